"""One thread of the process at a time captures, or allocates on the device.

Loops are captured in CUDA's thread-local mode, in which only the capturing thread must not
allocate. But no library says which of its calls are safe while another thread captures, so all GPU
backends of a process share one lock. It cannot stop other libraries, and need not: a loop was
captured next to a thread that allocated and copied all the time.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from threading import RLock

_DEVICE = RLock()
"""Of the process. A thread may take it again."""


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
