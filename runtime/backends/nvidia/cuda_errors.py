"""The errors of calls into CUDA, and into the libraries on top of it."""

from __future__ import annotations

import re

from ...errors import BackendError, GpuError, GpuMemoryError, NoDriverError, NoGpuError
from .cuda_api import CudaRuntime, Status

_FULL = re.compile(
    r"out of memory|OutOfMemory|MemoryAllocation|CUDA failure 2\b|failed to allocate|"
    r"could not be allocated|insufficient memory|not enough (device )?memory",
    re.IGNORECASE,
)
"""What TensorRT and ONNX Runtime say if the device's memory is full."""


def call_error(api: CudaRuntime, call: str, status: Status) -> BackendError:
    """Make the error for a call into CUDA from its status."""
    errors = api.cudaError_t
    _, words = api.cudaGetErrorString(status)
    said = f"{call}: {text(words)} ({getattr(status, 'name', status)})"
    if status == errors.cudaErrorInsufficientDriver:
        return NoDriverError(
            f"the NVIDIA driver is missing or older than CUDA needs ({said}). Install a newer "
            f"driver."
        )
    if status == errors.cudaErrorNoDevice:
        return no_gpu()
    if status == errors.cudaErrorMemoryAllocation:
        where = "page-locked host memory" if call == "cudaMallocHost" else "the GPU's memory"
        return GpuMemoryError(f"{where} is full ({said}).")
    return GpuError(f"CUDA failed, {said}. What was under way is lost; load the bundle again.")


def no_driver() -> NoDriverError:
    """Make the error for a machine without a driver."""
    return NoDriverError(
        "no NVIDIA driver is installed. Install the vendor's driver; inside a container, "
        "start it with the GPU."
    )


def no_gpu() -> NoGpuError:
    """Make the error for a machine without a GPU."""
    return NoGpuError(
        "there is an NVIDIA driver and no GPU that it shows. See nvidia-smi, and "
        "CUDA_VISIBLE_DEVICES."
    )


def library_error(what: str, said: str) -> GpuError:
    """Make the error for what a library could not do, from its own message."""
    kind = GpuMemoryError if _FULL.search(said) else GpuError
    return kind(f"{what}: {said or 'no reason given'}.")


def text(value: bytes | str) -> str:
    """Decode a C string. Versions of the bindings differ in whether they are bytes."""
    return value.decode() if isinstance(value, bytes) else value
