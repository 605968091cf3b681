"""The same trajectories as diffusers 0.42.1, in float64, with the same network, timesteps and
noise; and the differences, with their reasons.

diffusers forces float32 in its tables and steps. Here its names for float32 mean float64 while it
runs; nothing else of it is changed. The tests compare every input of the network, and the result if
both reach the clean end by the same rule.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest

from runtime import make_program, make_schedule, run
from runtime.diffusion.grid import make_grid
from runtime.diffusion.program import D, Z, assemble
from runtime.diffusion.schedule import Schedule
from runtime.diffusion.solvers.multistep import dpmpp_2m
from runtime.diffusion.solvers.singlestep import dpmpp_2s_sde, dpmpp_3s
from runtime.diffusion.solvers.steps import exact, singlestep

from .gaussian import finite_grid, gain
from .test_convergence import slope, third_order_as_commonly_coded

pytestmark = [
    pytest.mark.filterwarnings(
        "ignore:__array__ implementation:DeprecationWarning"
    ),  # torch's, of numpy 2
    pytest.mark.filterwarnings("ignore:__array_wrap__ must accept:DeprecationWarning"),
]

LINEAR = make_schedule("linear")
DRAWS = np.random.Generator(np.random.Philox(key=21)).standard_normal((200, 2, 5))
ATOL = 1e-9
"""Both sides are float64. Their sigma/alpha of up to 157 multiplies rounding, and so does the
network's slope at each call."""


def network(x: np.ndarray, time: np.ndarray) -> np.ndarray:
    """Any smooth function of both will do."""
    return np.tanh(1.3 * x + np.sin(time / 300)[:, None]) * 0.9 + 0.1 * np.cos(x)


class Recorder:
    """The network, and the inputs of its calls."""

    def __init__(self) -> None:
        self.inputs: list[np.ndarray] = []
        self.times: list[float] = []

    def __call__(self, x: np.ndarray, time: np.ndarray) -> np.ndarray:
        self.inputs.append(x.copy())
        self.times.append(float(time[0]))
        return network(x, time)


@contextmanager
def in_float64() -> Iterator[pytest.MonkeyPatch]:
    import torch

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "float32", torch.float64)
        patch.setattr(np, "float32", np.float64)
        usual = torch.get_default_dtype()
        torch.set_default_dtype(torch.float64)
        try:
            yield patch
        finally:
            torch.set_default_dtype(usual)


def scheduler(name: str, **config: Any) -> Any:
    import diffusers

    with in_float64():
        if name.startswith("EDM"):
            return getattr(diffusers, name)(**config)
        return getattr(diffusers, name)(trained_betas=LINEAR.beta.copy(), **config)


def by_row(k: int) -> np.ndarray:
    return DRAWS[1 + k]


def theirs(
    own: Any,
    steps: int | None,
    noise: Any = by_row,
    start: np.ndarray = DRAWS[0],
    **step_options: Any,
) -> tuple[Recorder, np.ndarray]:
    """diffusers' own loop. steps None: its tables were set by the caller. Schedulers in x/alpha get
    x/alpha."""
    import sys

    import torch

    called = Recorder()
    with in_float64() as patch:
        if steps is not None:
            own.set_timesteps(steps)
        module = sys.modules[type(own).__module__]
        if hasattr(module, "randn_tensor"):
            patch.setattr(
                module,
                "randn_tensor",
                lambda *a, **o: torch.from_numpy(noise(len(called.times) - 1)),
            )
        first = own.timesteps[0]
        scale = 1.0
        if not type(own).__name__.startswith("EDM"):
            scale = float(own.scale_model_input(torch.ones(1, dtype=torch.float64), first))
        x = torch.from_numpy(start) / scale
        for t in own.timesteps:
            F = called(own.scale_model_input(x, t).numpy(), np.full(len(x), float(t)))
            x = own.step(torch.from_numpy(F), t, x, **step_options).prev_sample
    return called, x.numpy()


def ours(
    solver: str,
    times: Any,
    *,
    schedule: Schedule = LINEAR,
    prediction: str = "epsilon",
    **options: Any,
) -> tuple[Recorder, np.ndarray]:
    called = Recorder()
    program = make_program(schedule, prediction, solver, None, list(times), **options)
    return called, run(program, called, DRAWS[0], lambda k: DRAWS[1 + k])


def agree(
    a: tuple[Recorder, np.ndarray],
    b: tuple[Recorder, np.ndarray],
    calls: int | None = None,
    atol: float = ATOL,
) -> None:
    """The same calls at the same times: all of them and the result, or the given number of
    calls."""
    assert len(a[0].times) == len(b[0].times)
    np.testing.assert_allclose(a[0].times[:calls], b[0].times[:calls], rtol=1e-12, atol=1e-9)
    np.testing.assert_allclose(
        np.array(a[0].inputs[:calls]), np.array(b[0].inputs[:calls]), rtol=0, atol=atol
    )
    if calls is None:
        np.testing.assert_allclose(a[1], b[1], rtol=0, atol=atol)


def distance(a: tuple[Recorder, np.ndarray], b: tuple[Recorder, np.ndarray]) -> float:
    return float(np.abs(a[1] - b[1]).max())


SPACINGS = [("leading", 20), ("leading", 7), ("trailing", 20), ("trailing", 7), ("linspace", 28)]
"""Of 28 in linspace all times are whole: between knots diffusers makes sigma/alpha linear in time
where ours is log(sigma/alpha)."""
ONE_STEP = [
    ("EulerDiscreteScheduler", {}, "euler", {}),
    ("EulerAncestralDiscreteScheduler", {}, "euler_ancestral", {}),
    ("HeunDiscreteScheduler", {}, "heun", {}),
    ("KDPM2DiscreteScheduler", {}, "kdpm2", {}),
]


def whole(times: Any) -> list[float]:
    """The tables of Heun and KDPM2 list the time of every call; the grid is every other one."""
    return list(dict.fromkeys(float(t) for t in times))


@pytest.mark.parametrize(("spacing", "steps"), SPACINGS)
@pytest.mark.parametrize(
    ("name", "config", "solver", "options"), ONE_STEP, ids=lambda v: v if isinstance(v, str) else ""
)
def test_solvers_in_sigma_over_alpha(name, config, solver, options, spacing, steps) -> None:
    own = scheduler(name, timestep_spacing=spacing, **config)
    found = theirs(own, steps)
    times = whole(own.timesteps[::2] if solver == "kdpm2" else own.timesteps)
    assert times == make_grid(LINEAR, spacing, steps).time[:-1].tolist()
    agree(ours(solver, times, **options), found)


@pytest.mark.parametrize(
    ("name", "solver"),
    [
        (name, solver)
        for name, _, solver, _ in ONE_STEP
        if "2" not in name and "Ancestral" not in name
    ],
)
def test_karras_spacing_in_sigma_over_alpha(name: str, solver: str) -> None:
    """Their Karras levels lie between knots, with log(sigma/alpha) linear in time as ours, and are
    our grid "karras"."""
    own = scheduler(name, use_karras_sigmas=True)
    found = theirs(own, 12)
    times = whole(own.timesteps)
    np.testing.assert_allclose(times, make_grid(LINEAR, "karras", 12).time[:-1], atol=1e-8)
    agree(ours(solver, times), found)


@pytest.mark.parametrize(("spacing", "steps"), [*SPACINGS[:-1], ("linspace", 27)])
@pytest.mark.parametrize("sde", [False, True])
def test_dpmpp_2m(spacing: str, steps: int, sde: bool) -> None:
    own = scheduler(
        "DPMSolverMultistepScheduler",
        timestep_spacing=spacing,
        final_sigmas_type="zero",
        algorithm_type="sde-dpmsolver++" if sde else "dpmsolver++",
    )
    found = theirs(own, steps)
    agree(ours("dpmpp_2m_sde" if sde else "dpmpp_2m", own.timesteps), found)


def on(own: Any, program: Any) -> Any:
    """The scheduler with a program's own times and levels for a table."""
    import torch

    own.set_timesteps(len(program))
    own.timesteps = torch.from_numpy(program.call[:, 0].copy())
    own.sigmas = torch.from_numpy(np.r_[program.level[:, 1] / program.level[:, 0], 0.0])
    return own


@pytest.mark.parametrize("grid", ["karras", "log_snr"])
@pytest.mark.parametrize(
    ("name", "config", "solver", "options"),
    [
        ("DPMSolverMultistepScheduler", {}, "dpmpp_2m", {}),
        ("UniPCMultistepScheduler", {}, "unipc", {}),
        (
            "UniPCMultistepScheduler",
            {"solver_type": "bh1", "lower_order_final": True},
            "unipc",
            {"variant": "bh1"},
        ),
        (
            "UniPCMultistepScheduler",
            {"disable_corrector": list(range(99))},
            "unipc",
            {"corrector": False},
        ),
    ],
)
def test_between_knots_given_the_same_times_and_levels(name, config, solver, options, grid) -> None:
    """With Karras spacing, these round the time to a knot but keep the level, so the network gets
    the time of another level. Ours does not."""
    program = make_program(LINEAR, "epsilon", solver, 20, grid, **options)
    # Their bh1 divides by h, infinite at the end: NaN, see below.
    calls = 20 if options.get("variant") == "bh1" else None
    agree(
        ours(solver, program.call[:, 0], **options),
        theirs(on(scheduler(name, **config), program), None),
        calls,
    )


@pytest.mark.parametrize("variant", ["bh1", "bh2"])
@pytest.mark.parametrize(
    ("spacing", "steps"), [("leading", 20), ("trailing", 20), ("linspace", 27)]
)
def test_unipc_order_2(spacing: str, steps: int, variant: str) -> None:
    own = scheduler("UniPCMultistepScheduler", timestep_spacing=spacing, solver_type=variant)
    found = theirs(own, steps)
    mine = ours("unipc", own.timesteps, variant=variant)
    agree(mine, found, steps if variant == "bh1" else None)
    if variant == "bh1":
        assert np.isnan(found[1]).all(), "B(h) = h is infinite on the step onto the clean end"
        assert np.isfinite(mine[1]).all()


@pytest.mark.parametrize("variant", ["bh1", "bh2"])
def test_unipc_order_3_but_for_the_order_of_the_last_but_one_step(variant: str) -> None:
    """diffusers lowers the order to 2 there, without need; up to there the calls are the same."""
    own = scheduler(
        "UniPCMultistepScheduler", timestep_spacing="trailing", solver_type=variant, solver_order=3
    )
    found = theirs(own, 20)
    mine = ours("unipc", own.timesteps, order=3, variant=variant)
    agree(mine, found, 19)
    assert np.abs(mine[0].inputs[19] - found[0].inputs[19]).max() > 1e-5


@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("spacing", ["leading", "trailing"])
def test_deis_but_for_its_end(order: int, spacing: str) -> None:
    """diffusers' DEIS ends at the first knot's level, not at the clean end; up to the last step the
    calls are the same."""
    own = scheduler("DEISMultistepScheduler", timestep_spacing=spacing, solver_order=order)
    found = theirs(own, 20)
    agree(ours("deis", own.timesteps, order=order), found, 20)
    assert float(own.sigmas[-1]) == pytest.approx(LINEAR.sigma[0] / LINEAR.alpha[0], rel=1e-6)


@pytest.mark.parametrize("spacing", ["leading", "trailing"])
def test_lms_but_for_its_last_step(spacing: str) -> None:
    """Onto sigma = 0 diffusers extrapolates with four points, and its result is not an estimate of
    the network; ours is x = D.

    Without clipping and with a smooth network, both work; at few steps theirs is a long
    extrapolation.
    """
    own = scheduler("LMSDiscreteScheduler", timestep_spacing=spacing)
    found = theirs(own, 20)
    mine = ours("lms", own.timesteps)
    agree(mine, found, 20)
    assert distance(mine, found) > 1e-5


def test_plms_but_for_its_last_step() -> None:
    own = scheduler(
        "PNDMScheduler", skip_prk_steps=True, timestep_spacing="leading", set_alpha_to_one=True
    )
    found = theirs(own, 20)
    mine = ours("plms", whole(own.timesteps))
    assert len(found[0].times) == 21
    agree(mine, found, 21)
    assert distance(mine, found) > 1e-5


def test_plms_steps_elsewhere_in_linspace_and_trailing() -> None:
    """As DDIM: the previous time is re-derived as t - T//n (diffusers issue 12633)."""
    for spacing, steps in (("linspace", 20), ("trailing", 7)):
        own = scheduler(
            "PNDMScheduler", skip_prk_steps=True, timestep_spacing=spacing, set_alpha_to_one=True
        )
        found = theirs(own, steps)
        mine = ours("plms", whole(own.timesteps))
        assert mine[0].times == found[0].times
        assert np.abs(np.array(mine[0].inputs) - np.array(found[0].inputs)).max() > 1e-3


@pytest.mark.parametrize("clip", [None, 1.0])
@pytest.mark.parametrize("steps", [1, 4, 8])
def test_lcm(steps: int, clip: float | None) -> None:
    own = scheduler("LCMScheduler", clip_sample=clip is not None)
    found = theirs(own, steps)
    agree(ours("lcm", own.timesteps, clip=clip), found)


def test_ddpm_fixed_large() -> None:
    own = scheduler(
        "DDPMScheduler", variance_type="fixed_large", clip_sample=False, timestep_spacing="leading"
    )
    found = theirs(own, 20)
    agree(ours("ddpm", own.timesteps, variance="fixed_large"), found)


def test_ddpm_fixed_large_leaves_noise_at_the_end_of_trailing() -> None:
    """diffusers adds noise on every step except from t = 0, which `trailing` does not have. So its
    result is the estimate plus noise. Ours adds none."""
    own = scheduler(
        "DDPMScheduler", variance_type="fixed_large", clip_sample=False, timestep_spacing="trailing"
    )
    found, quiet = theirs(own, 20), theirs(own, 20, lambda k: DRAWS[1 + k] * (k < 19))
    agree(ours("ddpm", own.timesteps, variance="fixed_large"), quiet)
    assert 0.05 < np.std(found[1] - quiet[1]) < 0.5


@pytest.mark.parametrize("grid", ["log_snr", "karras"])
def test_dpmpp_2s(grid: str) -> None:
    program = make_program(LINEAR, "epsilon", "dpmpp_2s", 10, grid)
    own = scheduler("DPMSolverSinglestepScheduler", lower_order_final=True)
    found = theirs(on(own, program), None)
    called = Recorder()
    agree((called, run(program, called, DRAWS[0])), found)


@pytest.mark.parametrize("grid", ["log_snr", "karras"])
def test_dpmpp_3s_but_for_its_second_inner_point(grid: str) -> None:
    """diffusers gets D_2's point by the midpoint weight of the second-order solver; the paper
    integrates the slope exactly. Both have order 3.

    With that one weight changed, ours equals theirs.
    """

    def midpoint(h: np.ndarray) -> list[list[np.ndarray]]:
        r1, r2 = 1 / 3, 2 / 3
        return [[], [-0.5 * np.expm1(-r2 * h) * r2 / r1], [0 * h, (1 + np.expm1(-h) / h) / r2]]

    on_grid = make_grid(LINEAR, grid, 10)
    program = assemble("variant", singlestep(on_grid, (1 / 3, 2 / 3), midpoint), LINEAR, "epsilon")
    own = scheduler("DPMSolverSinglestepScheduler", solver_order=3, lower_order_final=True)
    found = theirs(on(own, program), None)
    called = Recorder()
    agree((called, run(program, called, DRAWS[0])), found)
    paper = run(assemble("dpmpp_3s", dpmpp_3s(on_grid), LINEAR, "epsilon"), network, DRAWS[0])
    assert 1e-7 < np.abs(paper - found[1]).max() < 5e-3 * np.abs(paper).max()


def test_dpmpp_3m_as_in_diffusers_has_order_2() -> None:
    """Its second difference has half of its weight. With the same weight ours equals theirs, and
    test_convergence measures order 2 for it."""
    own = scheduler(
        "DPMSolverMultistepScheduler",
        solver_order=3,
        timestep_spacing="trailing",
        final_sigmas_type="zero",
    )
    found = theirs(own, 20)
    program = assemble(
        "common",
        third_order_as_commonly_coded(make_grid(LINEAR, "trailing", 20)),
        LINEAR,
        "epsilon",
    )
    called = Recorder()
    agree((called, run(program, called, DRAWS[0])), found)
    assert distance(ours("dpmpp_3m", own.timesteps), found) > 1e-5


def test_dpmpp_2s_sde_given_the_noise_of_one_path() -> None:
    """diffusers draws new noise for the whole step; ours continues that of the inner point. With
    the sum of both halves as its noise, theirs equals ours."""
    program = make_program(LINEAR, "epsilon", "dpmpp_2s_sde", 10, "log_snr")
    own = scheduler(
        "DPMSolverSinglestepScheduler", lower_order_final=True, algorithm_type="sde-dpmsolver++"
    )
    level, Mz = np.concatenate([program.level, [[1.0, 0.0]]]), program.update[:, 0, Z]

    def path(k: int) -> np.ndarray:
        if k % 2 == 0:
            return DRAWS[1 + k]
        keep, _, last = exact(level[k : k + 1], level[k + 1 : k + 2], sde=True)
        _, _, whole_step = exact(level[k - 1 : k], level[k + 1 : k + 2], sde=True)
        return (keep * Mz[k - 1] * DRAWS[k] + last * DRAWS[1 + k]) / whole_step

    found = theirs(on(own, program), None, path)
    called = Recorder()
    agree((called, run(program, called, DRAWS[0], lambda k: DRAWS[1 + k])), found)


def test_dpmpp_2s_sde_with_independent_draws_has_order_1_in_variance() -> None:
    """Why ours follows one path: the inner point's noise moves D_1, and the contribution of D_1
    must move with the step's noise."""
    errors: dict[str, list[float]] = {"one path": [], "independent": []}
    for n in (96, 384):
        update = dpmpp_2s_sde(finite_grid(LINEAR, n, "karras"))
        level = update.moments[:, 0]
        for kind, found in errors.items():
            variance = (level[0, 0] * 0.6) ** 2 + level[0, 1] ** 2
            for k in range(0, 2 * n, 2):
                (g0, g1), M = (gain(*level[k]), gain(*level[k + 1])), update.M[k : k + 2]
                inner, z1 = M[0, 0, 0] + M[0, 0, D] * g0, M[0, 0, Z]
                after, d0 = M[1, 0, 0] + M[1, 0, D] * g1, M[1, 0, 1] * g0
                kept = z1 * (after if kind == "one path" else M[1, 0, D] * g1)
                new = (
                    M[1, 0, Z]
                    if kind == "one path"
                    else exact(level[k : k + 1], level[k + 2 : k + 3], sde=True)[2][0]
                )
                variance = (after * inner + d0) ** 2 * variance + kept**2 + new**2
            found.append(abs(variance - (level[-1, 0] * 0.6) ** 2 - level[-1, 1] ** 2))
    assert slope(errors["one path"]) > 1.8
    assert 0.8 < slope(errors["independent"]) < 1.2


def algorithm_2(
    times: list[float], churn: float, s_min: float, s_max: float, s_noise: float, noise: Any
) -> np.ndarray:
    """Karras et al. 2022, Algorithm 2, line by line, in y = x/alpha; the first lift is that of the
    start."""
    t = np.r_[LINEAR.level(times)[1] / LINEAR.level(times)[0], 0.0]
    n, row, y = len(times), 0, None

    def estimate(y: np.ndarray, rho: float) -> np.ndarray:
        time = LINEAR.time_at(-2 * np.log(rho))
        alpha = 1 / np.hypot(1, rho)
        return y - rho * network(alpha * y, np.full(len(y), float(time)))

    for i in range(n):
        gamma = min(churn / n, np.sqrt(2) - 1) if s_min <= t[i] <= s_max else 0.0
        hat = min(t[i] * (1 + gamma), LINEAR.sigma[-1] / LINEAR.alpha[-1])
        if y is None:
            y = DRAWS[0] * np.hypot(1, hat)
        elif hat > t[i]:
            y = y + np.sqrt(hat**2 - t[i] ** 2) * s_noise * noise(row - 1)
        d = (y - estimate(y, hat)) / hat
        row += 1
        following = y + (t[i + 1] - hat) * d
        if t[i + 1] > 0:
            d_2 = (following - estimate(following, t[i + 1])) / t[i + 1]
            row += 1
            following = y + (t[i + 1] - hat) * (d + d_2) / 2
        y = following
    return y


@pytest.mark.parametrize("limits", [(0.0, np.inf), (0.1, 20.0)])
@pytest.mark.parametrize("s_noise", [1.0, 1.007])
def test_edm_is_algorithm_2(limits: tuple[float, float], s_noise: float) -> None:
    """diffusers has churn only in Euler, and wrongly (see below). So the independent implementation
    follows the lines of the paper."""
    times = make_grid(LINEAR, "trailing", 15).time[:-1].tolist()
    found = ours("edm", times, churn=6.0, s_min=limits[0], s_max=limits[1], s_noise=s_noise)
    expected = algorithm_2(times, 6.0, *limits, s_noise, lambda k: DRAWS[1 + k])
    np.testing.assert_allclose(found[1], expected, rtol=0, atol=1e-8)


def test_diffusers_churn_lifts_after_it_has_asked_the_network() -> None:
    """Algorithm 2 calls the network at the lifted x. EulerDiscreteScheduler calls it at x before
    the lift, and uses that as the estimate at the lifted level."""
    own = scheduler("EulerDiscreteScheduler", timestep_spacing="trailing")
    plain, churned = theirs(own, 10), theirs(own, 10, s_churn=3.0)
    np.testing.assert_array_equal(
        plain[0].inputs[0], churned[0].inputs[0]
    )  # lifted, and called at the same x
    assert churned[0].times == plain[0].times  # and of the same level


def test_heun_on_flow_is_not_diffusers_heun_on_flow() -> None:
    """Theirs averages dx/dt, ours dy/dρ (as on every schedule): both are Heun's method, of order 2,
    in other variables."""
    import torch
    from diffusers import FlowMatchHeunDiscreteScheduler

    flow = make_schedule("flow")
    own = FlowMatchHeunDiscreteScheduler()
    own.set_timesteps(10)
    times = make_grid(flow, "trailing", 10).time[1:-1]
    mine = ours("heun", times, schedule=flow, prediction="flow")
    own.timesteps = torch.from_numpy(np.r_[times[:1], np.repeat(times[1:], 2)])
    own.sigmas = torch.from_numpy(np.r_[times[:1], np.repeat(times[1:], 2), 0.0, 0.0] / 1000)
    called, x = Recorder(), torch.from_numpy(DRAWS[0])
    with in_float64():
        for t in own.timesteps:
            x = own.step(
                torch.from_numpy(called(x.numpy(), np.full(len(x), float(t)))), t, x
            ).prev_sample
    np.testing.assert_allclose(
        mine[0].inputs[1], called.inputs[1], atol=1e-12
    )  # Euler's step is the same
    assert 1e-4 < np.abs(mine[1] - x.numpy()).max() < 0.5


def test_euler_on_flow() -> None:
    import torch
    from diffusers import FlowMatchEulerDiscreteScheduler

    flow = make_schedule("flow")
    own = FlowMatchEulerDiscreteScheduler()
    own.set_timesteps(10)
    times = make_grid(flow, "trailing", 10).time[:-1]
    own.timesteps, own.sigmas = (
        torch.from_numpy(times.copy()),
        torch.from_numpy(np.r_[times, 0.0] / 1000),
    )
    called, x = Recorder(), torch.from_numpy(DRAWS[0])
    with in_float64():
        for t in own.timesteps:
            x = own.step(
                torch.from_numpy(called(x.numpy(), np.full(len(x), float(t)))), t, x
            ).prev_sample
    agree(ours("euler", times, schedule=flow, prediction="flow"), (called, x.numpy()))


@pytest.mark.parametrize(
    ("name", "solver"),
    [("EDMEulerScheduler", "euler"), ("EDMDPMSolverMultistepScheduler", "dpmpp_2m")],
)
def test_edm_schedule_and_preconditioning(name: str, solver: str) -> None:
    edm = make_schedule("edm")
    own = scheduler(name)
    found = theirs(own, 18, start=DRAWS[0] * 80.0)
    program = make_program(edm, "edm", solver, 18, "karras")
    called = Recorder()
    # sigma spans 80 to 0.002, and theirs is recomputed from its logarithm.
    agree((called, run(program, called, DRAWS[0] * program.start)), found, atol=1e-7)


def test_which_named_grids_are_theirs() -> None:
    """`leading` is T//n in Euler and T//(n+1) in DPM-Solver++. `linspace` calls t = 0 in Euler but
    not in DPM-Solver++."""
    grids = {
        name: make_grid(LINEAR, name, 10).time[:-1].tolist()
        for name in ("leading", "linspace", "trailing")
    }
    for spacing, grid in grids.items():
        tables = {}
        for name in (
            "EulerDiscreteScheduler",
            "DPMSolverMultistepScheduler",
            "UniPCMultistepScheduler",
        ):
            own = scheduler(name, timestep_spacing=spacing)
            with in_float64():
                own.set_timesteps(10)
            tables[name] = own.timesteps.tolist()
        assert tables["EulerDiscreteScheduler"] == grid
        assert (
            (tables["DPMSolverMultistepScheduler"] == grid)
            == (tables["UniPCMultistepScheduler"] == grid)
            == (spacing == "trailing")
        )


def test_trailing_in_diffusers_has_one_step_too_many_for_some_counts() -> None:
    """np.arange with a float step: at n = 61 a 62nd time, -1, which wraps around the table. Ours
    has n."""
    own = scheduler("EulerDiscreteScheduler", timestep_spacing="trailing")
    with in_float64():
        own.set_timesteps(61)
    assert len(own.timesteps) == 62
    assert float(own.timesteps[-1]) == -1
    assert len(make_grid(LINEAR, "trailing", 61)) == 61


def test_karras_in_diffusers_dpm_rounds_the_time_and_keeps_the_level() -> None:
    own = scheduler("DPMSolverMultistepScheduler", use_karras_sigmas=True)
    with in_float64():
        own.set_timesteps(12)
    alpha, sigma = LINEAR.level(own.timesteps.numpy().astype(float))
    off = np.log(own.sigmas.numpy()[:-1] / (sigma / alpha))
    assert np.abs(off).max() > 5e-3
    program = make_program(LINEAR, "epsilon", "dpmpp_2m", 12, "karras")
    np.testing.assert_allclose(
        program.level[:, 1] / program.level[:, 0], own.sigmas.numpy()[:-1], rtol=1e-9
    )


def test_2m_at_its_first_and_last_step_is_ddim() -> None:
    grid = make_grid(LINEAR, "trailing", 5)
    M = dpmpp_2m(grid).M
    assert M[0, 0, 1] == M[-1, 0, 1] == 0
    assert (M[1:-1, 0, 1] < 0).all()
