"""What an engine knows of its tickets: who waits, who runs, what is left. Its methods decide; they
take no lock and read no clock."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, field

from ..backends.base import Float32
from ..errors import BackendError, ClosedError, DeadlineError, Overloaded, UnnoiseError
from .admission import Limits, Refusal, deadline_refusal, refusal
from .cost import CostCurve
from .fair import FairQueue, Tick
from .forecast import Forecast, seconds_until_group
from .runner import Outcome, Sample
from .stats import Stats
from .ticket import State, Ticket, TicketStatus

PACE_S = 5.0
"""Seconds that the moving average of pace looks back."""
PACE_LEAST = 0.2
PACE_MOST = 5.0
"""A tick counts as no faster and no slower than this: the first of a size binds memory."""


@dataclass(eq=False, slots=True)
class Order:
    """A ticket that is not final.

    Attributes:
        ticket: The user's side of it.
        samples: One a request.
        result: [n, *S], filled as samples finish.
        deadline: In seconds of the engine's clock.
        left: Samples that are not finished.
    """

    ticket: Ticket
    samples: list[Sample]
    result: Float32
    deadline: float | None = None
    left: int = field(init=False)

    def __post_init__(self) -> None:
        self.left = len(self.samples)


@dataclass(eq=False, slots=True)
class Ending:
    """How a ticket ended."""

    order: Order
    state: State
    error: BaseException | None = None


class Ledger:
    """The tickets of an engine that are not final, and counters of all."""

    def __init__(self, curve: CostCurve, limits: Limits) -> None:
        self.curve = curve
        self.limits = limits
        self.orders: dict[int, Order] = {}
        self.gone: list[Sample] = []
        self.closing = False
        self._queue = FairQueue(curve, limits.live)
        self.slots = self._queue.live
        self._samples: dict[int, Sample] = {}
        self._forecast: Forecast | None = None
        self._pace = 1.0
        self._ticks = 0
        self._rows = 0
        self._dropped = 0
        self._accepted = 0
        self._states: Counter[State] = Counter()
        self._rejected: Counter[str] = Counter()

    def adopt(self, curve: CostCurve) -> None:
        """Use another curve. There must be no orders."""
        self.curve = curve
        self._queue = FairQueue(curve, self.limits.live)
        self.slots = self._queue.live
        self._forecast = None

    def check(self, order: Order, running: float) -> None:
        """Raise the error of a ticket that is not accepted.

        Args:
            order: The ticket.
            running: Seconds that the present network call has taken, 0 between calls.

        Raises:
            ClosedError: The engine is closing.
            Overloaded: A limit is met.
        """
        if self.closing:
            self._rejected["closed"] += 1
            raise ClosedError("the engine is closing and accepts nothing more.")
        works = [sample.work for sample in order.samples]
        if found := refusal(self.forecast(), works, self.limits, running):
            self.count(found)
            raise Overloaded(found.sentence, found.seconds)

    def deadline_refusal(self, order: Order, trial: FairQueue, deadline: float) -> Refusal | None:
        """Return the refusal of a ticket that is predicted to miss its deadline. Needs no lock.

        Args:
            order: The ticket.
            trial: A copy of the queue.
            deadline: Seconds from now.

        Returns:
            None if the ticket is predicted to be done in time.
        """
        works = [sample.work for sample in order.samples]
        seconds = seconds_until_group(trial, order.ticket.id, works, self._pace)
        return deadline_refusal(seconds, deadline)

    def count(self, refused: Refusal) -> None:
        """Count a refusal."""
        self._rejected[refused.why] += 1

    def snapshot(self) -> FairQueue:
        """A copy of the queue."""
        return self._queue.copy()

    def admit(self, order: Order, running: float) -> None:
        """Take in a ticket. Raises as `check` does."""
        self.check(order, running)
        self._accepted += 1
        self.orders[order.ticket.id] = order
        self._samples.update((sample.work.key, sample) for sample in order.samples)
        self._queue.add(sample.work for sample in order.samples)
        self._forecast = None

    def end(self, order: Order, state: State, error: BaseException | None = None) -> Ending:
        """Take out a ticket. The slots of its samples are to be freed before the next tick."""
        del self.orders[order.ticket.id]
        self._states[state] += 1
        for sample in order.samples:
            if self._samples.pop(sample.work.key, None) is not None:
                self._queue.remove(sample.work)
                self.gone.append(sample)
        self._forecast = None
        return Ending(order, state, error)

    def expire(self, now: float) -> list[Ending]:
        """Take out the tickets whose deadline has passed."""
        late = [o for o in self.orders.values() if o.deadline is not None and o.deadline <= now]
        return [
            self.end(order, "failed", DeadlineError("the deadline passed before it was done."))
            for order in late
        ]

    def pick(self, now: float) -> tuple[Tick, list[Sample]] | None:
        """Choose the next network call; None if there is nothing to do."""
        tick = self._queue.pick()
        if tick is None:
            return None
        samples = [self._samples[work.key] for work in tick.works]
        for sample in samples:
            if sample.ticket.started is None:
                sample.ticket.start(now)
        return tick, samples

    def note(self, tick: Tick, outcome: Outcome, seconds: float) -> list[Ending]:
        """Enter what a network call came to. Returns the tickets that ended.

        Samples that were cancelled while it ran are ignored.
        """
        self._ticks += 1
        self._rows += tick.rows
        self._dropped += outcome.dropped
        if not outcome.failed:
            ratio = seconds / self.curve.seconds(len(tick.works), tick.guided)
            ratio = min(max(ratio, PACE_LEAST), PACE_MOST)
            self._pace += -math.expm1(-seconds / PACE_S) * (ratio - self._pace)
        stepped = [sample.work for sample in outcome.stepped if sample.work.key in self._samples]
        self._queue.advance(stepped)
        self._forecast = None
        endings = []
        for sample, x in outcome.finished:
            if self._samples.pop(sample.work.key, None) is not None:
                order = self.orders[sample.ticket.id]
                order.result[sample.index] = x
                order.left -= 1
                if not order.left:
                    endings.append(self.end(order, "done"))
        for sample, error in outcome.failed:
            if sample.ticket.id in self.orders:
                order = self.orders[sample.ticket.id]
                endings.append(self.end(order, "failed", _typed(error)))
        return endings

    def forecast(self) -> Forecast:
        """The forecast of what is left. It is kept until something changes."""
        if self._forecast is None:
            self._forecast = Forecast(self._queue, pace=self._pace)
        return self._forecast

    def seconds_left(self, trial: FairQueue, ticket: Ticket) -> float:
        """Predicted seconds until a ticket is done. Needs no lock. trial: a copy of the queue."""
        return seconds_until_group(trial, ticket.id, pace=self._pace)

    def status(self, ticket: Ticket, now: float) -> TicketStatus:
        """Return the status of a ticket, without the prediction of its finish."""
        order = self.orders.get(ticket.id)
        left = sum(sample.work.left for sample in order.samples) if order else 0
        ahead = 0
        if order and ticket.started is None:
            before = (o.ticket for o in self.orders.values() if o.ticket.id < ticket.id)
            ahead = sum(other.started is None for other in before)
        end = now if ticket.ended is None else ticket.ended
        started = end if ticket.started is None else ticket.started
        return TicketStatus(
            state=ticket.state,
            rows=ticket.rows,
            rows_left=left,
            ahead=ahead,
            finish_seconds=0.0,
            queue_seconds=started - ticket.submitted,
            run_seconds=end - started,
        )

    def stats(self, tick_seconds: float) -> Stats:
        """Counters and gauges. tick_seconds: how long the call in progress has been running."""
        queue = self._queue
        return Stats(
            live=queue.started,
            waiting=len(queue) - queue.started,
            flows=queue.flows,
            backlog_rows=queue.rows,
            backlog_seconds=self.forecast().seconds,
            tick_seconds=tick_seconds,
            accepting=not self.closing,
            ticks=self._ticks,
            rows=self._rows,
            accepted=self._accepted,
            done=self._states["done"],
            failed=self._states["failed"],
            cancelled=self._states["cancelled"],
            rejected=dict(self._rejected),
            previews_dropped=self._dropped,
            pace=self._pace,
        )


def _typed(error: Exception) -> UnnoiseError:
    """The error of a failed step, as one of ours."""
    if isinstance(error, UnnoiseError):
        return error
    found = BackendError(f"a step failed: {type(error).__name__}: {error}.")
    found.__cause__ = error
    return found
