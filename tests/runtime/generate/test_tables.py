"""Conditions of a plan: sample i has row i of a table, and another table is another plan."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from runtime import Bundle, RequestError, Sampler
from runtime.generate.plan import Plan, Series
from runtime.generate.run import generate
from runtime.generate.settings import Settings

ROWS = {"low_res": 3, "text": 2, "style": 4}
N = 5


@pytest.fixture(scope="module")
def bundle(second_format: Path) -> Bundle:
    return Bundle.load(second_format / "bundle")


@pytest.fixture
def plan(bundle: Bundle, tmp_path: Path) -> Path:
    """A plan with a table of each condition alongside."""
    drawn = bundle.draw_conditions(max(ROWS.values()))
    for name, rows in ROWS.items():
        np.save(tmp_path / f"{name}.npy", drawn[name][:rows])
    value = {
        "seed": 3,
        "labels": [2, None],
        "steps": 3,
        "guidance": 2.0,
        "conditions": {name: f"{name}.npy" for name in ROWS},
    }
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(value))
    return path


def settings_of(bundle: Bundle, plan: Path, out: Path) -> Settings:
    return Settings(bundle=bundle, plan=Plan.read(plan), out=out, n=N, shard=3, format="npy")


def test_sample_i_has_row_i_and_the_rows_repeat(bundle: Bundle, plan: Path, tmp_path: Path) -> None:
    generate(settings_of(bundle, plan, tmp_path / "out"))
    shards = sorted((tmp_path / "out" / "shards").iterdir())
    found = np.concatenate([np.load(path / "samples.npy") for path in shards])
    drawn = bundle.draw_conditions(max(ROWS.values()))
    conditions = {name: drawn[name][np.arange(N) % rows] for name, rows in ROWS.items()}
    labels = [2, None, 2, None, 2]
    expected = Sampler(bundle, threads=1).sample(
        N, 3, label=labels, steps=3, guidance=2.0, conditions=conditions
    )
    assert found.tobytes() == expected.tobytes()


def test_another_table_is_another_plan_and_another_place_is_not(
    bundle: Bundle, plan: Path, tmp_path: Path
) -> None:
    generate(settings_of(bundle, plan, tmp_path / "out"))
    place = tmp_path / "elsewhere"
    place.mkdir()
    for path in (plan, *tmp_path.glob("*.npy")):
        (place / path.name).write_bytes(path.read_bytes())
    assert generate(settings_of(bundle, place / "plan.json", tmp_path / "out")).kept == 2
    np.save(place / "style.npy", np.array([1, 1]))
    with pytest.raises(RequestError, match="samples with another plan"):
        generate(settings_of(bundle, place / "plan.json", tmp_path / "out"))


@pytest.mark.parametrize(
    ("conditions", "message"),
    [
        ({"low_res": "none.npy"}, "'low_res', .*none.npy, cannot be read"),
        ({"low_res": "plan.json"}, "cannot be read .* Write it with numpy.save"),
        ({"low_res": 3}, "`conditions` must be a JSON object of file names"),
        (["low_res"], "`conditions` must be a JSON object of file names"),
        ({"low": "low_res.npy"}, "Did you mean 'low_res'"),
        ({"low_res": "text.npy"}, "`low_res`|'low_res'"),
        ({"style": "empty.npy"}, "a row for each sample"),
        ({"style": "nothing.npy"}, "cannot be read"),
        ({"style": "broken.npy"}, "cannot be read"),
    ],
)
def test_a_table_that_cannot_be_used_says_why(
    bundle: Bundle, plan: Path, conditions: object, message: str
) -> None:
    np.save(plan.with_name("empty.npy"), np.zeros(0, np.int64))
    plan.with_name("nothing.npy").touch()
    header = b"{'descr': (".ljust(117) + b"\n"
    plan.with_name("broken.npy").write_bytes(b"\x93NUMPY\x01\x00v\x00" + header)
    value = json.loads(plan.read_text())
    value["conditions"] = conditions
    if isinstance(conditions, dict) and "low" not in conditions:
        value["conditions"] = {**{name: f"{name}.npy" for name in ROWS}, **conditions}
    plan.write_text(json.dumps(value))
    with pytest.raises(RequestError, match=message):
        Series(bundle, Plan.read(plan), N)
