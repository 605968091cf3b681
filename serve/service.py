"""What the endpoints share: the models, the runs, the jobs, and pools of threads."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from starlette.requests import Request

from .jobs import Jobs
from .metrics import Metrics
from .models import Models
from .problems import Problem
from .runs import Run, Runs

T = TypeVar("T")


class Service:
    """The state of the service. For the event loop's thread.

    Attributes:
        draining: Whether it accepts no new work, because the process is to end.
        inside: Requests under way, without those of probes.
        planning: Plans requests and predicts their ends, which takes milliseconds.
        encoding: Encodes and decodes images.
        editing: Runs edits, which wait for the engine in their own threads.
    """

    def __init__(self, models: Models) -> None:
        """models: which the service opens, unless that is under way, and closes at the end."""
        self.settings = settings = models.settings
        self.draining = False
        # Two threads each: more would only take the processor from the network calls.
        self.planning = ThreadPoolExecutor(2, "unnoise-plan")
        self.encoding = ThreadPoolExecutor(2, "unnoise-encode")
        self.editing = ThreadPoolExecutor(settings.edits, "unnoise-edit")
        self.edits = 0
        self.inside = 0
        self.uploads = asyncio.Semaphore(settings.uploads)
        self.metrics = Metrics()
        self.models = models
        models.on_tick = self.metrics.tick
        self.metrics.watch(models)
        self.runs = Runs(settings, self.planning)
        self.jobs = Jobs(settings)
        self.started = time.time()

    def check_accepting(self) -> None:
        """Raises Problem (503) if no new work is accepted."""
        if self.draining:
            raise Problem(503, "the service is shutting down. Try again.", 5.0)

    def unready(self) -> str:
        """Say why the service cannot take work; empty if it can."""
        return "the service is shutting down." if self.draining else self.models.unready()

    async def encode(self, function: Callable[..., T], *arguments: object) -> T:
        """Call a function in the pool that encodes."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self.encoding, function, *arguments)

    async def predict(self, function: Callable[..., T], *arguments: object) -> T:
        """Call a function that predicts when a ticket is done, in the pool that plans."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self.planning, function, *arguments)

    async def drain(self) -> None:
        """Accept nothing new, let what was accepted finish, and stop the engines."""
        self.draining = True
        end = time.monotonic() + self.settings.drain_s
        # Readiness says 503 meanwhile, so the listener must stay open. A request ends later than
        # its run: the result is encoded and sent.
        while (self.runs.live or self.inside) and time.monotonic() < end:
            await asyncio.sleep(0.02)
        # It fails what is left, and may wait for a network call.
        await asyncio.to_thread(self._stop)

    def close(self) -> None:
        """Stop everything at once."""
        self.draining = True
        self._stop()
        for pool in (self.planning, self.encoding, self.editing):
            pool.shutdown(wait=False, cancel_futures=True)

    def _stop(self) -> None:
        """Close the engines, and wake the edits that wait for room in one."""
        self.models.close()
        self.runs.rouse()


def service_of(request: Request) -> Service:
    """Return the service that a request came to."""
    return request.app.state.service


def flow_of(request: Request) -> str:
    """Return whose work a request is: the user's name, or the client's address."""
    user = request.scope["state"].get("user")
    if user is not None:
        return user
    return request.client.host if request.client else ""


def note_facts(request: Request, run: Run) -> dict[str, str]:
    """Enter what a run came to in the log line. Returns the Server-Timing header."""
    facts = request.scope["state"]["facts"]
    ticket = run.ticket
    # The result was kept from before: nothing ran for this request.
    if ticket is None:
        facts["rows"] = 0
        return {"server-timing": "cached"}
    # An edit may have taken several passes.
    first = run.tickets[0]
    facts["rows"] = sum(each.rows for each in run.tickets)
    # Read off the tickets: a status would predict the end of all tickets, which takes long.
    if first.started is None or ticket.ended is None:
        return {}
    queue_s = first.started - first.submitted
    run_s = ticket.ended - first.started
    facts |= {"queue_s": round(queue_s, 4), "run_s": round(run_s, 4)}
    return {"server-timing": f"queue;dur={1000 * queue_s:.1f}, run;dur={1000 * run_s:.1f}"}
