"""The calls of the CUDA runtime that the GPU backends need, each checked.

An `ExitStack`, the owner, gives back every handle and all memory when it closes.
"""

from __future__ import annotations

import ctypes
import importlib
import re
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import ParamSpec, TypeVar, TypeVarTuple, cast

import numpy as np
from numpy.typing import NDArray

from ...diffusion.arrays import Array
from ..base import missing
from .cuda_api import Address, CudaRuntime, Event, Graph, Status, Stream, Template
from .cuda_errors import call_error, no_driver, no_gpu, text
from .engine_cache import Gpu
from .exclusive import capturing, exclusive

P = ParamSpec("P")
Values = TypeVarTuple("Values")
Element = TypeVar("Element", bound=np.generic)

ALIGNMENT = 256
"""Every device address that TensorRT is given is a multiple of so many bytes."""
PROC = Path("/proc/driver/nvidia/version")
"""The driver's file with its release, which CUDA does not report."""


def aligned(size: int) -> int:
    """Round bytes up to where the next slice may begin."""
    return -(-size // ALIGNMENT) * ALIGNMENT


def cudart(extra: str = "rtx") -> CudaRuntime:
    """Import cuda.bindings.runtime, which the package's `extra` installs.

    Raises:
        BackendError: It is not installed.
    """
    try:
        return cast(CudaRuntime, importlib.import_module("cuda.bindings.runtime"))
    except ImportError as error:
        raise missing("cuda.bindings", extra, error) from error


class Cuda:
    """Device 0 of this process, which CUDA_VISIBLE_DEVICES chooses.

    Every method raises GpuError, or a kind of it, if CUDA reports one.

    Raises:
        NoDriverError: No driver is installed, or it is too old.
        NoGpuError: There is no GPU.
    """

    def __init__(self, api: CudaRuntime) -> None:
        self._api = api
        self.held = 0
        """Bytes of device memory that were asked for and not given back."""
        # Without a driver the runtime reports version 0, and no error.
        (version,) = self._do(api.cudaDriverGetVersion)
        if version == 0:
            raise no_driver()
        (count,) = self._do(api.cudaGetDeviceCount)
        if not count:
            raise no_gpu()
        kinds = api.cudaMemcpyKind
        self._up = kinds.cudaMemcpyHostToDevice
        self._down = kinds.cudaMemcpyDeviceToHost
        self._across = kinds.cudaMemcpyDeviceToDevice

    def gpu(self) -> Gpu:
        """Describe what engines depend on."""
        (properties,) = self._do(self._api.cudaGetDeviceProperties, 0)
        (version,) = self._do(self._api.cudaDriverGetVersion)
        driver = f"CUDA {version // 1000}.{version % 1000 // 10}"
        if PROC.is_file():
            said = PROC.read_text(encoding="utf-8", errors="replace")
            release = re.search(r"\d+\.\d+[.\d]*", said)
            driver += f", {release[0]}" if release else ""
        # Some versions of the bindings return the C string with its padding.
        name = text(properties.name).rstrip("\0")
        return Gpu(name, f"{properties.major}.{properties.minor}", driver)

    def free_bytes(self) -> int:
        """Ask how much device memory is free."""
        free, _ = self._do(self._api.cudaMemGetInfo)
        return int(free)

    def memory(self, size: int, owner: ExitStack) -> Address:
        """Allocate `size` bytes on the device, until `owner` closes.

        Raises:
            GpuMemoryError: The device's memory is full.
        """
        api = self._api
        # At least one byte: the size 0 need not give an address that can be freed.
        (pointer,) = self._alone(api.cudaMalloc, max(size, 1))
        address = int(pointer)
        self.held += size

        def free() -> None:
            self.held -= size
            self._alone(api.cudaFree, address)

        owner.callback(free)
        return address

    def pinned(
        self, shape: tuple[int, ...], kind: type[Element], owner: ExitStack
    ) -> NDArray[Element]:
        """Allocate an array of zeros of this shape in page-locked host memory.

        After `owner` closes it must not be touched.

        Raises:
            GpuMemoryError: The system has no more page-locked memory.
        """
        api = self._api
        size = int(np.prod(shape)) * np.dtype(kind).itemsize
        (pointer,) = self._alone(api.cudaMallocHost, max(size, 1))
        address = int(pointer)
        owner.callback(self._alone, api.cudaFreeHost, address)
        # A view of foreign memory: copies between it and the device need no staging by the driver.
        host = memoryview((ctypes.c_byte * max(size, 1)).from_address(address))[:size]
        array = np.frombuffer(host, kind).reshape(shape)
        array[...] = 0
        return array

    def stream(self, owner: ExitStack) -> Stream:
        """Create a stream that does not wait for the default one."""
        (stream,) = self._alone(
            self._api.cudaStreamCreateWithFlags, self._api.cudaStreamNonBlocking
        )
        owner.callback(self._alone, self._api.cudaStreamDestroy, stream)
        return stream

    def event(self, owner: ExitStack, timed: bool = False) -> Event:
        """Create an event. An event that is not timed costs less to record."""
        api = self._api
        flags = api.cudaEventDefault if timed else api.cudaEventDisableTiming
        (event,) = self._alone(api.cudaEventCreateWithFlags, flags)
        owner.callback(self._alone, api.cudaEventDestroy, event)
        return event

    def upload(self, to: Address, array: Array, stream: Stream) -> None:
        """Copy a contiguous pinned array of any shape to the device.

        The array must not change until the stream has copied it.
        """
        self._do(self._api.cudaMemcpyAsync, to, array.ctypes.data, array.nbytes, self._up, stream)

    def download(self, array: Array, source: Address, stream: Stream) -> None:
        """Copy device memory into a contiguous pinned array of any shape."""
        self._do(
            self._api.cudaMemcpyAsync, array.ctypes.data, source, array.nbytes, self._down, stream
        )

    def upload_columns(self, to: Address, pitch: int, array: Array, stream: Stream) -> None:
        """Copy a pinned array [n, …] so that row i lies `pitch` bytes after row i - 1."""
        width = array.nbytes // len(array)
        source = array.ctypes.data
        self._do(
            self._api.cudaMemcpy2DAsync,
            to, pitch, source, width, width, len(array), self._up, stream,
        )  # fmt: skip

    def download_columns(self, array: Array, source: Address, pitch: int, stream: Stream) -> None:
        """Copy rows that start every `pitch` bytes into a pinned array [n, …]."""
        width = array.nbytes // len(array)
        to = array.ctypes.data
        self._do(
            self._api.cudaMemcpy2DAsync,
            to, width, source, pitch, width, len(array), self._down, stream,
        )  # fmt: skip

    def copy(self, to: Address, source: Address, size: int, stream: Stream) -> None:
        """Copy within the device's memory."""
        self._do(self._api.cudaMemcpyAsync, to, source, size, self._across, stream)

    def clear(self, address: Address, size: int, stream: Stream) -> None:
        """Fill device memory with zeros."""
        self._do(self._api.cudaMemsetAsync, address, 0, size, stream)

    def record(self, event: Event, stream: Stream) -> None:
        """Record the event when the stream gets there."""
        self._do(self._api.cudaEventRecord, event, stream)

    def wait(self, stream: Stream, event: Event) -> None:
        """Make the stream wait for the recorded event before it continues."""
        self._do(self._api.cudaStreamWaitEvent, stream, event, 0)

    def synchronize(self, stream: Stream) -> None:
        """Let the host wait for the stream."""
        self._do(self._api.cudaStreamSynchronize, stream)

    def until(self, event: Event) -> None:
        """Make the host wait for the recorded event. It does not wait if nothing was."""
        self._do(self._api.cudaEventSynchronize, event)

    def milliseconds(self, start: Event, end: Event) -> float:
        """Compute the device's time between two timed events."""
        (elapsed,) = self._do(self._api.cudaEventElapsedTime, start, end)
        return float(elapsed)

    def capture(self, enqueue: Callable[[], None], stream: Stream) -> Graph:
        """Capture what `enqueue` puts on the stream; `destroy` gives the graph back.

        After an error the capture is ended and CUDA's error is cleared, so that the stream can be
        used as before, as trtexec does.
        """
        with capturing():
            return self._capture(enqueue, stream)

    def _capture(self, enqueue: Callable[[], None], stream: Stream) -> Graph:
        api = self._api
        template = None
        graph = None
        try:
            # Thread-local: other threads may call CUDA meanwhile, and break nothing.
            self._do(
                api.cudaStreamBeginCapture,
                stream,
                api.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal,
            )
            # Even if `enqueue` raises: a stream left in capture mode would fail every later call.
            try:
                enqueue()
            finally:
                status, template = api.cudaStreamEndCapture(stream)
            if status != api.cudaError_t.cudaSuccess:
                raise call_error(api, "cudaStreamEndCapture", status)
            # An instantiated graph is a copy, and does not need the captured one.
            (graph,) = self._do(api.cudaGraphInstantiate, template, 0)
            self._drop(template)
        except BaseException:
            if graph is not None:
                self.destroy(graph)
            elif template is not None:
                self._drop(template)
            # Asking for the error of the failed capture clears it; the next call would report it.
            api.cudaGetLastError()
            raise
        return graph

    def launch(self, graph: Graph, stream: Stream) -> None:
        """Put a captured graph on the stream."""
        self._do(self._api.cudaGraphLaunch, graph, stream)

    def destroy(self, graph: Graph) -> None:
        """Give a captured graph back."""
        self._alone(self._api.cudaGraphExecDestroy, graph)

    def _drop(self, template: Template) -> None:
        if int(template):  # a failed capture ends with a null handle
            self._do(self._api.cudaGraphDestroy, template)

    def _alone(
        self,
        function: Callable[P, tuple[Status, *Values]],
        *arguments: P.args,
        **named: P.kwargs,
    ) -> tuple[*Values]:
        """Do as `_do`, while no other thread captures: what creates or frees could break it."""
        with exclusive():
            return self._do(function, *arguments, **named)

    def _do(
        self,
        function: Callable[P, tuple[Status, *Values]],
        *arguments: P.args,
        **named: P.kwargs,
    ) -> tuple[*Values]:
        """Call CUDA; return the values after the status, or raise the error that it names."""
        result = function(*arguments, **named)
        status = result[0]
        if status != self._api.cudaError_t.cudaSuccess:
            raise call_error(self._api, getattr(function, "__name__", "a call"), status)
        return result[1:]
