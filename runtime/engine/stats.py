"""What an engine reports about itself, for metrics."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple


class TickReport(NamedTuple):
    """One network call."""

    guided: bool  # which graph ran
    samples: int  # samples that took a step
    rows: int  # network rows: 2 a sample in the guided graph
    seconds: float  # of the call, filling and reading the buffers included
    finished: int  # samples that finished


@dataclass(frozen=True)
class Stats:
    """Counters and gauges of an engine.

    Attributes:
        live: Samples that have taken a step and are not finished.
        waiting: Samples that have taken none.
        flows: Flows that have unfinished samples.
        backlog_rows: Network rows that are left.
        backlog_seconds: Predicted seconds that they take.
        tick_seconds: How long the tick in progress has been running; 0 if none is. A hung network
            shows here: compare with a bound for readiness.
        accepting: Whether `submit` may accept work: neither closing nor broken.
        ticks: Network calls since the start.
        rows: Network rows since the start.
        accepted: Tickets since the start. So are the next three.
        done, failed, cancelled: By how they ended; a deadline that passed is a failure.
        rejected: By reason: "samples", "rows", "seconds", "flow", "deadline", "closed".
        previews_dropped: Previews that were replaced before they were taken.
        pace: Seconds that pass for each second that the cost curve predicts.
    """

    live: int
    waiting: int
    flows: int
    backlog_rows: int
    backlog_seconds: float
    tick_seconds: float
    accepting: bool
    ticks: int
    rows: int
    accepted: int
    done: int
    failed: int
    cancelled: int
    rejected: Mapping[str, int]
    previews_dropped: int
    pace: float
