"""What a bundle says of a network that was distilled: for how many calls, and at which levels."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from ..diffusion.grid import make_grid, spacing_of
from ..diffusion.program import Program
from ..diffusion.schedule import Schedule
from ..errors import RequestError
from ..errors.arguments import integer
from ..errors.messages import shown
from .rules import is_finite


@dataclass(frozen=True, eq=False)
class Distilled:
    """The numbers of network calls that a network was distilled for.

    Attributes:
        levels: By the number of calls, the times at which the network is called, falling.
        made: How it was distilled, as a JSON object.
    """

    levels: Mapping[int, tuple[float, ...]]
    made: Mapping[str, object]

    def spaced(
        self, steps: int | None, asked: object, up: bool, default: int, model: str
    ) -> tuple[int | None, tuple[float, ...]]:
        """Return the number of steps and the times of a grid.

        Args:
            steps: Their number; None for the default.
            asked: None, or times, which are taken as they are.
            up: Whether the grid is climbed.
            default: The model's number of steps.
            model: The model's name, for messages.

        Raises:
            RequestError: The network was not distilled for it.
        """
        if up:
            raise RequestError(
                f"{model} was distilled: it knows where paths end and not how they run, so it "
                "cannot invert an image. Invert with the network that it came from."
            )
        if asked is None:
            times = self.grid(default if steps is None else steps, model)
            return len(times), times
        times = spacing_of(asked)
        if isinstance(times, str):
            raise RequestError(
                f"{model} was distilled for levels of its own, got the grid {shown(times)}. Leave "
                "it out, or pass a list of times."
            )
        return steps, times

    def grid(self, steps: object, model: str) -> tuple[float, ...]:
        """Return the times of a grid of this many steps.

        Raises:
            RequestError: The network was not distilled for it.
        """
        known = ", ".join(map(str, sorted(self.levels)))
        remedy = f"Pass one of {known}, or a grid of times."
        count = integer("steps", steps, 1, None, remedy)
        if count not in self.levels:
            raise RequestError(
                f"`steps` must be one of {known}, for which {model} was distilled, got "
                f"{shown(steps)}. {remedy}"
            )
        return self.levels[count]

    def require_learned(self, program: Program, solver: str, model: str) -> None:
        """Check that a program on one of these grids calls the network at its levels alone.

        Raises:
            RequestError: It does not, as a program of a solver with calls inside a step.
        """
        learned = {time for times in self.levels.values() for time in times}
        others = sorted(set(program.call[:, 0].tolist()) - learned)
        if others:
            raise RequestError(
                f"{solver} calls the network between the levels that {model} was distilled for, at "
                f"the time {others[0]:g}. Take a solver with one call for each step, such as lcm "
                "or ddim, or pass a grid of times."
            )

    @classmethod
    def from_json(cls, value: Mapping[str, object], schedule: Schedule) -> Distilled:
        """Return what `to_json` made.

        Raises:
            RequestError: It is anything else, or a level is not on the schedule.
        """
        levels = value.get("levels")
        made = value.get("made")
        if not isinstance(levels, dict) or not levels or not isinstance(made, dict):
            raise RequestError("it must be an object with levels and made.")
        found: dict[int, tuple[float, ...]] = {}
        for calls, times in levels.items():
            if not re.fullmatch("[1-9][0-9]{0,2}", calls):
                raise RequestError(f"{calls[:20]!r} is not a number of calls, 1 to 999.")
            numbers = isinstance(times, list) and all(map(is_finite, times))
            if not numbers or len(times) != int(calls):
                raise RequestError(f"levels {calls!r} must be {calls} numbers.")
            # Made once, so that times that do not fall or leave the schedule are found now.
            make_grid(schedule, times)
            found[int(calls)] = tuple(map(float, times))
        return cls(found, made)

    def to_json(self) -> dict[str, object]:
        """Return the JSON value."""
        return {
            "levels": {str(calls): list(times) for calls, times in sorted(self.levels.items())},
            "made": dict(self.made),
        }
