"""The backends by name, and which of them a bundle can be opened with."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from ..bundle.bundle import Bundle
from ..errors import RequestError, UnnoiseError, unknown
from .base import Backend


@dataclass(frozen=True, eq=False)
class Kind:
    """A backend as a user chooses it.

    Attributes:
        folders: For each precision the bundle's folder that it is computed from.
        module: The module that it needs.
        extra: The extra that installs it.
        gpu: Whether it needs a GPU.
    """

    folders: Mapping[str, str]
    open: Callable[[Bundle, str, int | None, int | None], Backend]
    module: str
    extra: str
    gpu: bool = False


def _onnxruntime(
    bundle: Bundle, precision: str, threads: int | None, streams: int | None
) -> Backend:
    from .onnxruntime import OnnxRuntime

    return OnnxRuntime(bundle, precision, threads, streams)


def _openvino(bundle: Bundle, precision: str, threads: int | None, streams: int | None) -> Backend:
    from .openvino import OpenVino

    return OpenVino(bundle, precision, threads, streams)


def _onnxruntime_cuda(bundle: Bundle, precision: str, threads: int | None, _: object) -> Backend:
    from .nvidia.onnxruntime_cuda import OnnxRuntimeCuda

    return OnnxRuntimeCuda(bundle, precision, threads)


def _tensorrt(bundle: Bundle, precision: str, threads: int | None, _: object) -> Backend:
    from .nvidia.tensorrt import TensorRt

    return TensorRt(bundle, precision, threads, "tensorrt")


def _tensorrt_rtx(bundle: Bundle, precision: str, threads: int | None, _: object) -> Backend:
    from .nvidia.tensorrt import TensorRt

    return TensorRt(bundle, precision, threads, "tensorrt-rtx")


_ENGINES = {"fp32": "fp32", "fp16": "fp16", "int8-trt": "int8-trt"}
BACKENDS: Mapping[str, Kind] = {
    "onnxruntime": Kind({"fp32": "fp32", "int8": "int8"}, _onnxruntime, "onnxruntime", "cpu"),
    "openvino": Kind(
        {"fp32": "fp32", "bf16": "fp32", "int8": "int8"}, _openvino, "openvino", "openvino"
    ),
    "onnxruntime-cuda": Kind(
        {"fp32": "fp32", "fp16": "fp16"}, _onnxruntime_cuda, "onnxruntime", "cuda", True
    ),
    "tensorrt": Kind(_ENGINES, _tensorrt, "tensorrt", "tensorrt", True),
    "tensorrt-rtx": Kind(_ENGINES, _tensorrt_rtx, "tensorrt_rtx", "rtx", True),
}


def offered(bundle: Bundle) -> list[tuple[str, str]]:
    """List the (backend, precision) pairs that a bundle can be opened with.

    Whether the machine has what they need is another question, which `survey.backends` answers.

    A precision computed from the fp32 graph needs no check. Any other precision is offered on the
    backends that it was checked on, according to the bundle's report, if it met its bounds there.
    GPUs are an exception, because few bundles are exported on a machine with one: their precisions
    are offered if the graph was checked on onnxruntime. That check says nothing about a GPU's own
    rounding.
    """
    # The same Q/DQ graph has been seen to come out wrong on backends other than the checked one.
    return [
        (name, precision)
        for name, kind in BACKENDS.items()
        for precision, folder in kind.folders.items()
        if folder in bundle.precisions and _may_run(_checked(bundle, precision, name), folder)
    ]


def _checked(bundle: Bundle, precision: str, backend: str) -> Mapping[str, object] | None:
    """What the report says of a precision on a backend; None if it was not checked there."""
    entries = bundle.report.get(precision, {})
    return entries.get(backend, entries.get("onnxruntime") if BACKENDS[backend].gpu else None)


def _may_run(checked: Mapping[str, object] | None, folder: str) -> bool:
    return folder == "fp32" if checked is None else not checked.get("missed")


def open_backend(
    bundle: Bundle,
    backend: str = "auto",
    precision: str = "auto",
    threads: int | None = None,
    streams: int | None = None,
) -> Backend:
    """Open the bundle on a backend. `auto` is onnxruntime and fp32.

    Raises:
        RequestError: The backend is unknown, does not run the precision, or the bundle lacks it; or
            `streams` is given for a GPU.
        BackendError: This machine cannot run it.
    """
    backend = "onnxruntime" if backend == "auto" else backend
    precision = "fp32" if precision == "auto" else precision
    if backend not in BACKENDS:
        raise unknown("backend", backend, ["auto", *BACKENDS])
    pairs = offered(bundle)
    if (backend, precision) not in pairs:
        raise _not_offered(bundle, backend, precision, pairs)
    kind = BACKENDS[backend]
    if streams is not None and kind.gpu:
        raise RequestError(
            f"streams={streams} is not available on {backend}, which has one stream. Leave it out."
        )
    return kind.open(bundle, precision, threads, streams)


def _not_offered(
    bundle: Bundle, backend: str, precision: str, pairs: list[tuple[str, str]]
) -> UnnoiseError:
    """Make the error that says why a bundle cannot be opened with a precision on a backend."""
    # From the most general reason to the most special one: the first that holds is the message.
    check_precision(bundle, precision)
    if precision not in BACKENDS[backend].folders:
        why = f"{backend} does not compute {precision}" + (
            ", which is for GPUs" if precision in GPU else ""
        )
    elif BACKENDS[backend].folders[precision] not in bundle.precisions:
        why = f"{bundle.name} has no {precision}; export it with --{precision}"
    elif _checked(bundle, precision, backend) is not None:
        # A GPU is offered what was checked on onnxruntime, see `offered`.
        where = backend if backend in bundle.report[precision] else "onnxruntime"
        why = (
            f"{precision} of {bundle.name} missed its bounds on {where} when it was exported "
            "(see report.json)"
        )
    else:
        why = (
            f"{precision} of {bundle.name} was not checked on {backend}; "
            f"export it where {backend} is installed and the processor computes {precision}"
        )
    there = ", ".join(f"{b} {p}" for b, p in pairs)
    return RequestError(
        f"precision {precision!r} cannot be had on {backend}: {why}. This bundle runs as: {there}."
    )


def check_precision(bundle: Bundle, precision: str) -> None:
    """Raise RequestError, with the nearest name, unless the bundle or a backend has a precision."""
    names = {p for kind in BACKENDS.values() for p in kind.folders} | {*bundle.precisions, *GPU}
    if precision not in ("auto", *names):
        raise unknown("precision", precision, ["auto", *sorted(names)])


GPU = ("fp16", "int8-trt")
"""Precisions of a bundle that no CPU backend computes."""
