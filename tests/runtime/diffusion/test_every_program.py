"""Every solver on every schedule, grid and prediction raises an error with a reason, or is finite
and ends as declared."""

import functools
from collections import Counter, defaultdict
from collections.abc import Iterable
from itertools import product
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from runtime import Program, RequestError, make_program, make_schedule, run
from runtime.diffusion.grid import GRIDS, Grid, make_grid
from runtime.diffusion.program import C_IN, C_OUT, C_SKIP, PREDICTIONS, D, R, advance, denoise
from runtime.diffusion.solvers import SOLVERS

SCHEDULES = {
    "linear": make_schedule("linear"),
    "linear_raw": make_schedule("linear_raw"),
    "scaled_linear": make_schedule("scaled_linear"),
    "cosine": make_schedule("cosine"),
    "zero": make_schedule("scaled_linear").zero_terminal_snr(),
    "sigmoid": make_schedule("sigmoid"),
    "flow": make_schedule("flow"),
    "edm": make_schedule("edm"),
    "from_betas": make_schedule("from_betas", betas=np.linspace(1e-3, 0.3, 40).tolist()),
}
MUCH_ALIKE = ("linear_raw", "scaled_linear", "sigmoid")
"""Schedules much like others of the list. Programs of 1000 steps on them are in the slow run."""
OPTIONS: dict[str, list[dict[str, Any]]] = {
    "ddpm": [{}, {"variance": "fixed_large"}],
    "ddim": [{}, {"eta": 0.3}],
    "repaint": [{}, {"jump": 2, "resample": 3}, {"resample": 1, "eta": 0.5}],
    "edm": [{}, {"churn": 40.0}, {"churn": 10.0, "s_noise": 1.003, "s_min": 0.05, "s_max": 50.0}],
    "dpmpp_2s": [{}, {"r": 0.8}],
    "unipc": [
        {},
        {"variant": "bh1"},
        {"order": 3},
        {"order": 3, "variant": "bh1"},
        {"order": 3, "corrector": False},
    ],
    "deis": [{"order": p} for p in (1, 2, 3)],
    "lms": [{"order": p} for p in (1, 2, 3, 4)],
}
CALLS = {"heun": 2, "edm": 2, "kdpm2": 2, "dpmpp_2s": 2, "dpmpp_2s_sde": 2, "dpmpp_3s": 3}
"""Network calls per interval, of the solvers that take more than one."""


def runs_to_its_end(program: Program) -> None:
    """Run it with two networks at once: two samples with a perfect one, two with a bounded one.

    The perfect network knows x_0 and predicts from x: the end must be the declared level. With any
    bounded network all numbers must be finite, the program's own in the step graph's type.
    """
    assert np.isfinite(program.update.astype(np.float32)).all()
    random = np.random.Generator(np.random.Philox(key=9))
    x0 = random.uniform(-0.9, 0.9, (2, 3))
    noises = random.standard_normal((len(program), 4, 3))
    row = iter(range(len(program)))

    def network(scaled: np.ndarray, time: np.ndarray) -> np.ndarray:
        k = next(row)
        (alpha, sigma), answer = program.level[k], program.answer[k]
        x = scaled[:2] / program.call[k, C_IN]
        perfect = answer[0] * x0 + answer[1] * (x - alpha * x0) / sigma
        return np.concatenate([perfect, bounded(scaled[2:], time[2:])])

    exact = program.level[0, 0] * x0 + program.level[0, 1] * random.standard_normal(x0.shape)
    noise = program.start * random.standard_normal(x0.shape)
    found = run(program, network, np.concatenate([exact, noise]), lambda k: noises[k])
    assert program.moments[-1, 0].tolist() == [1, 0]
    assert np.abs(found[:2] - x0).max() <= largest_error(program)
    assert np.isfinite(found).all()


def bounded(x: np.ndarray, time: np.ndarray) -> np.ndarray:
    """An arbitrary network whose output is at most 1."""
    return np.tanh(x + 0.001 * time[:, None])


def largest_error(program: Program) -> float:
    """How far from x_0 a perfect network may end."""
    # x = D, except for lcm, whose last row keeps some of x and so of the noise in it: 5 deviations
    # of that.
    allowed = (5 * np.sqrt(np.abs(program.excess).sum()) + np.abs(program.bias).sum()) * (
        program.excess[-1] != 0
    )
    # Near pure noise, sigma/alpha multiplies the rounding of an epsilon network.
    rounding = 1e-8 + 1e-13 * np.abs(program.call[:, [C_SKIP, C_OUT]]).max()
    return rounding + allowed


def run_to_their_ends(programs: Iterable[Program]) -> None:
    """Run programs of one length as one batch, each sample on the rows of its own program.

    The checks are those of `runs_to_its_end`, at the cost of one program per length.
    """
    by_length = defaultdict[int, list[Program]](list)
    for program in programs:
        by_length[len(program)].append(program)
    for alike in by_length.values():
        _run_as_one(alike)


def _run_as_one(programs: list[Program]) -> None:
    random = np.random.Generator(np.random.Philox(key=9))
    count = len(programs)
    x0 = random.uniform(-0.9, 0.9, (count, 6))
    call = np.stack([program.call for program in programs], 1)
    update = np.stack([program.update for program in programs], 1)
    level = np.stack([program.level for program in programs], 1)[..., None]
    answer = np.stack([program.answer for program in programs], 1)[..., None]
    assert np.isfinite(update.astype(np.float32)).all()
    # The first half has the perfect network, the second half the bounded one.
    start = np.array([[program.start] for program in programs])
    state = np.zeros((2 * count, R, 6))
    state[:count, 0] = level[0, :, 0] * x0 + level[0, :, 1] * random.standard_normal(x0.shape)
    state[count:, 0] = start * random.standard_normal(x0.shape)
    call = np.concatenate([call, call], 1)
    update = np.concatenate([update, update], 1)
    for k in range(len(call)):

        def network(scaled: np.ndarray, time: np.ndarray, k: int = k) -> np.ndarray:
            x = scaled[:count] / call[k, :count, [C_IN]].T
            eps = (x - level[k, :, 0] * x0) / level[k, :, 1]
            perfect = answer[k, :, 0] * x0 + answer[k, :, 1] * eps
            return np.concatenate([perfect, bounded(scaled[count:], time[count:])])

        denoised = denoise(call[k], network, state[:, 0])
        state = advance(update[k], state, denoised, random.standard_normal(denoised.shape))
    assert np.isfinite(state[:, 0]).all()
    for program, found, expected in zip(programs, state[:count, 0], x0, strict=True):
        assert program.moments[-1, 0].tolist() == [1, 0]
        assert np.abs(found - expected).max() <= largest_error(program)


@functools.cache
def grid_of(name: str, spacing: str, steps: int) -> Grid:
    """The grid of a schedule of SCHEDULES, made once for all solvers."""
    return make_grid(SCHEDULES[name], spacing, steps)


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[pytest.mark.slow] if name in MUCH_ALIKE else [])
        for name in SCHEDULES
    ],
)
@pytest.mark.parametrize("solver", SOLVERS)
def test_one_two_three_and_all_steps_on_every_grid(solver: str, name: str) -> None:
    schedule = SCHEDULES[name]
    T = len(schedule)
    short = []
    for options, steps, grid in product(
        OPTIONS.get(solver, [{}]), (1, 2, 3, T), [*GRIDS, "karras(3)", "log_snr(7)"]
    ):
        visited = grid_of(name, grid, steps)
        program = make_program(schedule, "v", solver, steps, visited, **options)
        assert program.moments[-1, 0].tolist() == [1, 0]
        assert np.isfinite(program.update).all()
        if solver != "lcm":
            assert program.update[-1, 0, : D + 1].tolist() == [0, 0, 0, 0, 1], (
                "the step onto sigma = 0 is x = D"
            )
        calls = CALLS.get(solver, 1)
        noise_start = int(visited.alpha[0] == 0)
        full = max(
            steps - 1 - noise_start, 0
        )  # but for the steps from pure noise and onto the clean end
        once = steps + full * (calls - 1) + (solver == "plms" and full > 0)
        assert len(program) == once * options.get("resample", 4 if solver == "repaint" else 1)
        if steps <= 3:
            short.append(program)
    run_to_their_ends(short)


@pytest.mark.parametrize("solver", SOLVERS)
def test_all_steps_end_where_they_say(solver: str) -> None:
    run_to_their_ends(
        make_program(schedule, "v", solver, len(schedule), "trailing", **options)
        for schedule, options in product(SCHEDULES.values(), OPTIONS.get(solver, [{}]))
    )


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("solver", SOLVERS)
def test_one_two_three_and_all_steps_for_every_prediction(solver: str, prediction: str) -> None:
    schedules = [make_schedule(name, T=40) for name in ("cosine", "flow", "edm")]
    run_to_their_ends(
        make_program(schedule, prediction, solver, steps)
        for schedule, steps in product(schedules, (1, 2, 3, 40))
        # That pair is refused, see test_program.
        if prediction != "epsilon" or schedule.alpha[-1] != 0
    )


@pytest.mark.parametrize("solver", SOLVERS)
def test_a_long_program_ends_where_it_says(solver: str) -> None:
    run_to_their_ends(
        make_program(SCHEDULES[name], "v", solver, 60, grid)
        for name, grid in product(("linear", "zero", "edm"), ("karras", "trailing"))
    )


KNOTS = st.integers(2, 400)


def named(name: str, **parameters: Any) -> st.SearchStrategy[tuple[str, dict[str, Any]]]:
    return st.tuples(st.just(name), st.fixed_dictionaries(parameters))


SCHEDULE = st.one_of(
    named("linear", T=st.integers(21, 400)),
    named("linear_raw", T=KNOTS),
    named("scaled_linear", T=KNOTS),
    named("cosine", T=KNOTS),
    named("sigmoid", T=KNOTS),
    named("flow", T=KNOTS, time_scale=st.floats(1, 1000)),
    named("edm", T=KNOTS, sigma_max=st.floats(5, 200)),
    named("from_betas", betas=st.lists(st.floats(1e-4, 0.9), min_size=1, max_size=30)),
)
OPTION = {
    "eta": st.floats(-0.1, 1.1),
    "variance": st.sampled_from(["fixed_small", "fixed_large", "learned"]),
    "churn": st.floats(0, 80),
    "s_min": st.floats(0, 1),
    "s_max": st.floats(1, 100),
    "s_noise": st.floats(0.9, 1.1),
    "r": st.floats(0, 1),
    "order": st.integers(0, 5),
    "variant": st.sampled_from(["bh1", "bh2", "bh3"]),
    "corrector": st.booleans(),
    "timestep_scaling": st.floats(0.1, 20),
    "sigma_data": st.floats(0.1, 2),
    "jump": st.integers(0, 20),
    "resample": st.integers(0, 4),
}


def taken(solver: str) -> list[str]:
    code = SOLVERS[solver].__code__
    return [name for name in code.co_varnames[1 : code.co_argcount] if name in OPTION]


PLACES = st.lists(st.floats(0, 1), min_size=1, max_size=12, unique=True)
SPACING: dict[str, st.SearchStrategy[Any]] = {
    **{name: st.just(name) for name in GRIDS},
    "karras": st.one_of(st.just("karras"), st.floats(0.5, 12).map(lambda rho: f"karras({rho})")),
    "log_snr": st.one_of(
        st.just("log_snr"), st.floats(3, 20).map(lambda bound: f"log_snr({bound})")
    ),
    "explicit": PLACES.map(np.array),
}


@st.composite
def requests(
    draw: st.DrawFn, solver: str, spacing: str
) -> tuple[tuple[str, dict[str, Any]], bool, dict[str, Any]]:
    described = draw(SCHEDULE)
    schedule = make_schedule(described[0], **described[1])
    zero = schedule.variance_preserving and len(schedule) > 1 and draw(st.booleans())
    options = {name: draw(OPTION[name]) for name in taken(solver) if draw(st.booleans())}
    steps: int | None = draw(
        st.one_of(
            st.integers(1, min(len(schedule), 60)),
            st.just(len(schedule)),
            st.just(len(schedule) + 1),
        )
    )
    grid: Any = draw(SPACING[spacing])
    if spacing == "explicit":
        grid, steps = (
            sorted(schedule.time[0] + grid * (schedule.time[-1] - schedule.time[0]), reverse=True),
            None,
        )
    clip = draw(st.sampled_from([None, 1.0, 2.5]))
    prediction = draw(st.sampled_from(PREDICTIONS))
    return (
        described,
        zero,
        {
            "prediction": prediction,
            "solver": solver,
            "steps": steps,
            "grid": grid,
            "clip": clip,
            **options,
        },
    )


RAN: dict[str, Counter[str]] = {
    kind: Counter() for kind in ("solver", "schedule", "prediction", "grid", "steps")
}
"""How many requests ran, by kind."""


@pytest.mark.parametrize("spacing", SPACING)
@pytest.mark.parametrize("solver", SOLVERS)
def test_any_request_is_refused_with_a_reason_or_runs_to_its_end(solver: str, spacing: str) -> None:
    ran = 0

    @settings(
        max_examples=8,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(requests(solver, spacing))
    def one(drawn: tuple[tuple[str, dict[str, Any]], bool, dict[str, Any]]) -> None:
        nonlocal ran
        (name, parameters), zero, request = drawn
        schedule = make_schedule(name, **parameters)
        program, refusal = None, ""
        try:
            program = make_program(schedule.zero_terminal_snr() if zero else schedule, **request)
        except RequestError as error:
            refusal = str(error)
        if program is None:
            assert len(refusal) > 30, "a refusal says why"
            assert " comes to " not in refusal, (
                "no solver makes a program that its own proof refuses"
            )
            assert "not finite" not in refusal
            return
        ran += 1
        runs_to_its_end(program)
        whole = "all" if len(schedule) == request["steps"] else "some"
        for kind, found in zip(
            RAN, (solver, name, request["prediction"], spacing, whole), strict=True
        ):
            RAN[kind][found] += 1

    one()
    assert ran >= 1


def test_those_requests_were_of_every_kind() -> None:
    if len(RAN["solver"]) < len(SOLVERS):
        pytest.skip("not all of them were made")
    schedules = {*SCHEDULES} - {"zero"}
    expected = {
        "schedule": schedules,
        "prediction": {*PREDICTIONS},
        "grid": {*GRIDS, "explicit"},
        "steps": {"all", "some"},
    }
    for kind, names in expected.items():
        assert all(RAN[kind][name] for name in names), f"{kind}: {RAN[kind]}"
    assert sum(RAN["solver"].values()) >= 200
