"""Backends: each runs a bundle's step graph on one inference library. The loop and the update are theirs to run, not to decide."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from threading import Lock
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from ..bundle import Bundle
from ..errors import BackendError, unknown

Float32 = NDArray[np.float32]


class Buffers(Protocol):
    """One batch's memory, bound to the graph once. The caller fills the inputs in place, calls `step`, and reads the outputs.

    noise [B, *S], call [B, 6], update [B, R, R+2], label [B] int64: inputs. denoised [B, *S]: D of the last step.
    """

    noise: Float32
    call: Float32
    update: Float32
    label: NDArray[np.int64]
    denoised: Float32

    @property
    def state(self) -> Float32:
        """[B, R, *S]: the registers; another array after each step."""
        ...

    def step(self, guided: bool) -> None:
        """Run one row of every sample's program. guided: with the null label's half, for rows whose guidance is not 1."""
        ...


class Backend(Protocol):
    """A bundle loaded in one precision. Buffers may be used from one thread at a time; different buffers from different threads at once."""

    name: str
    precision: str

    def bind(self, batch: int) -> Buffers: ...


class BufferPool:
    """Lends buffers by batch size, one borrower at a time, and keeps them for the next."""

    def __init__(self, backend: Backend) -> None:
        self._backend, self._lock = backend, Lock()
        self._free: dict[int, list[Buffers]] = {}

    @contextmanager
    def lend(self, batch: int) -> Iterator[Buffers]:
        with self._lock:
            free = self._free.setdefault(batch, [])
            buffers = free.pop() if free else None
        buffers = buffers or self._backend.bind(batch)
        try:
            yield buffers
        finally:
            with self._lock:
                free.append(buffers)


def _onnxruntime(bundle: Bundle, precision: str, threads: int | None) -> Backend:
    from .onnxruntime import OnnxRuntime

    return OnnxRuntime(bundle, precision, threads)


BACKENDS: Mapping[str, Callable[[Bundle, str, int | None], Backend]] = {"onnxruntime": _onnxruntime}


def open_backend(bundle: Bundle, backend: str = "auto", precision: str = "auto", threads: int | None = None) -> Backend:
    """The bundle on a backend. `auto` is onnxruntime and fp32.

    Raises RequestError for an unknown backend or a precision that the bundle lacks, BackendError where this machine cannot run it.
    """
    backend = "onnxruntime" if backend == "auto" else backend
    precision = "fp32" if precision == "auto" else precision
    if backend not in BACKENDS:
        raise unknown("backend", backend, ["auto", *BACKENDS])
    if precision not in bundle.precisions:
        raise unknown(f"precision of bundle {bundle.name!r}:", precision, ["auto", *bundle.precisions])
    return BACKENDS[backend](bundle, precision, threads)


def missing(library: str, extra: str, error: Any) -> BackendError:
    """The error for an inference library that cannot be imported."""
    return BackendError(f"{library} cannot be imported ({error}). Install it: pip install 'unnoise[{extra}]'.")
