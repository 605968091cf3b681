"""Types of what we call in cuda.bindings.runtime, which has no annotations.

Every call returns its status, then its values. Handles are opaque: only their number is ever used.
"""

# ruff: noqa: N815 - the names are those of CUDA
from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, SupportsInt, TypeAlias

Stream: TypeAlias = SupportsInt
Event: TypeAlias = SupportsInt
Template: TypeAlias = SupportsInt
"""A captured graph."""
Graph: TypeAlias = SupportsInt
"""A captured graph that can be launched."""
Address: TypeAlias = int
"""Of device memory."""
Status: TypeAlias = object
Done: TypeAlias = tuple[Status]
"""What a call returns that has no values."""


class Errors(Protocol):
    """cudaError_t."""

    cudaSuccess: Status
    cudaErrorInsufficientDriver: Status
    cudaErrorNoDevice: Status
    cudaErrorMemoryAllocation: Status


class CopyKinds(Protocol):
    """cudaMemcpyKind."""

    cudaMemcpyHostToDevice: object
    cudaMemcpyDeviceToHost: object
    cudaMemcpyDeviceToDevice: object


class CaptureModes(Protocol):
    """cudaStreamCaptureMode."""

    cudaStreamCaptureModeThreadLocal: object


class Properties(Protocol):
    """cudaDeviceProp."""

    name: bytes | str
    major: int
    minor: int


class CudaRuntime(Protocol):
    """The module cuda.bindings.runtime."""

    cudaError_t: Errors
    cudaMemcpyKind: CopyKinds
    cudaStreamCaptureMode: CaptureModes
    cudaStreamNonBlocking: int
    cudaEventDefault: int
    cudaEventDisableTiming: int

    # Attributes and not methods: `Cuda` passes them on as functions of their arguments.
    cudaDriverGetVersion: Callable[[], tuple[Status, int]]
    cudaGetDeviceCount: Callable[[], tuple[Status, int]]
    cudaGetDeviceProperties: Callable[[int], tuple[Status, Properties]]
    cudaGetErrorString: Callable[[Status], tuple[Status, bytes | str]]
    cudaGetLastError: Callable[[], Done]
    cudaMemGetInfo: Callable[[], tuple[Status, int, int]]
    cudaMalloc: Callable[[int], tuple[Status, SupportsInt]]
    cudaFree: Callable[[Address], Done]
    cudaMallocHost: Callable[[int], tuple[Status, SupportsInt]]
    cudaFreeHost: Callable[[int], Done]
    cudaMemcpyAsync: Callable[[int, int, int, object, Stream], Done]
    cudaMemcpy2DAsync: Callable[[int, int, int, int, int, int, object, Stream], Done]
    cudaMemsetAsync: Callable[[Address, int, int, Stream], Done]
    cudaStreamCreateWithFlags: Callable[[int], tuple[Status, Stream]]
    cudaStreamDestroy: Callable[[Stream], Done]
    cudaStreamSynchronize: Callable[[Stream], Done]
    cudaStreamWaitEvent: Callable[[Stream, Event, int], Done]
    cudaEventCreateWithFlags: Callable[[int], tuple[Status, Event]]
    cudaEventDestroy: Callable[[Event], Done]
    cudaEventRecord: Callable[[Event, Stream], Done]
    cudaEventSynchronize: Callable[[Event], Done]
    cudaEventElapsedTime: Callable[[Event, Event], tuple[Status, float]]
    cudaStreamBeginCapture: Callable[[Stream, object], Done]
    cudaStreamEndCapture: Callable[[Stream], tuple[Status, Template]]
    cudaGraphInstantiate: Callable[[Template, int], tuple[Status, Graph]]
    cudaGraphLaunch: Callable[[Graph, Stream], Done]
    cudaGraphExecDestroy: Callable[[Graph], Done]
    cudaGraphDestroy: Callable[[Template], Done]
