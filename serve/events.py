"""Server-sent events: previews, and one last event, `done` or `error`."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable
from concurrent.futures import Executor
from typing import TypeVar

from starlette.types import Receive, Scope, Send

from runtime import Cancelled
from runtime.engine.ticket import TicketStatus

from .pictures import Float32, previews_as_json
from .problems import ClientGone, problem_of, to_bytes
from .runs import Run

T = TypeVar("T")
Last = Callable[[Float32], dict[str, object]]
"""Makes the data of a run's last event of its samples [n, *S]."""
HEARTBEAT = b": still here\n\n"


def event(name: str, data: object, number: int | None = None) -> bytes:
    """Return the bytes of an event; its data is JSON on one line."""
    head = b"" if number is None else b"id: %d\n" % number
    return head + b"event: " + name.encode() + b"\ndata: " + to_bytes(data) + b"\n\n"


async def unless_gone(receive: Receive, work: Awaitable[T]) -> T:
    """Wait for something while the client is there. The body must have been read.

    It waits in `receive`, which sees a client leave at once, in any stack of ASGI middleware.
    Asking `Request.is_disconnected` does not.

    Raises:
        ClientGone: The client left; the work is cancelled.
    """
    # Two tasks race: the work, and the news that the client has left.
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_gone(receive))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        # If both came at once, the work counts: it may hold what must be given back.
        if task.done():
            return task.result()
        # It raises if a body came that is too large.
        gone.result()
        raise ClientGone
    finally:
        for started in (task, gone):
            if not started.done():
                started.cancel()
        # A task that was cancelled still runs its `finally`, which frees what it holds.
        await asyncio.gather(task, gone, return_exceptions=True)


async def accepted(receive: Receive, run: Run) -> Run:
    """Wait until the engine has accepted a run, and return the run.

    If this raises, it has left the run.

    Raises:
        ClientGone: The client left.
        Overloaded, DeadlineError, ClosedError, RequestError: See `Engine.submit`.
    """
    try:
        if not run.done:
            await unless_gone(receive, run.started.wait())
        # Without a ticket it was refused, or its result was kept from before.
        if run.ticket is None:
            await run.result()
    except BaseException:
        run.leave()
        raise
    return run


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class EventStream:
    """A response of server-sent events. It stops its generator when the client leaves."""

    def __init__(
        self,
        events: AsyncGenerator[bytes, None],
        on_end: Callable[[], object],
    ) -> None:
        """on_end: called once, however it ends."""
        self._events = events
        self._on_end = on_end

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the events."""
        headers = {
            "content-type": "text/event-stream; charset=utf-8",
            "cache-control": "no-store",
            # nginx would otherwise hold events back.
            "x-accel-buffering": "no",
        }
        raw = [(name.encode(), value.encode()) for name, value in headers.items()]
        try:
            await send({"type": "http.response.start", "status": 200, "headers": raw})
            await unless_gone(receive, self._send_all(send))
            await send({"type": "http.response.body", "body": b"", "more_body": False})
        except ClientGone:
            # The status was sent before: the log has this.
            scope["state"]["facts"]["gone"] = True
        finally:
            self._on_end()
            await self._events.aclose()

    async def _send_all(self, send: Send) -> None:
        async for part in self._events:
            await send({"type": "http.response.body", "body": part, "more_body": True})


async def run_events(
    run: Run,
    encoding: Executor,
    heartbeat_s: float,
    last: Last,
    after: int = 0,
) -> AsyncGenerator[bytes, None]:
    """Yield the events of a run, to its end.

    Args:
        run: Whose events they are.
        encoding: The pool that makes the data of events.
        heartbeat_s: Seconds between signs of life.
        last: Called in the pool.
        after: The number of the last event that the client has seen.
    """
    loop = asyncio.get_running_loop()
    # It says at once that the request was accepted, before anything has run.
    status = await loop.run_in_executor(encoding, status_json, run)
    yield event("status", status, after or None)
    while not run.done:
        if not await run.change(after, heartbeat_s):
            yield HEARTBEAT
            continue
        if run.done:
            break
        # Only what is newer than the client's last event: the others are not repeated.
        views = [
            (sample, view.step, view.steps, view.denoised)
            for sample, view in sorted(run.views.items())
            if view.version > after
        ]
        after = run.version
        shown = await loop.run_in_executor(encoding, previews_as_json, run.model, views)
        yield event("preview", {"stage": run.stage, "previews": shown}, after)
    try:
        # A stream always ends with an event: the results or an error.
        data = await loop.run_in_executor(encoding, last, await run.result())
        yield event("done", data, after + 1)
    except Exception as error:
        yield event("error", problem_of(error).to_json(), after + 1)


def status_json(run: Run) -> dict[str, object]:
    """Return the state of a run, as JSON. From any thread: predicting its end takes long."""
    status = run.status()
    found = {"state": _state(run, status), "stage": run.stage}
    if status is None:
        return found
    return {
        **found,
        "rows": status.rows,
        "rows_left": status.rows_left,
        "ahead": status.ahead,
        "finish_seconds": round(status.finish_seconds, 3),
        "queue_seconds": round(status.queue_seconds, 3),
        "run_seconds": round(status.run_seconds, 3),
    }


def _state(run: Run, status: TicketStatus | None) -> str:
    """The state of a run. That of its newest ticket says nothing of the passes of an edit."""
    if not run.done:
        waiting = status is None or status.state == "waiting"
        return "waiting" if waiting else "running"
    error = run.future.exception()
    if error is None:
        return "done"
    return "cancelled" if isinstance(error, Cancelled) else "failed"
