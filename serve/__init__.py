"""Serve bundles over HTTP: `python -m serve BUNDLE`, or `create_app` for another ASGI server."""

from .app import create_app
from .settings import Settings

__all__ = ["Settings", "create_app"]
