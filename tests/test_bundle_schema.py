"""docs/bundle.schema.json accepts what is shipped, and rejects what the reader rejects."""

import copy
import functools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from runtime.bundle.manifest import read_manifest
from runtime.diffusion.schedule import make_schedule
from runtime.errors import BundleError

from .root import ROOT

OTHER_TYPES: tuple[Any, ...] = (None, True, 1, 1.5, "x", [], {})
WRONG_VALUES: tuple[tuple[tuple[str | int, ...], Any], ...] = (
    (("format",), 3),
    (("format",), 2),  # without conditions
    (("prediction",), "noise"),
    (("clip",), 0),
    (("clip",), -1.0),
    (("sample", "shape"), []),
    (("sample", "shape"), [3, 0]),
    (("sample", "shape"), [1, 1, 1, 1, 1]),
    (("sample", "shape"), [65537]),
    (("sample", "range"), [0.0]),
    (("labels", "names"), []),
    (("labels", "names"), ["a", "a"]),
    (("defaults", "steps"), 0),
    (("defaults", "steps"), 1_000_001),
    (("defaults", "guidance"), 10**400),
    (("tuned", "2", "weights"), [[0.0], [0.0]]),
    (("tuned", "2", "weights", 1), [2000.0, 0.0, 0.0]),
    (("tuned",), {"0": {"time": [9.0], "weights": [[0.0] * 3], "made": {}}}),
    (("report", "fp32", "onnxruntime", "missed"), 1),
    (("report", "fp32", "onnxruntime", "missed"), {}),
    (("report", "fp32", "onnxruntime", "answer"), {"1": 0.5}),
    (("report", "fp32", "onnxruntime", "ms_a_call"), 0.5),
    (("schedule", "parameters", "zero_terminal_snr"), 1),
    (("files",), {"../step.onnx": {"sha256": "0" * 64, "size": 1}}),
    (("files", "fp32/step.onnx", "sha256"), "0" * 63),
    (("files", "fp32/step.onnx", "size"), -1),
    (("files", "fp32/step.onnx", "size"), 2**40),
    (("schedule", "name"), "quadratic"),
    (("schedule", "alpha"), []),
    (("schedule", "sigma", 0), 0.0),
)


@pytest.fixture(scope="module")
def schema() -> jsonschema.Draft202012Validator:
    value = json.loads((ROOT / "docs" / "bundle.schema.json").read_text(encoding="utf-8"))
    jsonschema.Draft202012Validator.check_schema(value)
    return jsonschema.Draft202012Validator(value)


def _shipped() -> dict[str, Any]:
    return json.loads((ROOT / "bundles" / "emoji32" / "bundle.json").read_text(encoding="utf-8"))


@functools.cache
def _conditioned() -> dict[str, Any]:
    """The small manifest with conditions, which makes it format 2."""
    names = ("shape", "dtype", "range", "meaning", "null")
    entries = {
        "low_res": ([3, 8, 8], "float32", [-1.0, 1.0], "", 0.0),
        "text": ([7], "float32", None, "an embedding", None),
        "style": ([], "int64", [0, 4], "", 5),
    }
    conditions = [
        {"name": name, **dict(zip(names, values, strict=True))} for name, values in entries.items()
    ]
    return {**_small(), "format": 2, "conditions": conditions}


@functools.cache
def _small() -> dict[str, Any]:
    """The shipped manifest with a schedule of ten knots, so that every field is tried quickly."""
    value = _shipped()
    files = value["files"]
    return {
        **value,
        "labels": {"names": ["cat", "dog"], "null_trained": True},
        "schedule": make_schedule("linear_raw", T=10).to_json(),
        "tuned": {"2": {"time": [9.0, 4.0], "weights": [[0.0] * 3, [0.5, 0.0, 0.0]], "made": {}}},
        "report": {"fp32": {"onnxruntime": value["report"]["fp32"]["onnxruntime"]}},
        "provenance": {},
        "files": {name: files[name] for name in ("README.md", "fp32/step.onnx")},
    }


def _places(value: Any, path: tuple[str | int, ...] = ()) -> Iterator[tuple[str | int, ...]]:
    """Every field, and the first entry of every list."""
    if path:
        yield path
    entries = value.items() if isinstance(value, dict) else enumerate(value[:1])
    for key, entry in entries:
        if isinstance(entry, (dict, list)):
            yield from _places(entry, (*path, key))
        else:
            yield (*path, key)


def _changed(
    path: tuple[str | int, ...], *new: Any, of: dict[str, Any] | None = None
) -> dict[str, Any]:
    """A manifest, by default the small one, with a field replaced, or removed."""
    value = copy.deepcopy(of or _small())
    inner: Any = value
    for key in path[:-1]:
        inner = inner[key]
    if new:
        inner[path[-1]] = new[0]
    else:
        del inner[path[-1]]
    return value


def _is_read(value: dict[str, Any]) -> bool:
    try:
        read_manifest(Path("bundle.json"), value)
    except BundleError:
        return False
    return True


def test_the_shipped_manifest_is_valid(schema: jsonschema.Draft202012Validator) -> None:
    schema.validate(_shipped())
    schema.validate(_small())
    assert _is_read(_small())


@pytest.mark.parametrize("path", list(_places(_small())), ids=lambda path: ".".join(map(str, path)))
def test_a_field_of_another_type_is_refused_as_the_reader_refuses_it(
    path: tuple[str | int, ...], schema: jsonschema.Draft202012Validator
) -> None:
    accepted = []
    for other in OTHER_TYPES:
        value = _changed(path, other)
        if schema.is_valid(value) and not _is_read(value):
            accepted.append(other)
    # Replacing a number by another breaks rules between fields, which a schema cannot state.
    numbers = [value for value in accepted if type(value) in (int, float)]
    assert [value for value in accepted if value not in numbers] == []
    if not isinstance(path[-1], int):
        removed = _changed(path)
        assert not schema.is_valid(removed) or _is_read(removed)


@pytest.mark.parametrize("place", [0, 1, 2])
@pytest.mark.parametrize("field", ["name", "shape", "dtype", "range", "meaning", "null"])
def test_a_field_of_a_condition_is_refused_as_the_reader_refuses_it(
    place: int, field: str, schema: jsonschema.Draft202012Validator
) -> None:
    schema.validate(_conditioned())
    assert _is_read(_conditioned())
    path = ("conditions", place, field)
    for other in (*OTHER_TYPES, "learned", [0], [1, 0], [0, 1, 2], [1.5, 2], "x" * 64, "time"):
        value = _changed(path, other, of=_conditioned())
        # A learned null value needs a file, and a range must rise: rules between fields.
        if schema.is_valid(value) and other not in ("learned", [1, 0]):
            assert _is_read(value), other
        if _is_read(value):
            assert schema.is_valid(value), other
    removed = _changed(path, of=_conditioned())
    assert not schema.is_valid(removed)
    assert not _is_read(removed)


@pytest.mark.parametrize(("path", "new"), WRONG_VALUES)
def test_a_value_out_of_range_is_refused_by_both(
    path: tuple[str | int, ...], new: Any, schema: jsonschema.Draft202012Validator
) -> None:
    value = _changed(path, new)
    assert not _is_read(value)
    assert not schema.is_valid(value)


def test_unknown_fields_are_ignored_by_both(schema: jsonschema.Draft202012Validator) -> None:
    value = {**_small(), "later": 1}
    schema.validate(value)
    assert _is_read(value)
