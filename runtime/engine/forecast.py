"""When the work that is left will be done: predictions of fair queueing over a cost curve. Pure
arithmetic, without a clock.

Under fair queueing all flows with work progress alike. So if flow f has W_f network rows left, then
by the time that a lone flow has been served V rows, all flows together have been served
G(V) = sum of min(W_f, V). Inside a flow the groups come one after another, the least first. Group i
is done at V_i, the work of its flow up to and with it, after G(V_i) rows of the network. What is
left is to turn rows into seconds.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from .cost import CostCurve
from .fair import Work

Float64 = NDArray[np.float64]


class _Layers(NamedTuple):
    """Rows and seconds of one graph, summed up while all its samples progress alike."""

    rows: Float64  # network rows done
    seconds: Float64

    @classmethod
    def of(cls, left: Float64, curve: CostCurve, guided: bool, pace: float) -> _Layers:
        """left: rows of this graph that each sample has left."""
        left = np.sort(left[left > 0])
        depth = np.diff(left, prepend=0.0)
        width = len(left) - np.arange(len(left), dtype=np.float64)
        rows = depth * width * (1 + guided)
        seconds = pace * depth * curve.many(width, guided)
        zero = np.zeros(1)
        return cls(
            np.concatenate([zero, np.cumsum(rows)]), np.concatenate([zero, np.cumsum(seconds)])
        )

    def after(self, rows: float) -> float:
        """Seconds until so many network rows are done."""
        return float(np.interp(rows, self.rows, self.seconds))


class Forecast:
    """Predictions for the samples of a moment. If no other comes, they hold."""

    def __init__(self, works: Iterable[Work], curve: CostCurve, pace: float = 1.0) -> None:
        """pace: seconds that pass for each second of the curve, on a machine that is busy."""
        self._works = list(works)
        self._curve = curve
        self._pace = pace
        self._finished: list[tuple[str, int]] | None = None
        plain = np.array([work.plain_left for work in self._works], np.float64)
        guided = np.array([work.guided_left for work in self._works], np.float64)
        self._plain = _Layers.of(plain, curve, False, pace)
        self._guided = _Layers.of(guided, curve, True, pace)
        self._widths = int(np.count_nonzero(plain)), int(np.count_nonzero(guided))
        self.samples = len(self._works)
        self.rows = float(self._plain.rows[-1] + self._guided.rows[-1])
        self.seconds = float(self._plain.seconds[-1] + self._guided.seconds[-1])
        self._flow_rows: dict[str, int] = defaultdict(int)
        for work in self._works:
            self._flow_rows[work.flow] += work.left

    def flow_rows(self, flow: str) -> int:
        """Network rows that a flow has left."""
        return self._flow_rows.get(flow, 0)

    def flow_samples(self, flow: str) -> int:
        """Samples that a flow has left."""
        return sum(work.flow == flow for work in self._works)

    def seconds_of(self, rows: float) -> float:
        """Seconds until so many network rows are done, of both graphs in proportion."""
        if not self.rows:
            return 0.0
        share = min(rows / self.rows, 1.0)
        plain = self._plain.after(share * self._plain.rows[-1])
        return plain + self._guided.after(share * self._guided.rows[-1])

    def served(self, flow_rows: float) -> float:
        """G(V): rows of all flows by the time that a flow was served `flow_rows`."""
        return sum(min(rows, flow_rows) for rows in self._flow_rows.values())

    def seconds_until_flow_served(self, flow_rows: float) -> float:
        """Seconds until a flow that has enough work was served so many network rows."""
        return self.seconds_of(self.served(flow_rows))

    def seconds_until_group(self, flow: str, group: int) -> float:
        """Seconds until all samples of a group are done; 0 if it has none left."""
        own = [work for work in self._works if work.group == group]
        if not own:
            return 0.0
        lefts: dict[int, int] = defaultdict(int)
        for work in self._works:
            if work.flow == flow:
                lefts[work.group] += work.left
        rank = lefts[group], group
        ahead = sum(left for other, left in lefts.items() if (left, other) <= rank)
        # Its longest sample takes a row a tick at most, and ticks are as wide as there is work.
        longest = max(own, key=lambda work: work.left)
        in_turn = longest.plain_left * self._tick_seconds(False)
        in_turn += longest.guided_left * self._tick_seconds(True)
        return min(self.seconds, max(in_turn, self.seconds_until_flow_served(ahead)))

    def seconds_until_done(self, samples: int, flow: str | None = None) -> float:
        """Seconds until so many samples are done, of one flow or of all."""
        if samples <= 0:
            return 0.0
        served = [rows for name, rows in self._finishes() if flow in (None, name)]
        if not served:
            return 0.0
        return self.seconds_until_flow_served(served[min(samples, len(served)) - 1])

    def _tick_seconds(self, guided: bool) -> float:
        """Seconds of a call as wide as the work of a graph allows."""
        width = min(self._widths[guided], self._curve.cap(guided))
        return self._pace * self._curve.seconds(width, guided) if width else 0.0

    def _finishes(self) -> list[tuple[str, int]]:
        """For each sample its flow, and V of its finish, ascending."""
        if self._finished is None:
            lefts: dict[int, int] = defaultdict(int)
            for work in self._works:
                lefts[work.group] += work.left
            sums: dict[str, int] = defaultdict(int)
            found = []
            for work in sorted(self._works, key=lambda w: (lefts[w.group], w.group, w.left)):
                sums[work.flow] += work.left
                found.append((work.flow, sums[work.flow]))
            self._finished = sorted(found, key=lambda entry: entry[1])
        return self._finished
