"""One call a step, and a memory of earlier estimates, which each solver weighs in its own way."""

from __future__ import annotations

import numpy as np

from ...errors.arguments import choice, flag, integer
from ..arrays import Float64
from ..grid import Grid
from ..update import D, Update, levels
from .quadrature import falling, fit, growing, past
from .steps import epsilon_multistep, exact, intervals, multistep, orders


def _ago(grid: Grid, count: int) -> tuple[Float64, Float64]:
    """h [n], with 1 for infinite ones, and the positions of `count` earlier estimates, [n, count].

    The positions are (lambda_{i-j} - lambda_i)/h, j = 1 … count: NaN if there is none.
    """
    h = intervals(grid)
    h = np.where(np.isfinite(h), h, 1.0)
    lam = np.where(np.isfinite(grid.log_snr), 0.5 * grid.log_snr, np.nan)[:-1]
    return h, (past(lam, count) - lam[:, None]) / h[:, None]


def _predictor(grid: Grid, order: int, variant: str = "bh2") -> Float64:
    """w [n, order-1], the weights of the earlier estimates.

    Three points: the polynomial through them. Two points: B(h)/2 times the slope, B(h) = 1 - e^-h
    ("bh2") or h ("bh1").
    """
    h, ago = _ago(grid, order - 1)
    points = orders(grid, order)
    w = fit(ago, growing(h, order - 1), points)
    # UniPC and DPM-Solver++ replace the exact integral of a line by B(h)/2, which has its order.
    two = points == 2
    w[two, 0:1] = 0.5 * _scale(h, variant)[two, None] / ago[two, 0:1]
    return w


def _scale(h: Float64, variant: str) -> Float64:
    return h if variant == "bh1" else -np.expm1(-h)


def dpmpp_2m(grid: Grid) -> Update:
    """DPM-Solver++(2M) (Lu et al. 2022b, Algorithm 2). Order 2.

    With h = lambda' - lambda, h_1 the step before, r = h_1/h, and D_1 the estimate before:

        x' = sigma'/sigma · x + alpha'·(1 - e^-h)·(D + (D - D_1)/2r)

    The first step, and those from pure noise or onto the clean end, have no D_1 to use.
    """
    h, ago = _ago(grid, 1)
    r = -ago[:, 0]
    second = orders(grid, 2) == 2
    # `multistep` takes x' for D alone, and adds alpha' · w · (D_1 - D).
    w = np.zeros((len(grid), 1))
    w[second, 0] = np.expm1(-h[second]) / (2 * r[second])
    return multistep(grid, w)


def dpmpp_3m(grid: Grid) -> Update:
    """DPM-Solver++ multistep with three estimates. Order 3.

    The Taylor terms of Lu et al. 2022b, eq. 9, each integrated exactly. Common code uses the second
    difference, which is half of the second derivative, as if it were the whole, and has order 2.
    """
    return multistep(grid, _predictor(grid, 3))


def dpmpp_2m_sde(grid: Grid) -> Update:
    """SDE-DPM-Solver++(2M) (Lu et al. 2022b, solvers for diffusion SDEs).

    Each step's noise is independent.
    """
    h, ago = _ago(grid, 1)
    two = orders(grid, 2) == 2
    # As in `dpmpp_2m`, with 1 - e^-2h before D.
    w = np.zeros_like(ago)
    w[two, 0] = -0.5 * np.expm1(-2 * h[two]) / ago[two, 0]
    return multistep(grid, w, sde=True)


def unipc(grid: Grid, order: int = 2, variant: str = "bh2", corrector: bool = True) -> Update:
    """UniPC (Zhao et al. 2023, UniP and UniC in data prediction).

    A predictor of `order` 2 or 3, and a corrector of one order more without an extra call. Each
    call serves the corrector of the step before and the predictor of the next. The corrector needs
    no x of the step before: it adds the change of the weights.

    variant: B(h) of steps that weigh one difference only; "bh1" is h, "bh2" is 1 - e^-h.
    """
    order = integer("order", order, 2, 3)
    variant = choice("variant", variant, ("bh1", "bh2"))
    corrector = flag("corrector", corrector)
    predicted = _predictor(grid, order, variant)
    if not corrector:
        return multistep(grid, predicted)
    # The corrector's polynomial has one more node, the step's end (1 in units of h), whose
    # estimate the next call brings.
    h, ago = _ago(grid, order - 1)
    points = orders(grid, order)
    nodes = np.column_stack([np.ones(len(grid)), ago])
    w = fit(nodes, growing(h, order), points + 1)
    w[points == 1, 0] = 0.5 * _scale(h, variant)[points == 1]
    w[:, 1:] -= predicted
    w[~np.isfinite(intervals(grid))] = 0

    update = multistep(grid, np.column_stack([predicted, np.zeros(len(grid))]))
    keep, _, _ = exact(levels(grid)[:-1], levels(grid)[1:])
    # At row i the weights of the interval before it: of D, D_2, D_3 against D_1, on top of x.
    change = (keep * grid.alpha[:-1])[1:, None] * w[:-1]
    row = update.M[1:, 0]
    row[:, D] += change[:, 0]
    row[:, 2 : order + 1] += change[:, 1:]
    row[:, 1] -= change.sum(1)
    return update


def deis(grid: Grid, order: int = 3) -> Update:
    """tAB-DEIS (Zhang & Chen 2023, eq. 14 and 15): the polynomial of eps in log ρ.

    order: 1 … 3, the number of points; 1 is DDIM.
    """
    order = integer("order", order, 1, 3)
    h, ago = _ago(grid, order - 1)
    # With u = (lambda - lambda_0)/h and ρ = e^-lambda, dρ = -ρ_0·h·e^(-hu) du: weights that fall.
    w = fit(ago, falling(h, order - 1), orders(grid, order))
    return epsilon_multistep(grid, -_rho(grid)[:-1, None] * grid.alpha[1:, None] * w)


def _rho(grid: Grid) -> Float64:
    """[n+1]: sigma/alpha; 1 at pure noise, which has no weights."""
    return grid.sigma / np.where(grid.alpha > 0, grid.alpha, grid.sigma)


def lms(grid: Grid, order: int = 4) -> Update:
    """Adams-Bashforth on dy/dρ = eps with the grid's own steps.

    Hairer, Nørsett & Wanner 1993, III.5; Karras et al. 2022, eq. 4.

    order: 1 … 4, the number of points.
    """
    order = integer("order", order, 1, 4)
    rho = _rho(grid)
    # On a flow, ρ = 1 is a level of its own too. That of pure noise has no weights.
    step = np.diff(rho)[:, None]
    step[step == 0] = 1.0
    # ∫ u^i du over (0, 1) = 1/(i+1): in ρ the ODE has no other weight.
    moments = np.broadcast_to(1 / np.arange(2.0, order + 1), (len(grid), order - 1))
    nodes = (past(rho[:-1], order - 1) - rho[:-1, None]) / step
    return epsilon_multistep(
        grid, grid.alpha[1:, None] * step * fit(nodes, moments, orders(grid, order))
    )


def plms(grid: Grid) -> Update:
    """PLMS (Liu et al. 2022, eq. 9 and 12): Adams-Bashforth in DDIM's transfer. Order 2.

    n + 1 calls. The weights are those of equal steps. The first step is taken twice, as Heun's.
    From pure noise the first step is DDIM's, and the second is the one taken twice.
    """
    # The row that repeats the first step, at its end.
    first = int(not np.isfinite(grid.log_snr[0]))
    twice = first + 1 if len(grid) > first + 1 else None
    if twice is not None:
        time, alpha, sigma = (
            np.insert(v, twice, v[twice]) for v in (grid.time, grid.alpha, grid.sigma)
        )
        grid = Grid(grid.name, time, alpha, sigma, grid.schedule)
    n = len(grid)
    push = np.ones(n, bool)
    weights = np.array(
        [[0, 0, 0], [-1 / 2, 0, 0], [-16 / 12, 5 / 12, 0], [-59 / 24, 37 / 24, -9 / 24]]
    )
    order = np.clip(np.cumsum(np.isfinite(grid.log_snr[:-1])), 1, None)
    step = np.diff(_rho(grid))
    # The repeated row makes the same step, and its estimate is not one of another level.
    if twice is not None:
        push[twice] = False
        step[twice] = step[twice - 1]
        order[twice:] -= 1
    order = np.where(grid.sigma[1:] > 0, np.minimum(order, 4), 1)
    w = weights[order - 1]
    # The first time the step used eps_0. Half of eps_0 - eps takes it to Heun's mean of both.
    if twice is not None:
        w[twice] = (-1 / 2, 0, 0)
    return epsilon_multistep(grid, (grid.alpha[1:] * step)[:, None] * w, push)
