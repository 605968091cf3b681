"""The engine: continuous batching for many users, with one inference thread.

    with Engine(Sampler.load("bundles/emoji32")) as engine:
        ticket = engine.submit(Request(seed=1, label="cat"), flow="alice")
        x = ticket.result()                     # [1, *S]

At each tick the inference thread picks rows of running and waiting requests, and runs them in one
network call. Requests that have no row left are finished. There is no waiting window. The bytes of
a sample do not depend on its neighbours.
"""

from __future__ import annotations

import atexit
import itertools
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Protocol

import numpy as np

from ..backends.base import Backend
from ..backends.forks import ForkGuard
from ..bundle.bundle import Bundle
from ..errors import BackendError, ClosedError, DeadlineError, RequestError
from ..errors.arguments import enough_memory, function, instance, integer, number, wait_seconds
from ..errors.keywords import named
from ..errors.messages import refused
from .admission import Limits
from .cost import CostCurve
from .costs import Costs
from .expand import listed
from .fair import Work
from .job import Job
from .ledger import Ending, Ledger, Order
from .probe import Clock
from .request import Planner, Request
from .runner import Runner, Sample
from .stats import Stats, TickReport
from .ticket import Ticket, TicketStatus, guarded

JOIN_S = 10.0
"""Seconds that `close` waits for a network call that hangs."""


class Opened(Protocol):
    """A bundle on a backend, such as `runtime.Sampler`."""

    @property
    def bundle(self) -> Bundle: ...

    @property
    def backend(self) -> Backend: ...


class Engine:
    """Runs requests of many users in shared batches. May be used from many threads at once.

    Attributes:
        bundle, backend: Those of the sampler.
        limits: How much work is accepted.
        curve: What a tick costs. If nothing was cached, it is rough until the engine had time to
            measure more.
    """

    @named
    def __init__(
        self,
        sampler: Opened,
        limits: Limits | None = None,
        *,
        max_batch: int = 32,
        curve: CostCurve | None = None,
        on_tick: Callable[[TickReport], object] | None = None,
        clock: Clock = time.monotonic,
    ) -> None:
        """Measure the cost of a tick, or take it from the cache, and start the inference thread.

        Args:
            sampler: A `runtime.Sampler`, or anything with its `bundle` and `backend`. The engine
                does not close it. Others may use it meanwhile.
            limits: How much work is accepted; None is `Limits()`.
            max_batch: Most samples of a network call, 1 to 1024. Measured costs may lower it.
            curve: What a tick costs; None measures it.
            on_tick: Called after every tick in the inference thread, so it must be quick.
            clock: Seconds, for deadlines and statistics.

        Raises:
            RequestError: An argument cannot be used.
            BackendError: The machine cannot run the bundle.
        """
        max_batch = integer("max_batch", max_batch, 1, 1024)
        limits = Limits() if limits is None else instance("limits", limits, Limits)
        if not isinstance(getattr(sampler, "bundle", None), Bundle):
            raise refused("sampler", "a Sampler", sampler, "Sampler.load opens a bundle.")
        self.bundle = sampler.bundle
        self.backend = sampler.backend
        self.limits = limits.checked()
        self._guard = ForkGuard(self.backend.name, self)
        self._guard.check()
        self._costs = Costs(self.bundle, self.backend)
        if curve is not None:
            curve = instance("curve", curve, CostCurve, "Leave it out to measure it.")
        self._clock = function("clock", clock)
        self.curve = curve or self._costs.curve(max_batch)
        self._learned: CostCurve | None = None
        self._on_tick = on_tick if on_tick is None else function("on_tick", on_tick)
        self._planner = Planner(self.bundle)
        self._ledger = Ledger(self.curve, self.limits)
        self._runner = self._new_runner()
        self._tickets = itertools.count(1)
        self._keys = itertools.count()
        self._begun: float | None = None
        self._stopped = False
        self._all_finished = True
        self._changed = threading.Condition()
        # A daemon, so that an engine that nobody closes cannot keep the process alive; closed at
        # exit, so that no network call is cut off there.
        self._thread = threading.Thread(target=self._serve, name="unnoise-engine", daemon=True)
        atexit.register(self.close)
        self._thread.start()

    @named
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
            flow: Whose work it is, such as a token or a client's address. Flows share the rows of
                the network alike.
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
        self._guard.check()
        flow = instance("flow", flow, str, "Pass a token or an address.")
        every = integer("every", every, 1)
        if deadline is not None:
            deadline = number("deadline", deadline, 0.0, 1e9)
        called = None if isinstance(on_preview, bool) else function("on_preview", on_preview)
        entries = [requests] if isinstance(requests, Request) else listed(requests)
        self.limits.check_samples(len(entries))
        jobs = [self._planner.job(request) for request in entries]
        order = self._order(jobs, flow, every if on_preview else 0, called)
        if deadline is not None:
            order.deadline = order.ticket.submitted + deadline
            with self._changed:
                self._ledger.check(order, self._running())
                trial = self._ledger.snapshot()
            # Takes some milliseconds, during which the engine keeps running.
            if refused := self._ledger.deadline_refusal(order, trial, deadline):
                with self._changed:
                    self._ledger.count(refused)
                raise DeadlineError(refused.sentence, refused.seconds)
        with self._changed:
            self._ledger.admit(order, self._running())
            ending = None if jobs else self._ledger.end(order, "done")
            self._changed.notify_all()
        if ending is not None:
            self._tell([ending])
        return order.ticket

    def cancel(self, ticket: Ticket) -> bool:
        """Stop a ticket, see `Ticket.cancel`. Raises RequestError for another engine's ticket."""
        self._check_own(ticket)
        with self._changed:
            order = self._ledger.orders.get(ticket.id)
            endings = [] if order is None else [self._ledger.end(order, "cancelled")]
            self._changed.notify_all()
        self._tell(endings)
        return ticket.state == "cancelled"

    def status(self, ticket: Ticket) -> TicketStatus:
        """Return where a ticket stands, see `Ticket.status`. Raises as `cancel` does."""
        self._check_own(ticket)
        with self._changed:
            found = self._ledger.status(ticket, self._clock())
            # Nothing is left to predict, so the queue need not be copied.
            if ticket.id not in self._ledger.orders:
                return found
            trial = self._ledger.snapshot()
        return replace(found, finish_seconds=self._ledger.seconds_left(trial, ticket))

    def stats(self) -> Stats:
        """Return counters and gauges, of one moment."""
        with self._changed:
            return self._ledger.stats(self._running())

    def _check_own(self, ticket: Ticket) -> None:
        # Another engine's ticket has a number of the same row, which is somebody else's here.
        if not instance("ticket", ticket, Ticket).is_of(self):
            raise RequestError(f"ticket {ticket.id} is another engine's. Ask the ticket itself.")

    def _running(self) -> float:
        """Seconds that the present network call has taken, 0 between calls. With the lock held."""
        return 0.0 if self._begun is None else self._clock() - self._begun

    def close(self, drain_s: float = 0.0) -> bool:
        """Stop. New work raises `ClosedError` at once; what was accepted may finish.

        Args:
            drain_s: Seconds that accepted tickets have to finish. The rest fail with `ClosedError`.
                It is no time at all in the inference thread, such as in a ticket's callback:
                nothing would run meanwhile.

        Returns:
            Whether none had to fail. If several calls wait, the shortest wait decides for all.

        Raises:
            RequestError: `drain_s` is not a number.
        """
        drain_s = wait_seconds("drain_s", drain_s)
        if self._guard.forked:
            return True
        outside = threading.current_thread() is not self._thread
        with self._changed:
            self._ledger.closing = True
            if outside:
                self._changed.wait_for(lambda: not self._ledger.orders, timeout=drain_s)
            endings = self._fail_all(ClosedError("the engine was closed before it was done."))
        self._tell(endings)
        if outside:
            self._thread.join(JOIN_S)
        atexit.unregister(self.close)
        return self._all_finished

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _order(
        self,
        jobs: Sequence[Job],
        flow: str,
        every: int,
        on_preview: Callable[[Ticket], object] | None,
    ) -> Order:
        """A new ticket for some jobs."""
        group = next(self._tickets)
        works = [Work(next(self._keys), flow, group, job.table.guided.tobytes()) for job in jobs]
        rows = sum(work.left for work in works)
        self.limits.check_rows(rows)
        ticket = Ticket(self, group, flow, len(jobs), rows, self._clock(), on_preview)
        samples = [
            Sample(ticket, i, job, work, every)
            for i, (job, work) in enumerate(zip(jobs, works, strict=True))
        ]
        with enough_memory(f"a result of {len(jobs)} samples", "Submit fewer at a time."):
            result = np.zeros((len(jobs), *self.bundle.sample_shape), np.float32)
        return Order(ticket, samples, result)

    def _serve(self) -> None:
        """The inference thread."""
        try:
            while self._tick():
                pass
        except BaseException as error:
            with self._changed:
                self._ledger.closing = True
                found = BackendError(f"the engine stopped: {type(error).__name__}: {error}.")
                endings = self._fail_all(found)
            self._tell(endings)
            raise

    def _adopt(self) -> None:
        """Use the curve that was learned, unless work has come. Then it is kept for later."""
        with self._changed:
            if self._learned is not None and not self._wanted():
                self.curve = self._learned
                self._learned = None
                self._ledger.adopt(self.curve)
                self._runner = self._new_runner()

    def _new_runner(self) -> Runner:
        """An empty batch with room for the largest call."""
        room = max(self.curve.cap(False), self.curve.cap(True))
        shape = self.bundle.sample_shape
        cut = self._costs.known_streams
        return Runner(self.backend, shape, self._ledger.slots, room, cut)

    def _wanted(self) -> bool:
        """Whether the inference thread has something to do."""
        return bool(self._stopped or self._ledger.orders or self._ledger.gone)

    def _tick(self) -> bool:
        """Wait for work and run one network call. Returns False if the engine is to stop."""
        while (self._learned or self._costs.learning) and not self._wanted():
            self._learned = self._learned or self._costs.learn(self._wanted)
            self._adopt()
        with self._changed:
            ledger = self._ledger
            self._changed.wait_for(self._wanted)
            if self._stopped:
                return False
            now = self._clock()
            late = ledger.expire(now)
            if late:  # `close` may be waiting for the last of them
                self._changed.notify_all()
            gone = ledger.gone
            ledger.gone = []
            picked = ledger.pick(now)
            self._begun = now if picked else None
        self._tell(late)
        self._runner.free(gone)
        if picked is None:
            return True
        tick, samples = picked
        begun = self._clock()
        outcome = self._runner.step(samples, tick.guided)
        seconds = self._clock() - begun
        with self._changed:
            endings = self._ledger.note(tick, outcome, seconds)
            self._begun = None
            self._changed.notify_all()
        self._tell(endings)
        if self._on_tick is not None:
            finished = len(outcome.finished)
            report = TickReport(tick.guided, len(samples), tick.rows, seconds, finished)
            guarded(self._on_tick, report)
        return True

    def _fail_all(self, error: BaseException) -> list[Ending]:
        """Stop, and take out every ticket. With the lock held."""
        self._stopped = True
        self._changed.notify_all()
        orders = [*self._ledger.orders.values()]
        self._all_finished &= not orders
        return [self._ledger.end(order, "failed", error) for order in orders]

    def _tell(self, endings: Sequence[Ending]) -> None:
        """Make tickets final. It calls the users' functions, so never with the lock held."""
        for ending in endings:
            result = ending.order.result if ending.state == "done" else None
            ending.order.ticket.settle(ending.state, self._clock(), result, ending.error)
