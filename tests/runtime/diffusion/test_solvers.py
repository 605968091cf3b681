"""DDPM and DDIM: order of convergence, exact moments, and diffusers' schedulers as an independent
implementation."""

import numpy as np
import pytest

from runtime import RequestError, make_program, make_schedule, run
from runtime.diffusion.grid import Grid, make_grid
from runtime.diffusion.program import D, Z
from runtime.diffusion.solvers import SOLVERS, ddim

MU, S = 0.3, 0.6
"""Data N(MU, S²), for which everything is known in closed form."""


def ideal(x: np.ndarray, alpha: float, sigma: float) -> np.ndarray:
    """E[x_0 | x_t] for the Gaussian data."""
    return MU + alpha * S**2 * (x - alpha * MU) / (alpha**2 * S**2 + sigma**2)


def even_grid(n: int, power: float) -> Grid:
    """log(alpha/sigma) from -5 to 4 in n intervals, evenly (power 1) or not; variance-preserving,
    finite end."""
    half = -5 + 9 * np.linspace(0, 1, n + 1) ** power
    alpha, sigma = np.sqrt(1 / (1 + np.exp(-2 * half))), np.sqrt(1 / (1 + np.exp(2 * half)))
    return Grid("test", np.arange(n + 1)[::-1].astype(float), alpha, sigma)


@pytest.mark.parametrize("power", [1.0, 1.4])
def test_ddim_converges_with_order_1_to_the_exact_map(power: float) -> None:
    errors = []
    for n in (96, 384):
        grid = even_grid(n, power)
        M, x = ddim(grid).M, np.array([1.7])
        for k in range(n):
            x = M[k, 0, 0] * x + M[k, 0, D] * ideal(x, grid.alpha[k], grid.sigma[k])
        (a, b), (s, t) = grid.alpha[[0, -1]], grid.sigma[[0, -1]]
        exact = b * MU + np.sqrt((b**2 * S**2 + t**2) / (a**2 * S**2 + s**2)) * (1.7 - a * MU)
        errors.append(abs(float(x[0] - exact)))
    slope = np.log(errors[0] / errors[1]) / np.log(4)
    assert abs(slope - 1) < 0.15, f"slope {slope:.3f}"  # the next order's share at n = 96


@pytest.mark.parametrize("eta", [0.0, 0.4, 1.0])
def test_for_one_picture_the_variance_is_exact_at_every_level(eta: float) -> None:
    """Data that is a single point: D is x_0 exactly, so x must be N(alpha·x_0, sigma²) at every
    level."""
    grid = even_grid(50, 1.2)
    M, variance, mean = ddim(grid, eta).M, grid.sigma[0] ** 2, grid.alpha[0] * MU
    for k in range(50):
        mean = M[k, 0, 0] * mean + M[k, 0, D] * MU
        variance = M[k, 0, 0] ** 2 * variance + M[k, 0, Z] ** 2
        np.testing.assert_allclose(
            [mean, variance], [grid.alpha[k + 1] * MU, grid.sigma[k + 1] ** 2], rtol=1e-12
        )


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_for_gaussian_data_the_variance_converges_to_the_datas(eta: float) -> None:
    """Mean and variance propagated exactly through M and the ideal denoiser, which is linear in x."""
    errors = []
    for n in (100, 400):
        grid = even_grid(n, 1.0)
        M, mean, variance = (
            ddim(grid, eta).M,
            grid.alpha[0] * MU,
            grid.alpha[0] ** 2 * S**2 + grid.sigma[0] ** 2,
        )
        for k in range(n):
            gain = grid.alpha[k] * S**2 / (grid.alpha[k] ** 2 * S**2 + grid.sigma[k] ** 2)
            slope = M[k, 0, 0] + M[k, 0, D] * gain
            mean = slope * mean + M[k, 0, D] * MU * (1 - gain * grid.alpha[k])
            variance = slope**2 * variance + M[k, 0, Z] ** 2
        assert abs(mean - grid.alpha[-1] * MU) < 1e-9
        errors.append(abs(variance - grid.alpha[-1] ** 2 * S**2 - grid.sigma[-1] ** 2))
    assert errors[0] < 0.05
    assert (
        3.4 < errors[0] / errors[1] < 4.6
    )  # order 1: four times the steps, a quarter of the error


def test_ddpm_is_the_papers_posterior() -> None:
    """Ho et al. 2020, eq. 7, in their own symbols, for consecutive knots."""
    schedule = make_schedule("linear")
    program = make_program(schedule, "epsilon", "ddpm", 1000, "linspace")
    beta = schedule.beta
    bar = schedule.alpha**2
    for row, t in ((0, 999), (500, 499), (998, 1)):
        np.testing.assert_allclose(
            program.update[row, 0, D], np.sqrt(bar[t - 1]) * beta[t] / (1 - bar[t]), rtol=1e-8
        )
        np.testing.assert_allclose(
            program.update[row, 0, 0],
            np.sqrt(1 - beta[t]) * (1 - bar[t - 1]) / (1 - bar[t]),
            rtol=1e-8,
        )
        np.testing.assert_allclose(
            program.update[row, 0, Z] ** 2, beta[t] * (1 - bar[t - 1]) / (1 - bar[t]), rtol=1e-7
        )


def network(x: np.ndarray, time: np.ndarray) -> np.ndarray:
    """Any smooth function of both will do."""
    return np.tanh(1.3 * x + np.sin(time / 300)[:, None]) * 0.9 + 0.1 * np.cos(x)


@pytest.fixture(scope="module")
def draws() -> np.ndarray:
    return np.random.Generator(np.random.Philox(key=8)).standard_normal((60, 2, 5))


def theirs(scheduler, steps: int, draws: np.ndarray, network=network, **step_options) -> np.ndarray:
    """A diffusers scheduler's own loop on tables in float64, with the given network and noise."""
    import torch
    from diffusers.schedulers import scheduling_ddim, scheduling_ddpm

    betas = torch.from_numpy(make_schedule("linear").beta.copy())
    scheduler.betas, scheduler.alphas = betas, 1 - betas
    scheduler.alphas_cumprod = torch.from_numpy(make_schedule("linear").alpha ** 2)
    scheduler.final_alpha_cumprod = scheduler.one = torch.tensor(1.0, dtype=torch.float64)
    scheduler.set_timesteps(steps)
    noises = iter(draws[1:])
    with pytest.MonkeyPatch.context() as patch:
        for module in (scheduling_ddim, scheduling_ddpm):
            patch.setattr(module, "randn_tensor", lambda *a, **k: torch.from_numpy(next(noises)))
        x = torch.from_numpy(draws[0])
        for t in scheduler.timesteps:
            F = torch.from_numpy(network(x.numpy(), np.full(len(x), float(t))))
            x = scheduler.step(F, t, x, **step_options).prev_sample
    return x.numpy()


def ours(
    steps: int,
    grid: str,
    draws: np.ndarray,
    solver: str = "ddim",
    clip: float | None = None,
    **options,
) -> np.ndarray:
    program = make_program(
        make_schedule("linear"), "epsilon", solver, steps, grid, clip=clip, **options
    )
    return run(program, network, draws[0], lambda k: draws[1 + k])


@pytest.mark.parametrize("clip", [None, 1.0])
@pytest.mark.parametrize(
    ("grid", "steps"), [("leading", 50), ("leading", 7), ("trailing", 50), ("trailing", 8)]
)
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_ddim_is_diffusers_ddim(
    grid: str, steps: int, eta: float, clip: float | None, draws: np.ndarray
) -> None:
    from diffusers import DDIMScheduler

    scheduler = DDIMScheduler(
        clip_sample=clip is not None, timestep_spacing=grid, set_alpha_to_one=True
    )
    expected = theirs(scheduler, steps, draws, eta=eta, use_clipped_model_output=True)
    # float64 on both sides; epsilon at the noisy end is divided by alpha ~ 6e-3.
    np.testing.assert_allclose(ours(steps, grid, draws, eta=eta, clip=clip), expected, atol=1e-10)


@pytest.mark.parametrize("clip", [None, 1.0])
@pytest.mark.parametrize("steps", [50, 8])
def test_ddpm_is_diffusers_ddpm(steps: int, clip: float | None, draws: np.ndarray) -> None:
    from diffusers import DDPMScheduler

    scheduler = DDPMScheduler(
        variance_type="fixed_small", clip_sample=clip is not None, timestep_spacing="leading"
    )
    expected = theirs(scheduler, steps, draws)
    # diffusers clamps the variance at 1e-20, which the last step reaches: std 1e-10 of noise at the
    # end.
    np.testing.assert_allclose(ours(steps, "leading", draws, "ddpm", clip), expected, atol=1e-9)


def test_clipped_ddim_keeps_the_unclipped_epsilon_in_diffusers_by_default_and_ours_does_not(
    draws: np.ndarray,
) -> None:
    from diffusers import DDIMScheduler

    default = theirs(DDIMScheduler(clip_sample=True, timestep_spacing="leading"), 20, draws)
    assert np.abs(ours(20, "leading", draws, clip=1.0) - default).max() > 1e-2


@pytest.mark.parametrize(("grid", "steps"), [("linspace", 20), ("trailing", 7)])
def test_diffusers_steps_to_t_minus_T_over_n_where_the_grid_goes_elsewhere(
    grid: str, steps: int, draws: np.ndarray
) -> None:
    """diffusers re-derives the previous timestep as t - T//n (issue 12633), which is another level
    than its own next timestep's.

    A network that knows x_0 keeps its eps along the exact trajectory: x is alpha·x_0 + sigma·eps at
    every call. That holds for ours but not for theirs.
    """
    from diffusers import DDIMScheduler

    schedule = make_schedule("linear")
    x_0, eps = draws[1], (draws[0] - schedule.alpha[-1] * draws[1]) / schedule.sigma[-1]
    asked: list[tuple[int, np.ndarray]] = []

    def knows(x: np.ndarray, time: np.ndarray) -> np.ndarray:
        asked.append((int(time[0]), x.copy()))
        return (x - schedule.alpha[int(time[0])] * x_0) / schedule.sigma[int(time[0])]

    def off() -> float:
        """The largest distance of x from the exact trajectory over all calls."""
        return max(
            np.abs(x - schedule.alpha[t] * x_0 - schedule.sigma[t] * eps).max() for t, x in asked
        )

    run(make_program(schedule, "epsilon", "ddim", steps, grid), knows, draws[0])
    ours_asked = [t for t, _ in asked]
    assert off() < 1e-12
    asked.clear()
    scheduler = DDIMScheduler(clip_sample=False, timestep_spacing=grid, set_alpha_to_one=True)
    theirs(scheduler, steps, draws, knows)
    assert [t for t, _ in asked] == ours_asked, "both ask at the same times"
    assert off() > 1e-3


def test_unknown_solvers_and_options_are_refused() -> None:
    schedule = make_schedule("cosine")
    with pytest.raises(RequestError, match="unknown solver 'dpmm'. Did you mean 'ddpm'"):  # noqa: RUF043
        make_program(schedule, "v", "dpmm")
    with pytest.raises(RequestError, match="Did you mean 'eta'"):
        make_program(schedule, "v", "ddim", etaa=1)
    with pytest.raises(RequestError, match="solver 'euler' takes no options"):
        make_program(schedule, "v", "euler", eta=1)
    for eta in (-0.1, 1.1, float("nan"), "1", True):
        with pytest.raises(RequestError, match="`eta` must be a number"):
            make_program(schedule, "v", "ddim", eta=eta)


def test_every_solver_says_where_it_is_from() -> None:
    for name, solver in SOLVERS.items():
        assert solver.__doc__, name
        assert "20" in solver.__doc__, f"{name} names no paper"


@pytest.mark.parametrize("schedule", ["flow", "cosine"])
@pytest.mark.parametrize("solver", sorted(SOLVERS))
def test_a_way_up_to_pure_noise_ends_there(solver: str, schedule: str) -> None:
    """A network that knows x_0 gives the noise of the point that the walk begins at."""
    found = make_schedule(schedule)
    found = found.zero_terminal_snr() if schedule == "cosine" else found
    assert not found.alpha[-1]
    grid = make_grid(found, "log_snr", 8).climbing()
    if make_program(found, "x0", solver, 8, clip=None).noisy.any():
        with pytest.raises(RequestError, match="a grid that climbs"):
            make_program(found, "x0", solver, grid=grid, clip=None)
        return
    # It extrapolates in ρ, which grows so fast here that float32's rounding grows with it.
    order = {"order": 1} if solver == "lms" else {}
    program = make_program(found, "x0", solver, grid=grid, clip=None, **order)
    x0, eps = np.random.default_rng(0).normal(size=(2, 1, 1, 2, 2)).astype(np.float32)
    alpha, sigma = program.level[0].astype(np.float32)
    end = run(program, lambda x, *_: np.broadcast_to(x0, x.shape), alpha * x0 + sigma * eps)
    np.testing.assert_allclose(end, eps * np.float32(found.sigma[-1]), atol=2e-4)


@pytest.mark.parametrize(
    ("solver", "options"), [("edm", {"churn": 10.0}), ("repaint", {"eta": 0.0, "resample": 2})]
)
def test_a_solver_that_its_options_make_noisy_cannot_climb(solver: str, options: dict) -> None:
    schedule = make_schedule("cosine")
    up = make_grid(schedule, "log_snr", 8).climbing()
    with pytest.raises(RequestError, match="use a deterministic solver"):
        make_program(schedule, "x0", solver, grid=up, **options)
    quiet = {"edm": {"churn": 0.0}, "repaint": {"eta": 0.0, "resample": 1}}[solver]
    assert not make_program(schedule, "x0", solver, grid=up, **quiet).noisy.any()


def test_lms_climbs_past_the_level_whose_rho_is_that_of_pure_noise() -> None:
    """A flow's middle has ρ = 1, which stands for pure noise too, of no weights."""
    schedule = make_schedule("flow")
    up = make_grid(schedule, "trailing", 2).climbing()
    assert up.alpha[-2] == up.sigma[-2]
    assert np.isfinite(make_program(schedule, "v", "lms", grid=up).update).all()
