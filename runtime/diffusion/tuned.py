"""A solver that was fitted to one network by `export.tune`: a few numbers in the bundle, and a
program like any other."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..errors import RequestError
from .grid import make_grid
from .program import Program, R, assemble
from .schedule import Float64, Schedule
from .solvers.steps import multistep

TUNED = "tuned"
"""The solver's name."""
MEMORY = R - 1
"""Denoised estimates before the row's own that a row may weigh."""
LARGEST = 1e3
"""Of a weight; those found by fitting are of the order of 1."""


@dataclass(frozen=True, eq=False)
class Tuned:
    """time [K]: where the network is asked, falling. weights [K, 3]: w of x' = exact step +
    alpha'·Σ w_j (D_j - D), D_j the estimate j rows before.

    Whatever the weights are, the marginals are kept: they only move weight from one estimate of x_0
    to another. made: how it was fitted.
    """

    time: Float64
    weights: Float64
    made: Mapping[str, Any]

    def __post_init__(self) -> None:
        for name in ("time", "weights"):
            getattr(self, name).setflags(write=False)

    def __len__(self) -> int:
        return len(self.time)

    def program(self, schedule: Schedule, prediction: str, **how: Any) -> Program:
        """The program for a network of this kind, with its proof; how: clip, guidance and its
        interval. Raises RequestError, see `assemble`."""
        if not (np.abs(self.weights) <= LARGEST).all():
            raise RequestError(f"solver {TUNED!r}: a weight is beyond ±{LARGEST:g}.")
        return assemble(
            TUNED,
            multistep(make_grid(schedule, self.time.tolist()), self.weights),
            schedule,
            prediction,
            **how,
        )

    @classmethod
    def from_json(cls, calls: str, value: Any) -> Tuned:
        """What `to_json` made, under the number of its calls. Raises RequestError for anything
        else."""
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

    def to_json(self) -> dict[str, Any]:
        return {
            "time": self.time.tolist(),
            "weights": self.weights.tolist(),
            "made": dict(self.made),
        }


def _numbers(value: Any, count: int) -> bool:
    """Whether it is a list of so many numbers that float64 can hold."""
    return (
        isinstance(value, list)
        and len(value) == count
        and all(type(v) in (int, float) and abs(v) < 1e300 for v in value)
    )
