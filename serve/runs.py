"""Work under way. Equal requests share one run; a run is cancelled when nobody waits for it."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from typing import NamedTuple

from runtime import Inversion, Overloaded, Request, Ticket
from runtime.engine.ticket import TicketPreview, TicketStatus
from runtime.errors import UnnoiseError

from .models import Model
from .settings import Settings
from .work import Float32, Refusals, Results, Work, prepare

FEW = 4
"""Requests that are checked in the event loop."""


class SampleView(NamedTuple):
    """The newest preview of one sample of a run."""

    version: int  # of the run, when it came
    step: int  # rows done
    steps: int
    denoised: Float32  # [*S]


class Run:
    """Work under way, or done. For the event loop's thread, unless a method says otherwise.

    Attributes:
        future: Its samples, float32 [n, *S].
        ticket: The newest ticket; None before the engine has accepted one.
        tickets: All of them.
        views: The newest preview of each sample.
        version: Counts changes of `views`.
        roused: Ends an edit's wait for room: its last user has left, or the engine is closed.
        stage: Counts its tickets; an edit may take several, one after another.
        inversion: What an edit found that inverts images.
        animated: Whether its result is frames [K, n, *S].
        started: Set once the engine has accepted its first ticket, or it has ended.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, model: Model) -> None:
        self.model = model
        self.future: asyncio.Future[Float32] = loop.create_future()
        self.ticket: Ticket | None = None
        self.tickets: list[Ticket] = []
        self.views: dict[int, SampleView] = {}
        self.version = 0
        self.roused = threading.Event()
        self.users = 0
        self.stage = 0
        self.inversion: Inversion | None = None
        self.animated = False
        self._stopped = False
        self._loop = loop
        # Events of asyncio are for the loop's thread; an edit's thread waits for `roused`.
        self.started = asyncio.Event()
        self._changed = asyncio.Event()
        self._noted = False
        # An error that nobody asks for is no mistake here.
        self.future.add_done_callback(lambda done: done.cancelled() or done.exception())
        self.future.add_done_callback(lambda _: self._wake())
        self.future.add_done_callback(lambda _: self.started.set())

    @property
    def done(self) -> bool:
        """Whether it has ended."""
        return self.future.done()

    @property
    def cancelled(self) -> bool:
        """Whether its last user has left before it was done. From any thread."""
        return self._stopped

    def status(self) -> TicketStatus | None:
        """Return where its newest ticket stands; None before there is one."""
        return self.ticket.status() if self.ticket else None

    def join(self) -> Run:
        """Become a user. Returns the run."""
        self.users += 1
        return self

    def leave(self) -> None:
        """Stop being a user. The last one cancels unfinished work."""
        self.users -= 1
        # Anyone else who waits for the same work keeps it alive.
        if self.users:
            return
        # A job keeps the run for minutes, and nobody reads these any more.
        self.views.clear()
        if not self.done:
            self._stopped = True
            self.roused.set()
            if self.ticket is not None:
                self.ticket.cancel()

    async def result(self) -> Float32:
        """Wait for the samples, float32 [n, *S]. A caller that is cancelled stops no other."""
        # Without the shield, a client that leaves would cancel the future of all others.
        return await asyncio.shield(self.future)

    async def change(self, version: int, timeout: float) -> bool:
        """Wait until it is done or has a version after `version`, at most `timeout` seconds.

        Returns whether that came.
        """
        while not self.done and self.version <= version:
            # A new event is made at every change, so that no waiter can miss one.
            changed = self._changed
            try:
                async with asyncio.timeout(timeout):
                    await changed.wait()
            except TimeoutError:
                return False
        return True

    def attach(self, ticket: Ticket) -> None:
        """Follow a ticket: the first, or the next of an edit that takes several."""
        self.ticket = ticket
        self.tickets.append(ticket)
        self.stage += 1
        self.started.set()
        # The client may have left while the engine planned.
        if self.cancelled:
            ticket.cancel()

    def note(self, ticket: Ticket) -> None:
        """Take in a preview. From any thread; for `Engine.submit`."""
        # Many previews may come before the loop gets to one: one look serves them all.
        if not self._noted:
            self._noted = True
            self.call(self._look, ticket)

    def call(self, function: Callable[..., object], *arguments: object) -> None:
        """Call a function in the event loop. From any thread."""
        # The engine may end a ticket after the loop, when the process ends.
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(function, *arguments)

    def settle(self, samples: Float32 | None, error: BaseException | None = None) -> None:
        """End it."""
        if self.future.done():
            return
        if error is not None:
            # A job keeps the error for minutes, whose frames hold an edit's images.
            plain = isinstance(error, UnnoiseError)
            self.future.set_exception(error.with_traceback(None) if plain else error)
        elif samples is not None:
            # Several responses and the kept results read the same array.
            samples.flags.writeable = False
            self.future.set_result(samples)

    def _look(self, ticket: Ticket) -> None:
        self._noted = False
        if (preview := ticket.preview()) is not None:
            self.show(preview)

    def show(self, preview: TicketPreview) -> None:
        """Show a preview to the readers of the run."""
        # The last one of cancelled work may come late.
        if not self.users:
            return
        self.version += 1
        each = zip(*preview[:4], strict=True)
        for sample, step, steps, denoised in each:
            self.views[int(sample)] = SampleView(self.version, int(step), int(steps), denoised)
        self._wake()

    def _wake(self) -> None:
        changed = self._changed
        self._changed = asyncio.Event()
        changed.set()


class Runs:
    """All runs. For the event loop's thread."""

    def __init__(self, settings: Settings, planning: Executor) -> None:
        """planning: plans requests, which takes milliseconds."""
        self._settings = settings
        self._planning = planning
        self._shared: dict[tuple[str, int], Run] = {}
        self._live: set[Run] = set()
        self._results = Results(settings.cache_bytes)
        self._refusals = Refusals()
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def live(self) -> int:
        """Runs that have not ended."""
        return len(self._live)

    async def plan(self, model: Model, requests: Sequence[Request]) -> Work:
        """Check requests. Raises RequestError, see `prepare`."""
        if len(requests) <= FEW and not any(request.start is not None for request in requests):
            # Less work than to wake a thread.
            return prepare(model, requests, self._settings)
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._planning, prepare, model, requests, self._settings)

    def start(self, work: Work, flow: str, deadline: float | None = None, every: int = 0) -> Run:
        """Run work, or join a run of the same work. The caller must `leave` the run.

        The engine may still refuse it: see `events.accepted`.

        Args:
            work: What to run.
            flow: Whose work it is.
            deadline: Seconds from now. A run with one is not shared.
            every: Steps between previews; 0 for none.

        Raises:
            Overloaded: The engine refused no larger work of the flow a moment ago.
        """
        loop = asyncio.get_running_loop()
        # The same request was answered before.
        if (kept := self._results.get(work.key)) is not None:
            run = Run(loop, work.model).join()
            run.settle(kept)
            return run
        # The same request is under way. One with other previews is another run; one with a
        # deadline may be refused or ended for it.
        shared = self._shared.get((work.key, every)) if deadline is None else None
        if shared is not None and not shared.cancelled and not shared.done:
            return shared.join()
        self._refusals.check(work, flow)
        run = self.open(work.model).join()
        if deadline is None:
            self._share((work.key, every), run)
        run.future.add_done_callback(lambda future: self._keep(work.key, future))
        task = loop.create_task(self._submit(run, work, flow, deadline, every))
        # The loop holds tasks weakly.
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return run

    def open(self, model: Model) -> Run:
        """Return a new run that its maker attaches tickets to and settles."""
        run = Run(asyncio.get_running_loop(), model)
        self._live.add(run)
        run.future.add_done_callback(lambda _: self._ended(run))
        return run

    def rouse(self) -> None:
        """Have edits that wait for room find their engine closed. From any thread."""
        for run in tuple(self._live):
            run.roused.set()

    def _ended(self, run: Run) -> None:
        self._live.discard(run)
        if run.cancelled:
            self._refusals.forget(run.model.name)

    def _share(self, key: tuple[str, int], run: Run) -> None:
        self._shared[key] = run

        def forget(_: object) -> None:
            # A run that was cancelled may have been replaced by then.
            if self._shared.get(key) is run:
                del self._shared[key]

        run.future.add_done_callback(forget)

    def _keep(self, key: str, future: asyncio.Future[Float32]) -> None:
        if not future.cancelled() and future.exception() is None:
            self._results.put(key, future.result())

    async def _submit(
        self, run: Run, work: Work, flow: str, deadline: float | None, every: int
    ) -> None:
        """Hand work to the engine, in a task of its own: its first user may leave meanwhile."""
        loop = asyncio.get_running_loop()
        engine = work.model.engine
        # Without a reader, previews would be copied for nothing.
        shown = run.note if every else False
        try:
            ticket = await loop.run_in_executor(
                self._planning, engine.submit, work.requests, flow, deadline, shown, every or 1
            )
        except BaseException as error:
            self._refusals.note(work, flow, error if isinstance(error, Overloaded) else None)
            run.settle(None, error)
            return
        self._refusals.note(work, flow, None)
        run.attach(ticket)
        # It is called in the inference thread.
        ticket.add_done_callback(lambda ended: run.call(_end, run, ended))


def _end(run: Run, ticket: Ticket) -> None:
    """Settle a run with its ticket, which is final."""
    error = ticket.exception()
    run.settle(None if error else ticket.result(), error)
