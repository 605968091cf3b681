"""One call a step and no memory: denoise, then put noise back, old or fresh."""

from __future__ import annotations

import itertools

import numpy as np

from ...errors.arguments import choice, integer, number
from ..grid import Grid
from ..update import D, Update, Z, levels
from .steps import fresh, intervals


def ddim(grid: Grid, eta: float = 0.0) -> Update:
    """DDIM (Song et al. 2021, eq. 12 and 16): re-noise D to the next level, partly afresh.

    For any (alpha, sigma), with ' the next level:

        s² = eta² · sigma'² · (1 - SNR/SNR')
        x' = alpha'·D + √(sigma'² - s²) · (x - alpha·D)/sigma + s·z

    Order 1. A grid that climbs inverts (eta = 0 only).

    eta: 0 … 1. 0 is deterministic, 1 is DDPM's posterior.
    """
    eta = number("eta", eta, 0.0, 1.0)
    update = Update.blank(levels(grid), grid.time[:-1])
    alpha = grid.alpha[:-1]
    sigma = grid.sigma[:-1]
    next_alpha = grid.alpha[1:]
    next_sigma = grid.sigma[1:]
    s = next_sigma * eta * np.sqrt(fresh(intervals(grid))) if eta else np.zeros_like(sigma)
    # √(sigma'² - s²) as a product, which keeps its digits where s is close to sigma'.
    keep = np.sqrt((next_sigma - s) * (next_sigma + s)) / sigma
    update.M[:, 0, 0] = keep
    update.M[:, 0, D] = next_alpha - keep * alpha
    update.M[:, 0, Z] = s
    return update


def ddpm(grid: Grid, variance: str = "fixed_small") -> Update:
    """DDPM's ancestral sampling (Ho et al. 2020, Algorithm 2 and eq. 7), on any grid.

    variance: "fixed_small" is the posterior's β̃ = sigma'²·(1 - SNR/SNR'). "fixed_large" is
        β = sigma²·(1 - SNR/SNR') of the forward step (their section 3.2), which leaves the
        marginals by β - β̃ a step. The step onto the clean end adds none.
    """
    variance = choice("variance", variance, ("fixed_small", "fixed_large"))
    update = ddim(grid, eta=1.0)
    if variance == "fixed_large":
        share = fresh(intervals(grid))
        inner = grid.sigma[1:] > 0
        # More noise than the next level has room for: the row declares the excess, β - β̃.
        update.M[:, 0, Z] = inner * grid.sigma[:-1] * np.sqrt(share)
        update.excess[:] = (
            inner * (grid.sigma[:-1] - grid.sigma[1:]) * (grid.sigma[:-1] + grid.sigma[1:]) * share
        )
    return update


def euler(grid: Grid) -> Update:
    """Euler's method on dy/dρ = eps, with y = x/alpha and ρ = sigma/alpha. Order 1.

    Karras et al. 2022, eq. 4 and Algorithm 1 without its lines 6-8. The same numbers as `ddim` with
    eta = 0; on `flow` they are those of Euler's method on dx/dt = eps - x_0.
    """
    return ddim(grid)


def euler_ancestral(grid: Grid, eta: float = 1.0) -> Update:
    """Euler down to ρ_down, then fresh noise up to ρ' (in the variables of Karras et al. 2022).

    ρ_up = eta·ρ'·√(1 - ρ'²/ρ²), ρ_down² = ρ'² - ρ_up². The same numbers as `ddim` with this eta
    (Song et al. 2021, eq. 16); with eta = 1, as `ddpm`.
    """
    return ddim(grid, eta)


def repaint(grid: Grid, jump: int = 5, resample: int = 4, eta: float = 1.0) -> Update:
    """RePaint's walk (Lugmayr et al. 2022, Algorithm 1), for inpainting; n · resample calls.

    DDIM, or DDPM with eta = 1, walks blocks of `jump` intervals, counted from the clean end,
    `resample` times each. Between two walks of a block x climbs back by the forward process,

        x' = (alpha'/alpha)·x + √(sigma'² - (alpha'·sigma/alpha)²)·z,

    which is fused into the row before. Each climb lets the painted part agree with the known part.
    """
    jump = integer("jump", jump, 1)
    resample = integer("resample", resample, 1, 1000)
    if resample > 1:
        fresh(intervals(grid))  # which refuses a grid that climbs
    n = len(grid)
    # The blocks' bounds; the noisiest block takes what `jump` does not divide.
    bounds = [0, *range(n % jump or jump, n + 1, jump)] if jump < n else [0, n]
    rows = np.concatenate(
        [np.tile(np.arange(a, b), resample) for a, b in itertools.pairwise(bounds)]
    )
    # The rows of one DDIM, in the order of the walk.
    level = levels(grid)
    once = ddim(grid, eta)
    update = Update.blank(level[np.r_[rows, n]], grid.time[rows])
    update.M[:] = once.M[rows]
    # After a block's last row comes its first again: that row climbs as well. Its own noise and
    # that of the climb are independent, so their variances add up.
    climbs = np.flatnonzero(np.diff(rows) <= 0)
    alpha, sigma = level[rows[climbs] + 1].T
    up_alpha, up_sigma = level[rows[climbs + 1]].T
    ratio = up_alpha / alpha
    row = update.M[climbs, 0] * (up_alpha / alpha)[:, None]
    row[:, Z] = np.sqrt(row[:, Z] ** 2 + (up_sigma - ratio * sigma) * (up_sigma + ratio * sigma))
    update.M[climbs, 0] = row
    return update


def lcm(grid: Grid, timestep_scaling: float = 10.0, sigma_data: float = 0.5) -> Update:
    """Multistep consistency sampling, for networks distilled to predict x_0 in one step.

    Song et al. 2023, Algorithm 1, as latent consistency models do it (Luo et al. 2023,
    Algorithm 3):

        x' = alpha'·f + sigma'·z,  f = c_skip·x + c_out·D
        c_skip = sigma_data²/(τ² + sigma_data²),  c_out = τ/√(τ² + sigma_data²)

    τ = timestep_scaling · t, t counted in knots from the least noisy one, where f = x.
    """
    scaling = number("timestep_scaling", timestep_scaling, 1e-6, 1e6)
    sigma_data = number("sigma_data", sigma_data, 1e-6, 1e6)
    fresh(intervals(grid))  # which refuses a grid that climbs
    update = Update.blank(levels(grid), grid.time[:-1])
    tau = scaling * grid.knot[:-1]
    norm = np.hypot(tau, sigma_data)
    c_skip = (sigma_data / norm) ** 2
    c_out = tau / norm
    update.M[:, 0, 0] = grid.alpha[1:] * c_skip
    update.M[:, 0, D] = grid.alpha[1:] * c_out
    update.M[:, 0, Z] = grid.sigma[1:]
    # f mixes x into a perfect D, so it is not x_0: declare how far the row leaves its level.
    update.bias[:] = grid.alpha[1:] * (c_skip * grid.alpha[:-1] + c_out - 1)
    update.excess[:] = (grid.alpha[1:] * c_skip * grid.sigma[:-1]) ** 2
    return update
