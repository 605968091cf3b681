"""Schedules: an independent implementation of their formulas, and the properties of every
schedule."""

import contextlib
import copy
import inspect
import pickle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from runtime import RequestError, Schedule, make_program, make_schedule
from runtime.diffusion.schedule import SCHEDULES, log_snr_of
from runtime.files import from_json, to_json

NAMED = [name for name in SCHEDULES if name != "from_betas"]
EVERY = [
    *((name, {}) for name in NAMED),
    ("linear", {"T": 100}),
    ("cosine", {"T": 10}),
    ("edm", {"T": 18, "sigma_max": 10.0}),
    ("from_betas", {"betas": [0.1, 0.2, 0.9]}),
    ("from_betas", {"betas": [0.5, 1.0]}),
]


def alpha_bar(betas: np.ndarray) -> np.ndarray:
    """Π (1 - β_s) in extended precision."""
    return np.cumprod(1 - betas.astype(np.longdouble))


@pytest.mark.parametrize(
    ("name", "betas"),
    [
        ("linear", np.linspace(1e-4, 0.02, 1000)),
        ("linear_raw", np.linspace(1e-4, 0.02, 1000)),
        ("scaled_linear", np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2),
        (
            "cosine",
            np.array(
                [
                    min(
                        0.999,
                        1
                        - np.cos((i + 1 + 8) / 1008 * np.pi / 2) ** 2
                        / np.cos((i + 8) / 1008 * np.pi / 2) ** 2,
                    )
                    for i in range(1000)
                ]
            ),
        ),
    ],
)
def test_alpha_and_sigma_are_the_products_of_the_papers_betas(name: str, betas: np.ndarray) -> None:
    schedule = make_schedule(name)
    # The betas themselves carry a rounding each; the first sigmas keep their digits.
    np.testing.assert_allclose(schedule.alpha**2, alpha_bar(betas).astype(float), rtol=1e-10)
    np.testing.assert_allclose(schedule.sigma**2, (1 - alpha_bar(betas)).astype(float), rtol=1e-10)
    np.testing.assert_allclose(schedule.beta, betas, rtol=1e-9)
    np.testing.assert_array_equal(schedule.time, np.arange(1000))


def test_linear_keeps_its_end_for_any_number_of_knots_and_is_refused_where_beta_reaches_1() -> None:
    np.testing.assert_allclose(
        make_schedule("linear", T=100).beta[[0, -1]], [1e-3, 0.2], rtol=1e-12
    )
    np.testing.assert_allclose(
        make_schedule("linear_raw", T=100).beta[[0, -1]], [1e-4, 0.02], rtol=1e-9
    )
    with pytest.raises(RequestError, match=r"T=20 rescales beta to 1.*linear_raw"):
        make_schedule("linear", T=20)
    assert len(make_schedule("linear", T=21)) == 21


def test_flow_sigmoid_and_edm_are_their_formulas() -> None:
    flow, edm, sigmoid = (
        make_schedule("flow", T=4),
        make_schedule("edm", T=5),
        make_schedule("sigmoid", T=8),
    )
    np.testing.assert_allclose(flow.sigma, [0.25, 0.5, 0.75, 1.0])
    np.testing.assert_allclose(flow.alpha, [0.75, 0.5, 0.25, 0.0])
    np.testing.assert_allclose(flow.time, [250, 500, 750, 1000])
    ramp = (0.002 ** (1 / 7) + np.arange(5) / 4 * (80 ** (1 / 7) - 0.002 ** (1 / 7))) ** 7
    np.testing.assert_allclose(edm.sigma, ramp, rtol=1e-12)
    np.testing.assert_allclose(edm.time, np.log(ramp) / 4, rtol=1e-12)
    S = lambda v: 1 / (1 + np.exp(-v))  # noqa: E731
    t = np.arange(1, 9) / 8
    np.testing.assert_allclose(
        sigmoid.alpha**2, np.maximum((S(3) - S(6 * t - 3)) / (S(3) - S(-3)), 1e-9), rtol=1e-9
    )


@pytest.mark.parametrize(("name", "parameters"), EVERY)
def test_what_every_schedule_is(name: str, parameters: dict) -> None:
    s = make_schedule(name, **parameters)
    assert (np.diff(s.alpha) <= 0).all()
    assert (np.diff(s.sigma) >= 0).all()
    assert (np.diff(s.log_snr) < 0).all()
    assert np.isfinite(s.log_snr[:-1]).all()
    assert s.variance_preserving == (name not in ("flow", "edm"))
    if s.variance_preserving:
        np.testing.assert_allclose(s.alpha**2 + s.sigma**2, 1, atol=1e-12)
    with pytest.raises(ValueError, match="read-only"):
        s.alpha[0] = 0


@pytest.mark.parametrize("zero", [False, True])
@pytest.mark.parametrize(("name", "parameters"), EVERY)
def test_level_and_time_at_are_inverse_and_exact_at_the_knots(
    name: str, parameters: dict, zero: bool
) -> None:
    s = make_schedule(name, **parameters)
    s = s.zero_terminal_snr() if zero and s.variance_preserving else s
    alpha, sigma = s.level(s.time)
    np.testing.assert_allclose(alpha, s.alpha, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(sigma, s.sigma, rtol=1e-9)
    between = np.linspace(s.time[0], s.time[-1], 41)[:-1]
    found = s.time_at(log_snr_of(*s.level(between)))
    # If the schedule is nearly flat, a rounding of log-SNR moves the time by more.
    np.testing.assert_allclose(found, between, atol=1e-6 * (s.time[-1] - s.time[0] + 1e-9))


def test_between_knots_log_snr_is_linear_in_time() -> None:
    s = make_schedule("cosine")
    middle = log_snr_of(*s.level([10.5, 500.25]))
    np.testing.assert_allclose(
        middle,
        [(s.log_snr[10] + s.log_snr[11]) / 2, 0.75 * s.log_snr[500] + 0.25 * s.log_snr[501]],
        rtol=1e-9,
    )


def test_between_knots_a_continuous_schedule_is_its_formula() -> None:
    """Log-SNR interpolated between these few knots would be another level, by 1 % and more."""
    np.testing.assert_allclose(make_schedule("flow", T=4).level(300), (0.7, 0.3), rtol=1e-15)
    np.testing.assert_allclose(make_schedule("edm", T=5).level(np.log(3) / 4), (1, 3), rtol=1e-15)
    S = lambda v: 1 / (1 + np.exp(-v))  # noqa: E731
    alpha_bar = (S(3) - S(6 * 3.5 / 8 - 3)) / (S(3) - S(-3))  # at index 2.5, t = (2.5 + 1)/8
    found = make_schedule("sigmoid", T=8).level(2.5)
    np.testing.assert_allclose(found, (alpha_bar**0.5, (1 - alpha_bar) ** 0.5), rtol=1e-14)


def test_outside_the_knots_there_is_no_level() -> None:
    s = make_schedule("cosine")
    for time in (-0.5, 999.5, np.nan):
        with pytest.raises(RequestError, match="outside the schedule"):
            s.level(time)
    with pytest.raises(RequestError, match="outside the schedule"):
        s.time_at(100.0)


def test_zero_terminal_snr_ends_in_pure_noise_and_starts_where_it_did() -> None:
    s = make_schedule("scaled_linear")
    z = s.zero_terminal_snr()
    assert z.alpha[-1] == 0
    assert z.sigma[-1] == 1
    np.testing.assert_allclose(z.alpha[0], s.alpha[0], rtol=1e-15)
    assert z.sigma[0] == s.sigma[0]  # √(1 - alpha²) would lose its digits
    # Lin et al. 2024, Algorithm 1, on √ᾱ.
    root = s.alpha - s.alpha[-1]
    np.testing.assert_allclose(z.alpha, root * s.alpha[0] / root[0], rtol=1e-12)
    for name in ("flow", "edm"):
        with pytest.raises(RequestError, match="variance-preserving schedules only"):
            make_schedule(name).zero_terminal_snr()


@pytest.mark.parametrize(("name", "parameters"), EVERY)
def test_json_gives_the_same_schedule_to_the_bit(name: str, parameters: dict) -> None:
    s = make_schedule(name, **parameters)
    for schedule in (s, s.zero_terminal_snr()) if s.variance_preserving else (s,):
        found = Schedule.from_json(from_json(to_json(schedule.to_json())))
        for array in ("alpha", "sigma", "time"):
            np.testing.assert_array_equal(getattr(found, array), getattr(schedule, array))
        middle = (schedule.time[0] + schedule.time[-1]) / 2
        np.testing.assert_array_equal(found.level(middle), schedule.level(middle))


@pytest.mark.parametrize("array", ["alpha", "sigma", "time"])
@pytest.mark.parametrize("name", ["flow", "edm"])
def test_numbers_that_are_not_what_the_name_says_are_refused(name: str, array: str) -> None:
    """On schedules that need not preserve variance, so that no other check finds the wrong number.
    edm's alphas move together, so that it stays a schedule."""
    value = make_schedule(name, T=9).to_json()
    moved = range(9) if (name, array) == ("edm", "alpha") else [4]
    for i in moved:
        value[array][i] *= 1 + 1e-6
    with pytest.raises(
        RequestError, match=f"the stored {array} is not what its name and parameters give"
    ):
        Schedule.from_json(value)


@pytest.mark.parametrize(
    ("alpha", "sigma", "time"),
    [
        ([0.9, np.nan], [0.1, 0.9], [0, 1]),
        ([0.9, 0.8], [0.1, np.inf], [0, 1]),
        ([0.9, 0.8], [0.1], [0, 1]),
        ([], [], []),
        ([0.8, 0.9], [0.6, 0.7], [0, 1]),
        ([0.9, 0.8], [0.5, 0.4], [0, 1]),
        ([0.9, 0.9], [0.5, 0.5], [0, 1]),
        ([0.9, 0.8], [0.5, 0.6], [1, 1]),
        ([0.0, 0.0], [0.5, 0.6], [0, 1]),
        ([1.0, 0.8], [0.0, 0.6], [0, 1]),
    ],
)
def test_numbers_that_are_no_schedule_are_refused(alpha: list, sigma: list, time: list) -> None:
    with pytest.raises(RequestError, match="flow"):
        Schedule("flow", alpha, sigma, time)


def test_a_schedule_that_claims_to_preserve_variance_must() -> None:
    with pytest.raises(RequestError, match="must be 1"):
        Schedule("mine", [0.9, 0.8], [0.5, 0.6], [0, 1])


def test_unknown_names_and_parameters_are_refused_with_the_nearest() -> None:
    with pytest.raises(RequestError, match=r"unknown schedule 'cosin'. Did you mean 'cosine'"):
        make_schedule("cosin")
    with pytest.raises(RequestError, match="Did you mean 'beta_end'"):
        make_schedule("linear", beta_and=0.1)
    with pytest.raises(RequestError, match="`T` must be 1 to 1000000, got 0"):
        make_schedule("cosine", T=0)


VALUES = st.one_of(
    st.floats(),
    st.integers(-5, 40),
    st.none(),
    st.text(max_size=3),
    st.booleans(),
    st.lists(st.floats(), max_size=3),
)


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_any_parameters_give_a_schedule_or_a_request_error(data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(sorted(SCHEDULES)))
    known = list(inspect.signature(SCHEDULES[name]).parameters)
    parameters = data.draw(st.dictionaries(st.sampled_from(known), VALUES, max_size=3))
    if name != "from_betas":
        parameters.setdefault("T", 30)
    with contextlib.suppress(RequestError):
        assert isinstance(make_schedule(name, **parameters), Schedule)


def test_a_schedule_of_one_knot_of_pure_noise() -> None:
    found = make_schedule("from_betas", betas=[1.0])
    assert [part.tolist() for part in found.level(np.array([0.0]))] == [[0.0], [1.0]]
    assert len(make_program(found, "x0", "ddim", 1, clip=None)) == 1
    with pytest.raises(RequestError, match="needs two knots"):
        make_schedule("cosine", T=1).zero_terminal_snr()


@pytest.mark.parametrize("name", ["flow", "sigmoid", "edm", "cosine"])
def test_stored_parameters_may_lack_the_formulas_defaults(name: str) -> None:
    """Between the knots too, where flow and sigmoid compute with them."""
    made = make_schedule(name)
    value = made.to_json()
    value["parameters"] = {"T": 1000, "zero_terminal_snr": False}
    found = Schedule.from_json(value)
    assert found.to_json() == made.to_json()
    middle = float(made.time[500:502].mean())
    np.testing.assert_array_equal(found.level(middle), made.level(middle))
    value["parameters"]["zero_terminal_snr"] = "no"
    with pytest.raises(RequestError, match="`zero_terminal_snr` must be True or False"):
        Schedule.from_json(value)


def test_a_schedule_by_hand_needs_its_formulas_parameters_between_the_knots() -> None:
    with pytest.raises(RequestError, match=r"parameters are not those of its formula.*make_sched"):
        Schedule("flow", [0.9, 0.5], [0.1, 0.9], [0, 1]).level(0.5)


@pytest.mark.parametrize("sigma_data", [0, -1.0, 1e-300])
def test_data_without_a_deviation_are_refused(sigma_data: float) -> None:
    """The network of the prediction edm would have no weight in D."""
    with pytest.raises(RequestError, match="`sigma_data` must be a number from 1e-06"):
        make_schedule("edm", sigma_data=sigma_data)


def test_a_schedule_can_be_pickled_and_copied() -> None:
    made = make_schedule("cosine").zero_terminal_snr()
    for found in (pickle.loads(pickle.dumps(made)), copy.deepcopy(made)):
        assert found.to_json() == made.to_json()
        assert not found.alpha.flags.writeable
