"""What a tick costs: seconds of the plain and of the guided graph by batch size."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

Points: TypeAlias = tuple[tuple[int, float], ...]

WITHIN = 1.05
"""The cap is the smallest batch whose seconds per sample are within this factor of the best."""
CHEAPER = 0.9
"""Plain rows ride in the guided graph if that takes no more than this share of both calls."""


@dataclass(frozen=True)
class CostCurve:
    """Seconds of a network call by its number of samples.

    Attributes:
        plain, guided: (samples, seconds) of each measured batch size, ascending.
        mergeable: Whether a plain row has the same bytes in the guided graph, at every size.
        same_bytes: Whether a row has the same bytes at every measured size.
        settled: Whether each size was measured twice alike. If not, the machine was busy.
    """

    plain: Points
    guided: Points
    mergeable: bool = False
    same_bytes: bool = True
    settled: bool = True

    def points(self, guided: bool) -> Points:
        """(samples, seconds) of a graph."""
        return self.guided if guided else self.plain

    def seconds(self, samples: int, guided: bool) -> float:
        """Seconds of a call; between measured sizes on the line that joins them."""
        points = self.points(guided)
        low = points[0]
        for high in points:
            if samples <= high[0]:
                share = (samples - low[0]) / (high[0] - low[0]) if high is not low else 0.0
                return low[1] + share * (high[1] - low[1])
            low = high
        return low[1] * samples / low[0]

    def many(self, samples: NDArray[np.float64], guided: bool) -> NDArray[np.float64]:
        """Seconds [n] to run a row of samples [n] each, in calls of at most the cap."""
        sizes, seconds = np.array(self.points(guided), np.float64).T
        cap = self.cap(guided)
        full = self.seconds(cap, guided) / cap
        return np.where(samples <= cap, np.interp(samples, sizes, seconds), samples * full)

    def cap(self, guided: bool) -> int:
        """Most samples of a call: the smallest size that is nearly as cheap a sample as any."""
        points = self.points(guided)
        best = min(seconds / size for size, seconds in points)
        return next(size for size, seconds in points if seconds / size <= WITHIN * best)

    def merges(self, plain: int, guided: int) -> bool:
        """Whether one call of the guided graph is cheaper than a call of each, and allowed."""
        if not (self.mergeable and plain and guided and plain + guided <= self.cap(True)):
            return False
        apart = self.seconds(plain, False) + self.seconds(guided, True)
        return self.seconds(plain + guided, True) < CHEAPER * apart

    def could_merge(self) -> bool:
        """Whether merging would be cheaper at any sizes, if it were allowed."""
        allowed = CostCurve(self.plain, self.guided, mergeable=True)
        cap = self.cap(True)
        sizes = range(1, cap)
        return any(allowed.merges(p, g) for p in sizes for g in range(1, cap - p + 1))


def no_cheaper(found: Sequence[tuple[int, float]]) -> bool:
    """Whether neither of the last two sizes is notably cheaper a sample than a smaller one."""
    each = [seconds / size for size, seconds in found]
    worse = [i > 0 and WITHIN * each[i] > min(each[:i]) for i in range(len(each))]
    return len(each) > 2 and all(worse[-2:])
