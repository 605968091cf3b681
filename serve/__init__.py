"""Serve bundles over HTTP: `python -m serve BUNDLE`, or `create_app` for another ASGI server."""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .app import create_app
    from .settings import Settings

__all__ = ["Settings", "create_app"]

_HOMES = {"Settings": ".settings", "create_app": ".app"}


def __getattr__(name: str) -> object:
    # `python -m serve` opens its bundles while it imports the web server.
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name], __name__), name)
