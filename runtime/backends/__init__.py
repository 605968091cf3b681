"""Backends: each runs a bundle's step graph on one inference library. The loop and the update are theirs to run, not to decide."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from threading import Lock
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from ..bundle import Bundle
from ..errors import BackendError, BundleError, RequestError, UnnoiseError, unknown

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


@dataclass(frozen=True)
class Kind:
    """A backend as it can be chosen: the bundle's folder that each precision is computed from, and how it is opened."""

    folders: Mapping[str, str]
    open: Callable[[Bundle, str, int | None], Backend]


def _onnxruntime(bundle: Bundle, precision: str, threads: int | None) -> Backend:
    from .onnxruntime import OnnxRuntime

    return OnnxRuntime(bundle, precision, threads)


def _openvino(bundle: Bundle, precision: str, threads: int | None) -> Backend:
    from .openvino import OpenVino

    return OpenVino(bundle, precision, threads)


BACKENDS: Mapping[str, Kind] = {
    "onnxruntime": Kind({"fp32": "fp32", "int8": "int8"}, _onnxruntime),
    "openvino": Kind({"fp32": "fp32", "bf16": "fp32", "int8": "int8"}, _openvino),
}


def offered(bundle: Bundle) -> list[tuple[str, str]]:
    """The (backend, precision) pairs that a bundle can be opened with, where the machine has what they need.

    int8 is offered to the backends that the bundle's report shows it was checked on: the same Q/DQ graph has been seen to come
    out wrong on others. What missed its bounds there is offered to none.
    """
    return [
        (name, precision)
        for name, kind in BACKENDS.items()
        for precision, folder in kind.folders.items()
        if folder in bundle.precisions and _may_run(bundle.report.get(precision, {}).get(name), folder)
    ]


def _may_run(checked: Mapping[str, Any] | None, folder: str) -> bool:
    return folder == "fp32" if checked is None else not checked.get("missed")


def open_backend(bundle: Bundle, backend: str = "auto", precision: str = "auto", threads: int | None = None) -> Backend:
    """The bundle on a backend. `auto` is onnxruntime and fp32.

    Raises RequestError for an unknown backend or a precision that it cannot run or the bundle lacks, BackendError where this machine cannot run it.
    """
    backend = "onnxruntime" if backend == "auto" else backend
    precision = "fp32" if precision == "auto" else precision
    if backend not in BACKENDS:
        raise unknown("backend", backend, ["auto", *BACKENDS])
    pairs = offered(bundle)
    if (backend, precision) not in pairs:
        raise _not_offered(bundle, backend, precision, pairs)
    return BACKENDS[backend].open(bundle, precision, threads)


def _not_offered(bundle: Bundle, backend: str, precision: str, pairs: list[tuple[str, str]]) -> UnnoiseError:
    """Why a precision cannot be had: nobody knows it, the bundle lacks it, this backend does not compute it, or nobody checked it there."""
    known = sorted({p for kind in BACKENDS.values() for p in kind.folders} | set(bundle.precisions) | set(GPU))
    if precision not in known:
        return unknown("precision", precision, ["auto", *known])
    if precision not in BACKENDS[backend].folders:
        why = f"{backend} does not compute {precision}" + (", which is for GPUs" if precision in GPU else "")
    elif BACKENDS[backend].folders[precision] not in bundle.precisions:
        why = f"{bundle.name} has no {precision}; export it with --{precision}"
    elif backend in bundle.report.get(precision, {}):
        why = f"{precision} of {bundle.name} missed its bounds on {backend} when it was exported (see report.json)"
    else:
        why = f"{precision} of {bundle.name} was not checked on {backend}; export it where {backend} is installed"
    there = ", ".join(f"{b} {p}" for b, p in pairs)
    return RequestError(f"precision {precision!r} cannot be had on {backend}: {why}. This bundle runs as: {there}.")


GPU = ("fp16", "int8-trt")
"""Precisions of a bundle that no CPU backend computes."""


def failed(bundle: Bundle, library: str, batch: int, error: Any) -> BundleError:
    """The error for a graph that was loaded but does not run. The machine may be at fault too, where a batch does not fit its memory."""
    return BundleError(
        f"{bundle.path}: {library} failed on a batch of {batch}: {error}. Fetch or export the bundle again; where it is whole, "
        "the batch may be too large for this machine's memory: give a smaller max_batch."
    )


def missing(library: str, extra: str, error: Any) -> BackendError:
    """The error for an inference library that cannot be imported."""
    return BackendError(f"{library} cannot be imported ({error}). Install it: pip install 'unnoise[{extra}]'.")
