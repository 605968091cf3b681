"""What solvers share: the exact step between two levels, and the three forms of solvers around it.

With lambda = log(alpha/sigma) and h = lambda' - lambda, the reverse ODE over one interval is, for a
constant D (Lu et al. 2022b, eq. 8),

    x' = sigma'/sigma · x + alpha'·(1 - e^-h)·D

and the reverse SDE (their solvers for diffusion SDEs) has e^-h·sigma'/sigma before x, 1 - e^-2h
before D, and noise of variance sigma'²·(1 - e^-2h). A solver of higher order adds alpha' · Σ w_j
(D_j - D), D_j the estimates at other levels: the solver is its weights w. `epsilon_multistep` does
the same with eps. If h is infinite, from pure noise or onto the clean end, there are no weights and
the order is 1.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeAlias

import numpy as np

from ...errors import RequestError
from ..arrays import Bool, Float64
from ..curves import log_snr_of
from ..grid import Grid
from ..update import CLEAN, D, R, Update, Z, levels
from .quadrature import Int

EPS = (0.0, 1.0)
"""Pure noise, and a perfect estimate of it, in units of (x_0, eps)."""


def exact(here: Float64, there: Float64, sde: bool = False) -> tuple[Float64, Float64, Float64]:
    """Compute the exact step between levels [n, 2] for a constant D.

    Returns what multiplies x, D and z, each [n].
    """
    alpha, sigma = there.T
    keep = sigma / here[:, 1]
    # Between two levels of pure noise h is undefined: x stays, and D adds nothing.
    with np.errstate(over="ignore", invalid="ignore"):
        h = np.nan_to_num(half(there) - half(here), nan=0.0, posinf=np.inf, neginf=-np.inf)
        gain = alpha * -np.expm1(-h)
    if not sde:
        # Up to pure noise h is -inf, and the limit is that of alpha' - sigma'/sigma·alpha.
        return keep, np.where(np.isneginf(h), alpha - keep * here[:, 0], gain), np.zeros_like(h)
    share = fresh(h)
    return keep * np.exp(-h), alpha * share, sigma * np.sqrt(share)


def fresh(h: Float64) -> Float64:
    """Compute 1 - e^-2h = 1 - SNR/SNR' [n], the share of the next level's variance drawn afresh.

    Raises:
        RequestError: An h [n] is below 0.
    """
    if (h < 0).any():
        raise RequestError(
            "a grid that climbs can be walked without fresh noise only: use a deterministic solver."
        )
    return -np.expm1(-2 * h)


def half(level: Float64) -> Float64:
    """lambda = log(alpha/sigma) of levels [..., 2]."""
    return 0.5 * log_snr_of(level[..., 0], level[..., 1])


def intervals(grid: Grid) -> Float64:
    """[n]: h = lambda' - lambda; infinite from pure noise and onto the clean end."""
    return np.diff(0.5 * grid.log_snr)


def orders(grid: Grid, most: int) -> Int:
    """[n]: the number of points that each interval may use, its own included, up to `most`."""
    # An estimate counts if its lambda is finite: levels of pure noise have no place on the axis.
    finite = np.isfinite(grid.log_snr)
    usable = np.cumsum(finite[:-1])
    return np.where(finite[1:], np.clip(usable, 1, most), 1)


def remember(update: Update, count: int, value: tuple[float, float], push: Bool) -> None:
    """Make registers 1 … count a queue, which rows with `push` [n] move on and others keep.

    value: what the registers hold, in units of (x_0, eps). The caller fills register 1.
    """
    held = np.r_[0, np.cumsum(push)]
    for j in range(1, count + 1):
        update.M[:, j, j] = ~push
        if j > 1:
            update.M[:, j, j - 1] = push
        update.moments[held >= j, j] = value


def multistep(grid: Grid, w: Float64, sde: bool = False) -> Update:
    """x' = exact step + alpha' · Σ w_j (D_j - D), D_j the estimate j rows before; w [n, q].

    The registers hold the last q estimates.
    """
    level = levels(grid)
    q = w.shape[1]
    update = Update.blank(level, grid.time[:-1])
    M = update.M
    weighed = level[1:, :1] * w
    M[:, 0, 0], M[:, 0, D], M[:, 0, Z] = exact(level[:-1], level[1:], sde)
    # w_j (D_j - D): the weight that goes to D_j is taken from D, so the sum stays.
    M[:, 0, 1 : q + 1] = weighed
    M[:, 0, D] -= weighed.sum(1)
    if q:
        M[:, 1, D] = 1
        remember(update, q, CLEAN, np.ones(len(grid), bool))
    return update


def epsilon_multistep(grid: Grid, c: Float64, push: Bool | None = None) -> Update:
    """x' = exact step + Σ c_j (eps_j - eps), eps_j the noise estimate j rows before; c [n, q].

    eps = (x - alpha·D)/sigma. The registers hold the last q estimates.

    push: [n], the rows whose estimates are remembered; all if not given.
    """
    alpha = grid.alpha[:-1]
    sigma = grid.sigma[:-1]
    total = c.sum(1)
    q = c.shape[1]
    push = np.ones(len(grid), bool) if push is None else push
    update = multistep(grid, np.empty((len(grid), 0)))
    M = update.M
    # The row's own eps is not a register: its weight, -Σ c_j, goes to the x and D that make it.
    M[:, 0, 1 : q + 1] = c
    M[:, 0, 0] -= total / sigma
    M[:, 0, D] += total * alpha / sigma
    if q:
        remember(update, q, EPS, push)
        M[:, 1, 0] = push / sigma
        M[:, 1, D] = push * (-alpha / sigma)
    return update


Weights: TypeAlias = Callable[[Float64], Sequence[Sequence[Float64]]]
"""h [n] → for each point the weights [n] of D_1 - D_0, D_2 - D_0, …, see `singlestep`."""


def singlestep(
    grid: Grid,
    fractions: Sequence[float],
    weights: Weights,
    *,
    sde: bool = False,
    start: Grid | None = None,
    kick_scale: float = 1.0,
) -> Update:
    """Make steps with calls inside the interval, at lambda + r·h for r in `fractions`.

    The value of x at point s + 1 (the last point is the interval's end) is

        x_s = exact step from the interval's start + alpha_s · Σ_j w_sj (D_j - D_0)

    The start itself is eliminated: each row steps from the point before. Under the SDE all points
    lie on one path of the noise. The registers hold D_0, D_1, … within an interval, and nothing
    from one interval to the next. Intervals of infinite h take one call and are of first order.

    Args:
        weights: weights(h)[s] are the w_sj, each [n].
        start: Noisier levels, from which the intervals start instead of the grid's own. Noise lifts
            x there.
        kick_scale: That noise, as a multiple of its due deviation.
    """
    n = len(grid)
    S = 1 + len(fractions)
    start = grid if start is None else start
    end = levels(grid)[1:]
    h = half(end) - half(levels(start)[:-1])
    full = np.isfinite(h)
    time, level = _points(grid, start, fractions, full)
    # An infinite interval has no weights; h = 1 replaces it, so that nothing overflows.
    w = [[np.where(full, v, 0.0) for v in stage] for stage in weights(np.where(full, h, 1.0))]

    # One row a call: [interval, point]. An infinite interval keeps its first row only.
    M = np.zeros((n, S, R, R + 2))
    before = np.zeros((n, S, R, 2))
    excess = np.zeros((n, S))
    for s in range(S):
        there = end if s == S - 1 else np.where(full[:, None], level[s + 1], end)
        _fill_stage(M[:, s], level, there, w, full, s, sde)
        before[:, s, 0] = level[s]
        before[:, s, 1 : s + 1] = CLEAN
    if start is not grid:
        _lift(M, excess, end, levels(start), full, kick_scale)

    kept = np.column_stack([np.ones(n, bool), *[full] * (S - 1)])
    final = np.zeros((1, R, 2))
    final[0, 0] = end[-1]
    moments = np.concatenate([before[kept], final])
    return Update(time[kept], M[kept], moments, excess[kept], np.zeros(int(kept.sum())))


def _fill_stage(
    row: Float64,
    level: Float64,
    there: Float64,
    w: Sequence[Sequence[Float64]],
    full: Bool,
    s: int,
    sde: bool,
) -> None:
    """Fill the rows [n, R, R+2] that step from point s of every interval to the levels `there`.

    level: [S, n, 2], of the points. w, full: see `singlestep`.
    """
    # column[j] multiplies D_j: the newest estimate is D itself, the others are in registers.
    column = [*range(1, s + 1), D]
    # An infinite interval has no row s > 0. EPS is any level at which the exact step is finite.
    here = level[s] if s == 0 else np.where(full[:, None], level[s], EPS)
    keep, gain, row[:, 0, Z] = exact(here, there, sde)
    row[:, 0, 0] = keep
    row[:, 0, column[0]] = gain
    # The corrections at this point, less those that x carries along from the point before.
    last = len(level) - 1
    for j in range(1, s + 1):
        carried = keep * level[s][:, 0] * w[s - 1][j - 1] if j < s else 0.0
        change = there[:, 0] * w[s][j - 1] - carried
        row[:, 0, column[j]] += change
        row[:, 0, column[0]] -= change
    # Remember the estimates for the interval's later points.
    for j in range(s + 1 if s < last else 0):
        row[full, 1 + j, column[j]] = 1


def _lift(
    M: Float64, excess: Float64, end: Float64, start: Float64, full: Bool, kick_scale: float
) -> None:
    """Let the last row of each interval but the last lift x to the next interval's start.

    M: [n, S, R, R+2]. excess: [n, S]. end: [n, 2], the intervals' ends. start: [n+1, 2], where they
    start, and the last end.
    """
    n, S = excess.shape
    last = (np.arange(n - 1), np.where(full, S - 1, 0)[:-1])
    up = start[1:-1]
    # The forward process: scale the signal to the noisier level, then add the variance it lacks,
    # sigma_up²·(1 - SNR_up/SNR).
    M[*last, 0] *= (up[:, 0] / end[:-1, 0])[:, None]
    kick = up[:, 1] * np.sqrt(-np.expm1(2 * (half(up) - half(end[:-1]))))
    M[*last, 0, Z] = kick_scale * kick
    excess[last] = (kick_scale**2 - 1) * kick**2


def _points(
    grid: Grid, start: Grid, fractions: Sequence[float], full: Bool
) -> tuple[Float64, Float64]:
    """Find time [n, S] and level [S, n, 2] of every interval's calls of the network.

    An interval of infinite h calls once, at its start, whose time and level fill its other entries.
    """
    n = len(grid)
    first = start.log_snr[:-1]
    last = grid.log_snr[1:]
    time = np.empty((n, 1 + len(fractions)))
    level = np.empty((1 + len(fractions), n, 2))
    time[:] = start.time[:-1, None]
    level[:] = levels(start)[:-1]
    for s, r in enumerate(fractions, 1):
        if r == 1:  # the grid's own level, which need not be found again
            time[full, s], level[s, full] = grid.time[1:][full], levels(grid)[1:][full]
        elif full.any():
            time[full, s], level[s, full] = grid.between(
                first[full] + r * (last[full] - first[full])
            )
    return time, level
