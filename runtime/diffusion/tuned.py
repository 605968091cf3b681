"""A solver that `export.tune` fitted to one network: a few numbers, which make a program."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..errors import RequestError
from .arrays import Float64
from .grid import make_grid
from .program import Program, R, assemble
from .schedule import Schedule
from .solvers.steps import multistep

TUNED = "tuned"
"""The solver's name."""
MEMORY = R - 1
"""Denoised estimates before the row's own that a row may weigh."""
LARGEST = 1e3
"""The largest weight that is accepted; fitted weights are of the order of 1."""


@dataclass(frozen=True, eq=False)
class Tuned:
    """The levels and the weights of history of a multistep solver with K calls.

    x' = exact step + alpha'·Σ w_j (D_j - D), D_j the estimate j rows before. Any weights keep the
    marginals: they only move weight from one estimate of x_0 to another.

    Attributes:
        time: [K], falling: where the network is called.
        weights: [K, 3], w.
        made: How it was fitted, as a JSON object.
    """

    time: Float64
    weights: Float64
    made: Mapping[str, Any]

    def __post_init__(self) -> None:
        for name in ("time", "weights"):
            getattr(self, name).setflags(write=False)

    def __len__(self) -> int:
        return len(self.time)

    def program(
        self,
        schedule: Schedule,
        prediction: str,
        *,
        clip: float | None = None,
        guidance: float = 1.0,
        guidance_interval: tuple[float, float] | None = None,
    ) -> Program:
        """Make the program for networks of this prediction, see `assemble`.

        Raises:
            RequestError: A weight is too large, or see `assemble`.
        """
        # Written so that NaN is refused too.
        if not (np.abs(self.weights) <= LARGEST).all():
            raise RequestError(f"solver {TUNED!r}: a weight is beyond ±{LARGEST:g}.")
        return assemble(
            TUNED,
            multistep(make_grid(schedule, self.time.tolist()), self.weights),
            schedule,
            prediction,
            clip=clip,
            guidance=guidance,
            guidance_interval=guidance_interval,
        )

    @classmethod
    def from_json(cls, calls: str, value: object) -> Tuned:
        """Return what `to_json` made, stored under the number of its calls.

        Raises:
            RequestError: It is anything else.
        """
        if not re.fullmatch("[1-9][0-9]{0,2}", calls):
            raise RequestError(
                f"its name must be a number of calls, 1 to 999, found {calls[:20]!r}."
            )
        if not isinstance(value, dict) or not isinstance(value.get("made"), dict):
            raise RequestError(
                f"it must be an object with time, weights and made, found {type(value).__name__}."
            )
        K = int(calls)
        weights = value.get("weights")
        rows = weights if isinstance(weights, list) else []
        if (
            not _numbers(value.get("time"), K)
            or len(rows) != K
            or not all(_numbers(row, MEMORY) for row in rows)
        ):
            raise RequestError(
                f"it must have {K} numbers as time and {K} rows of {MEMORY} numbers as weights."
            )
        return cls(np.array(value["time"], np.float64), np.array(rows, np.float64), value["made"])

    def to_json(self) -> dict[str, object]:
        """Return the JSON value."""
        return {
            "time": self.time.tolist(),
            "weights": self.weights.tolist(),
            "made": dict(self.made),
        }


def _numbers(value: object, count: int) -> bool:
    """Whether it is a list of `count` numbers that float64 can hold."""
    return (
        isinstance(value, list)
        and len(value) == count
        and all(type(v) in (int, float) and abs(v) < 1e300 for v in value)
    )
