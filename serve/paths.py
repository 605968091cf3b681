"""Paths of an application that another one may mount under a prefix."""

from __future__ import annotations

from starlette.types import Scope


def prefix_of(scope: Scope) -> str:
    """Return what the paths of clients begin with, such as "/unnoise"; mostly empty."""
    return scope.get("root_path", "")


def path_of(scope: Scope) -> str:
    """Return the path of a request inside the application."""
    path: str = scope["path"]
    prefix = prefix_of(scope)
    inside = path.removeprefix(prefix)
    # A proxy may strip the prefix before a request comes here.
    return inside if path.startswith(prefix) and inside.startswith("/") else path
