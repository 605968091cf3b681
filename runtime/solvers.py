"""The solvers. Each is a pure function (grid, options) → `Update`: it is read like the paper's algorithm box."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from .arguments import bind, number
from .errors import RequestError, unknown
from .grid import Grid, make_grid
from .program import D, Program, Update, Z, assemble, levels
from .schedule import Schedule


def ddim(grid: Grid, eta: float = 0.0) -> Update:
    """DDIM (Song et al. 2021, eq. 12 and 16): re-noise the denoised estimate to the next level, a share of it with fresh noise.

    eta 0 … 1: 0 is deterministic, 1 is DDPM's posterior. For any (alpha, sigma), with ' the next level:
        s² = eta² · sigma'² · (1 - SNR/SNR'),  x' = alpha'·D + √(sigma'² - s²) · (x - alpha·D)/sigma + s·z
    """
    eta = number("eta", eta, 0.0, 1.0)
    update = Update.blank(levels(grid), grid.time[:-1])
    alpha, sigma, next_alpha, next_sigma = grid.alpha[:-1], grid.sigma[:-1], grid.alpha[1:], grid.sigma[1:]
    s = eta * next_sigma * np.sqrt(-np.expm1(-np.diff(grid.log_snr)))
    keep = np.sqrt((next_sigma - s) * (next_sigma + s)) / sigma
    update.M[:, 0, 0], update.M[:, 0, D], update.M[:, 0, Z] = keep, next_alpha - keep * alpha, s
    return update


def ddpm(grid: Grid) -> Update:
    """DDPM's ancestral sampling with the posterior variance β̃ ("fixed small"; Ho et al. 2020, Algorithm 2 and eq. 7)."""
    return ddim(grid, eta=1.0)


SOLVERS: Mapping[str, Callable[..., Update]] = {s.__name__: s for s in (ddpm, ddim)}


def make_program(
    schedule: Schedule,
    prediction: str,
    solver: str = "ddim",
    steps: int | None = 50,
    grid: str | Sequence[float] = "trailing",
    *,
    clip: float | None = None,
    guidance: float = 1.0,
    **options: Any,
) -> Program:
    """The program of `solver` on `steps` grid intervals, proved (see `Program`).

    prediction: what the network answers, see `precondition`. clip: bound on |D|, None for none. guidance: 1 is none.
    options: the solver's own. Raises RequestError for anything unknown or out of range, with the nearest known name.
    """
    if solver not in SOLVERS:
        raise unknown("solver", solver, SOLVERS)
    if clip is not None and not clip > 0:
        raise RequestError(f"clip must be above 0, or None for no clipping, found {clip!r}.")
    guidance = number("guidance", guidance, -1e3, 1e3)
    update = bind(f"solver {solver!r}", SOLVERS[solver], make_grid(schedule, grid, steps), **options)
    return assemble(solver, update, schedule, prediction, clip=clip, guidance=guidance)
