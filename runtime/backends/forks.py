"""Inference libraries do not survive os.fork: refuse their use in a forked child, and let it
exit."""

from __future__ import annotations

import os
import sys
from functools import cache
from weakref import WeakValueDictionary

from ..errors import BackendError

_natives: WeakValueDictionary[int, object] = WeakValueDictionary()
"""Every live object that owns objects of an inference library, by id."""
_GLOBAL = {
    "openvino": "threads",
    "onnxruntime-cuda": "CUDA",
    "tensorrt": "CUDA",
    "tensorrt-rtx": "CUDA",
}
"""What backends share with everything else in their process, even after they are closed."""
_started: set[str] = set()
"""Those of `_GLOBAL` that this process, or a process that it is a fork of, has started."""
_inherited: set[str] = set()
"""Those that were started before the fork, and are broken here."""


class ForkGuard:
    """Remembers which process loaded a backend, the only process that can use it.

    A forked child inherits the library's objects but none of its threads, and no CUDA context.
    Using the objects there waits forever for those threads, or computes nonsense.

    Args:
        name: of the backend, for the error.
        owner: the Python object that owns the library's objects; see `keep`.

    Raises:
        BackendError: if the backend needs CUDA, and CUDA was started before this process was
        forked.
    """

    def __init__(self, name: str, owner: object) -> None:
        self.name = name
        self._pid = os.getpid()
        _install_hook()
        self._global = _GLOBAL.get(name, "")
        check_inherited(name)
        _started.add(self._global)
        self.keep(owner)

    @property
    def forked(self) -> bool:
        """Whether this process is a fork of the one that loaded the backend."""
        return os.getpid() != self._pid

    def check(self) -> None:
        """Raise BackendError in a process forked from the one that loaded the backend."""
        if self.forked:
            raise BackendError(
                f"the bundle was loaded on {self.name} in process {self._pid}, and process "
                f"{os.getpid()} is a fork of it. Inference libraries do not survive a fork. "
                "Load the bundle after the fork, once in every worker."
            )

    def keep(self, owner: object) -> None:
        """Never destroy what `owner` owns in a forked child, where its destructor would hang."""
        _natives[id(owner)] = owner
        if self._global and self._global in _inherited:
            # OpenVINO works again in a fork, but when it destroys a model it waits for its thread
            # pool, which is one for the process and lost its threads in the fork.
            _leak(owner)


def check_inherited(name: str) -> None:
    """Raise BackendError if a backend needs CUDA, and CUDA was started before a fork."""
    # Before CUDA is asked for anything: its own error would only say that it does not start.
    if _GLOBAL.get(name) == "CUDA" and "CUDA" in _inherited:
        raise BackendError(
            f"{name} cannot be opened: CUDA was started before this process was forked, "
            "and does not survive a fork. Load the first bundle after the fork, "
            "or start the workers with multiprocessing's `spawn`."
        )


def _leak(owner: object) -> None:
    """Keep `owner` to the end of the process. A variable could not: Python clears them at exit."""
    import ctypes

    ctypes.pythonapi.Py_IncRef(ctypes.py_object(owner))


@cache
def _install_hook() -> None:
    """Prepare every later fork. Does nothing if the system cannot fork."""
    if not hasattr(os, "register_at_fork"):
        return
    import ctypes

    libc = ctypes.CDLL(None)

    def after_fork() -> None:
        # The destructors of sessions and compiled models join threads that do not exist in this
        # process, so they must never run: leak a reference to every owner, on purpose. The memory
        # is shared with the parent until either process writes to it.
        _inherited.update(_started)
        for owner in list(_natives.values()):
            _leak(owner)
        # The libraries' exit handlers wait for missing threads, too: importing ONNX Runtime 1.32
        # is enough to hang exit(). The C library calls the newest handler first, so ours ends the
        # process, with its exit status, before it reaches any handler that the parent registered.
        # Python has finished by then; what the child itself registers later has run as well.
        if sys.platform == "linux" and hasattr(libc, "on_exit"):
            libc.on_exit(libc._exit, None)
            libc.__cxa_atexit(libc.fflush, None, None)

    os.register_at_fork(after_in_child=after_fork)
