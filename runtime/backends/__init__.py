"""Backends: each runs a bundle's step graph on one inference library. The loop and the update are theirs to run, not to decide."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from threading import Lock
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from ..bundle import Bundle
from ..errors import BackendError, BundleError, RequestError, UnnoiseError, unknown
from ..program import R
from .forks import ForkGuard

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


def shapes(bundle: Bundle, batch: int) -> dict[str, tuple[int, ...]]:
    """Of the step graph's inputs and outputs, by name."""
    S = bundle.sample_shape
    return {
        "state": (batch, R, *S),
        "noise": (batch, *S),
        "call": (batch, 6),
        "update": (batch, R, R + 2),
        "label": (batch,),
        "next_state": (batch, R, *S),
        "denoised": (batch, *S),
    }


class HostBuffers:
    """Buffers as numpy arrays whose memory is bound once for each graph and direction; the two `state` arrays are input and output in turn.

    least: samples that there is memory for where the batch is smaller.
    """

    def __init__(self, bundle: Bundle, guard: ForkGuard, batch: int, least: int = 0) -> None:
        guard.check()
        guard.keep(self)
        self._bundle = bundle
        self._guard = guard
        self._batch = batch
        self._current = 0
        kinds = {"label": np.int64}
        room = shapes(bundle, max(batch, least))
        self._whole: dict[str, Any] = {
            name: self._array(shape, kinds.get(name, np.float32)) for name, shape in room.items()
        }
        self._states = self._whole["state"][:batch], self._whole["next_state"][:batch]
        self.noise: Float32 = self._whole["noise"][:batch]
        self.call: Float32 = self._whole["call"][:batch]
        self.update: Float32 = self._whole["update"][:batch]
        self.label: NDArray[np.int64] = self._whole["label"][:batch]
        self.denoised: Float32 = self._whole["denoised"][:batch]
        self._bound: dict[tuple[bool, int], Callable[[], object]] = {}

    @property
    def state(self) -> Float32:
        return self._states[self._current]

    def step(self, guided: bool) -> None:
        self._guard.check()
        key = guided, self._current
        if key not in self._bound:
            self._bound[key] = self._bind(*key)
        try:
            self._bound[key]()
        except UnnoiseError:
            raise
        except Exception as error:  # inference libraries' own errors share no base class
            raise BundleError(
                f"{self._bundle.path}: {self._guard.name} failed on a batch of {self._batch}: "
                f"{self._said(error)}. Fetch or export the bundle again. If the bundle is intact, "
                "the batch may be too large for this machine's memory: pass a smaller max_batch."
            ) from error
        self._current = 1 - self._current

    def _array(self, shape: tuple[int, ...], kind: Any) -> Any:
        """Memory of zeros."""
        return np.zeros(shape, kind)

    def _arrays(self, current: int, size: int) -> dict[str, Any]:
        """The memory of `size` samples by the graph's names, where the state lies in the one or the other array."""
        arrays = {name: array[:size] for name, array in self._whole.items()}
        if current:
            arrays["state"], arrays["next_state"] = arrays["next_state"], arrays["state"]
        return arrays

    def _bind(self, guided: bool, current: int) -> Callable[[], object]:
        """What runs a graph on this memory."""
        raise NotImplementedError

    def _said(self, error: Exception) -> str:
        """The library's message."""
        return str(error)


class Backend(Protocol):
    """A bundle loaded in one precision. Buffers may be used from one thread at a time; different buffers from different threads at once."""

    name: str
    precision: str

    def bind(self, batch: int) -> Buffers: ...


class Rows(NamedTuple):
    """Whole programs of one batch: B samples, K rows, of which samples whose program is shorter end with identity rows."""

    x: Float32  # [B, *S] before the first row
    label: NDArray[np.int64]  # [B]
    call: Float32  # [K, B, 6]
    update: Float32  # [K, B, R, R+2]
    guided: NDArray[np.bool_]  # [K]: whether the row runs with the null label's half
    noisy: NDArray[np.bool_]  # [K]: whether the row takes noise
    draw: Callable[[int, Float32], None]  # fills [B, *S] with a row's noise, zero where a sample takes none


class Timing(NamedTuple):
    """How the loop of one batch ran on a device."""

    batch: int
    bucket: int  # samples that ran, the padding among them
    rows: int
    how: str  # "one graph", "3 graphs", "plain enqueues"
    note: str  # why nothing was captured; "" where it was
    captured: bool  # in this call; False where an earlier call's graph was launched again
    device_ms: float  # on the device, from the first row to the last, waiting for noise included
    device_bytes: int  # held by the backend by now


@runtime_checkable
class WholeLoop(Protocol):
    """A backend that runs whole programs by itself, with the state on the device, where nobody looks at the steps."""

    name: str
    precision: str
    largest: int | None
    """Samples of the largest batch; None: any."""

    def bind(self, batch: int) -> Buffers: ...

    def run_rows(self, rows: Rows) -> tuple[Float32, Timing]:
        """x [B, *S] after the last row, and how it ran."""
        ...

    def close(self) -> None:
        """Give back the device's memory; the backend is of no use after that. Twice is no error."""
        ...


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

    def clear(self) -> None:
        """Drop the buffers that nobody borrows."""
        with self._lock:
            for free in self._free.values():
                free.clear()


@dataclass(frozen=True)
class Kind:
    """A backend as it can be chosen: the bundle's folder that each precision is computed from, how it is opened, and what it needs."""

    folders: Mapping[str, str]
    open: Callable[[Bundle, str, int | None], Backend]
    module: str
    extra: str
    gpu: bool = False


def _onnxruntime(bundle: Bundle, precision: str, threads: int | None) -> Backend:
    from .onnxruntime import OnnxRuntime

    return OnnxRuntime(bundle, precision, threads)


def _openvino(bundle: Bundle, precision: str, threads: int | None) -> Backend:
    from .openvino import OpenVino

    return OpenVino(bundle, precision, threads)


def _onnxruntime_cuda(bundle: Bundle, precision: str, threads: int | None) -> Backend:
    from .onnxruntime_cuda import OnnxRuntimeCuda

    return OnnxRuntimeCuda(bundle, precision, threads)


def _tensorrt(bundle: Bundle, precision: str, threads: int | None) -> Backend:
    from .tensorrt import TensorRt

    return TensorRt(bundle, precision, threads, "tensorrt")


def _tensorrt_rtx(bundle: Bundle, precision: str, threads: int | None) -> Backend:
    from .tensorrt import TensorRt

    return TensorRt(bundle, precision, threads, "tensorrt-rtx")


_ENGINES = {"fp32": "fp32", "fp16": "fp16", "int8-trt": "int8-trt"}
BACKENDS: Mapping[str, Kind] = {
    "onnxruntime": Kind({"fp32": "fp32", "int8": "int8"}, _onnxruntime, "onnxruntime", "cpu"),
    "openvino": Kind({"fp32": "fp32", "bf16": "fp32", "int8": "int8"}, _openvino, "openvino", "openvino"),
    "onnxruntime-cuda": Kind({"fp32": "fp32", "fp16": "fp16"}, _onnxruntime_cuda, "onnxruntime", "cuda", True),
    "tensorrt": Kind(_ENGINES, _tensorrt, "tensorrt", "tensorrt", True),
    "tensorrt-rtx": Kind(_ENGINES, _tensorrt_rtx, "tensorrt_rtx", "rtx", True),
}


def offered(bundle: Bundle) -> list[tuple[str, str]]:
    """The (backend, precision) pairs that a bundle can be opened with, where the machine has what they need.

    int8 is offered to the backends that the bundle's report shows it was checked on: the same Q/DQ graph has been seen to come
    out wrong on others. What missed its bounds there is offered to none. Few bundles are exported beside a GPU: what is for GPUs is
    offered where its graph was checked on onnxruntime, which is no evidence for what a GPU's own rounding does.
    """
    return [
        (name, precision)
        for name, kind in BACKENDS.items()
        for precision, folder in kind.folders.items()
        if folder in bundle.precisions and _may_run(_checked(bundle, precision, name), folder)
    ]


def _checked(bundle: Bundle, precision: str, backend: str) -> Mapping[str, Any] | None:
    entries = bundle.report.get(precision, {})
    return entries.get(backend, entries.get("onnxruntime") if BACKENDS[backend].gpu else None)


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


def missing(library: str, extra: str, error: Any) -> BackendError:
    """The error for an inference library that cannot be imported."""
    return BackendError(f"{library} cannot be imported ({error}). Install it: pip install 'unnoise[{extra}]'.")
