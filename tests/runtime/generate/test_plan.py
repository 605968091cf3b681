"""A plan: which label, seed and options sample i has."""

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from runtime import Bundle, RequestError
from runtime.diffusion.noise import MAX_SEED
from runtime.generate.plan import MAX_SHARES, Plan, Series, Share, turns

LABELS = 10


@pytest.fixture(scope="module")
def bundle(first_release: Path) -> Bundle:
    return Bundle.load(first_release / "bundle")


def test_sample_i_is_a_function_of_the_plan_and_i(bundle: Bundle) -> None:
    value = {
        "seed": 7,
        "labels": [3, {"label": "5", "share": 2}, None],
        "solver": "ddpm",
        "steps": 4,
        "guidance": 3.0,
        "guidance_interval": [0, 5],
        "options": {"variance": "fixed_large"},
    }
    plan = Plan.from_json(value)
    small = Series(bundle, plan, 8)
    large = Series(bundle, plan, 10**9)
    for i in range(8):
        request = small.request(i)
        assert request.to_json() == large.request(i).to_json()
        assert request.seed == 7 + i
        assert request.steps == 4
        assert request.options == {"variance": "fixed_large"}
    assert Counter(small.label(i) for i in range(8)) == {3: 2, 5: 4, None: 2}
    assert large.label(10**9 - 1) == large.label((10**9 - 1) % 4)


def test_the_json_of_a_plan_reads_back() -> None:
    value = {"seed": 3, "labels": [1, {"label": "a", "share": 4}, None], "grid": [9, 4, 1]}
    plan = Plan.from_json(value)
    assert plan.labels == (Share(1), Share("a", 4), Share(None))
    again = Plan.from_json(json.loads(json.dumps(plan.to_json())))
    assert again.to_json() == plan.to_json()
    assert again.labels == plan.labels
    assert Plan.from_json({"labels": "all"}).to_json() == {"seed": 0, "labels": "all"}


def test_all_labels_take_turns(bundle: Bundle) -> None:
    series = Series(bundle, Plan.from_json({"labels": "all"}), 25)
    assert [series.label(i) for i in range(20)] == [*range(LABELS), *range(LABELS)]
    assert len(series.resolved) == LABELS


def test_without_labels_samples_have_the_null_label(bundle: Bundle) -> None:
    series = Series(bundle, Plan(), 1)
    assert series.label(0) is None
    assert series.resolved[0].options.guidance == 1


@given(st.lists(st.integers(1, 50), min_size=1, max_size=12))
def test_shares_are_exact_and_spread_evenly(shares: list[int]) -> None:
    pattern = np.array(turns(shares))
    total = sum(shares)
    assert len(pattern) == total
    length = np.arange(1, total + 1)
    for entry, share in enumerate(shares):
        counts = np.cumsum(pattern == entry)
        assert counts[-1] == share
        # Each of the others is off its ideal count by less than one.
        assert (np.abs(counts - length * share / total) <= len(shares) / 2).all()


def test_a_tie_goes_to_the_first() -> None:
    assert turns([1, 1, 1]) == [0, 1, 2]
    assert turns([1, 2]) == [1, 0, 1]
    assert turns([2, 2]) == [0, 1, 0, 1]


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([], "`plan` must be a JSON object"),
        ({"label": 3}, "Did you mean 'labels'"),
        ({"labels": "every"}, '`labels` must be "all" or a list'),
        ({"labels": {"a": 3}}, '`labels` must be "all" or a list'),
        ({"labels": [True]}, "`label` must be a name, a number or null"),
        ({"labels": [{"share": 2, "name": 1}]}, "unknown option of a label's share: 'name'"),
        ({"labels": [{"label": 1, "share": 0}]}, "`share` must be 1 to 1000000"),
        ({"seed": -1}, "`seed` must be 0 to"),
        ({"seed": 0.5}, "`seed` must be an integer"),
        ({"options": [1]}, "`options` must be a JSON object"),
    ],
)
def test_a_plan_that_is_none_says_why(value: object, message: str) -> None:
    with pytest.raises(RequestError) as caught:
        Plan.from_json(value)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"solver": "dimm"}, "Did you mean 'ddim'"),
        ({"steps": 0}, "`steps` must be 1"),
        ({"labels": [0, 77]}, "out of range"),
        ({"labels": ["7", "fish"]}, "unknown label 'fish'"),
        ({"guidance": "x", "labels": [0]}, "`guidance` must be a number"),
        ({"seed": MAX_SEED}, "`seed` must be 0 to"),
        ({"labels": [{"label": 1, "share": MAX_SHARES}, 2]}, "must sum to at most"),
        ({"options": {"eto": 1}}, "Did you mean 'eta'"),
    ],
)
def test_the_bundle_checks_a_plan_before_anything_is_made(
    bundle: Bundle, value: object, message: str
) -> None:
    with pytest.raises(RequestError) as caught:
        Series(bundle, Plan.from_json(value), 100)
    assert message in str(caught.value)


def test_a_file_that_is_no_json_says_so(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    with pytest.raises(RequestError, match="cannot be read as JSON"):
        Plan.read(path)
    path.write_text('{"seed": NaN}')
    with pytest.raises(RequestError, match="cannot be read as JSON"):
        Plan.read(path)
    path.write_text('{"seed": 4}')
    assert Plan.read(path) == Plan.from_json({"seed": 4}) or Plan.read(path).seed == 4
