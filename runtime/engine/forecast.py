"""When the work that is left will be done: predictions of fair queueing over a cost curve. Pure
arithmetic, without a clock.

Fair queueing serves the flow with the least tag, so all flows with work reach a tag F at about the
same time. A flow at tag S with W network rows left has then been served F - S of them, at least 0
and at most W. The sum over the flows is the network's work until then. Inside a flow the groups
come one after another, the least first, so each sample has a tag at which it is done. The cost
curve turns rows into seconds.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

from ..diffusion.arrays import Float64
from .cost import CostCurve
from .fair import FairQueue, Work

TRIAL_TICKS = 64
"""Ticks that a prediction for one group runs, which takes some milliseconds."""


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

    def after(self, rows: Float64) -> Float64:
        """Seconds until so many network rows are done."""
        return np.interp(rows, self.rows, self.seconds)


class Forecast:
    """Predictions for the samples of a moment, as if no others came.

    Attributes:
        samples, rows, seconds: What is left, and predicted seconds until it is done.
        pace: Seconds that pass for each second of the curve.
        tick_seconds: Seconds of the longer call, as wide as the work allows: no prediction is
            finer than that.
    """

    def __init__(self, queue: FairQueue, more: Iterable[Work] = (), pace: float = 1.0) -> None:
        """Take a snapshot.

        Args:
            queue: What is under way and waiting.
            more: Samples that are not in the queue, to be predicted as if they came now.
            pace: Seconds that pass for each second of the curve, on a machine that is busy.
        """
        self._works = [*queue.works(), *more]
        self._curve = queue.curve
        self.pace = pace
        left = np.array([work.left for work in self._works], np.float64)
        rows = np.array([len(work.guided) - work.row for work in self._works], np.float64)
        guided = left - rows
        plain = rows - guided
        self._left = plain, guided
        self._plain = _Layers.of(plain, self._curve, False, pace)
        self._guided = _Layers.of(guided, self._curve, True, pace)
        self._widths = int(np.count_nonzero(plain)), int(np.count_nonzero(guided))
        self.samples = len(self._works)
        self.tick_seconds = max(self._tick_seconds(False), self._tick_seconds(True))
        self.rows = float(self._plain.rows[-1] + self._guided.rows[-1])
        self.seconds = float(self._plain.seconds[-1] + self._guided.seconds[-1])
        self._flow_rows: dict[str, int] = defaultdict(int)
        for work in self._works:
            self._flow_rows[work.flow] += work.left
        self._tags = {flow: queue.tag(flow) for flow in self._flow_rows}
        self._finished: list[float] | None = None

    def flow_rows(self, flow: str) -> int:
        """Network rows that a flow has left."""
        return self._flow_rows.get(flow, 0)

    def flow_samples(self, flow: str) -> int:
        """Samples that a flow has left."""
        return sum(work.flow == flow for work in self._works)

    def end_of_call(self, seconds: float, running: float) -> float:
        """Seconds from now until the network call ends in which a moment lies.

        What is done is known at the end of a call, so room is made only then.

        Args:
            seconds: The moment, from the beginning of the present call.
            running: Seconds that this call has taken.
        """
        tick = self.tick_seconds
        if not tick:
            return seconds
        # Not less than a part of a call: one may take longer than predicted.
        return max(math.ceil(seconds / tick - 1e-6), 1) * tick - min(running, 0.9 * tick)

    def seconds_of(self, rows: float) -> float:
        """Seconds until so many network rows are done, of both graphs in proportion."""
        return float(self._seconds_of(np.array([float(rows)]))[0])

    def seconds_until_flow_served(self, flow: str, rows: float) -> float:
        """Seconds until a flow was served so many network rows."""
        tag = self._tags.get(flow, 0) + rows
        return self.seconds_of(self._served(np.array([float(tag)]))[0])

    def seconds_until_done(self, samples: int, flow: str | None = None) -> float:
        """Seconds until so many samples are done, of one flow or of all."""
        if samples <= 0:
            return 0.0
        pairs = zip(self._finishes(), self._works, strict=True)
        seconds = sorted(finish for finish, work in pairs if flow in (None, work.flow))
        return seconds[min(samples, len(seconds)) - 1] if seconds else 0.0

    def _finishes(self) -> list[float]:
        """Seconds until each sample is done."""
        if self._finished is None and self._works:
            tags = np.array(self._finish_tags(), np.float64)
            # A sample takes a row a tick at most, and ticks are as wide as there is work.
            in_turn = self._left[0] * self._tick_seconds(False)
            in_turn += self._left[1] * self._tick_seconds(True)
            seconds = np.maximum(in_turn, self._seconds_of(self._served(tags)))
            self._finished = np.minimum(seconds, self.seconds).tolist()
        return self._finished or []

    def _finish_tags(self) -> list[float]:
        """The tag of each sample's flow when the sample is done."""
        lefts: dict[int, int] = defaultdict(int)
        for work in self._works:
            lefts[work.group] += work.left
        before = dict(self._tags)
        found: dict[int, float] = {}
        for work in sorted(self._works, key=lambda w: (lefts[w.group], w.group, w.left)):
            before[work.flow] += work.left
            found[work.key] = before[work.flow]
        # While a sample takes its rows one by one, its flow pays for others that fill the ticks.
        plain = self._samples_a_tick(0)
        guided = self._samples_a_tick(1)
        for i, work in enumerate(self._works):
            paid = self._left[0][i] * plain.get(work.flow, 1.0)
            paid += 2 * self._left[1][i] * guided.get(work.flow, 1.0)
            found[work.key] = max(found[work.key], self._tags[work.flow] + paid)
        return [found[work.key] for work in self._works]

    def _samples_a_tick(self, graph: int) -> dict[str, float]:
        """Samples of each flow in one call of a graph, if all flows that have some share it."""
        pairs = zip(self._works, self._left[graph], strict=True)
        flows = Counter(work.flow for work, left in pairs if left)
        share = max(self._curve.cap(bool(graph)) / max(len(flows), 1), 1.0)
        return {flow: min(share, number) for flow, number in flows.items()}

    def _served(self, tags: Float64) -> Float64:
        """Network rows of all flows that are done by the time that each tag is the least."""
        begun = np.array([self._tags[flow] for flow in self._flow_rows], np.float64)
        rows = np.array([*self._flow_rows.values()], np.float64)
        return np.clip(tags[:, None] - begun, 0.0, rows).sum(axis=1)

    def _seconds_of(self, rows: Float64) -> Float64:
        if not self.rows:
            return np.zeros(len(rows))
        share = np.minimum(rows / self.rows, 1.0)
        plain = self._plain.after(share * self._plain.rows[-1])
        return plain + self._guided.after(share * self._guided.rows[-1])

    def _tick_seconds(self, guided: bool) -> float:
        """Seconds of a call as wide as the work of a graph allows."""
        width = min(self._widths[guided], self._curve.cap(guided))
        return self.pace * self._curve.seconds(width, guided) if width else 0.0


def seconds_until_group(
    queue: FairQueue, group: int, more: Iterable[Work] = (), pace: float = 1.0
) -> float:
    """Predicted seconds until all samples of a group are done; 0 if it has none.

    The policy itself runs for up to `TRIAL_TICKS` ticks. If the group is not done by then, the
    rate so far is taken for the rest.

    Args:
        queue: What is under way and waiting; it is left as it is.
        group: In the queue, or among `more`.
        more: Samples that are not in the queue, as if they came now.
        pace: Seconds that pass for each second of the curve.
    """
    trial = queue.copy()
    trial.add(work.copy() for work in more)
    own = [work for work in trial.works() if work.group == group]
    rows = sum(work.left for work in own)
    seconds = 0.0
    for _ in range(TRIAL_TICKS):
        if not any(work.left for work in own):
            return pace * seconds
        tick = trial.pick()
        assert tick is not None
        seconds += trial.curve.seconds(len(tick.works), tick.guided)
        trial.advance(tick.works)
    done = rows - sum(work.left for work in own)
    until_all = Forecast(queue, more).seconds
    return pace * min(until_all, seconds * rows / done if done else until_all)
