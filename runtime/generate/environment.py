"""Everything besides bundle and plan that the bytes of a shard depend on."""

from __future__ import annotations

import platform
import sys
from collections.abc import Mapping
from importlib import metadata

import numpy as np

from ..backends.registry import BACKENDS
from ..backends.survey import machine
from ..errors import BackendError
from ..sampler import Sampler

Environment = Mapping[str, str | int | None]
"""Versions, settings and the machine, by name; plain JSON values."""


def environment_of(sampler: Sampler, versions: Mapping[str, str]) -> Environment:
    """Return the environment of an open sampler.

    Args:
        versions: Of the libraries that write the format, by name.
    """
    backend = sampler.backend
    kind = BACKENDS.get(backend.name)
    library = sys.modules.get(kind.module) if kind else None
    here = machine()
    threads = getattr(backend, "threads", None)
    return {
        "backend": backend.name,
        "precision": backend.precision,
        # 0 is the library's word for one a core.
        "threads": threads or here["cores"],
        "max_batch": sampler.max_batch,
        "unnoise": _version("unnoise"),
        "python": ".".join(platform.python_version_tuple()[:2]),
        "numpy": np.__version__,
        kind.module if kind else "library": str(getattr(library, "__version__", "unknown")),
        **versions,
        "machine": platform.machine(),
        "instructions": " ".join(here["instructions"]),
        **({"gpu": _gpu()} if kind and kind.gpu else {}),
    }


def differences(before: Environment, now: Environment) -> list[str]:
    """List the differences of two environments, such as "numpy 2.3.0 instead of 2.4.6"."""
    names = [*before, *(name for name in now if name not in before)]
    return [
        f"{name} {now.get(name)} instead of {before.get(name)}"
        for name in names
        if before.get(name) != now.get(name)
    ]


def _version(distribution: str) -> str:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:  # run from a checkout that is not installed
        return "unknown"


def _gpu() -> str:
    """Return the GPU and the driver that a backend runs on."""
    from ..backends.nvidia.cuda import Cuda, cudart

    try:
        gpu = Cuda(cudart()).gpu()
    except BackendError:  # without cuda-bindings, which onnxruntime does not need
        return "unknown"
    return f"{gpu}, {gpu.driver}"
