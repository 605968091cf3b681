"""The reverse loop on the device: rows of the step engine, captured into CUDA graphs.

A graph holds the rows of one window, at most 32. Every program is cut into windows whose lengths
are powers of two, so a few graphs run any number of rows: before each launch the device copies the
window's part of the program, and of the noise, to where the graph reads it. The two states are
input and output in turn. docs/gpu.md has a drawing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from itertools import groupby
from typing import NamedTuple, Protocol

from ...diffusion.arrays import Bool
from ...errors import CaptureError, GpuError, GpuMemoryError
from ..base import Float32, Rows
from .cuda import Cuda
from .cuda_api import Address, Graph, Stream
from .device_noise import Noise, piece_rows
from .device_program import Program
from .device_space import Space, stride
from .exclusive import capturing, exclusive

WINDOW = 32
"""Most rows of one graph. A longer one would save little: a launch takes some microseconds."""


class StepContext(Protocol):
    """A step engine's context for batches of one size, see `tensorrt_engine.Context`."""

    def bind(self, addresses: dict[str, Address]) -> None: ...
    def enqueue(self, stream: Stream) -> None: ...
    def capturable(self, stream: Stream) -> bool: ...


class StepEngine(Protocol):
    """A step engine, see `tensorrt_engine.Engine`."""

    def context(self, bucket: int, stream: Stream) -> StepContext: ...


class Kind(NamedTuple):
    """What a graph depends on.

    Attributes:
        length: Its rows.
        guided: Whether they are guided.
        parity: Which of the two states it starts from.
        noisy: Whether it reads noise; otherwise it reads zeros.
    """

    length: int
    guided: bool
    parity: int
    noisy: bool


class Window(NamedTuple):
    """Rows that one graph runs."""

    first: int
    kind: Kind


class Ran(NamedTuple):
    """What a loop returns: x [B, *S], the milliseconds on the device, and how the rows ran."""

    x: Float32
    device_ms: float
    how: str


def windows(guided: Bool, noisy: Bool, most: int) -> Iterator[Window]:
    """Cut a program's rows into windows of powers of two, all guided or none.

    Args:
        guided: [K].
        noisy: [K].
        most: The longest window, a power of two.
    """
    first = 0
    for kind, run in groupby(bool(g) for g in guided):
        end = first + len(list(run))
        while first < end:
            count = min(most, 1 << ((end - first).bit_length() - 1))
            takes = bool(noisy[first : first + count].any())
            yield Window(first, Kind(count, kind, first % 2, takes))
            first += count


class DeviceLoop:
    """The loop over the rows of any program, for batches of one size.

    If capture is refused, for which `note` gives the reason, the same rows run by plain enqueues.
    `close` frees all.

    Args:
        engine: engine(guided), the step engine.
        copying: The stream that uploads noise.
    """

    def __init__(
        self,
        cuda: Cuda,
        space: Space,
        engine: Callable[[bool], StepEngine],
        copying: Stream,
    ) -> None:
        self._cuda = cuda
        self._space = space
        self._engine = engine
        self._copying = copying
        self.note = ""
        self._graphs = dict[Kind, Graph]()
        self._held = ExitStack()
        """Of the graphs."""
        self._contexts = dict[Kind | bool, StepContext]()
        self._noise: Noise | None = None
        self._owner = ExitStack()
        # If an allocation fails, the earlier ones are freed with the attempt.
        with ExitStack() as attempt:
            self._program = Program(cuda, space.bucket, WINDOW, space.stream, attempt)
            self._start = cuda.event(attempt, timed=True)
            self._end = cuda.event(attempt, timed=True)
            attempt.callback(self._drop_contexts)
            attempt.callback(lambda: self._held.close())
            attempt.callback(cuda.synchronize, space.stream)  # before any memory is freed
            self._owner = attempt.pop_all()

    @staticmethod
    def bytes(bucket: int, sample: int, K: int, noisy: bool) -> int:
        """Compute what a loop takes on the device, without its graphs.

        sample: The number of floats of one sample.
        """
        program = Program.bytes(bucket, WINDOW, K)
        if not noisy:
            return program
        window = piece_rows(bucket, sample) * stride(bucket * sample)
        return program + window + Noise.bytes(bucket, sample)

    def close(self) -> None:
        """Free the loop's graphs and memory."""
        self._owner.close()

    def prepare(self, rows: Rows) -> bool:
        """Allocate and capture what a program lacks; return whether a graph was captured.

        Raises:
            GpuMemoryError: The device's memory is full.
        """
        self._program.reserve(len(rows.call))
        if self._noise is None and rows.noisy.any():
            self._allocate_noise()
        kinds = {window.kind for window in self._windows(rows)}
        lacking = sorted(kinds - self._graphs.keys())
        captured = bool(lacking) and not self.note
        if captured:
            self._capture(lacking)
        if self.note:
            # A context's first run may allocate, so it is made here, where that can be repeated.
            for kind in kinds:
                self._enqueue(self._context(kind.guided, kind.guided), kind, 1)
        return captured and not self.note

    def run(self, rows: Rows) -> Ran:
        """Run a batch that `prepare` was called for."""
        cuda = self._cuda
        space = self._space
        plan = list(self._windows(rows))
        space.start(rows)
        self._program.send(rows)
        cuda.record(self._start, space.stream)
        for window in plan:
            kind = window.kind
            self._program.move(window.first, kind.length)
            if kind.noisy:
                self._send_noise(rows, window)
            if self.note:
                self._enqueue(self._context(kind.guided, kind.guided), kind, kind.length)
            else:
                cuda.launch(self._graphs[kind], space.stream)
        cuda.record(self._end, space.stream)
        x = space.finish(len(rows.call), len(rows.x))
        return Ran(x, cuda.milliseconds(self._start, self._end), self._how(len(plan)))

    def _how(self, launches: int) -> str:
        if self.note:
            return "plain enqueues"
        return "one graph" if launches == 1 else f"{launches} graphs"

    def _windows(self, rows: Rows) -> Iterator[Window]:
        """Cut a program. With noise windows are shorter: drawing and computing overlap."""
        most = self._noise.rows if self._noise and rows.noisy.any() else WINDOW
        return windows(rows.guided, rows.noisy, most)

    def _allocate_noise(self) -> None:
        """Allocate the noise that graphs read, and what it arrives in."""
        cuda = self._cuda
        space = self._space
        with ExitStack() as attempt:
            noise = Noise(cuda, space.shape, space.stream, self._copying, attempt)
            self._window = cuda.memory(noise.rows * noise.stride, attempt)
            attempt.callback(cuda.synchronize, space.stream)  # before any memory is freed
            cuda.clear(self._window, noise.rows * noise.stride, space.stream)
            self._owner.enter_context(attempt.pop_all())
            self._noise = noise

    def _send_noise(self, rows: Rows, window: Window) -> None:
        """Copy a window's noise to where its graph reads it, once that was drawn and uploaded."""
        noise = self._noise
        assert noise is not None, "not prepared"
        count = window.kind.length
        source = noise.send(rows, window.first, count)
        self._cuda.copy(self._window, source, count * noise.stride, self._space.stream)
        noise.taken()

    def _capture(self, kinds: list[Kind]) -> None:
        """Capture graphs, or say in `note` why that failed."""
        try:
            for kind in kinds:
                graph = self._captured(kind)
                self._held.callback(self._cuda.destroy, graph)
                self._graphs[kind] = graph
        # If one window cannot be captured, none is kept: all rows run by plain enqueues.
        except CaptureError as error:
            self.note = str(error)
            self._graphs.clear()
            self._held.close()
            self._drop_contexts()

    def _drop_contexts(self) -> None:
        """Free the contexts' memory, which would break a capture by another thread."""
        with exclusive():
            self._contexts.clear()

    def _captured(self, kind: Kind) -> Graph:
        """Capture a window after the recipe of trtexec.

        Each graph has its own context, because it depends on the context's state.
        """
        cuda = self._cuda
        stream = self._space.stream
        context = self._context(kind, kind.guided)
        with capturing():
            # Plain runs in both directions first: what they initialise must not be captured.
            self._enqueue(context, kind._replace(parity=0), 1)
            self._enqueue(context, kind._replace(parity=1), 1)
            cuda.synchronize(stream)
            if not context.capturable(stream):
                raise CaptureError("the library says that its work cannot be captured")

            def enqueue() -> None:
                try:
                    self._enqueue(context, kind, kind.length)
                # A library that allocates under capture is refused, however much memory is free.
                except GpuMemoryError as error:
                    raise CaptureError(str(error)) from error

            try:
                return cuda.capture(enqueue, stream)
            # The caller frees memory and tries again.
            except GpuMemoryError:
                raise
            except GpuError as error:
                raise CaptureError(f"{kind.length} rows could not be captured: {error}") from error

    def _context(self, key: Kind | bool, guided: bool) -> StepContext:
        if key not in self._contexts:
            space = self._space
            self._contexts[key] = self._engine(guided).context(space.bucket, space.stream)
        return self._contexts[key]

    def _enqueue(self, context: StepContext, kind: Kind, count: int) -> None:
        """Put the first rows of the window on the stream, each bound to its own slot."""
        space = self._space
        for slot in range(count):
            direction = (kind.parity + slot) % 2
            noise = space.silence
            if kind.noisy and self._noise is not None:
                noise = self._window + slot * self._noise.stride
            context.bind(
                {
                    **space.addresses,
                    **self._program.addresses(slot),
                    "state": space.states[direction],
                    "next_state": space.states[1 - direction],
                    "noise": noise,
                }
            )
            context.enqueue(space.stream)
