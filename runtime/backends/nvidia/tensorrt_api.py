"""Types of what we call in TensorRT and TensorRT-RTX, whose modules have no annotations."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol, TypeAlias

from .cuda_api import Address

Untyped: TypeAlias = Any
"""An enumeration, or a base class of ours: a Protocol can be neither."""


class Log(Protocol):
    """Our logger, which the library writes to."""

    def said(self) -> str:
        """Return the last errors."""
        ...

    def clear(self) -> None:
        """Forget them."""
        ...


class HostMemory(Protocol):
    """IHostMemory, which has the buffer protocol."""

    nbytes: int

    def __buffer__(self, flags: int, /) -> memoryview: ...


class RuntimeCache(Protocol):
    """IRuntimeCache, of TensorRT-RTX: compiled kernels."""

    def deserialize(self, data: bytes) -> bool: ...
    def serialize(self) -> HostMemory | None: ...


class RuntimeConfig(Protocol):
    """IRuntimeConfig, of TensorRT-RTX."""

    dynamic_shapes_kernel_specialization_strategy: object
    cuda_graph_strategy: object

    def set_execution_context_allocation_strategy(self, strategy: object) -> None: ...
    def create_runtime_cache(self) -> RuntimeCache: ...
    def set_runtime_cache(self, cache: RuntimeCache) -> bool: ...


class ExecutionContext(Protocol):
    """IExecutionContext."""

    def set_optimization_profile_async(self, profile: int, stream: int) -> bool: ...
    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool: ...
    def infer_shapes(self) -> Sequence[str]: ...
    def set_device_memory(self, address: Address, size: int) -> None: ...
    def set_tensor_address(self, name: str, address: Address) -> bool: ...
    def execute_async_v3(self, stream: int) -> bool: ...


class NativeEngine(Protocol):
    """ICudaEngine."""

    num_io_tensors: int
    num_optimization_profiles: int
    device_memory_size_v2: int

    def get_tensor_name(self, index: int) -> str: ...
    def get_tensor_mode(self, name: str) -> object: ...
    def get_tensor_dtype(self, name: str) -> object: ...
    def get_tensor_location(self, name: str) -> object: ...
    def get_tensor_profile_shape(self, name: str, profile: int) -> Sequence[Sequence[int]]: ...
    def create_runtime_config(self) -> RuntimeConfig: ...
    def create_execution_context(self, how: RuntimeConfig | object) -> ExecutionContext | None: ...


class NativeRuntime(Protocol):
    """IRuntime."""

    engine_host_code_allowed: bool

    def deserialize_cuda_engine(self, data: bytes) -> NativeEngine | None: ...


class TensorRtLibrary(Protocol):
    """The module tensorrt or tensorrt_rtx, whose enumerations and base classes stay untyped."""

    __name__: str
    __version__: str
    ILogger: Untyped
    DataType: Untyped
    TensorIOMode: Untyped
    TensorLocation: Untyped
    ExecutionContextAllocationStrategy: Untyped
    DynamicShapesKernelSpecializationStrategy: Untyped
    CudaGraphStrategy: Untyped

    def Runtime(self, log: Log) -> NativeRuntime: ...
