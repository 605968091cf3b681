"""runtime.bundle.conditions: what a bundle says of its conditions, and format 2."""

import copy
import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from runtime import Bundle, BundleError, Condition, RequestError, Sampler
from runtime.bundle.conditions import MAX_CONDITIONS
from runtime.bundle.manifest import read_manifest

LOW_RES = Condition("low_res", (3, 4, 4), range=(-1, 1), meaning="half the size", null=0)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"name": "x"}, "`name` must be .* not x or time"),
        ({"name": "1st"}, "first a letter"),
        ({"name": "a" * 64}, "up to 63"),
        ({"name": 3}, "`name` must be a string"),
        ({"name": "a", "shape": (0,)}, "a: shape` must be 1 to 65536"),
        ({"name": "a", "shape": (1, 1, 1, 1, 1)}, "at most 4 axes"),
        ({"name": "a", "shape": (65536, 65536)}, "268435456 values"),
        ({"name": "a", "shape": 3}, "0 to 4 integers"),
        ({"name": "a", "dtype": "float16"}, "Known: float32, int64"),
        ({"name": "a", "range": (1, 1)}, "two rising numbers"),
        ({"name": "a", "range": (0, np.inf)}, "a: range` must be a number"),
        ({"name": "a", "dtype": "int64"}, "because dtype is int64"),
        ({"name": "a", "dtype": "int64", "range": (0, 1.5)}, "must be an integer"),
        ({"name": "a", "null": "zero"}, 'number, "learned" or None'),
        ({"name": "a", "null": True}, "a: null` must be"),
        ({"name": "a", "meaning": None}, "meaning` must be a string"),
    ],
)
def test_a_field_that_cannot_be_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        Condition(**fields)


def test_a_condition_goes_to_json_and_back() -> None:
    style = Condition("style", (), "int64", (0, 4), null=5)
    for condition in (LOW_RES, style, Condition("text", (77, 8), null="learned")):
        assert Condition.from_json(json.loads(json.dumps(condition.to_json()))) == condition
    assert LOW_RES.is_image
    assert not Condition("field", (3, 4, 4)).is_image
    assert (LOW_RES.port, style.port) == ("condition_low_res", "condition_style")
    assert str(style) == "style: one integer in 0 … 4"


def test_only_a_bundle_with_conditions_has_format_2(shipped: Bundle, second_format: Path) -> None:
    plain = shipped.to_json()
    assert plain["format"] == 1
    assert "conditions" not in plain
    bundle = Bundle.load(second_format / "bundle")
    assert bundle.to_json()["format"] == 2
    assert [c.name for c in bundle.conditions] == ["low_res", "text", "style"]
    # Format 1 has no such field, and a reader ignores fields that it does not know.
    spec = read_manifest(Path("bundle.json"), {**plain, "conditions": "?"}).spec
    assert spec.conditions == ()


Change = Callable[[dict[str, Any]], object]


def _twice(value: dict[str, Any]) -> None:
    value["conditions"].append(copy.deepcopy(value["conditions"][0]))


def _many(value: dict[str, Any]) -> None:
    entry = {**value["conditions"][0], "null": None}
    value["conditions"] = [{**entry, "name": f"c{i}"} for i in range(MAX_CONDITIONS + 1)]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda v: v.pop("conditions"), "'conditions' is missing"),
        (lambda v: v.update(conditions={}), "'conditions' is {}"),
        (lambda v: v["conditions"].append(1), "a condition` must be an object"),
        (lambda v: v["conditions"][0].pop("null"), "lacks null"),
        (lambda v: v["conditions"][0].update(name="label"), "different names expected"),
        (_twice, "different names expected"),
        (_many, "17 conditions, at most 16"),
        (lambda v: v["conditions"][1].update(shape=[3, 5]), "no file 'nulls/text.bin' of 60 bytes"),
        (lambda v: v["conditions"][0].update(null="learned"), "no file 'nulls/low_res.bin'"),
        (lambda v: v.update(format=3), "newer than 2"),
        (lambda v: v.update(format=True), "1 or 2 expected"),
    ],
)
def test_a_fault_is_named(second_format: Path, change: Change, message: str) -> None:
    value = json.loads((second_format / "bundle" / "bundle.json").read_text())
    change(value)
    with pytest.raises(BundleError, match=message):
        read_manifest(Path("bundle.json"), value)


def test_a_learned_null_value_is_read_and_checked(second_format: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(second_format / "bundle", tmp_path / "copy"))
    text = Bundle.load(folder).conditions[1]
    expected = np.linspace(-1, 1, 12, dtype=np.float32).reshape(3, 4)
    np.testing.assert_array_equal(Bundle.load(folder).null_of(text), expected)

    nans = np.full(12, np.nan, "<f4").tobytes()
    (folder / "nulls" / "text.bin").write_bytes(nans)
    with pytest.raises(BundleError, match="changed or damaged"):
        Bundle.load(folder).null_of(text)
    value = json.loads((folder / "bundle.json").read_text())
    value["files"]["nulls/text.bin"]["sha256"] = hashlib.sha256(nans).hexdigest()
    (folder / "bundle.json").write_text(json.dumps(value))
    with pytest.raises(BundleError, match="holds NaN"):
        Bundle.load(folder).null_of(text)


def test_drawn_conditions_depend_on_their_number_alone(second_format: Path) -> None:
    bundle = Bundle.load(second_format / "bundle")
    many = bundle.draw_conditions(5, first=2)
    for name, values in bundle.draw_conditions(2, first=4).items():
        np.testing.assert_array_equal(values, many[name][2:4])
    assert (many["low_res"].dtype, many["style"].dtype) == (np.float32, np.int64)
    assert np.abs(many["low_res"]).max() <= 1
    assert set(many["style"].tolist()) <= set(range(5))


@pytest.mark.parametrize("solver", ["ddim", "ddpm"])
def test_the_first_bundle_of_format_2_gives_the_samples_that_it_gave(
    second_format: Path, solver: str
) -> None:
    sampler = Sampler.load(second_format / "bundle", backend="onnxruntime")
    with np.load(second_format / "samples.npz") as stored:
        samples = sampler.sample(
            4,
            seed=7,
            label=[0, 1, 2, None],
            conditions={c.name: stored[c.name] for c in sampler.bundle.conditions},
            guidance=2.0,
            steps=8,
            solver=solver,
        )
        # The tolerance is that of the first release's bundle.
        np.testing.assert_allclose(samples, stored[solver], rtol=0, atol=1e-4)
