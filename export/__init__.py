"""PyTorch → ONNX, and the proof. `build_bundle` exports any module from Python; `python -m
export.build` from the shell."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .build import build_bundle
    from .errors import ExportError

__all__ = ["ExportError", "build_bundle"]


def __getattr__(name: str) -> Any:
    # On first use: torch takes seconds to import, and `python -m export.build` must find its module
    # not yet imported.
    if name == "build_bundle":
        from .build import build_bundle

        return build_bundle
    if name == "ExportError":
        from .errors import ExportError

        return ExportError
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
