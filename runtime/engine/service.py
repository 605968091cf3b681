"""The engine: continuous batching for many users, with one inference thread.

    with Engine(Sampler.load("bundles/emoji32")) as engine:
        ticket = engine.submit(Request(seed=1, label="cat"), flow="alice")
        x = ticket.result()                     # [1, *S]

At each tick the inference thread picks rows of the requests that are under way or waiting, runs
them in one network call, and finishes those that have no row left. There is no waiting window. A
sample has the bytes that it has alone, whatever the neighbours.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

from ..backends.base import Backend
from ..bundle.bundle import Bundle
from .request import Request
from .ticket import Ticket


class Opened(Protocol):
    """A bundle on a backend, such as `runtime.Sampler`."""

    @property
    def bundle(self) -> Bundle: ...

    @property
    def backend(self) -> Backend: ...


@dataclass(frozen=True)
class Limits:
    """How much work an engine accepts before it raises `Overloaded`.

    Attributes:
        live: Samples that hold memory in the batch; the others wait without.
        samples: Samples that are not finished, of all flows.
        rows: Network rows that are left, of all flows; a guided row counts 2.
        seconds: Predicted seconds that those rows take. A ticket is accepted by an engine that
            has nothing to do, however long it takes.
        flow_share: The share of samples, rows and seconds that one flow may hold, 0 … 1.
    """

    live: int = 64
    samples: int = 512
    rows: int = 100_000
    seconds: float = 60.0
    flow_share: float = 0.5


class TickReport(NamedTuple):
    """One network call, for metrics."""

    guided: bool  # which graph ran
    samples: int  # samples that took a step
    rows: int  # network rows: 2 a sample in the guided graph
    seconds: float  # of the whole tick, bookkeeping included
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
        accepted: Tickets since the start. So are the next four.
        done, failed, cancelled: by how they ended; deadlines that passed are failures.
        rejected: by reason: "samples", "rows", "seconds", "flow", "deadline", "closed".
        previews_dropped: Previews that were replaced before they were taken.
        cap, cap_guided: Most samples of a call of the plain and of the guided graph.
        same_bytes: Whether the bytes of a sample were found to be independent of the batch's size
            when the engine started.
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
    rejected: Mapping[str, int] = field(default_factory=dict)
    previews_dropped: int = 0
    cap: int = 1
    cap_guided: int = 1
    same_bytes: bool = True


class Engine:
    """Runs requests of many users in shared batches. May be used from many threads at once.

    Attributes:
        bundle, backend: Those of the sampler.
        limits: How much work is accepted.
    """

    def __init__(
        self,
        sampler: Opened,
        limits: Limits | None = None,
        *,
        max_batch: int = 32,
        on_tick: Callable[[TickReport], object] | None = None,
    ) -> None:
        """Measure the cost of a tick, or take it from the cache, and start the inference thread.

        Args:
            sampler: A `runtime.Sampler`, or anything with its `bundle` and `backend`. The engine
                does not close it. Others may use it meanwhile.
            limits: How much work is accepted; None is `Limits()`.
            max_batch: Most samples of a network call, 1 to 1024. Measured costs may lower it.
            on_tick: Called after every tick in the inference thread, so it must be quick.
        """
        raise NotImplementedError

    def submit(
        self,
        requests: Request | Sequence[Request],
        flow: str = "",
        deadline: float | None = None,
        on_preview: bool | Callable[[Ticket], object] = False,
        every: int = 1,
    ) -> Ticket:
        """Accept requests, to be finished together as one ticket. Planning runs in this thread.

        Args:
            requests: One request, or a list of them.
            flow: Whose work it is, such as a token or a client's address. Flows share the network
                by rows, whatever they submit.
            deadline: Seconds from now; None has none.
            on_preview: True fills the ticket's mailbox with previews. A function is also called
                with the ticket after each deposit, in the inference thread, so it must be quick.
            every: Deposit a preview after every so many rows of a sample, and after its last.

        Raises:
            RequestError: A request cannot be used, or is larger than the limits ever allow.
            Overloaded: Too much work is waiting; its `retry_after` is in seconds.
            DeadlineError: The predicted finish is beyond the deadline.
            ClosedError: The engine is closing or closed.
        """
        raise NotImplementedError

    def stats(self) -> Stats:
        """Return counters and gauges, of one moment."""
        raise NotImplementedError

    def close(self, drain_s: float = 0.0) -> bool:
        """Stop. New work raises `ClosedError` at once; what was accepted may finish.

        Args:
            drain_s: Seconds that accepted tickets have to finish. The rest fail with `ClosedError`.

        Returns:
            Whether all finished. A second call waits for the same end.
        """
        raise NotImplementedError

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
