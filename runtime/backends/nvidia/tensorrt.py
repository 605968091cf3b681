"""TensorRT and TensorRT-RTX: the reverse loop in a few CUDA graphs of a step engine.

The engine comes from this machine's cache (`runtime.backends.nvidia.engine_cache`). `python -m
export.engines build` puts it there. docs/gpu.md describes the design.
"""

from __future__ import annotations

import numpy as np

from ...bundle.bundle import Bundle
from ...bundle.format import step_file
from ...errors import EngineError, GpuError, GpuMemoryError, RequestError
from . import engine_cache as engines
from .cuda import Cuda, cudart
from .device_backend import DeviceBackend
from .device_loop import DeviceLoop
from .device_space import Space
from .engine_cache import LIBRARIES, Entry
from .exclusive import exclusive
from .tensorrt_api import NativeRuntime
from .tensorrt_engine import Engine
from .tensorrt_library import load_library, logger


class TensorRt(DeviceBackend[Engine]):
    """A bundle's step engines by TensorRT, for the batch sizes that they were built for.

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
        super().__init__(library, bundle, precision, threads)
        self._trt = load_library(library)
        cuda = Cuda(cudart("rtx" if library == "tensorrt-rtx" else "tensorrt"))
        self._gpu = cuda.gpu()
        try:
            self._start(cuda)
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

    def _forget(self) -> None:
        """Drop engines before the runtime."""
        with exclusive():
            super()._forget()
            self._runtime = None

    def _open(self, guided: bool) -> Engine:
        """Load a step graph's engine.

        Raises:
            EngineError: There is none, it does not load, or it is for other batches than the plain
                graph's.
        """
        assert self._runtime is not None, "closed"
        found = engines.find(
            self.bundle,
            self.precision,
            step_file(guided),
            LIBRARIES[self.name],
            self._trt.__version__,
            self._gpu,
        )
        if guided:
            self._check_buckets(found)
        return Engine(
            self._trt,
            self._runtime,
            self._log,
            self.cuda,
            self.bundle,
            found,
            self._gpu,
            self._owner,
        )

    def _check_buckets(self, guided: Entry) -> None:
        """Raise EngineError unless the guided graph's engine takes the batches of the plain one."""
        plain = self._engines[False].buckets
        if guided.recipe.buckets != plain:
            sizes = ",".join(map(str, plain))
            other = ",".join(map(str, guided.recipe.buckets))
            raise EngineError(
                f"the engine of {self.bundle.name} {self.precision} for guided rows is for batches "
                f"{other}, and the one for other rows for batches {sizes}: a build may have been "
                f"interrupted. Build both: python -m export.engines build {self.bundle.path} "
                f"--engine {self.name} --precision {self.precision} --batch-buckets {sizes}"
            )

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

    def _too_large(
        self, bucket: int, error: GpuMemoryError, K: int, noisy: bool, kinds: set[bool]
    ) -> GpuMemoryError:
        """Make the error with what was needed, and the largest batch that would fit."""
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
