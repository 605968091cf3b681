"""This machine: its processor, and which backends it runs."""

from __future__ import annotations

from importlib import metadata
from importlib.util import find_spec
from typing import TypedDict, cast

from ..errors import BackendError
from ..errors.messages import described
from .onnxruntime_api import OnnxRuntimeLibrary
from .processor import flags, processor_name, usable_cores
from .registry import BACKENDS

INSTRUCTIONS = {
    "avx2": "AVX2",
    "avx512f": "AVX-512",
    "avx512_vnni": "VNNI",
    "avx512_bf16": "bf16",
    "amx_tile": "AMX",
}
"""The instruction sets that decide how fast a processor multiplies, by Linux's names."""


class Machine(TypedDict):
    """A machine: its processor, the cores that this process may use, and instruction sets."""

    processor: str
    cores: int
    instructions: list[str]


class BackendState(TypedDict):
    """A backend on this machine. `version` is None if absent, `missing` says how to get it."""

    version: str | None
    precisions: list[str]
    missing: str | None


def machine() -> Machine:
    """Return the facts of this machine; instruction sets are read on Linux only."""
    here = flags()
    return {
        "processor": processor_name(),
        "cores": usable_cores(),
        "instructions": [shown for flag, shown in INSTRUCTIONS.items() if flag in here],
    }


def backends() -> dict[str, BackendState]:
    """Return every backend's state on this machine, by name."""
    return {name: _backend(name) for name in BACKENDS}


def _backend(name: str) -> BackendState:
    kind = BACKENDS[name]
    install = f"pip install 'unnoise[{kind.extra}]'"
    spec = find_spec(kind.module)
    # A folder that an uninstalled package left behind can be imported, and holds nothing.
    if spec is None or spec.origin is None:
        return {"version": None, "precisions": [], "missing": install}
    version = _version(name)
    # onnxruntime-gpu brings a module of the same name as onnxruntime: only the version shows which
    # one it is.
    if kind.gpu and version is None:
        return {"version": None, "precisions": [], "missing": install}
    precisions = list(kind.folders)
    lacking = None
    if kind.gpu and (lacking := _no_gpu(name)):
        precisions = []
    if name == "openvino":
        try:
            import openvino

            from .openvino import lacks

            said = {precision: lacks(precision, openvino) for precision in precisions}
        # The module is there, and what it loads is not. Its own errors share no base class.
        except Exception as error:
            said = dict.fromkeys(precisions, f"it does not start: {described(error)}")
        precisions = [precision for precision in precisions if not said[precision]]
        found = dict.fromkeys(one.partition(" (")[0] for one in said.values() if one)
        lacking = "; ".join(found) or None
    return {"version": version or "?", "precisions": precisions, "missing": lacking}


DISTRIBUTIONS = {
    "onnxruntime-cuda": ("onnxruntime-gpu",),
    "tensorrt": ("tensorrt", "tensorrt-cu13", "tensorrt-cu12"),
    "tensorrt-rtx": ("tensorrt-rtx-cu13", "tensorrt-rtx-cu12", "tensorrt-rtx"),
}
"""The distributions of a backend's module, if they are not named like the backend."""


def _version(name: str) -> str | None:
    for distribution in DISTRIBUTIONS.get(name, (name,)):
        try:
            return metadata.version(distribution)
        except metadata.PackageNotFoundError:
            continue
    return None


def _no_gpu(name: str) -> str | None:
    """Return why this process cannot use an NVIDIA GPU, in one line; None if it can."""
    from .nvidia.cuda import Cuda, cudart

    try:
        api = cudart(BACKENDS[name].extra)
    except BackendError as error:
        return str(error)
    try:
        Cuda(api)
    except BackendError as error:
        return str(error).partition(". ")[0].rstrip(".")
    if name != "onnxruntime-cuda":
        return None
    # The package for CPUs may have been installed over the one for GPUs: both are listed then.
    try:
        import onnxruntime

        from .nvidia.onnxruntime_cuda import lacks

        return lacks(cast(OnnxRuntimeLibrary, onnxruntime)).partition(". ")[0] or None
    except Exception as error:
        return f"it does not start: {described(error)}"
