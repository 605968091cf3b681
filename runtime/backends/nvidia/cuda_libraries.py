"""What ONNX Runtime's CUDA provider needs, checked before the first session.

The provider itself reports a missing driver or library on stderr only, and then says that its nodes
would run on the CPU.
"""

from __future__ import annotations

import contextlib
import ctypes
import io
import logging
import sys

from ...errors import CudaLibraryError
from ..onnxruntime_api import OnnxRuntimeLibrary
from .cuda import Cuda, cudart

_LOG = logging.getLogger("unnoise.onnxruntime")


def needed(cuda_version: str) -> tuple[str, ...]:
    """List the shared libraries that the provider loads on Linux.

    cuda_version: That it was built with, such as "13.0".
    """
    major = cuda_version.partition(".")[0]
    toolkit = [f"lib{name}.so.{major}" for name in ("cudart", "cublasLt", "cublas")]
    return (*toolkit, "libcurand.so.10", "libcudnn.so.9")


def loads(name: str) -> bool:
    """Whether the dynamic linker finds a library."""
    try:
        ctypes.CDLL(name)
    except OSError:
        return False
    return True


def ready(ort: OnnxRuntimeLibrary) -> Cuda:
    """Return device 0, once all that the provider needs is there.

    Raises:
        BackendError: cuda.bindings is missing.
        NoDriverError: No driver is installed, or it is too old.
        NoGpuError: There is no GPU.
        CudaLibraryError: CUDA's libraries, or cuDNN, cannot be loaded.
    """
    cuda = Cuda(cudart("cuda"))
    # It finds the libraries in their own packages, where the dynamic linker does not look.
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        ort.preload_dlls()
    if said.getvalue():
        _LOG.info("%s", said.getvalue().strip())
    if sys.platform == "linux" and ort.cuda_version:
        lacking = [name for name in needed(ort.cuda_version) if not loads(name)]
        if lacking:
            raise CudaLibraryError(
                f"onnxruntime's CUDA provider needs {', '.join(lacking)}, which cannot be loaded. "
                "Install CUDA and cuDNN: pip install 'unnoise[cuda]'."
            )
    return cuda
