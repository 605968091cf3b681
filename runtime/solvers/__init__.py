"""The solvers. Each is a pure function (grid, options) → `Update`: it is read like the paper's algorithm box.

ancestral: one call a step and no memory. singlestep: more calls and no memory. multistep: one call and a memory. steps: what they share.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ..arguments import bind, number
from ..errors import RequestError, unknown
from ..grid import make_grid
from ..program import Program, Update, assemble
from ..schedule import Schedule
from .ancestral import ddim, ddpm, euler, euler_ancestral, lcm
from .multistep import deis, dpmpp_2m, dpmpp_2m_sde, dpmpp_3m, lms, plms, unipc
from .singlestep import dpmpp_2s, dpmpp_2s_sde, dpmpp_3s, edm, heun, kdpm2

SOLVERS: Mapping[str, Callable[..., Update]] = {
    solver.__name__: solver
    for solver in (
        *(ddpm, ddim, euler, euler_ancestral, lcm),
        *(heun, edm, kdpm2, dpmpp_2s, dpmpp_3s, dpmpp_2s_sde),
        *(dpmpp_2m, dpmpp_3m, dpmpp_2m_sde, unipc, deis, lms, plms),
    )
}


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
