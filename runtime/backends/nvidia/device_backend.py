"""A bundle's step engines on one GPU, whichever library runs them: memory, loops and turns."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from contextlib import ExitStack
from threading import RLock
from typing import Generic, Protocol, Self, TypeVar

from ...bundle.bundle import Bundle
from ...errors import BackendError, GpuMemoryError, RequestError
from ..base import Float32, Rows, Timing
from ..forks import ForkGuard, check_inherited
from .cuda import Cuda
from .cuda_api import Stream
from .device_buffers import DeviceBuffers
from .device_loop import DeviceLoop, StepContext, StepEngine
from .device_space import Space
from .exclusive import exclusive

Made = TypeVar("Made")


class DeviceEngine(StepEngine, Protocol):
    """A step engine whose memory is known.

    Attributes:
        held: Bytes that it holds on the device.
    """

    held: int


Opened = TypeVar("Opened", bound=DeviceEngine)


class DeviceBackend(Generic[Opened]):
    """One GPU, one stream, one batch at a time.

    Calls from other threads wait. `close`, or leaving a `with` block, frees everything. A subclass
    opens engines, and says for which batch sizes. If its constructor fails it calls `close`.

    Attributes:
        largest: Samples of the largest batch; None for no limit.

    Raises:
        RequestError: `threads` is given.
        BackendError: CUDA was started before this process was forked.
    """

    kept = "engines"
    """What the library keeps on the device, as `device_memory` names it."""

    def __init__(self, name: str, bundle: Bundle, precision: str, threads: int | None) -> None:
        if threads is not None:
            raise RequestError(
                f"threads are a CPU backend's, {name} runs on the GPU: leave them out."
            )
        check_inherited(name)
        self.name = name
        self.precision = precision
        self.bundle = bundle
        self.largest: int | None = None
        self.lock = RLock()
        self._owner = ExitStack()
        self._closed = False
        self._streams: list[Stream] = []
        self._engines: dict[bool, Opened] = {}
        self._spaces: dict[int, Space] = {}
        self._steps: dict[tuple[int, bool], StepContext] = {}
        self._loops: dict[int, DeviceLoop] = {}

    def _start(self, cuda: Cuda) -> None:
        """Begin to use CUDA: make the streams. One computes, one uploads noise."""
        self.guard = ForkGuard(self.name, self)
        self.cuda = cuda
        for _ in range(2):
            self._streams.append(cuda.stream(self._owner))
        self.stream, self._copying = self._streams

    def _open(self, guided: bool) -> Opened:
        """Open a step graph's engine."""
        raise NotImplementedError

    def bucket(self, batch: int) -> int:
        """Return the smallest batch size of the engines that holds so many samples.

        Raises:
            RequestError: None does.
        """
        raise NotImplementedError

    @property
    def device_memory(self) -> dict[str, int]:
        """Bytes on the device of the engines or sessions, and of batches and programs.

        The former's share is estimated from the device's free memory.
        """
        held = sum(engine.held for engine in self._engines.values())
        return {self.kept: held, "buffers": self.cuda.held}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Wait for the device and free its memory. A second call does nothing.

        In a forked child it does nothing either: the device's memory belongs to the parent.
        """
        if self.guard.forked:
            return
        with self.lock:
            if self._closed:
                return
            self._closed = True
            # Called from the last line to the first: wait for the device; drop graphs, contexts
            # and engines; free memory.
            with ExitStack() as stack:
                stack.push(self._owner.pop_all())
                for space in self._spaces.values():
                    stack.callback(space.close)
                stack.callback(self._forget)
                for loop in self._loops.values():
                    stack.callback(loop.close)
                for stream in self._streams:
                    stack.callback(self.cuda.synchronize, stream)

    def _forget(self) -> None:
        """Drop contexts before engines."""
        with exclusive():
            for held in (self._loops, self._steps, self._spaces, self._engines):
                held.clear()

    def engine(self, guided: bool) -> Opened:
        """Return the step graph's engine, or the guided one's, opened on first use.

        Raises:
            BackendError: It does not open.
        """
        if guided not in self._engines:
            self._engines[guided] = self._open(guided)
        return self._engines[guided]

    def bind(self, batch: int) -> DeviceBuffers:
        """Allocate memory for `batch` samples that are stepped from the host."""
        self.alive()
        return DeviceBuffers(self, batch)

    def alive(self) -> None:
        """Raise BackendError after `close`, and in a forked child."""
        self.guard.check()
        if self._closed:
            raise BackendError(f"{self.name} was closed; load the bundle again.")

    def space(self, bucket: int) -> Space:
        """Return the device memory for a batch size, allocated on first use."""
        if bucket not in self._spaces:
            self._spaces[bucket] = Space(self.cuda, self.bundle, bucket, self.stream)
        return self._spaces[bucket]

    def step(self, bucket: int, guided: bool, fill: Callable[[Space], None]) -> Space:
        """Enqueue a single step of a batch that `fill` uploads; return where its outputs lie."""

        def run() -> Space:
            key = bucket, guided
            space = self.space(bucket)
            # Captured graphs have contexts of their own.
            if key not in self._steps:
                self._steps[key] = self.engine(guided).context(bucket, self.stream)
            fill(space)
            self._steps[key].bind(space.addresses)
            self._steps[key].enqueue(self.stream)
            return space

        return self._fitting(bucket, 0, False, {guided}, run)

    def run_rows(self, rows: Rows) -> tuple[Float32, Timing]:
        """Run a batch; return x [B, *S] after the last row, and how it ran.

        Raises:
            GpuMemoryError: It does not fit, even without the loops that are kept.
        """
        self.guard.check()  # before the lock, which a thread of the parent may hold forever
        with self.lock:
            self.alive()
            batch = len(rows.x)
            K = len(rows.call)
            noisy = bool(rows.noisy.any())
            bucket = self.bucket(batch)
            kinds = {bool(g) for g in rows.guided}
            captured = self._fitting(bucket, K, noisy, kinds, lambda: self._prepare(bucket, rows))
            loop = self._loops[bucket]
            ran = loop.run(rows)
            held = sum(self.device_memory.values())
            return ran.x, Timing(
                batch, bucket, K, ran.how, loop.note, captured, ran.device_ms, held
            )

    def _prepare(self, bucket: int, rows: Rows) -> bool:
        """Make a loop ready for a program; return whether it captured graphs."""
        if bucket not in self._loops:
            space = self.space(bucket)
            self._loops[bucket] = DeviceLoop(self.cuda, space, self.engine, self._copying)
        return self._loops[bucket].prepare(rows)

    def _fitting(
        self, bucket: int, K: int, noisy: bool, kinds: set[bool], make: Callable[[], Made]
    ) -> Made:
        """Call `make`; if the memory is full, once more without the loops that are kept.

        Raises GpuMemoryError with what was needed, and the largest batch that would fit.
        """
        for last in (False, True):
            there = bucket in self._spaces
            try:
                return make()
            except GpuMemoryError as error:
                # Its frames hold contexts, and so the memory that is to be freed.
                _forget_frames(error)
                self._make_room()
                if not there and bucket in self._spaces:
                    self._spaces.pop(bucket).close()
                if last:
                    raise self._too_large(bucket, error, K, noisy, kinds) from error
        raise AssertionError("unreachable")

    def _make_room(self) -> None:
        """Free the loops that are kept, for all batch sizes."""
        while self._loops:
            self._loops.popitem()[1].close()

    def _too_large(
        self, bucket: int, error: GpuMemoryError, K: int, noisy: bool, kinds: set[bool]
    ) -> GpuMemoryError:
        """Make the error for a batch that does not fit.

        Args:
            K: Its rows; 0 for a step from the host.
            noisy: Whether it takes noise.
            kinds: Of its rows: guided, not guided or both.
        """
        raise NotImplementedError


def _forget_frames(error: BaseException) -> None:
    """Drop the local variables of the calls that an error came through, and of its causes."""
    cause: BaseException | None = error
    while cause is not None:
        traceback.clear_frames(cause.__traceback__)
        cause = cause.__cause__
