"""The CUDA runtime's calls that the GPU backends need, each checked, with every handle given back
by its owner's `close`."""

from __future__ import annotations

import ctypes
import importlib
import re
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from ...errors import GpuError, GpuMemoryError, NoDriverError, NoGpuError
from ..base import missing
from .engine_cache import Gpu

ALIGNMENT = 256
"""Bytes, of every device address that TensorRT is given."""
PROC = Path("/proc/driver/nvidia/version")
Address: TypeAlias = int


def aligned(size: int) -> int:
    """Bytes, rounded up to where the next slice may begin."""
    return -(-size // ALIGNMENT) * ALIGNMENT


def cudart() -> Any:
    """The module cuda.bindings.runtime. Raises BackendError where it is not installed."""
    try:
        return importlib.import_module("cuda.bindings.runtime")
    except ImportError as error:
        raise missing("cuda.bindings", "rtx", error) from error


class Cuda:
    """Device 0 of this process (CUDA_VISIBLE_DEVICES chooses). Raises NoDriverError and NoGpuError
    where there is none."""

    def __init__(self, api: Any) -> None:
        self._api = api
        self.held = 0
        """Bytes of device memory that were asked for and not given back."""
        if self._do(api.cudaDriverGetVersion) == 0:
            raise NoDriverError(
                "no NVIDIA driver is installed. Install the vendor's driver; inside a container, "
                "start it with the GPU."
            )
        if not self._do(api.cudaGetDeviceCount):
            raise self._no_gpu()
        kinds = api.cudaMemcpyKind
        self._up = kinds.cudaMemcpyHostToDevice
        self._down = kinds.cudaMemcpyDeviceToHost

    def gpu(self) -> Gpu:
        """What engines depend on."""
        properties = self._do(self._api.cudaGetDeviceProperties, 0)
        version = self._do(self._api.cudaDriverGetVersion)
        name = properties.name
        text = name.decode() if isinstance(name, bytes) else str(name)
        text_of_driver = (
            PROC.read_text(encoding="utf-8", errors="replace") if PROC.is_file() else ""
        )
        release = re.search(r"\d+\.\d+[.\d]*", text_of_driver)
        driver = f"CUDA {version // 1000}.{version % 1000 // 10}" + (
            f", {release[0]}" if release else ""
        )
        return Gpu(text.rstrip("\0"), f"{properties.major}.{properties.minor}", driver)

    def free_bytes(self) -> int:
        """Device memory that is free."""
        return int(self._do(self._api.cudaMemGetInfo)[0])

    def memory(self, size: int, owner: ExitStack) -> Address:
        """`size` bytes on the device, until `owner` closes. Raises GpuMemoryError."""
        api = self._api
        address = int(self._do(api.cudaMalloc, max(size, 1)))
        self.held += size

        def free() -> None:
            self.held -= size
            self._do(api.cudaFree, address)

        owner.callback(free)
        return address

    def pinned(self, shape: tuple[int, ...], kind: Any, owner: ExitStack) -> NDArray[Any]:
        """An array of zeros in page-locked host memory, until `owner` closes, after which it must
        not be touched."""
        api = self._api
        size = int(np.prod(shape)) * np.dtype(kind).itemsize
        address = int(self._do(api.cudaMallocHost, max(size, 1)))
        owner.callback(self._do, api.cudaFreeHost, address)
        host = memoryview((ctypes.c_byte * max(size, 1)).from_address(address))[:size]
        array = np.frombuffer(host, kind).reshape(shape)
        array[...] = 0
        return array

    def stream(self, owner: ExitStack) -> Any:
        """A stream that does not wait for the default one."""
        stream = self._do(self._api.cudaStreamCreateWithFlags, self._api.cudaStreamNonBlocking)
        owner.callback(self._do, self._api.cudaStreamDestroy, stream)
        return stream

    def event(self, owner: ExitStack, timed: bool = False) -> Any:
        api = self._api
        event = self._do(
            api.cudaEventCreateWithFlags,
            api.cudaEventDefault if timed else api.cudaEventDisableTiming,
        )
        owner.callback(self._do, api.cudaEventDestroy, event)
        return event

    def upload(self, to: Address, array: NDArray[Any], stream: Any) -> None:
        """Copy a contiguous pinned array to the device; it must stay as it is until the stream gets
        there."""
        self._do(self._api.cudaMemcpyAsync, to, array.ctypes.data, array.nbytes, self._up, stream)

    def download(self, array: NDArray[Any], source: Address, stream: Any) -> None:
        """Copy device memory into a contiguous pinned array."""
        self._do(
            self._api.cudaMemcpyAsync, array.ctypes.data, source, array.nbytes, self._down, stream
        )

    def clear(self, address: Address, size: int, stream: Any) -> None:
        self._do(self._api.cudaMemsetAsync, address, 0, size, stream)

    def record(self, event: Any, stream: Any) -> None:
        self._do(self._api.cudaEventRecord, event, stream)

    def wait(self, stream: Any, event: Any) -> None:
        """What comes next on the stream waits for what was recorded."""
        self._do(self._api.cudaStreamWaitEvent, stream, event, 0)

    def synchronize(self, stream: Any) -> None:
        self._do(self._api.cudaStreamSynchronize, stream)

    def until(self, event: Any) -> None:
        """Let the host wait for what was recorded; at once where nothing was."""
        self._do(self._api.cudaEventSynchronize, event)

    def milliseconds(self, start: Any, end: Any) -> float:
        return float(self._do(self._api.cudaEventElapsedTime, start, end))

    def capture(self, enqueue: Callable[[], None], stream: Any) -> Any:
        """What `enqueue` puts on the stream, as a graph that can be launched; give it back with
        `destroy`.

        Whatever goes wrong, the capture is ended and the error is cleared, so that the stream can
        be used as before (trtexec's recipe).
        """
        api = self._api
        template = graph = None
        try:
            self._do(
                api.cudaStreamBeginCapture,
                stream,
                api.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal,
            )
            try:
                enqueue()
            finally:
                status, template = api.cudaStreamEndCapture(stream)
            if status != api.cudaError_t.cudaSuccess:
                raise self._error("cudaStreamEndCapture", status)
            graph = self._do(api.cudaGraphInstantiate, template, 0)
            self._drop(template)
        except BaseException:
            if graph is not None:
                self.destroy(graph)
            elif template is not None:
                self._drop(template)
            api.cudaGetLastError()
            raise
        return graph

    def launch(self, graph: Any, stream: Any) -> None:
        self._do(self._api.cudaGraphLaunch, graph, stream)

    def destroy(self, graph: Any) -> None:
        self._do(self._api.cudaGraphExecDestroy, graph)

    def _drop(self, template: Any) -> None:
        if template is not None and int(template):
            self._do(self._api.cudaGraphDestroy, template)

    def _do(self, function: Any, *arguments: Any) -> Any:
        """The values that a call returns after its status. Raises the error that the status
        names."""
        status, *values = function(*arguments)
        if status != self._api.cudaError_t.cudaSuccess:
            raise self._error(function.__name__, status)
        return values[0] if len(values) == 1 else values

    def _error(self, call: str, status: Any) -> GpuError | NoDriverError | NoGpuError:
        errors = self._api.cudaError_t
        text = self._api.cudaGetErrorString(status)[1]
        words = text.decode() if isinstance(text, bytes) else text
        said = f"{call}: {words} ({getattr(status, 'name', status)})"
        if status == errors.cudaErrorInsufficientDriver:
            return NoDriverError(
                f"the NVIDIA driver is missing or older than CUDA needs ({said}). Install a newer "
                f"driver."
            )
        if status == errors.cudaErrorNoDevice:
            return self._no_gpu()
        if status == errors.cudaErrorMemoryAllocation:
            where = "page-locked host memory" if call == "cudaMallocHost" else "the GPU's memory"
            return GpuMemoryError(f"{where} is full ({said}).")
        return GpuError(f"CUDA failed, {said}. What was under way is lost; load the bundle again.")

    def _no_gpu(self) -> NoGpuError:
        return NoGpuError(
            "there is an NVIDIA driver and no GPU that it shows. See nvidia-smi, and "
            "CUDA_VISIBLE_DEVICES."
        )
