"""More than one call a step, and no memory between steps.

A solver is where it calls the network, and how it weighs the estimates, see `steps`.
"""

from __future__ import annotations

import math

import numpy as np

from ...errors.arguments import number
from ..arrays import Float64
from ..grid import Grid
from ..update import Update
from .steps import fresh, intervals, singlestep


def heun(grid: Grid) -> Update:
    """Heun's method on dy/dρ = (y - D)/ρ (Karras et al. 2022, Algorithm 1). Order 2.

    2n - 1 calls onto the clean end. The trapezoid adds ½Δρ·(D_0 - D_1)/ρ' to Euler's y', which is
    ½(e^h - 1)·(D_1 - D_0).
    """
    return singlestep(grid, (1.0,), _trapezoid)


def _trapezoid(h: Float64) -> list[list[Float64]]:
    return [[], [0.5 * np.expm1(h)]]


def edm(
    grid: Grid,
    churn: float = 0.0,
    s_min: float = 0.0,
    s_max: float = math.inf,
    s_noise: float = 1.0,
) -> Update:
    """Stochastic Heun (Karras et al. 2022, Algorithm 2).

    Before each step noise lifts ρ = sigma/alpha to (1 + γ)·ρ, γ = min(churn/n, √2 - 1) if
    s_min ≤ ρ ≤ s_max. The lift is the noise of the row before; the first lift is the start's own
    noise, at s_noise 1. No lift goes beyond the schedule's noisiest knot.

    s_noise: S_noise of the paper, which leaves the marginals unless it is 1.
    """
    churn = number("churn", churn, 0.0, 1e6)
    s_noise = number("s_noise", s_noise, 0.0, 10.0)
    s_min = number("s_min", s_min, 0.0, 1e9)
    s_max = number("s_max", s_max, 0.0, math.inf)
    gamma = min(churn / len(grid), math.sqrt(2) - 1)
    if gamma == 0:
        return heun(grid)
    fresh(intervals(grid))  # which refuses a grid that climbs
    rho = np.exp(-0.5 * grid.log_snr)
    noisiest = grid.noisiest
    # In log-SNR the lift is a shift by -2·log(1 + γ). Levels that it does not move stay as they
    # are, bit for bit.
    lifted = np.maximum(grid.log_snr - 2 * math.log1p(gamma), noisiest)
    chosen = (rho >= s_min) & (rho <= s_max) & (rho > 0) & (lifted < grid.log_snr - 1e-9)
    time = grid.time.copy()
    alpha = grid.alpha.copy()
    sigma = grid.sigma.copy()
    if chosen.any():
        time[chosen], level = grid.between(lifted[chosen])
        alpha[chosen], sigma[chosen] = level.T
    return singlestep(
        grid,
        (1.0,),
        _trapezoid,
        start=Grid(grid.name, time, alpha, sigma, grid.schedule),
        kick_scale=s_noise,
    )


def kdpm2(grid: Grid) -> Update:
    """DPM-Solver-2 (Lu et al. 2022a, Algorithm 1, r = ½): the midpoint rule on dy/dρ = eps.

    Order 2. The midpoint is ρ_m = √(ρρ'). y' = y + (ρ' - ρ)·(y_m - D_1)/ρ_m weighs D_1 by
    (ρ - ρ')/ρ_m = 2·sinh(h/2).
    """
    return singlestep(grid, (0.5,), lambda h: [[], [2 * np.sinh(0.5 * h)]])


def dpmpp_2s(grid: Grid, r: float = 0.5) -> Update:
    """DPM-Solver++(2S) (Lu et al. 2022b, Algorithm 1). Order 2.

    D = (1 - 1/2r)·D_0 + 1/2r·D_1, D_1 at lambda + r·h.
    """
    r = number("r", r, 0.05, 0.95)
    return singlestep(grid, (r,), lambda h: [[], [-np.expm1(-h) / (2 * r)]])


def dpmpp_3s(grid: Grid) -> Update:
    """DPM-Solver-3 (Lu et al. 2022a, Algorithm 2, r = 1/3 and 2/3) in data prediction. Order 3.

    Data prediction: DPM-Solver++, Lu et al. 2022b, section 4.
    """
    r1 = 1 / 3
    r2 = 2 / 3

    def weights(h: Float64) -> list[list[Float64]]:
        # φ_2 of the paper, at the end and at the second point: the integral of a slope.
        linear = 1 + np.expm1(-h) / h
        linear_2 = 1 + np.expm1(-r2 * h) / (r2 * h)
        return [[], [r2 / r1 * linear_2], [np.zeros_like(h), linear / r2]]

    return singlestep(grid, (r1, r2), weights)


def dpmpp_2s_sde(grid: Grid, r: float = 0.5) -> Update:
    """SDE-DPM-Solver++ with one call inside the step (Lu et al. 2022b, Algorithm 1 on the SDE).

    The noise of both calls is one path: the draws are independent for the two halves, not for the
    inner point and the whole step.
    """
    r = number("r", r, 0.05, 0.95)
    return singlestep(grid, (r,), lambda h: [[], [-np.expm1(-2 * h) / (2 * r)]], sde=True)
