"""One thread of the process at a time captures, or allocates on the device.

ONNX Runtime captures in CUDA's global mode: meanwhile an allocation by any thread of the process
fails, and breaks the capture. TensorRT's loop captures in thread-local mode, and its own thread
must not allocate. So all GPU backends of a process share one lock. It cannot stop other libraries
in the same process, such as PyTorch.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from threading import RLock

_DEVICE = RLock()
"""Of the process, because CUDA's global capture mode is. A thread may take it again."""


@contextmanager
def exclusive() -> Iterator[None]:
    """Let no other thread of the GPU backends capture, allocate or free meanwhile."""
    with _DEVICE:
        yield


@contextmanager
def capturing() -> Iterator[None]:
    """Do as `exclusive`, and stop Python's garbage collector.

    A collection could free a forgotten object's memory on the device, which breaks a capture.
    """
    with _DEVICE:
        running = gc.isenabled()
        gc.disable()
        try:
            yield
        finally:
            if running:
                gc.enable()
