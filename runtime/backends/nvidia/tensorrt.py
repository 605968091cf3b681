"""TensorRT and TensorRT-RTX: the whole reverse loop as one CUDA graph of a step engine, torch-free.
docs/gpu.md.

The engine comes from this machine's cache (`runtime.backends.nvidia.engine_cache`); `python -m
export.engines build` puts it there.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from contextlib import ExitStack
from threading import RLock
from typing import Any

import numpy as np

from ...bundle.bundle import Bundle
from ...bundle.format import step_file
from ...errors import BackendError, GpuError, GpuMemoryError, RequestError
from ..base import Float32, HostBuffers, Rows, Timing
from ..forks import ForkGuard
from . import engine_cache as engines
from .cuda import Cuda, cudart
from .device_loop import DeviceLoop, Space
from .engine_cache import LIBRARIES
from .tensorrt_engine import Context, Engine, load_library, logger

LOOPS = 8
"""Captured loops that are kept, each with its program's memory; beyond that the one unused for
longest goes."""


class TensorRt:
    """A bundle's step engines on one GPU, one stream, one batch at a time: calls from other threads
    wait.

    library: "tensorrt" or "tensorrt-rtx". Raises BackendError and its kinds (`runtime.errors`): the
    library is not installed, no driver, no GPU, no engine for it in the cache, no memory. `close`,
    or leaving a `with` block, frees everything.
    """

    def __init__(
        self, bundle: Bundle, precision: str, threads: int | None, library: str = "tensorrt"
    ) -> None:
        if threads is not None:
            raise RequestError(
                f"threads are a CPU backend's, {library} runs on the GPU: leave them out."
            )
        self.name = library
        self.precision = precision
        self.bundle = bundle
        self.guard = ForkGuard(self.name, self)
        self._trt = load_library(library)
        self.cuda = Cuda(cudart())
        self._gpu = self.cuda.gpu()
        self.largest: int | None = None
        """Samples of the largest batch that the engine was built for."""
        self.lock = RLock()
        self._owner = ExitStack()
        self._closed = False
        self._streams: list[Any] = []
        self._engines: dict[bool, Engine] = {}
        self._spaces: dict[int, Space] = {}
        self._steps: dict[tuple[int, bool], Context] = {}
        self._loops: OrderedDict[Any, DeviceLoop] = OrderedDict()
        try:
            for _ in range(2):
                self._streams.append(self.cuda.stream(self._owner))
            self.stream, self._copying = self._streams
            self._log = logger(self._trt)
            self._runtime = self._trt.Runtime(self._log)
            self._runtime.engine_host_code_allowed = False
            self.largest = self.engine(False).buckets[-1]
        except TypeError as error:  # pybind's factory returned nullptr
            self.close()
            raise GpuError(
                f"{library} does not start on this GPU: {self._log.said() or error}."
            ) from error
        except BaseException:
            self.close()
            raise

    @property
    def device_memory(self) -> dict[str, int]:
        """Bytes on the device: the engines' own, as far as the device's free memory tells, and what
        batches and programs take."""
        return {
            "engines": sum(engine.weights for engine in self._engines.values()),
            "buffers": self.cuda.held,
        }

    def __enter__(self) -> TensorRt:
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
            with ExitStack() as stack:  # the last to be called stands first
                stack.push(self._owner.pop_all())
                for holder in (*self._spaces.values(), *self._loops.values()):
                    stack.callback(holder.close)
                stack.callback(self._forget)
                for stream in self._streams:
                    stack.callback(self.cuda.synchronize, stream)

    def _forget(self) -> None:
        """Contexts before engines, engines before the runtime."""
        for held in (self._loops, self._steps, self._spaces, self._engines):
            held.clear()
        self._runtime = None

    def engine(self, guided: bool) -> Engine:
        """The step graph's engine, or the guided one's, loaded on first use."""
        if guided not in self._engines:
            version = self._trt.__version__
            found = engines.find(
                self.bundle,
                self.precision,
                step_file(guided),
                LIBRARIES[self.name],
                version,
                self._gpu,
            )
            self._engines[guided] = Engine(
                self._trt, self._runtime, self._log, self.cuda, self.bundle, found, self._gpu
            )
        return self._engines[guided]

    def bind(self, batch: int) -> TensorRtBuffers:
        self.alive()
        return TensorRtBuffers(self, batch)

    def bucket(self, batch: int) -> int:
        """The smallest batch size of the engine that holds so many samples."""
        found = next((b for b in self._engines[False].buckets if b >= batch), None)
        if found is None:
            raise RequestError(
                f"a batch of {batch} is larger than the engine's largest, {self.largest}: give "
                f"max_batch={self.largest}, "
                "or build with --batch-buckets."
            )
        return found

    def alive(self) -> None:
        self.guard.check()
        if self._closed:
            raise BackendError(f"{self.name} was closed; load the bundle again.")

    def space(self, bucket: int) -> Space:
        if bucket not in self._spaces:
            self._spaces[bucket] = Space(self.cuda, self.bundle, bucket, self.stream)
        return self._spaces[bucket]

    def step_context(self, bucket: int, guided: bool) -> Context:
        """The context that runs single steps; captured graphs have their own."""
        key = bucket, guided
        if key not in self._steps:
            self._steps[key] = self._fitting(
                bucket,
                0,
                False,
                {guided},
                lambda: self.space(bucket).context(self.engine(guided), guided),
            )
        return self._steps[key]

    def run_rows(self, rows: Rows) -> tuple[Float32, Timing]:
        self.guard.check()  # before the lock, which a thread of the parent may hold forever
        with self.lock:
            self.alive()
            batch = len(rows.x)
            K = len(rows.call)
            noisy = bool(rows.noisy.any())
            bucket = self.bucket(batch)
            key = bucket, rows.guided.tobytes(), noisy
            new = key not in self._loops
            if new:
                kinds = {bool(g) for g in rows.guided}
                made = self._fitting(
                    bucket, K, noisy, kinds, lambda: self._loop(bucket, rows.guided, noisy)
                )
                self._loops[key] = made
                if len(self._loops) > LOOPS:
                    self._loops.popitem(last=False)[1].close()
            self._loops.move_to_end(key)
            loop = self._loops[key]
            x, spent = loop.run(rows)
            return x, Timing(
                batch,
                bucket,
                K,
                loop.how,
                loop.note,
                new and not loop.note,
                spent,
                sum(self.device_memory.values()),
            )

    def _loop(self, bucket: int, guided: Any, noisy: bool) -> DeviceLoop:
        engines_ = {kind: self.engine(kind) for kind in {bool(g) for g in guided}}
        return DeviceLoop(self.cuda, self.space(bucket), engines_, guided, noisy, self._copying)

    def _fitting(
        self, bucket: int, K: int, noisy: bool, kinds: set[bool], make: Callable[[], Any]
    ) -> Any:
        """What `make` makes; where the memory is full, once more without the captured loops that
        are kept.

        Raises GpuMemoryError with what was needed, and the largest batch that would fit.
        """
        for last in (False, True):
            there = bucket in self._spaces
            try:
                return make()
            except GpuMemoryError as error:
                if not there and bucket in self._spaces:
                    self._spaces.pop(bucket).close()
                while self._loops:
                    self._loops.popitem(last=False)[1].close()
                if last:
                    raise self._too_large(bucket, K, noisy, kinds, error) from error

    def _too_large(
        self, bucket: int, K: int, noisy: bool, kinds: set[bool], error: GpuMemoryError
    ) -> GpuMemoryError:
        free = self.cuda.free_bytes()
        needed = self._needed(bucket, K, noisy, kinds)
        fits = [
            b
            for b in self._engines[False].buckets
            if b < bucket and self._needed(b, K, noisy, kinds) <= free
        ]
        advice = (
            f"A batch of {fits[-1]} would fit: give max_batch={fits[-1]}."
            if fits
            else "No smaller batch would fit."
        )
        return GpuMemoryError(
            f"a batch of {bucket}{f' over {K} rows' if K else ''} needs {needed / 1e6:.2f} MB "
            f"more of the GPU's memory, "
            f"and {free / 1e6:.2f} MB are free. {advice} ({error})"
        )

    def _needed(self, bucket: int, K: int, noisy: bool, kinds: set[bool]) -> int:
        """Bytes that a loop takes beyond what is held already."""
        space = self._spaces.get(bucket)
        sample = int(np.prod(self.bundle.sample_shape))
        held = DeviceLoop.bytes(bucket, sample, K, noisy) + (
            0 if space else Space.bytes(self.bundle, bucket)
        )
        lacking = [k for k in kinds if k in self._engines and not (space and space.activated(k))]
        return held + sum(self._engines[k].activations(bucket) for k in lacking)


class TensorRtBuffers(HostBuffers):
    """A batch that is stepped from the host, for previews and inpainting: every step sends the
    state and fetches it."""

    def __init__(self, backend: TensorRt, batch: int) -> None:
        backend.bucket(batch)  # refuses a batch that no engine takes, before memory is allocated
        super().__init__(backend.bundle, backend.guard, batch)
        self._backend = backend

    def _bind(self, guided: bool, current: int, first: int, count: int) -> Callable[[], object]:
        backend = self._backend
        backend.alive()
        bucket = backend.bucket(count)
        arrays = self._arrays(current, first, count)

        def run() -> None:
            with backend.lock:
                backend.alive()
                context = backend.step_context(bucket, guided)
                space = backend.space(bucket)
                # What pads the bucket is left of earlier batches: samples do not see each other.
                for name in ("state", "noise", "call", "update", "label"):
                    space.pinned[name][:count] = arrays[name]
                space.upload("state", "noise", "call", "update", "label")
                context.bind(space.addresses)
                context.enqueue(backend.stream)
                space.download("next_state", "denoised")
                backend.cuda.synchronize(backend.stream)
                for name in ("next_state", "denoised"):
                    arrays[name][:] = space.pinned[name][:count]

        return run
