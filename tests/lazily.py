"""Libraries that few tests use, imported by the first test that does.

Every process that runs tests reads every file of tests first, also those that it runs none of.
"""

from __future__ import annotations

import importlib
from typing import Any


class Lazy:
    """A module that is imported when a public attribute of it is first read."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __getattr__(self, name: str) -> Any:
        # pytest and its plugins read private attributes of everything in a file of tests.
        if name.startswith("_"):
            raise AttributeError(name)
        return getattr(importlib.import_module(self._name), name)
