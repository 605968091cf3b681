"""What solvers share: the exact step between two levels, and the three shapes that a solver has
around it.

With lambda = log(alpha/sigma) and h = lambda' - lambda, the reverse ODE over one interval is, for a
D that does not change (Lu et al. 2022b, eq. 8),

    x' = sigma'/sigma · x + alpha'·(1 - e^-h)·D

and the reverse SDE (their solvers for diffusion SDEs) has e^-h·sigma'/sigma before x, 1 - e^-2h
before D, and noise of variance sigma'²·(1 - e^-2h). A solver of higher order adds alpha' · Σ w_j
(D_j - D), D_j the estimates at other levels: it is its weights w. Those of `epsilon_multistep` do
the same with eps. Where h is infinite, from pure noise or onto the clean end, there are no weights
and the order is 1.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from ...errors import RequestError
from ..grid import Grid
from ..program import CLEAN, D, R, Update, Z, levels
from ..schedule import Float64, log_snr_of

EPS = (0.0, 1.0)
Bool = NDArray[np.bool_]
Int = NDArray[np.int_]


def exact(here: Float64, there: Float64, sde: bool = False) -> tuple[Float64, Float64, Float64]:
    """The exact step between levels [n, 2] for a constant D: what multiplies x, D and z, each
    [n]."""
    h = half(there) - half(here)
    alpha, sigma = there.T
    keep = sigma / here[:, 1]
    if not sde:
        return keep, alpha * -np.expm1(-h), np.zeros_like(h)
    share = fresh(h)
    return keep * np.exp(-h), alpha * share, sigma * np.sqrt(share)


def fresh(h: Float64) -> Float64:
    """1 - e^-2h = 1 - SNR/SNR': the share of the next level's variance that is drawn afresh. Raises
    RequestError where h < 0."""
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
    """[n]: points that each interval may use: its own, and one more an interval up to `most`; only
    levels of finite lambda count."""
    finite = np.isfinite(grid.log_snr)
    usable = np.cumsum(finite[:-1])
    return np.where(finite[1:], np.clip(usable, 1, most), 1)


def past(value: Float64, count: int) -> Float64:
    """[n, count]: the value at 1, 2, …, count levels before each; NaN where there is none."""
    n = len(value)
    padded = np.concatenate([np.full(count, np.nan), value])
    return (
        np.stack([padded[count - j : count - j + n] for j in range(1, count + 1)], -1)
        if count
        else np.empty((n, 0))
    )


def fit(nodes: Float64, moments: Float64, order: Int) -> Float64:
    """w [n, q] with Σ_j w_j · nodes_j^i = moments_i for i = 1 … order-1: a polynomial through the
    nodes (and 0), integrated.

    nodes, moments: [n, q], in units of the interval. Row by row the first order-1 nodes are used,
    and the other weights are 0.
    """
    w = np.zeros_like(nodes)
    for p in range(2, nodes.shape[1] + 2):
        rows = order == p
        if rows.any():
            powers = nodes[rows, None, : p - 1] ** np.arange(1, p)[:, None]
            w[rows, : p - 1] = np.linalg.solve(powers, moments[rows, : p - 1, None])[..., 0]
    return w


def growing(h: Float64, count: int) -> Float64:
    """[n, count]: ∫ over u in (0, 1) of h·e^(-h(1-u))·u^i for i = 1 … count: how the ODE weighs a
    polynomial D."""
    return _moments(h, count, np.exp(-h), h, -np.expm1(-h), lambda i, last: 1 - i * last / h)


def falling(h: Float64, count: int) -> Float64:
    """[n, count]: ∫ over u in (0, 1) of h·e^(-hu)·u^i for i = 1 … count: how the ODE weighs a
    polynomial eps."""
    return _moments(
        h, count, np.ones_like(h), -h, -np.expm1(-h), lambda i, last: i * last / h - np.exp(-h)
    )


def _moments(
    h: Float64,
    count: int,
    scale: Float64,
    a: Float64,
    first: Float64,
    by_parts: Callable[[int, Float64], Float64],
) -> Float64:
    """By parts where h is large, by the series of e^(au) where that would cancel."""
    k = np.arange(18)
    small = np.abs(h) < 1
    terms = np.where(small, a, 0.0)[:, None] ** k / np.cumprod(np.maximum(k, 1.0))
    result = np.empty((len(h), count))
    last = first
    for i in range(1, count + 1):
        last = np.where(small, scale * h * (terms / (i + 1 + k)).sum(1), by_parts(i, last))
        result[:, i - 1] = last
    return result


def remember(update: Update, count: int, value: tuple[float, float], push: Bool) -> None:
    """Registers 1 … count as a queue of what register 1 is given: filled by rows where `push`, kept
    by the others."""
    held = np.r_[0, np.cumsum(push)]
    for j in range(1, count + 1):
        update.M[:, j, j] = ~push
        if j > 1:
            update.M[:, j, j - 1] = push
        update.moments[held >= j, j] = value


def multistep(grid: Grid, w: Float64, sde: bool = False) -> Update:
    """x' = exact step + alpha' · Σ w_j (D_j - D), D_j the estimate j rows before; w [n, q].
    Registers: the last q estimates."""
    level = levels(grid)
    q = w.shape[1]
    update = Update.blank(level, grid.time[:-1])
    M = update.M
    weighed = level[1:, :1] * w
    M[:, 0, 0], M[:, 0, D], M[:, 0, Z] = exact(level[:-1], level[1:], sde)
    M[:, 0, 1 : q + 1] = weighed
    M[:, 0, D] -= weighed.sum(1)
    if q:
        M[:, 1, D] = 1
        remember(update, q, CLEAN, np.ones(len(grid), bool))
    return update


def epsilon_multistep(grid: Grid, c: Float64, push: Bool | None = None) -> Update:
    """x' = exact step + Σ c_j (eps_j - eps), eps_j the noise estimate (x - alpha·D)/sigma j rows
    before; c [n, q].

    push [n]: which rows' estimates are remembered; all if not given. Registers: the last q
    estimates.
    """
    alpha = grid.alpha[:-1]
    sigma = grid.sigma[:-1]
    total = c.sum(1)
    q = c.shape[1]
    push = np.ones(len(grid), bool) if push is None else push
    update = multistep(grid, np.empty((len(grid), 0)))
    M = update.M
    M[:, 0, 1 : q + 1] = c
    M[:, 0, 0] -= total / sigma
    M[:, 0, D] += total * alpha / sigma
    if q:
        remember(update, q, EPS, push)
        M[:, 1, 0] = push / sigma
        M[:, 1, D] = push * (-alpha / sigma)
    return update


Weights = Callable[[Float64], Sequence[Sequence[Float64]]]


def singlestep(
    grid: Grid,
    fractions: Sequence[float],
    weights: Weights,
    *,
    sde: bool = False,
    start: Grid | None = None,
    kick_scale: float = 1.0,
) -> Update:
    """Steps with calls inside the interval, at lambda + r·h for r in `fractions`; no memory from
    one interval to the next.

    weights(h)[s]: of D_1 - D_0, D_2 - D_0, … in the value of x at point s + 1 (the last one is the
    interval's end), each [n]:
        x_s = exact step from the interval's start + alpha_s · Σ_j w_sj (D_j - D_0)
    The start itself is eliminated: each row steps from the point before. Under the SDE all points
    lie on one path of the noise. Registers: D_0, D_1, …. Intervals of infinite h take one call and
    are of first order.
    start: noisier levels that the intervals start from instead of the grid's own; noise of
    kick_scale times the due deviation lifts x there.
    """
    n = len(grid)
    S = 1 + len(fractions)
    start = start or grid
    end = levels(grid)[1:]
    here = levels(start)[:-1]
    h = half(end) - half(here)
    full = np.isfinite(h)
    time, level = _points(grid, start, fractions, full)
    w = [[np.where(full, v, 0.0) for v in stage] for stage in weights(np.where(full, h, 1.0))]
    M = np.zeros((n, S, R, R + 2))
    before = np.zeros((n, S, R, 2))
    excess = np.zeros((n, S))
    for s in range(S):
        there = end if s == S - 1 else np.where(full[:, None], level[s + 1], end)
        row, column = M[:, s], [*range(1, s + 1), D]  # column[j] of D_j: the newest is D itself
        known = (
            level[s] if s == 0 else np.where(full[:, None], level[s], EPS)
        )  # EPS: any, for rows that are left out
        keep, gain, row[:, 0, Z] = exact(known, there, sde)
        row[:, 0, 0] = keep
        row[:, 0, column[0]] = gain
        for j in range(1, s + 1):
            change = there[:, 0] * w[s][j - 1] - (
                keep * level[s][:, 0] * w[s - 1][j - 1] if j < s else 0.0
            )
            row[:, 0, column[j]] += change
            row[:, 0, column[0]] -= change
        for j in range(s + 1 if s < S - 1 else 0):
            row[full, 1 + j, column[j]] = 1
        before[:, s, 0] = level[s]
        before[:, s, 1 : s + 1] = CLEAN
    if start is not grid:
        last = (np.arange(n - 1), np.where(full, S - 1, 0)[:-1])
        up = levels(start)[1:-1]
        M[*last, 0] *= (up[:, 0] / end[:-1, 0])[:, None]
        kick = up[:, 1] * np.sqrt(-np.expm1(2 * (half(up) - half(end[:-1]))))
        M[*last, 0, Z] = kick_scale * kick
        excess[last] = (kick_scale**2 - 1) * kick**2
    kept = np.column_stack([np.ones(n, bool), *[full] * (S - 1)])
    final = np.zeros((1, R, 2))
    final[0, 0] = end[-1]
    return Update(
        time[kept],
        M[kept],
        np.concatenate([before[kept], final]),
        excess[kept],
        np.zeros(int(kept.sum())),
    )


def _points(
    grid: Grid, start: Grid, fractions: Sequence[float], full: Bool
) -> tuple[Float64, Float64]:
    """time [n, S] and level [S, n, 2] at which each interval calls the network; the start's own
    where it calls once."""
    n = len(grid)
    first = start.log_snr[:-1]
    last = grid.log_snr[1:]
    time = np.empty((n, 1 + len(fractions)))
    level = np.empty((1 + len(fractions), n, 2))
    time[:] = start.time[:-1, None]
    level[:] = levels(start)[:-1]
    for s, r in enumerate(fractions, 1):
        if r == 1:
            time[full, s], level[s, full] = grid.time[1:][full], levels(grid)[1:][full]
        elif full.any():
            time[full, s], level[s, full] = grid.between(
                first[full] + r * (last[full] - first[full])
            )
    return time, level
