"""How messages show values, paths and other errors: short, and without raising themselves."""

from __future__ import annotations

import reprlib
from typing import Any

from . import RequestError


class _Short(reprlib.Repr):
    """`repr`, with every part shortened."""

    def __init__(self) -> None:
        super().__init__()
        self.maxlevel = 3
        self.maxstring = 60
        self.maxother = 80

    def repr_int(self, x: int, level: int) -> str:
        if x.bit_length() > 256:  # Python refuses to print integers of many thousand digits
            return f"an integer of {x.bit_length()} bits"
        return int.__repr__(x)

    def repr_bytes(self, x: bytes, level: int) -> str:
        return repr(x[:40]) if len(x) <= 40 else f"{x[:40]!r}… of {len(x)} bytes"

    repr_bytearray = repr_bytes

    def repr_instance(self, x: object, level: int) -> str:
        dtype = getattr(x, "dtype", None)
        shape = getattr(x, "shape", None)
        if dtype is not None and isinstance(shape, tuple):
            return f"an array of {str(dtype)[:40]} with shape {tuple(shape)}"
        return super().repr_instance(x, level)


def shown(value: object) -> str:
    """Return `value` for a message: its repr on one line, shortened.

    An array is shown as its type and shape. Never raises, even if the value's own `__repr__` does.
    """
    try:
        text = _Short().repr(unwrapped(value))
    except Exception:  # __repr__ is the caller's code
        text = f"a value of type {type(value).__name__}"
    text = text.replace("\n", " ")
    return text if len(text) <= 300 else text[:299] + "…"


def shown_path(path: object) -> str:
    """Return a path for a message: unchanged if short and printable, else its shortened repr."""
    text = str(path)
    return text if len(text) <= 200 and text.isprintable() else shown(text)


def reason(error: BaseException) -> str:
    """Return an error's own message, shortened. Never raises."""
    try:
        text = str(error)
    except Exception:  # __str__ is the caller's code
        text = ""
    text = text if text.isprintable() else repr(text)
    return text[:199] + "…" if len(text) > 200 else text or type(error).__name__


def described(error: BaseException) -> str:
    """Return an error's type and the first line of its message, shortened. Never raises."""
    try:
        lines = str(error).strip().splitlines()
    except Exception:  # __str__ is the caller's code
        lines = []
    return type(error).__name__ + (f": {lines[0][:300]}" if lines else "")


def printable(value: object) -> str:
    """Return the text of `value` without characters that cannot be encoded as UTF-8."""
    return str(value).encode("utf-8", "backslashreplace").decode("utf-8")


def unwrapped(value: object) -> Any:
    """Return the Python scalar in a numpy scalar, 0-d array or 0-d tensor.

    Any other value is returned unchanged. So are dates, time spans and structured scalars, whose
    `item()` is an integer or a tuple.
    """
    try:
        array: Any = value
        if getattr(value, "shape", None) != ():
            return value
        if getattr(array.dtype, "kind", "") in ("m", "M", "V"):
            return value
        return array.item()
    except Exception:  # the attributes are the caller's code
        return value


def refused(name: str, rule: str, value: object, remedy: str = "") -> RequestError:
    """Return the error "`name` must be rule, got value. Remedy.\""""
    received = shown(value)
    # The type is added if the value's text does not show it: '3' may be a string or an array.
    if not isinstance(unwrapped(value), (int, float, type(None))) and "with shape" not in received:
        received += f" ({type(value).__name__})"
    return RequestError(f"`{name}` must be {rule}, got {received}.{remedy and ' ' + remedy}")
