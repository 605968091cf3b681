"""Tickets: what an engine returns for a submitted request, usable from any thread."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from ..backends.base import Float32
from ..errors.arguments import function, wait_seconds
from .loop import Cancelled

T = TypeVar("T")
State = Literal["waiting", "running", "done", "failed", "cancelled"]
"""A ticket waits until one of its samples takes its first step. The last three states are final."""


class TicketPreview(NamedTuple):
    """The newest step of those samples of a ticket that moved since the last preview was taken."""

    samples: NDArray[np.int64]  # [b], positions in the ticket's result
    step: NDArray[np.int64]  # [b], rows of the sample's program that are done, 1 … steps
    steps: NDArray[np.int64]  # [b], rows of the sample's program
    denoised: Float32  # [b, *S], the denoised estimates D, in the data's range; a copy
    x: Float32  # [b, *S], the samples themselves, as noisy as they are by then; a copy


@dataclass(frozen=True)
class TicketStatus:
    """The state of a ticket, the work that is left, and its times.

    Attributes:
        state: See `State`.
        rows: Network rows of all its samples; a guided row counts 2.
        rows_left: Network rows that are not done yet; 0 once the ticket is final.
        ahead: Tickets that are not final, were submitted before this one and have not started;
            0 once this one has started.
        finish_seconds: Predicted seconds until it is done; 0 once the ticket is final.
        queue_seconds: From submission to the first step, so far if there was none yet.
        run_seconds: From the first step to the end, so far if it has not ended.
    """

    state: State
    rows: int
    rows_left: int
    ahead: int
    finish_seconds: float
    queue_seconds: float
    run_seconds: float


class Owner(Protocol):
    """What a ticket needs of its engine."""

    def cancel(self, ticket: Ticket) -> bool: ...

    def status(self, ticket: Ticket) -> TicketStatus: ...


class Ticket:
    """One submission to an engine: one request, or several that are finished together.

    Attributes:
        id: 1, 2, … in the order of submission.
        flow: The flow that its rows are charged to.
        samples: How many samples the result has.
        rows: Network rows of all its samples; a guided row counts 2.
        submitted, started, ended: When, in seconds of the engine's clock; None is not yet.
    """

    def __init__(
        self,
        owner: Owner,
        number: int,
        flow: str,
        samples: int,
        rows: int,
        submitted: float,
        on_preview: Callable[[Ticket], object] | None = None,
    ) -> None:
        self.id = number
        self.flow = flow
        self.samples = samples
        self.rows = rows
        self.submitted = submitted
        self.started: float | None = None
        self.ended: float | None = None
        self._owner = owner
        self._lock = threading.Lock()
        self._final = threading.Event()
        self._state: State = "waiting"
        self._result: Float32 | None = None
        self._error: BaseException | None = None
        self._callbacks: list[Callable[[Ticket], object]] = []
        self._mailbox: dict[int, tuple[int, int, Float32, Float32]] = {}
        self._on_preview = on_preview

    def __repr__(self) -> str:
        return f"<Ticket {self.id}: {self._state}, {self.samples} samples, {self.rows} rows>"

    @property
    def state(self) -> State:
        """Its state, see `State`."""
        return self._state

    @property
    def final(self) -> bool:
        """Whether it is done, failed or cancelled."""
        return self._final.is_set()

    def status(self) -> TicketStatus:
        """Return the state, the work that is left and the predicted time that it takes."""
        return self._owner.status(self)

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until it is final.

        Args:
            timeout: Seconds; None waits without a limit.

        Returns:
            Whether it is final.
        """
        return self._final.wait(None if timeout is None else wait_seconds("timeout", timeout))

    def result(self, timeout: float | None = None) -> Float32:
        """Wait for the samples, float32 [samples, *S].

        Args:
            timeout: Seconds; None waits without a limit.

        Raises:
            TimeoutError: It is not final after `timeout` seconds. It keeps running.
            Cancelled: It was cancelled.
            DeadlineError: Its deadline passed.
            ClosedError: The engine was closed before it was done.
            UnnoiseError: A step failed for it.
        """
        error = self.exception(timeout)
        if error is not None:
            raise error
        assert self._result is not None
        return self._result

    def exception(self, timeout: float | None = None) -> BaseException | None:
        """Wait until it is final, and return what `result` raises, or None.

        Raises:
            TimeoutError: It is not final after `timeout` seconds.
        """
        if not self.wait(timeout):
            raise TimeoutError(f"ticket {self.id} is not done after {timeout:g} s.")
        return self._error

    def cancel(self) -> bool:
        """Stop it. Its slots are free before the next tick; no other ticket is touched.

        Returns:
            Whether it is cancelled now: False if it was done or failed before.
        """
        return self._owner.cancel(self)

    def preview(self) -> TicketPreview | None:
        """Take what is in the mailbox, or None if nothing is. It never waits.

        The mailbox holds the newest step of each sample. A new step replaces one that was not
        taken. It is always empty unless the ticket was submitted with `on_preview`.
        """
        with self._lock:
            mail = self._mailbox
            self._mailbox = {}
        if not mail:
            return None
        order = sorted(mail)
        return TicketPreview(
            samples=np.array(order, np.int64),
            step=np.array([mail[i][0] for i in order], np.int64),
            steps=np.array([mail[i][1] for i in order], np.int64),
            denoised=np.stack([mail[i][2] for i in order]),
            x=np.stack([mail[i][3] for i in order]),
        )

    def add_done_callback(self, callback: Callable[[Ticket], object]) -> None:
        """Call `callback(ticket)` once the ticket is final; at once if it is.

        It is called in the thread that finished the ticket, mostly the inference thread, so it
        must be quick: in asyncio pass one that calls `loop.call_soon_threadsafe`. What it raises
        goes to `threading.excepthook` and changes nothing else.

        Raises:
            RequestError: `callback` is not a function.
        """
        function("callback", callback)
        with self._lock:
            if not self._final.is_set():
                self._callbacks.append(callback)
                return
        guarded(callback, self)

    def is_of(self, owner: Owner) -> bool:
        """Whether this engine made it. For the engine."""
        return self._owner is owner

    def start(self, now: float) -> None:
        """Note the first step. For the engine."""
        with self._lock:
            if self._state == "waiting":
                self._state = "running"
                self.started = now

    def deposit(self, sample: int, step: int, steps: int, denoised: Float32, x: Float32) -> bool:
        """Put a sample's newest step, D and x [*S], into the mailbox. For the engine.

        It does nothing if the ticket is final, such as one that was cancelled during the step.

        Returns:
            Whether one that nobody had taken was replaced.
        """
        with self._lock:
            if self._final.is_set():
                return False
            replaced = sample in self._mailbox
            self._mailbox[sample] = (step, steps, denoised, x)
        return replaced

    def notify(self) -> None:
        """Call the preview callback, if there is one. For the engine."""
        if self._on_preview is not None and not self._final.is_set():
            guarded(self._on_preview, self)

    def settle(
        self,
        state: State,
        now: float,
        result: Float32 | None = None,
        error: BaseException | None = None,
    ) -> None:
        """Make it final, with its samples [samples, *S], and call the callbacks. For the engine.

        It does nothing if the ticket is final.
        """
        with self._lock:
            if self._final.is_set():
                return
            self._state = state
            self.ended = now
            self._result = result
            self._error = Cancelled("the request was cancelled.") if state == "cancelled" else error
            callbacks = self._callbacks
            self._callbacks = []
            self._final.set()
        for callback in callbacks:
            guarded(callback, self)


def guarded(callback: Callable[[T], object], value: T) -> None:
    """Call somebody's function so that what it raises cannot stop the engine."""
    try:
        callback(value)
    # Also SystemExit, and asyncio's CancelledError, which is no Exception.
    except BaseException as error:
        thread = threading.current_thread()
        if isinstance(error, KeyboardInterrupt) and thread is threading.main_thread():
            raise
        details = (type(error), error, error.__traceback__, thread)
        with contextlib.suppress(Exception):  # of a hook of the user's, or of a closed stderr
            threading.excepthook(threading.ExceptHookArgs(details))
