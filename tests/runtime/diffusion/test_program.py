"""Programs: the check accepts correct programs and rejects every kind of wrong number; and the loop
that runs them."""

import dataclasses

import numpy as np
import pytest

from runtime import RequestError, make_program, make_schedule, run
from runtime.diffusion.grid import GRIDS, make_grid
from runtime.diffusion.program import C_OUT, C_SKIP, PREDICTIONS, D, Z, precondition

SCHEDULES = {
    "cosine": make_schedule("cosine"),
    "linear": make_schedule("linear"),
    "zero": make_schedule("scaled_linear").zero_terminal_snr(),
    "sigmoid": make_schedule("sigmoid"),
    "flow": make_schedule("flow"),
    "edm": make_schedule("edm"),
}


def perfect(prediction: str, schedule, x0: np.ndarray):
    """A network that knows x_0: its prediction at (x, time), computed from x_0 and the eps that x
    implies."""

    def network(scaled: np.ndarray, time: np.ndarray) -> np.ndarray:
        alpha, sigma = (
            v.reshape(-1, *[1] * (x0.ndim - 1))
            for v in schedule.level(np.clip(time, schedule.time[0], schedule.time[-1]))
        )
        s = np.hypot(sigma, 0.5 * alpha) if prediction == "edm" else 1.0
        x = scaled * s
        eps = (x - alpha * x0) / sigma
        if (
            prediction == "edm"
        ):  # Karras et al. 2022, eq. 7 solved for F, on x / alpha at noise sigma / alpha
            y, r = x / alpha, sigma / alpha
            return (x0 - 0.25 / (r**2 + 0.25) * y) / (0.5 * r / np.hypot(r, 0.5))
        return {"epsilon": eps, "x0": x0, "v": alpha * eps - sigma * x0, "flow": eps - x0}[
            prediction
        ]

    return network


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize(
    ("solver", "options"), [("ddim", {}), ("ddim", {"eta": 0.6}), ("ddpm", {})]
)
def test_a_perfect_network_gives_the_picture_back(
    prediction: str, name: str, solver: str, options: dict
) -> None:
    """In float64, along the whole loop and for every prediction, except grids that epsilon and edm
    cannot start at pure noise."""
    schedule = SCHEDULES[name]
    grid = "leading" if schedule.alpha[-1] == 0 and prediction in ("epsilon", "edm") else "trailing"
    program = make_program(schedule, prediction, solver, 12, grid, **options)
    random = np.random.Generator(np.random.Philox(key=5))
    x0 = random.uniform(-1, 1, (2, 3, 4))
    seen: list[np.ndarray] = []
    start = program.level[0][0] * x0 + program.level[0][1] * random.standard_normal(x0.shape)
    found = run(
        program,
        perfect(prediction, schedule, x0),
        start,
        lambda k: random.standard_normal(x0.shape),
        on_step=lambda k, d: seen.append(d),
    )
    np.testing.assert_allclose(found, x0, atol=1e-9)
    # c_out reaches sigma/alpha ~ 1e4 at the noisy end, and amplifies rounding by as much.
    assert max(np.abs(d - x0).max() for d in seen) < 1e-9


@pytest.mark.parametrize("steps", [1, 2, 3, 1000])
@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("name", SCHEDULES)
def test_every_grid_and_schedule_is_proved_from_its_first_level_to_the_clean_end(
    name: str, grid: str, steps: int
) -> None:
    program = make_program(SCHEDULES[name], "v", "ddim", steps, grid, eta=0.5)
    assert len(program) == steps
    assert program.moments[-1, 0].tolist() == [1, 0]
    assert program.update[-1, 0, :4].tolist() == [0, 0, 0, 0], "the step onto sigma = 0 is x = D"
    assert program.update[-1, 0, D] == 1
    assert np.isfinite(program.update).all()


def test_a_program_states_its_start() -> None:
    assert make_program(SCHEDULES["cosine"], "v", steps=10).start == 1
    assert make_program(SCHEDULES["flow"], "flow", steps=10).start == 1
    assert make_program(SCHEDULES["edm"], "edm", steps=10).start == pytest.approx(80)


RIGHT = make_program(SCHEDULES["cosine"], "epsilon", "ddim", 10, eta=0.7)


@pytest.mark.parametrize(
    ("field", "place"),
    [
        ("update", (3, 0, 0)),
        ("update", (3, 0, D)),
        ("update", (3, 0, Z)),
        ("update", (3, 1, 0)),
        ("update", (3, 2, D)),
        ("update", (9, 0, Z)),
        ("call", (4, C_SKIP)),
        ("call", (4, C_OUT)),
        ("moments", (5, 0, 0)),
        ("moments", (5, 0, 1)),
        ("moments", (10, 0, 1)),
        ("answer", (2, 1)),
        ("excess", (2,)),
        ("bias", (2,)),
    ],
)
def test_a_number_off_by_a_billionth_is_found(field: str, place: tuple[int, ...]) -> None:
    array = getattr(RIGHT, field).copy()
    array[place] += 1e-9 * max(1.0, abs(array[place]))
    with pytest.raises(RequestError, match=r"solver 'ddim', row \d+"):
        dataclasses.replace(RIGHT, **{field: array})


def test_a_number_that_is_not_finite_is_refused() -> None:
    for field in ("call", "update"):
        array = getattr(RIGHT, field).copy()
        array[(3, 1) if field == "call" else (3, 0, 0)] = np.nan
        with pytest.raises(RequestError, match="not finite"):
            dataclasses.replace(RIGHT, **{field: array})


def test_a_program_cannot_be_written_to() -> None:
    for name in ("call", "update", "moments", "excess", "bias", "answer"):
        with pytest.raises(ValueError, match="read-only"):
            getattr(RIGHT, name)[:] = 0
    with pytest.raises(dataclasses.FrozenInstanceError):
        RIGHT.start = 2  # type: ignore[misc]


def test_epsilon_at_pure_noise_is_refused_and_the_others_are_not() -> None:
    for name in ("zero", "flow"):
        with pytest.raises(RequestError, match="says nothing at zero terminal SNR"):
            make_program(SCHEDULES[name], "epsilon", steps=5)
        for prediction in ("v", "x0", "flow", "edm"):
            make_program(SCHEDULES[name], prediction, steps=5)


def test_an_unknown_prediction_is_refused() -> None:
    with pytest.raises(RequestError, match="unknown prediction 'epsilo'. Did you mean 'epsilon'"):  # noqa: RUF043
        precondition("epsilo", np.ones(1), np.ones(1))


@pytest.mark.parametrize("clip", [0, -1.0, float("nan")])
def test_a_clip_bound_must_be_above_0(clip: float) -> None:
    with pytest.raises(RequestError, match="`clip` must be a number"):
        make_program(SCHEDULES["cosine"], "v", clip=clip)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_the_loop_keeps_its_type_and_clips(dtype: type) -> None:
    program = make_program(SCHEDULES["cosine"], "x0", "ddim", 4, clip=0.5)
    types: set[type] = set()

    def network(x: np.ndarray, time: np.ndarray) -> np.ndarray:
        types.update((x.dtype.type, time.dtype.type))
        return 3 * np.ones_like(x)

    found = run(program, network, np.ones((2, 3), dtype))
    assert found.dtype == dtype
    assert types == {dtype}
    np.testing.assert_array_equal(found, 0.5)


def test_noise_is_asked_for_on_noisy_rows_only() -> None:
    asked: list[int] = []

    def z(k: int) -> np.ndarray:
        asked.append(k)
        return np.zeros((1, 2))

    network = lambda x, t: np.zeros_like(x)  # noqa: E731
    run(make_program(SCHEDULES["cosine"], "v", "ddpm", 5), network, np.ones((1, 2)), z)
    assert asked == [0, 1, 2, 3], "the last row steps onto the clean end"
    asked.clear()
    run(make_program(SCHEDULES["cosine"], "v", "ddim", 5), network, np.ones((1, 2)), z)
    assert asked == []


def test_a_program_that_adds_noise_needs_some() -> None:
    program = make_program(SCHEDULES["cosine"], "v", "ddpm", 5)
    network = lambda x, t: np.zeros_like(x)  # noqa: E731
    with pytest.raises(RequestError, match="'ddpm' adds noise in 4 of 5 rows, got no `noise`"):
        run(program, network, np.ones((1, 2)))
    with pytest.raises(RequestError, match="`noise` must be a function"):
        run(program, network, np.ones((1, 2)), np.ones((1, 2)))  # type: ignore[arg-type]


@pytest.mark.parametrize("output", [np.zeros((1, 2)), np.zeros(5), np.float64(0), (1, 2)])
def test_an_output_of_another_shape_is_refused(output: object) -> None:
    """It may broadcast, to samples that look right."""
    program = make_program(SCHEDULES["cosine"], "v", "ddim", 5)
    with pytest.raises(RequestError, match=r"returns F of x's shape \[5, 2\]"):
        run(program, lambda x, t: output, np.ones((5, 2)))


def test_guidance_needs_something_to_guide_away_from() -> None:
    program = make_program(SCHEDULES["cosine"], "v", "ddim", 5, guidance=3.0)
    network = lambda x, t, *_: np.zeros_like(x)  # noqa: E731
    for given in ({}, {"label": np.zeros(2, np.int64)}):
        with pytest.raises(RequestError, match="nothing to guide away from"):
            run(program, network, np.ones((2, 3)), **given)


def test_guidance_is_fc_plus_g_minus_1_times_the_difference_and_1_asks_once() -> None:
    calls: list[list[int]] = []

    def network(x: np.ndarray, time: np.ndarray, label: np.ndarray) -> np.ndarray:
        calls.append(label.tolist())
        return np.where(label[:, None] == 9, 0.25, 1.0) * np.ones_like(x)

    x, label = np.zeros((2, 3)), np.array([1, 2])
    found = {
        g: run(
            make_program(SCHEDULES["cosine"], "x0", steps=1, guidance=g),
            network,
            x,
            label=label,
            null_label=9,
        )
        for g in (1.0, 3.0, 0.0)
    }
    np.testing.assert_allclose(found[1.0], 1.0)
    np.testing.assert_allclose(found[3.0], 1 + 2 * 0.75)
    np.testing.assert_allclose(found[0.0], 0.25)
    assert calls == [[1, 2], [1, 2], [9, 9], [1, 2], [9, 9]]


def test_a_batch_of_none_is_none() -> None:
    program = make_program(make_schedule("cosine"), "v", "dpmpp_2m", 3)
    for shape in ((0,), (0, 3, 4)):
        found = run(program, lambda x, time: x, np.zeros(shape, np.float32))
        assert found.shape == shape


@pytest.mark.parametrize("z", [np.ones((1, 2)), np.ones(2), 1.0, None])
def test_noise_of_another_shape_is_refused(z: object) -> None:
    """It may broadcast, and all samples would have the same."""
    program = make_program(SCHEDULES["cosine"], "v", "ddpm", 5)
    with pytest.raises(RequestError, match=r"returns z of x's shape \[3, 2\]"):
        run(program, lambda x, t: np.zeros_like(x), np.ones((3, 2)), lambda k: z)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"conditions": 5}, "`conditions` must be a Mapping"),
        ({"conditions": {"c": [1, 2, 3]}}, r"`conditions\['c'\]` must be an array of 3 values"),
        ({"conditions": {"c": np.ones(2)}}, r"`conditions\['c'\]` must be an array of 3 values"),
        ({"conditions": {"c": np.ones(3)}, "null_conditions": {"d": 0}}, "unknown condition 'd'"),
    ],
)
def test_conditions_that_are_not_one_a_sample_are_refused(given: dict, message: str) -> None:
    program = make_program(SCHEDULES["cosine"], "v", "ddim", 5)
    with pytest.raises(RequestError, match=message):
        run(program, lambda x, t, **_: np.zeros_like(x), np.ones((3, 2)), **given)


def test_what_is_not_a_number_is_no_proof() -> None:
    answer = RIGHT.answer.copy()
    answer[4, 1] = np.nan
    with pytest.raises(RequestError, match="the denoised estimate comes to"):
        dataclasses.replace(RIGHT, answer=answer)


def test_times_a_grid_and_a_schedule_of_few_knots_have_their_own_number_of_steps() -> None:
    cosine = SCHEDULES["cosine"]
    assert len(make_program(cosine, "v")) == 50
    assert len(make_program(make_schedule("cosine", T=7), "v")) == 7
    assert len(make_program(cosine, "v", grid=[900, 400, 10])) == 3
    grid = make_grid(cosine, "trailing", 4)
    assert len(make_program(cosine, "v", grid=grid)) == 4
    with pytest.raises(RequestError, match=r"has 4 steps, got steps=5\. Leave `steps` out"):
        make_program(cosine, "v", "ddim", 5, grid)
