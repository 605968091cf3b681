"""Checks on the exporter's arguments. Checks on numbers are in `runtime.arguments`."""

from __future__ import annotations

import re
import reprlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from runtime.errors import RequestError
from runtime.files import to_json

_SHORT = reprlib.Repr()
_SHORT.maxstring = 100
_SHORT.maxother = 100
_SHORT.maxlong = 40


def shown(value: object) -> str:
    """Return `value` as an error message shows it: short, and without raising an error itself."""
    try:
        return _SHORT.repr(value)
    except Exception:  # __repr__ is the caller's code
        return f"<{type(value).__name__}>"


def described(error: BaseException) -> str:
    """Return an error's type and the first line of its message."""
    try:
        lines = str(error).strip().splitlines()
    except Exception:  # __str__ is the caller's code
        lines = []
    return type(error).__name__ + (f": {lines[0][:300]}" if lines else "")


def printable(value: object) -> str:
    """Return the text of `value` without characters that cannot be encoded as UTF-8."""
    return str(value).encode("utf-8", "backslashreplace").decode("utf-8")


def text(name: str, value: Any, example: str) -> str:
    """Return `value`, a string. Raises RequestError for anything else."""
    if not isinstance(value, str):
        raise RequestError(
            f"{name} must be a string, got {shown(value)} ({type(value).__name__}). Pass a name "
            f"such as {example!r}."
        )
    return value


def elements(name: str, value: Any, rule: str) -> tuple[Any, ...]:
    """Return the elements of a list, a tuple or a vector. Raises RequestError for anything else.

    Args:
        name: The argument's name.
        value: The value received.
        rule: What `name` must be, such as "two numbers".
    """
    vector = isinstance(value, np.ndarray) and value.ndim == 1
    if not vector and (not isinstance(value, Sequence) or isinstance(value, (str, bytes))):
        raise RequestError(f"{name} must be {rule}, got {shown(value)} ({type(value).__name__}).")
    return tuple(value)


def json_object(name: str, value: Any) -> dict[str, Any]:
    """Return a mapping that JSON can hold, {} for None, with numpy scalars as Python numbers.

    Raises RequestError for anything else: the bundle stores this object as JSON.
    """
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise RequestError(
            f"{name} must be a dictionary, got {shown(value)} ({type(value).__name__})."
        )
    try:
        plain = _plain(value)
        to_json(plain).encode("utf-8")
    except (TypeError, ValueError, RecursionError) as error:
        raise RequestError(
            f"{name} must be JSON (strings, finite numbers, lists, dictionaries with string keys), "
            f"got {shown(value)} ({described(error)})."
        ) from error
    return plain


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        strange = [key for key in value if not isinstance(key, str)]
        if strange:
            raise TypeError(f"the key {shown(strange[0])} is not a string")
        return {key: _plain(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(inner) for inner in value]
    if isinstance(value, np.generic) or (isinstance(value, np.ndarray) and value.ndim == 0):
        return value.item()
    return value


def path_of(name: str, value: Any) -> Path:
    """Return `value` as a path. Raises RequestError for anything but a string or a path."""
    if not isinstance(value, (str, Path)):
        raise RequestError(
            f"{name} must be a path, got {shown(value)} ({type(value).__name__}). Pass a string "
            f"or a pathlib.Path."
        )
    if "\0" in str(value):
        raise RequestError(f"{name} must be a path, got {value!r}, which has a NUL character.")
    return Path(value)


def bundle_name(name: str) -> str:
    """Return the name of a folder or a class, changed into one that a bundle can have."""
    return re.sub(r"[^A-Za-z0-9_.-]", "-", name).lstrip("-.") or "network"
