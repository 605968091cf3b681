"""Grids: their definitions, at the step counts for which common code is wrong."""

import numpy as np
import pytest

from runtime import RequestError, make_schedule
from runtime.diffusion.grid import GRIDS, Grid, make_grid

COSINE = make_schedule("cosine")


@pytest.mark.parametrize("steps", [1, 2, 3, 7, 50, 61, 103, 121, 999, 1000])
@pytest.mark.parametrize("name", GRIDS)
@pytest.mark.parametrize(
    "schedule",
    [COSINE, make_schedule("flow"), make_schedule("edm"), COSINE.zero_terminal_snr()],
    ids=lambda s: s.name,
)
def test_a_grid_has_its_number_of_falling_intervals_inside_the_schedule(
    name: str, steps: int, schedule
) -> None:
    """61, 103 and 121 are step counts at which a trailing grid made with a float range has one
    interval too many."""
    grid = make_grid(schedule, name, steps)
    assert len(grid) == steps
    assert grid.time.shape == grid.alpha.shape == grid.sigma.shape == (steps + 1,)
    assert (np.diff(grid.log_snr) > 0).all()
    assert (np.diff(grid.time[:-1]) < 0).all()
    assert schedule.time[0] <= grid.time[-2]
    assert grid.time[0] <= schedule.time[-1]
    assert np.isnan(grid.time[-1])
    assert (grid.alpha[-1], grid.sigma[-1]) == (1, 0)


def test_the_index_grids_are_their_definitions() -> None:
    times = {
        name: make_grid(COSINE, name, 4).time[:-1].tolist()
        for name in ("leading", "trailing", "linspace")
    }
    assert times == {
        "leading": [750, 500, 250, 0],
        "trailing": [999, 749, 499, 249],
        "linspace": [999, 666, 333, 0],
    }
    assert make_grid(COSINE, "trailing", 7).time[:-1].tolist() == [
        999,
        856,
        713,
        570,
        428,
        285,
        142,
    ]
    # 999·¾ = 749.25, 499.5 (to even: 500), 249.75: rounded down it would be 499 and 249.
    assert make_grid(COSINE, "linspace", 5).time[:-1].tolist() == [999, 749, 500, 250, 0]


@pytest.mark.parametrize("name", ["trailing", "linspace", "log_snr"])
def test_one_step_starts_at_the_last_knot(name: str) -> None:
    assert make_grid(COSINE, name, 1).time[0] == 999


def test_the_log_snr_grid_is_even_in_log_snr() -> None:
    lam = make_grid(COSINE, "log_snr", 20).log_snr[:-1]
    np.testing.assert_allclose(
        np.diff(lam), (COSINE.log_snr[0] - COSINE.log_snr[-1]) / 19, rtol=1e-6
    )
    zero = make_grid(COSINE.zero_terminal_snr(), "log_snr", 20).log_snr[:-1]
    assert zero[0] == -np.inf
    assert np.ptp(np.diff(zero[1:])) < 1e-6


def test_an_explicit_grid_takes_any_falling_times() -> None:
    grid = make_grid(COSINE, [999, 500.5, 0])
    assert grid.time[:-1].tolist() == [999, 500.5, 0]
    np.testing.assert_array_equal(grid.alpha[:-1], COSINE.level([999, 500.5, 0])[0])


@pytest.mark.parametrize(
    ("spacing", "steps", "message"),
    [
        ("trailing", 0, "`steps` must be 1 to 1000, got 0"),
        ("trailing", -1, "`steps` must be 1 to 1000"),
        ("trailing", 1001, "`steps` must be 1 to 1000, got 1001"),
        ("trailing", None, "`steps` must be an integer"),
        ("trailing", 5.0, "`steps` must be an integer"),
        ("trailing", True, "`steps` must be an integer"),
        ("leadin", 5, "Did you mean 'leading'"),
        ([], None, "strictly falling times"),
        ([1, 2], None, "strictly falling times"),
        ([5, 5], None, "strictly falling times"),
        ([[5]], None, "strictly falling times"),
        ([1000], None, "time 1000.0 is outside the schedule"),
        ([5, float("nan")], None, "strictly falling times"),
        (["a"], None, "a name .* or a list of strictly falling times"),
        (None, 5, "strictly falling times"),
        ([9, 3], 5, "takes 2 steps, got steps=5"),
    ],
)
def test_what_is_no_grid_is_refused(spacing, steps, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        make_grid(COSINE, spacing, steps)


def test_leading_can_start_at_a_later_knot() -> None:
    np.testing.assert_array_equal(make_grid(COSINE, "leading(1)", 4).time[:-1], [751, 501, 251, 1])
    np.testing.assert_array_equal(
        make_grid(COSINE, "leading(0)", 4).time[:-1], make_grid(COSINE, "leading", 4).time[:-1]
    )


@pytest.mark.parametrize(("name", "rho"), [("karras", 7), ("karras(3.5)", 3.5), ("karras(1)", 1)])
def test_karras_is_even_in_a_power_of_sigma_over_alpha(name: str, rho: float) -> None:
    grid = make_grid(make_schedule("edm"), name, 18)
    steps = np.diff(grid.sigma[:-1] ** (1 / rho))
    np.testing.assert_allclose(steps, (0.002 ** (1 / rho) - 80 ** (1 / rho)) / 17, rtol=1e-8)
    zero = make_grid(COSINE.zero_terminal_snr(), name, 5)
    assert zero.alpha[0] == 0
    assert np.ptp(np.diff((zero.sigma[1:-1] / zero.alpha[1:-1]) ** (1 / rho))) < 1e-6 * (
        zero.sigma[1] / zero.alpha[1]
    )


@pytest.mark.parametrize(
    ("spacing", "message"),
    [
        ("karras(x)", "rho as a number"),
        ("karras()", "rho as a number"),
        ("karras(0)", "`rho` must be a number from 0.1 to 100"),
        ("karras(nan)", "`rho` must be"),
        ("log_snr(x)", "its bound as a number"),
        ("log_snr(0)", "`bound` must be a number from 0.1"),
        ("trailing(3)", "takes no number"),
        ("leading(x)", "its offset in knots as a number"),
        ("leading(1.5)", "`offset` must be an integer"),
        ("leading(-1)", "`offset` must be 0 to 999"),
        ("leading(500)", "asks for knot 1000 of 1000: take fewer steps"),
        ("karas(7)", "Did you mean 'karras'"),
        ([5.0, 5 - 1e-12], "neighbours of the same level"),
    ],
)
def test_numbers_of_grids_are_checked_and_neighbours_differ(spacing, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        make_grid(COSINE, spacing, 2)


def test_a_bounded_log_snr_grid_starts_at_the_last_knot_and_is_even_within_the_bound() -> None:
    grid = make_grid(COSINE, "log_snr(7)", 9)
    assert grid.time[0] == COSINE.time[-1]
    np.testing.assert_allclose(grid.log_snr[1:-1], np.linspace(-7, 7, 8), atol=1e-9)
    cut = make_grid(COSINE, "log_snr(12)", 9)
    np.testing.assert_allclose(cut.log_snr[1:-1], np.linspace(-12, COSINE.log_snr[0], 8), atol=1e-9)
    whole = make_grid(COSINE, "log_snr(1000)", 9)
    np.testing.assert_allclose(whole.log_snr, make_grid(COSINE, "log_snr", 9).log_snr)
    zero = make_grid(COSINE.zero_terminal_snr(), "log_snr(7)", 4)
    assert zero.alpha[0] == 0
    np.testing.assert_allclose(zero.log_snr[1:-1], [-7, 0, 7], atol=1e-9)
    assert make_grid(COSINE, "log_snr(7)", 1).time[0] == COSINE.time[-1]


def test_the_tail_of_a_grid_is_its_last_levels_and_climbing_starts_at_the_least_noisy_knot() -> (
    None
):
    grid = make_grid(COSINE, "trailing", 10)
    tail = grid.tail(0.3)
    np.testing.assert_array_equal(tail.alpha, grid.alpha[-4:])
    assert len(grid.tail(0.0)) == 1
    assert len(grid.tail(0.26)) == 3
    up = tail.climbing()
    np.testing.assert_array_equal(up.time, [0, 99, 199, 299])
    np.testing.assert_allclose(up.sigma, COSINE.sigma[[0, 99, 199, 299]], rtol=1e-14)
    with pytest.raises(RequestError, match="no level above the least noisy"):
        make_grid(COSINE, [5, 0], None).tail(0.5).climbing()
    linspace = make_grid(
        COSINE, "linspace", 4
    )  # ends at the least noisy knot, which is not walked twice
    np.testing.assert_array_equal(linspace.climbing().time, linspace.time[:-1][::-1])
    with pytest.raises(RequestError, match="`strength` must be a number from 0 to 1"):
        grid.tail(1.5)


def test_levels_between_a_grids_own_come_from_its_schedule() -> None:
    grid = make_grid(COSINE, "trailing", 4)
    time, level = grid.between(np.array([0.0, 1.0]))
    np.testing.assert_allclose(COSINE.level(time), level.T)
    np.testing.assert_allclose(2 * np.log(level[:, 0] / level[:, 1]), [0, 1], atol=1e-12)
    with pytest.raises(RequestError, match="outside the schedule"):
        grid.between(np.array([99.0]))
    with pytest.raises(RequestError, match="has no schedule"):
        Grid("bare", grid.time, grid.alpha, grid.sigma).between(np.zeros(1))
