"""The passes of an edit, which run in an engine along with all other requests."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable

import numpy as np
from numpy.typing import NDArray

from runtime import Cancelled, DeadlineError, Overloaded, Request, Ticket
from runtime.engine.loop import Preview, Result, StepCallback
from runtime.engine.ticket import TicketPreview
from runtime.sampler.animation import Animating

from . import limits
from .models import Model
from .pictures import Float32
from .runs import Run
from .settings import Settings

MOST_TRIES = 20
"""Times that a later pass of an edit is submitted if the engine is overloaded."""


class EngineEditing(Animating):
    """The editing methods of `Sampler`, whose requests run in an engine. For one thread."""

    def __init__(
        self,
        model: Model,
        submit: Callable[[list[Request], StepCallback | None], Float32],
    ) -> None:
        """submit: runs requests, shows their steps, and returns their samples [n, *S]."""
        self.bundle = model.bundle
        self._submit = submit
        self._planner = model.planner

    def run(self, requests: Iterable[Request], on_step: StepCallback | None = None) -> Result:
        """Run requests, see `Sampler.run`; samples are [n, *S].

        `on_step` is called for each sample by itself, in the inference thread.
        """
        return Result(self._submit(list(requests), on_step), ())


class Passes:
    """Submits the passes of an edit, one after another, and shows them as one run."""

    def __init__(
        self,
        run: Run,
        settings: Settings,
        flow: str,
        deadline: float | None,
        every: int,
    ) -> None:
        """deadline: seconds from now for all passes; None has none."""
        self._run = run
        self._settings = settings
        self._flow = flow
        self._end = None if deadline is None else time.monotonic() + deadline
        self._every = every
        self._passes = 0
        self._on_step: StepCallback | None = None

    def submit(self, requests: list[Request], on_step: StepCallback | None) -> Float32:
        """Run one pass, in the edit's thread. Returns its samples [n, *S].

        on_step: called after every step of every sample, in the inference thread.

        Raises:
            Cancelled: The run was cancelled.
            UnnoiseError: See `Engine.submit` and `Ticket.result`.
        """
        # Every pass is bounded like a request of its own.
        limits.checked(self._run.model.bundle, requests, self._settings)
        for left in reversed(range(MOST_TRIES)):
            if self._run.cancelled:
                raise Cancelled("the edit was cancelled.")
            try:
                return self._once(requests, on_step)
            except DeadlineError:
                # A 422 is for requests that ask for too much, and this one was accepted.
                if not self._passes:
                    raise
                raise DeadlineError("the deadline passed before the edit was done.") from None
            except Overloaded as error:
                # The first pass is refused like any request; later ones were promised.
                if not self._passes or not left:
                    raise
                self._run.roused.wait(error.retry_after)
        raise AssertionError

    def _once(self, requests: list[Request], on_step: StepCallback | None) -> Float32:
        run = self._run
        shown: bool | Callable[[Ticket], object] = run.note if self._every else False
        every = self._every or 1
        if on_step is not None:
            self._on_step = on_step
            shown = self._watch
            every = 1
        # What is left of the deadline of all passes.
        deadline = None if self._end is None else max(self._end - time.monotonic(), 0.0)
        ticket = run.model.engine.submit(requests, self._flow, deadline, shown, every)
        self._passes += 1
        # Runs belong to the event loop, and this is the edit's thread.
        run.call(run.attach, ticket)
        try:
            return ticket.result()
        finally:
            # A job keeps its ticket for minutes, and this holds the frames of an animation.
            self._on_step = None

    def _watch(self, ticket: Ticket) -> None:
        """Hand every step to `on_step`; for `Engine.submit`."""
        on_step = self._on_step
        # The engine calls it after every deposit, so the mailbox has lost none.
        found = ticket.preview()
        if on_step is None or found is None:
            return
        for i, (step, steps) in enumerate(zip(found.step, found.steps, strict=True)):
            one = slice(i, i + 1)
            on_step(
                Preview(
                    found.samples[one],
                    int(step),
                    int(steps),
                    found.denoised[one],
                    found.x[one],
                )
            )
        # Of these, readers of the run see those that they asked for.
        if self._every:
            due = (found.step % self._every == 0) | (found.step == found.steps)
            if due.any():
                self._run.call(self._run.show, _chosen(found, due))


def _chosen(found: TicketPreview, due: NDArray[np.bool_]) -> TicketPreview:
    """The entries of a preview that are due."""
    return TicketPreview(
        found.samples[due], found.step[due], found.steps[due], found.denoised[due], found.x[due]
    )
