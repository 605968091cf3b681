"""runtime.engine.request: one owner of defaults, JSON and back, and names that are misspelled."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from runtime import Bundle, Request, RequestError, Sampler, SamplingOptions, resolve
from runtime.engine.request import Planner

IMAGE = np.linspace(-1, 1, 64, dtype=np.float32).reshape(1, 8, 8)
REQUESTS = [
    Request(0),
    Request(5, label=3, solver="dpmpp_2m", steps=4, grid="log_snr", guidance=2.0),
    Request(2**62, label="7", grid=(999.0, 500.0), guidance_interval=(0.2, 3.0)),
    Request(1, solver="ddim", steps=3, options={"eta": 0.5}),
    Request(2, label=1, picture=IMAGE, strength=0.5, steps=4),
    Request(3, label=1, start=IMAGE, up=True, steps=4, solver="ddim", guidance=1.0),
    Request(4, label=1, known=IMAGE, mask=np.abs(IMAGE), steps=3),
]


@pytest.mark.parametrize("request_", REQUESTS, ids=repr)
def test_a_request_goes_to_json_and_back_and_gives_the_same_bytes(
    sampler: Sampler, request_: Request
) -> None:
    text = json.dumps(request_.to_json(), allow_nan=False)
    again = Request.from_json(json.loads(text))
    assert json.dumps(again.to_json()) == text
    same = (
        sampler.sample_requests([again]).tobytes() == sampler.sample_requests([request_]).tobytes()
    )
    assert same


def test_a_grid_in_an_array_goes_to_json() -> None:
    request = Request(0, grid=np.array([900.0, 500.0, 10.0]))  # type: ignore[arg-type]
    assert request.to_json() == {"seed": 0, "grid": [900.0, 500.0, 10.0]}


def test_numpy_values_go_to_json() -> None:
    request = Request(np.int64(3), guidance=np.float32(1.5), steps=np.array(4), grid="karras")  # type: ignore[arg-type]
    assert json.loads(json.dumps(request.to_json())) == {
        "seed": 3,
        "guidance": 1.5,
        "steps": 4,
        "grid": "karras",
    }


def test_numpy_values_resolve_to_pythons_and_share_a_program(sampler: Sampler) -> None:
    plain = {"steps": 3, "guidance": 2.0, "guidance_interval": (0.5, 3.0), "options": {"eta": 0.5}}
    numpy = {
        "steps": np.int64(3),
        "guidance": np.array(2.0),
        "guidance_interval": np.array([0.5, 3.0]),
        "options": {"eta": np.float64(0.5)},
    }
    bundle = sampler.bundle
    one = Request(0, label=1, solver="ddim", **plain)  # type: ignore[arg-type]
    two = Request(0, label=1, solver="ddim", **numpy)  # type: ignore[arg-type]
    assert json.dumps(resolve(bundle, two).to_json()) == json.dumps(resolve(bundle, one).to_json())
    planner = Planner(bundle)
    assert planner.job(two).table is planner.job(one).table
    # A list from JSON as well.
    assert planner.job(Request.from_json(one.to_json())).table is planner.job(one).table


def test_what_is_not_said_is_the_bundles(
    edited: Callable[[Callable[[dict], object]], Path],
) -> None:
    defaults = {
        "solver": "ddim",
        "steps": 7,
        "grid": "log_snr",
        "guidance": 1.7,
        "options": {"eta": 0.3},
    }
    bundle = Bundle.load(edited(lambda value: value.update(defaults=defaults)))
    found = resolve(bundle, Request(0, label=2)).to_json()
    assert {name: found[name] for name in defaults} == defaults
    assert (found["seed"], found["label"]) == (0, 2)
    assert json.loads(json.dumps(found)) == found


def test_an_option_of_the_default_solver_is_kept_unless_another_is_chosen(
    edited: Callable[[Callable[[dict], object]], Path],
) -> None:
    defaults = {
        "solver": "ddim",
        "steps": 7,
        "grid": "trailing",
        "guidance": 1.0,
        "options": {"eta": 0.3},
    }
    bundle = Bundle.load(edited(lambda value: value.update(defaults=defaults)))
    assert bundle.resolve(SamplingOptions()).options == {"eta": 0.3}
    assert bundle.resolve(SamplingOptions(options={"eta": 0.5})).options == {"eta": 0.5}
    assert bundle.resolve(SamplingOptions(solver="dpmpp_2m")).options == {}


def test_the_null_label_is_not_guided(sampler: Sampler) -> None:
    assert resolve(sampler.bundle, Request(0, guidance=3.0)).options.guidance == 1.0
    assert resolve(sampler.bundle, Request(0, label=1, guidance=3.0)).options.guidance == 3.0


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"seed": 1, "setps": 3}, "'setps'. Did you mean 'steps'"),
        ({"seed": 1, "gudance": 3}, "'gudance'. Did you mean 'guidance'"),
        ({"label": 2}, "needs `seed`"),
        ({"seed": 1, "start": 5}, "`start` must be an object"),
        ({"seed": 1, "mask": {"shape": [2], "float32": "AAAA"}}, "`mask` must be an object"),
        ([1], "must be a JSON object"),
        (None, "must be a JSON object"),
    ],
)
def test_json_that_is_no_request_is_refused_by_name(value: object, message: str) -> None:
    with pytest.raises(RequestError) as caught:
        Request.from_json(value)
    assert message in str(caught.value)


def test_a_misspelled_field_or_option_gets_the_nearest_name(sampler: Sampler) -> None:
    for ask, meant in (
        (lambda: Request(0, setps=3), "steps"),  # type: ignore[call-arg]
        (lambda: sampler.sample(1, labl=3), "label"),
        (lambda: sampler.sample(1, solver="ddim", etta=0.5), "eta"),
        (lambda: resolve(sampler.bundle, Request(0, solver="ddim", options={"step": 3})), "steps"),
    ):
        with pytest.raises(RequestError) as caught:
            ask()
        assert f"Did you mean '{meant}'?" in str(caught.value)


def test_a_request_shows_what_it_says() -> None:
    assert repr(Request(3, solver="ddim", start=IMAGE)) == (
        "Request(seed=3, solver='ddim', start=an array of float32 with shape (1, 8, 8))"
    )


def test_lists_and_numpy_numbers_go_to_json(sampler: Sampler) -> None:
    """Lists instead of arrays, and numpy's numbers inside of tuples."""
    numbers = (np.float32(0.25), np.float32(3))
    one = Request(2, label=1, picture=IMAGE, strength=0.5, steps=4, guidance_interval=(0.25, 3.0))
    two = Request(
        2,
        label=1,
        picture=IMAGE.tolist(),
        strength=0.5,
        steps=4,
        guidance_interval=numbers,  # type: ignore[arg-type]
    )
    assert json.dumps(two.to_json()) == json.dumps(one.to_json())
    vector = [np.float32(0.5), np.float32(1)]
    found = Request(0, conditions={"a": vector, "b": [IMAGE[0], IMAGE[0]], "c": None}).to_json()
    again = Request.from_json(json.loads(json.dumps(found)))
    assert again.conditions["a"] == [0.5, 1.0]
    assert again.conditions["b"].tobytes() == IMAGE[0].tobytes() * 2
    assert again.conditions["c"] is None
    with pytest.raises(RequestError, match="`start` must be an array of numbers, got 'x'"):
        Request(0, start="x").to_json()


def test_edm_lifts_the_start_of_a_request_to_its_first_level(tiny_bundle: Path) -> None:
    """It began at the grid's level, and the network was given another one."""
    options = {"solver": "edm", "steps": 8, "strength": 0.5, "guidance": 1.0}
    bundle = Bundle.load(tiny_bundle)
    planner = Planner(bundle)
    x = np.zeros(bundle.sample_shape, np.float32)
    found = [
        planner.job(Request(seed, start=x, options={"churn": 4.0}, **options)) for seed in range(99)
    ]
    plain = planner.job(Request(0, start=x, options={"churn": 0.0}, **options))
    assert plain.x is not None
    assert not plain.x.any()
    low, high = plain.table.level, found[0].table.level
    assert high[1] > low[1]
    # x is 0, so that all of it is the noise that lacks: sigma'² - (alpha'/alpha·sigma)².
    wanted = high[1] ** 2 - (high[0] / low[0] * low[1]) ** 2
    np.testing.assert_allclose(np.var([job.x for job in found]), wanted, rtol=0.05)
    np.testing.assert_array_equal(
        planner.job(Request(0, start=x + 1, options={"churn": 0.0}, **options)).x, x + 1
    )
