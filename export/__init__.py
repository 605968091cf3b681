"""PyTorch → ONNX, and the proof that both agree.

`build_bundle` exports any module from Python, `python -m export.build` from the shell.
`export.build.build` takes an `export.sources.model.Model`.
"""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from runtime.bundle.conditions import Condition

    from .build import build_bundle
    from .errors import ExportError
    from .graph.calibrate import Calibration
    from .proof.plan import Bounds, Plan

__all__ = ["Bounds", "Calibration", "Condition", "ExportError", "Plan", "build_bundle"]

_HOMES = {
    "Bounds": ".proof.plan",
    "Calibration": ".graph.calibrate",
    "Condition": "runtime.bundle.conditions",
    "ExportError": ".errors",
    "Plan": ".proof.plan",
    "build_bundle": ".build",
}


def __getattr__(name: str) -> object:
    # On first use: torch takes seconds to import, and `python -m export.build` must find its
    # module not yet imported.
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name], __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
