"""What a distilled run learns besides its `Options`: from which teacher, and for how many calls."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from runtime.diffusion.grid import trailing_knots
from runtime.diffusion.precondition import precondition
from runtime.diffusion.schedule import Schedule
from runtime.diffusion.solvers import SOLVERS
from runtime.diffusion.tuned import TUNED
from runtime.errors import RequestError, unknown
from runtime.errors.arguments import choice, elements, integer, number

from .options import option

METHODS = ("endpoint", "consistency", "data")
MOST_CALLS = 64
STEEPEST = 10.0
"""The largest factor by which D may change with F where a sample starts."""


@dataclass(frozen=True)
class Distillation:
    """How a student learns to answer in few network calls; see `trainer.objectives`.

    The teacher is the network that the run starts from.

    Attributes:
        levels: endpoint: the knots at which the student is called, noisiest first, one for each
            of `wanted_knots`; () for the other methods, which are called at those.

    Raises:
        RequestError: A value has the wrong type or is out of range.
    """

    calls: tuple[int, ...] = option((1, 2, 4), "numbers of network calls that the student is for")
    method: str = option(
        "endpoint",
        "endpoint: learn where the teacher's samples end; consistency: one answer along each path; "
        "data: the data's own images, by their conditions",
        METHODS,
    )
    guidance: float = option(1.0, "the guidance scale that is built in")
    trajectories: int = option(8192, "endpoint: samples of the teacher to learn from")
    solver: str = option("dpmpp_2m", "the teacher's solver")
    solver_steps: int = option(16, "the teacher's network calls for a sample")
    levels: tuple[int, ...] = option((), "")

    def __post_init__(self) -> None:
        choice("method", self.method, METHODS)
        rule = "numbers of calls, such as (1, 2, 4)"
        given = elements("calls", self.calls, rule)
        calls = tuple(integer("calls", count, 1, MOST_CALLS) for count in given)
        if not calls or len(set(calls)) < len(calls):
            raise RequestError(f"`calls` must be different numbers, such as 1,2,4, got {calls}.")
        checked: Mapping[str, Any] = {
            "calls": tuple(sorted(calls)),
            "guidance": number("guidance", self.guidance, -1e3, 1e3),
            "trajectories": integer("trajectories", self.trajectories, 1, 10**9),
            "solver_steps": integer("solver-steps", self.solver_steps, 1, 10**6),
            "solver": choice("solver", self.solver, [*SOLVERS, TUNED]),
            "levels": tuple(
                integer("levels", knot, 0, 10**6)
                for knot in elements("levels", self.levels, "knots, noisiest first")
            ),
        }
        for name, value in checked.items():
            object.__setattr__(self, name, value)
        if self.method == "data" and self.guidance != 1:
            raise RequestError(
                f"guidance {self.guidance:g} cannot be built in: the method data learns from "
                "images, not from the teacher's samples. Use --guidance 1."
            )

    def knots(self, calls: int, T: int) -> tuple[int, ...]:
        """Return the knots at which the student is called, noisiest first.

        They are those of `student_knots`, or the nearest of `levels`.

        Raises:
            RequestError: It does not learn this number of calls.
        """
        if calls not in self.calls:
            raise RequestError(
                f"this network is distilled for {listed(self.calls)} calls, got {calls}. Pass one "
                "of these."
            )
        wanted = student_knots(T, calls)
        if not self.levels:
            return wanted
        of = dict(zip(wanted_knots(self.calls, T), self.levels, strict=True))
        return tuple(of[knot] for knot in wanted)

    @property
    def paths(self) -> int:
        """How many of the teacher's paths are made before the first step."""
        return self.trajectories if self.method == "endpoint" else 0

    def require_fitting(self, T: int, half_lives: int) -> None:
        """Check what depends on the rest of a config.

        Args:
            T: Knots of the schedule.
            half_lives: Averages by half-life, of which consistency needs two.

        Raises:
            RequestError: There are more calls or higher levels than knots, a level is missing, or
                an average is.
        """
        if max(self.calls) > T:
            raise RequestError(f"`calls` must be at most {T}, the schedule's knots: {self.calls}.")
        wanted = len(wanted_knots(self.calls, T)) if self.method == "endpoint" else 0
        falling = all(a > b for a, b in itertools.pairwise((T, *self.levels)))
        if len(self.levels) != wanted or not falling:
            raise RequestError(
                f"`levels` must be {wanted} falling knots below {T}, got {self.levels}."
            )
        if self.method == "consistency" and half_lives < 2:
            raise RequestError(
                "consistency needs a second, shorter half-life: --ema-half-life 5000,900."
            )

    def to_json(self) -> dict[str, Any]:
        """Return the JSON value: every field, tuples as lists."""
        return with_lists(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Distillation:
        """Return what `to_json` wrote.

        Raises:
            RequestError: A key is not a field.
        """
        known = [f.name for f in dataclasses.fields(cls)]
        for key in value:
            if key not in known:
                raise unknown("key of distillation", key, known)
        given: dict[str, Any] = {
            k: tuple(v) if isinstance(v, list) else v for k, v in value.items()
        }
        return cls(**given)


def with_lists(value: Mapping[str, Any]) -> dict[str, Any]:
    """Return a record as JSON holds it: tuples as lists."""
    return {k: list(v) if isinstance(v, tuple) else v for k, v in value.items()}


def listed(calls: tuple[int, ...]) -> str:
    """Return numbers of calls as words: "1, 2 or 4"."""
    *first, last = map(str, calls)
    return f"{', '.join(first)} or {last}" if first else last


def student_knots(T: int, calls: int) -> tuple[int, ...]:
    """Return the knots at which a student is called that makes a sample in this many calls.

    They are those of the grid `trailing`. The second of two calls is at 3/4 of the schedule
    instead of its middle, which was better for emoji32 (docs/distillation.md).
    """
    noisiest = trailing_knots(T, 4)[:2] if calls == 2 and T >= 4 else trailing_knots(T, calls)
    return tuple(noisiest.tolist())


def wanted_knots(calls: tuple[int, ...], T: int) -> tuple[int, ...]:
    """Return the knots of all numbers of calls together, noisiest first."""
    return tuple(
        sorted({knot for count in calls for knot in student_knots(T, count)}, reverse=True)
    )


def require_readable(prediction: str, schedule: Schedule) -> None:
    """Check that one call can answer from pure noise.

    Raises:
        RequestError: The error of the prediction would be multiplied there.
    """
    c, _ = precondition(
        prediction,
        schedule.alpha[-1:],
        schedule.sigma[-1:],
        schedule.parameters.get("sigma_data", 0.5),
    )
    if abs(c[0, 2]) > STEEPEST:
        raise RequestError(
            f"a network that predicts {prediction} cannot be distilled on this schedule: where a "
            f"sample starts, the error of its prediction counts {abs(c[0, 2]):.0f} times in the "
            "image. Train the teacher with --prediction v, x0, flow or edm."
        )
