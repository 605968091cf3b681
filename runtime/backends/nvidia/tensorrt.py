"""TensorRT and TensorRT-RTX: the whole reverse loop as one CUDA graph of a step engine.

The engine comes from this machine's cache (`runtime.backends.nvidia.engine_cache`). `python -m
export.engines build` puts it there. docs/gpu.md describes the design.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from threading import RLock
from typing import TypeVar

import numpy as np

from ...bundle.bundle import Bundle
from ...bundle.format import step_file
from ...errors import BackendError, GpuError, GpuMemoryError, RequestError
from ..base import Float32, Rows, Timing
from ..forks import ForkGuard
from . import engine_cache as engines
from .cuda import Cuda, cudart
from .cuda_api import Stream
from .device_loop import DeviceLoop
from .device_space import Space
from .engine_cache import LIBRARIES
from .exclusive import exclusive
from .tensorrt_api import NativeRuntime
from .tensorrt_buffers import TensorRtBuffers
from .tensorrt_engine import Context, Engine
from .tensorrt_library import load_library, logger

Made = TypeVar("Made")


class TensorRt:
    """A bundle's step engines on one GPU, one stream, one batch at a time.

    Calls from other threads wait. `close`, or leaving a `with` block, frees everything.

    Args:
        threads: None; a GPU has none to choose.
        library: "tensorrt" or "tensorrt-rtx".

    Raises:
        BackendError: One of its kinds in `runtime.errors`: the library, a driver, a GPU, an engine
            in the cache or memory is missing.
        RequestError: `threads` is given.
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
        self.cuda = Cuda(cudart("rtx" if library == "tensorrt-rtx" else "tensorrt"))
        self._gpu = self.cuda.gpu()
        self.largest: int | None = None
        """Samples of the largest batch that the engine was built for."""
        self.lock = RLock()
        self._owner = ExitStack()
        self._closed = False
        self._streams: list[Stream] = []
        self._engines: dict[bool, Engine] = {}
        self._spaces: dict[int, Space] = {}
        self._steps: dict[tuple[int, bool], Context] = {}
        self._loops: dict[int, DeviceLoop] = {}
        try:
            for _ in range(2):
                self._streams.append(self.cuda.stream(self._owner))
            self.stream, self._copying = self._streams
            self._log = logger(self._trt)
            self._runtime: NativeRuntime | None = self._trt.Runtime(self._log)
            # An engine may bring code for the host. Ours have none, so none is run.
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
        """Bytes on the device of the engines, and of batches and programs.

        The engines' share is estimated from the device's free memory.
        """
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
        """Drop contexts before engines, and engines before the runtime."""
        with exclusive():
            for held in (self._loops, self._steps, self._spaces, self._engines):
                held.clear()
            self._runtime = None

    def engine(self, guided: bool) -> Engine:
        """Return the step graph's engine, or the guided one's, loaded on first use.

        Raises:
            EngineError: There is none, or it does not load.
        """
        if guided not in self._engines:
            assert self._runtime is not None, "closed"
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
                self._trt,
                self._runtime,
                self._log,
                self.cuda,
                self.bundle,
                found,
                self._gpu,
                self._owner,
            )
        return self._engines[guided]

    def bind(self, batch: int) -> TensorRtBuffers:
        """Allocate memory for `batch` samples that are stepped from the host."""
        self.alive()
        return TensorRtBuffers(self, batch)

    def bucket(self, batch: int) -> int:
        """Return the smallest batch size of the engine that holds so many samples.

        Raises:
            RequestError: None does.
        """
        found = next((b for b in self._engines[False].buckets if b >= batch), None)
        if found is None:
            raise RequestError(
                f"a batch of {batch} is larger than the engine's largest, {self.largest}: give "
                f"max_batch={self.largest}, "
                "or build with --batch-buckets."
            )
        return found

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

    def step_context(self, bucket: int, guided: bool) -> Context:
        """Return the context that runs single steps; captured graphs have their own."""
        key = bucket, guided
        if key not in self._steps:

            def make() -> Context:
                self.space(bucket)
                return self.engine(guided).context(bucket, self.stream)

            self._steps[key] = self._fitting(bucket, 0, False, {guided}, make)
        return self._steps[key]

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
                while self._loops:
                    self._loops.popitem()[1].close()
                if not there and bucket in self._spaces:
                    self._spaces.pop(bucket).close()
                if last:
                    raise self._too_large(bucket, K, noisy, kinds, error) from error
        raise AssertionError("unreachable")

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
        """The bytes that a loop takes beyond what is held already."""
        space = self._spaces.get(bucket)
        sample = int(np.prod(self.bundle.sample_shape))
        held = DeviceLoop.bytes(bucket, sample, K, noisy) + (
            0 if space else Space.bytes(self.bundle, bucket)
        )
        return held + sum(self._engines[kind].lacking for kind in kinds & self._engines.keys())
