"""The solvers. Each is a pure function (grid, options) → `Update`, read like an algorithm box.

ancestral: one call a step and no memory. singlestep: more calls and no memory. multistep: one call
and a memory. steps and quadrature: what they share.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence

from ...errors import RequestError
from ...errors.arguments import choice, instance, integer, number
from ...errors.keywords import bind, check_options, option_names
from ...errors.messages import shown
from ..grid import Grid, make_grid, spacing_of
from ..program import PREDICTIONS, Program, Update, assemble
from ..schedule import Schedule
from .ancestral import ddim, ddpm, euler, euler_ancestral, lcm, repaint
from .multistep import deis, dpmpp_2m, dpmpp_2m_sde, dpmpp_3m, lms, plms, unipc
from .singlestep import dpmpp_2s, dpmpp_2s_sde, dpmpp_3s, edm, heun, kdpm2

SOLVERS: Mapping[str, Callable[..., Update]] = {
    solver.__name__: solver
    for solver in (
        *(ddpm, ddim, euler, euler_ancestral, lcm, repaint),
        *(heun, edm, kdpm2, dpmpp_2s, dpmpp_3s, dpmpp_2s_sde),
        *(dpmpp_2m, dpmpp_3m, dpmpp_2m_sde, unipc, deis, lms, plms),
    )
}

STEPS = 50
"""Intervals of a grid that is given by its name alone, if the schedule has so many knots."""
LEAST_CLIP = 1e-300
"""The least bound on |D|, which must be above 0."""
ARGUMENTS = ("solver", "steps", "grid", "clip", "guidance", "guidance_interval")
"""What `make_program` takes besides a solver's own options."""


def options_of(solver: str) -> tuple[str, ...]:
    """List the names of a solver's own options."""
    return option_names(SOLVERS[solver], 1)


def make_program(
    schedule: Schedule,
    prediction: str,
    solver: str = "ddim",
    steps: int | None = None,
    grid: str | Sequence[float] | Grid = "trailing",
    *,
    clip: float | None = None,
    guidance: float = 1.0,
    guidance_interval: tuple[float, float] | None = None,
    **options: object,
) -> Program:
    """Make the program of `solver` on `steps` grid intervals, with its proof, see `Program`.

    Args:
        prediction: What the network predicts, see `precondition`.
        steps: None is the number of the times or of the `Grid`; for a name, 50 or all knots of a
            schedule with fewer.
        grid: A name, falling times, or a `Grid`.
        clip: The bound on |D|; None for no bound.
        guidance: The classifier-free guidance scale; 1 is none.
        guidance_interval: The noise levels (low, high] of sigma/alpha at which guidance holds; None
            for all (Kynkäänniemi et al. 2024, section 3).
        options: The solver's own.

    Raises:
        RequestError: Anything is unknown, with the nearest known name, or out of range.
    """
    instance("schedule", schedule, Schedule, "Make one with make_schedule.")
    choice("prediction", prediction, PREDICTIONS)
    solver = choice("solver", solver, SOLVERS)
    check_options(f"solver {solver!r}", options, options_of(solver), ARGUMENTS)
    if clip is not None:
        clip = number("clip", clip, LEAST_CLIP, float("inf"), "Pass a bound above 0, or None.")
    guidance = number("guidance", guidance, -1e3, 1e3)
    grid = _grid_of(schedule, grid, steps)
    # The solver's update holds for any network; `assemble` adds what depends on this one.
    update = bind(f"solver {solver!r}", SOLVERS[solver], (grid,), options)
    return assemble(
        solver,
        update,
        schedule,
        prediction,
        clip=clip,
        guidance=guidance,
        guidance_interval=guidance_interval,
    )


def _grid_of(schedule: Schedule, grid: str | Sequence[float] | Grid, steps: int | None) -> Grid:
    """Return the grid of `make_program`. Raises RequestError if it has another number of steps."""
    if not isinstance(grid, Grid):
        spacing = spacing_of(grid)
        if steps is None and isinstance(spacing, str):
            steps = min(STEPS, len(schedule))
        return make_grid(schedule, spacing, steps)
    if steps is not None and integer("steps", steps, 1) != len(grid):
        raise RequestError(
            f"grid {grid.name!r} has {len(grid)} steps, got steps={shown(steps)}. Leave `steps` "
            "out."
        )
    return grid


CALLS = {"heun": 2, "edm": 2, "kdpm2": 2, "dpmpp_2s": 2, "dpmpp_3s": 3, "dpmpp_2s_sde": 2}
"""Network calls an interval, for solvers that need more than one."""
EXTRA_CALLS = {"plms": 1}
"""Network calls that a solver adds once."""


def most_rows(solver: str, intervals: int, options: Mapping[str, object]) -> int:
    """Bound the number of rows of a program, without making it.

    Args:
        solver: A name of `SOLVERS`.
        intervals: Of the grid.
        options: The solver's own. One that the solver refuses may count as its default.

    Returns:
        As many rows as the program has, or a few more.
    """
    rows = intervals * CALLS.get(solver, 1) + EXTRA_CALLS.get(solver, 0)
    if solver != repaint.__name__:
        return rows
    resample = options.get("resample", inspect.signature(repaint).parameters["resample"].default)
    return rows * resample if isinstance(resample, int) else rows
