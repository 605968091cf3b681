"""The cache of engines never returns an engine that is incomplete, owned by another user, or built
from another recipe."""

import dataclasses
import hashlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from runtime.backends.nvidia import engine_cache as engines
from runtime.backends.nvidia.engine_cache import Entry, Gpu, Recipe
from runtime.errors import EngineError

L4 = Gpu("L4", "8.9", "CUDA 13.0, 580.95")
RECIPE = Recipe(
    "emoji", "fp16", "step.onnx", "ab" * 32, "tensorrt", "11.4.0", L4, (1, 2, 4), ("-TF32",)
)


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("UNNOISE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "engines"


def test_what_is_stored_is_found_and_loaded(place: Path) -> None:
    assert engines.lookup(RECIPE) is None
    assert list(engines.entries()) == []
    entry = engines.store(RECIPE, b"engine")
    assert engines.lookup(RECIPE) == entry
    assert engines.load(entry) == b"engine"
    assert entry.sha256 == hashlib.sha256(b"engine").hexdigest()
    assert [key for key, _ in engines.entries()] == [RECIPE.key]
    record = json.loads((place / f"{RECIPE.key}.json").read_text())
    assert record["recipe"]["gpu"] == {
        "name": "L4",
        "compute_capability": "8.9",
        "driver": "CUDA 13.0, 580.95",
    }
    assert record["recipe"]["buckets"] == [1, 2, 4]


def test_every_part_of_a_recipe_but_the_bundles_name_makes_another_entry() -> None:
    other = {
        "precision": "fp32", "graph": "step_guided.onnx", "onnx": "cd" * 32, "library": "tensorrt_rtx", "version": "11.4.1",
        "gpu": L4._replace(driver="CUDA 13.1"), "buckets": (1, 2), "flags": (),
    }  # fmt: skip
    assert other.keys() | {"bundle"} == {f.name for f in dataclasses.fields(Recipe)}
    keys = {
        RECIPE.key,
        *(dataclasses.replace(RECIPE, **{name: value}).key for name, value in other.items()),
    }
    keys |= {dataclasses.replace(RECIPE, gpu=L4._replace(**{f: "x"})).key for f in Gpu._fields}
    assert len(keys) == 1 + len(other) + len(Gpu._fields)
    assert dataclasses.replace(RECIPE, bundle="renamed").key == RECIPE.key
    engines.store(RECIPE, b"engine")
    assert isinstance(engines.lookup(dataclasses.replace(RECIPE, bundle="renamed")), Entry)


def test_a_changed_engine_is_an_error_and_a_changed_record_is_told(place: Path) -> None:
    entry = engines.store(RECIPE, b"engine")
    path, record = place / f"{entry.sha256}.engine", place / f"{RECIPE.key}.json"
    for data in (b"engine ", b"engin", b"engines"[1:], b""):
        path.write_bytes(data)
        with pytest.raises(EngineError, match="is not what was built"):
            engines.load(entry)
    path.unlink()
    with pytest.raises(EngineError, match="cannot be read"):
        engines.load(entry)
    whole = record.read_text()
    changes = {
        "": "cannot be "
        "read", "[]": "cannot be read", whole.replace('"format": 1', '"format": 9'): "of format 9",
        whole.replace("8.9", "8.6"): "of another "
        "engine", whole.replace(entry.sha256, "../../secret"): "no sha256",
        whole.replace("step.onnx", "step_guided.onnx"): "of another "
        "engine", whole.replace('"size": 6', '"size": "x"'): "cannot be read",
    }  # fmt: skip
    for text, said in changes.items():
        record.write_text(text)
        assert said in str(engines.lookup(RECIPE)), text
        assert [said in str(found) for _, found in engines.entries()] == [True]


def test_a_new_engine_takes_the_old_ones_place_and_what_nobody_names_goes_in_time(
    place: Path,
) -> None:
    engines.store(RECIPE, b"old")
    other = dataclasses.replace(RECIPE, graph="step_guided.onnx")
    engines.store(other, b"same")
    engines.store(RECIPE, b"same")
    engines.store(RECIPE, b"new")
    names = {hashlib.sha256(data).hexdigest() for data in (b"same", b"new")}
    assert {p.stem for p in place.glob("*.engine")} == names
    for name, age in (
        ("lost.engine", 2 * engines._ABANDONED),
        (".half", 2 * engines._ABANDONED),
        (".fresh", 0.0),
    ):
        (place / name).touch()
        os.utime(place / name, (0, time.time() - age))
    engines.store(RECIPE, b"new")
    assert {p.name for p in place.iterdir() if p.suffix != ".json"} == {
        *(f"{n}.engine" for n in names),
        ".fresh",
    }
    assert engines.clear([other.key]) == 1
    assert engines.clear() == 1
    assert not list(place.iterdir())


@pytest.mark.skipif(os.name != "posix", reason="modes are POSIX's")
@pytest.mark.parametrize("shared", ["", "engines"])
def test_a_folder_that_others_may_write_to_is_not_used(place: Path, shared: str) -> None:
    engines.store(RECIPE, b"engine")
    (place.parent / shared).chmod(0o777)
    assert engines.lookup(RECIPE) is None
    assert list(engines.entries()) == []
    for use in (engines.place, lambda: engines.store(RECIPE, b"engine")):
        with pytest.raises(EngineError, match="may be written to by others"):
            use()


def test_without_a_cache_there_are_no_engines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UNNOISE_CACHE", "off")
    assert list(engines.entries()) == []
    assert engines.clear() == 0
    with pytest.raises(EngineError, match="turned off"):
        engines.store(RECIPE, b"engine")


def test_several_processes_store_and_load_at_once(root: Path, place: Path) -> None:
    """Processes store different bytes under one recipe. What is loaded is always complete, and in
    the end one engine is left."""
    code = (
        "import sys; from runtime.backends.nvidia import engine_cache as engines\n"
        "from runtime.backends.nvidia.engine_cache import Gpu, Recipe\n"
        f"recipe = {RECIPE!r}\n"
        "for i in range(40):\n"
        "    engines.store(recipe, (sys.argv[1] * 50_000 + str(i)).encode())\n"
        "    found = engines.lookup(recipe)\n"
        "    assert len(set(engines.load(found)[:50_000])) == 1, found"
    )
    running = [
        subprocess.Popen([sys.executable, "-c", code, letter], cwd=root) for letter in "wxyz"
    ]
    assert [process.wait() for process in running] == [0] * 4
    found = engines.lookup(RECIPE)
    assert isinstance(found, Entry)
    assert engines.load(found)
