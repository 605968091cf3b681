"""TensorRT and TensorRT-RTX: the reverse loop in a few CUDA graphs of a step engine.

The engine comes from this machine's cache (`runtime.backends.nvidia.engine_cache`). `python -m
export.engines build` puts it there. docs/gpu.md describes the design.
"""

from __future__ import annotations

from ...bundle.bundle import Bundle
from ...bundle.format import step_file
from ...errors import GpuError, RequestError
from . import engine_cache as engines
from .cuda import Cuda, cudart
from .device_backend import DeviceBackend
from .engine_cache import LIBRARIES
from .exclusive import exclusive
from .tensorrt_api import NativeRuntime
from .tensorrt_engine import Engine
from .tensorrt_library import load_library, logger


class TensorRt(DeviceBackend):
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
        self._buckets: tuple[int, ...] = ()
        try:
            self._start(cuda)
            self._log = logger(self._trt)
            self._runtime: NativeRuntime | None = self._trt.Runtime(self._log)
            # An engine may bring code for the host. Ours have none, so none is run.
            self._runtime.engine_host_code_allowed = False
            self.engine(False)
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
            EngineError: There is none, or it does not load.
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
        engine = Engine(
            self._trt,
            self._runtime,
            self._log,
            self.cuda,
            self.bundle,
            found,
            self._gpu,
            self._owner,
        )
        if not guided:
            self._buckets = engine.buckets
            self.largest = engine.buckets[-1]
        return engine

    def bucket(self, batch: int) -> int:
        """Return the smallest batch size of the engine that holds so many samples.

        Raises:
            RequestError: None does.
        """
        found = next((b for b in self._buckets if b >= batch), None)
        if found is None:
            raise RequestError(
                f"a batch of {batch} is larger than the engine's largest, {self.largest}: give "
                f"max_batch={self.largest}, "
                "or build with --batch-buckets."
            )
        return found

    def _smaller(self, bucket: int) -> list[int]:
        return [size for size in self._buckets if size < bucket]
