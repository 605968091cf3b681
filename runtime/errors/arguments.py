"""Checks of arguments. Each error names the argument, the rule and the value received.

The checks take values from the caller's code, which may be of any type and raise any error.
"""

from __future__ import annotations

import operator
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from math import inf, prod
from pathlib import Path
from threading import TIMEOUT_MAX
from typing import Any, TypeGuard, TypeVar

import numpy as np
from numpy.typing import NDArray

from . import RequestError, unknown
from .messages import reason, refused, unwrapped

T = TypeVar("T")
MAX_LENGTH = 1_000_000
"""The most entries of a list of numbers, such as grid times or betas."""
MAX_DIMENSIONS = 32
MAX_ELEMENTS = 2**28
"""The most elements of one sample, as in a bundle."""


def integer(name: str, value: object, low: int, high: int | None = None, remedy: str = "") -> int:
    """Return `value` as an int in [low, high].

    numpy integers and 0-d integer arrays are integers.

    Raises:
        RequestError: It is anything else, such as a bool, a float, a string or an array, or it is
            out of range.
    """
    # Nearly every value ends here; the rest costs microseconds, in every sample of a batch.
    if type(value) is int and low <= value and (high is None or value <= high):
        return value
    bounds = f"at least {low}" if high is None else f"{low} to {high}"
    try:
        found = unwrapped(value)
        if isinstance(found, bool) or _has_dimensions(found):
            raise TypeError
        found = operator.index(found)
    except Exception:  # __index__ is the caller's code
        example = remedy or f"Pass an int, such as {low}."
        raise refused(name, f"an integer, {bounds}", value, example) from None
    if found < low or (high is not None and found > high):
        other = "larger" if found < low else "smaller"
        raise refused(name, bounds, found, remedy or f"Pass a {other} one.")
    return found


def number(name: str, value: object, low: float, high: float, remedy: str = "") -> float:
    """Return `value` as a float in [low, high].

    numpy scalars and 0-d arrays are numbers.

    Raises:
        RequestError: It is anything else, such as NaN, a bool, a string, a complex number or an
            array, or it is out of range.
    """
    rule = f"a number from {low:g} to {high:g}"
    try:
        found = _real(value)
    except OverflowError:
        raise refused(name, rule, value, remedy or "Pass a smaller one.") from None
    except Exception:  # __float__ is the caller's code
        raise refused(name, rule, value, remedy or "Pass an int or a float.") from None
    if not low <= found <= high:  # NaN fails this too
        raise refused(name, rule, found, remedy)
    return found


def wait_seconds(name: str, value: object) -> float:
    """Return `value` as a time to wait, cut to the longest that the system's locks can wait.

    Raises RequestError for anything but a number. Below 0 is no time.
    """
    return min(number(name, value, -inf, inf), TIMEOUT_MAX)


def flag(name: str, value: object) -> bool:
    """Return `value` as a bool. Raises RequestError for anything else."""
    found = unwrapped(value)
    # 0 and 1 are refused: they are more often a misplaced argument than a flag.
    if not isinstance(found, bool):
        raise refused(name, "True or False", value)
    return found


def choice(name: str, value: object, known: Iterable[str], what: str = "") -> str:
    """Return `value`, one of the names `known`.

    Args:
        what: How the message calls the thing that is named; `name` by default.

    Raises:
        RequestError: It is not such a name. The message suggests the nearest one.
    """
    names = list(known)
    found = unwrapped(value)
    if not isinstance(found, str):
        raise refused(name, "a name", value, f"Pass one of {', '.join(names)}.")
    if found not in names:
        # difflib takes seconds to compare very long strings.
        raise unknown(what or name, found if len(found) <= 60 else found[:59] + "…", names)
    return str(found)


def instance(name: str, value: object, kind: type[T], remedy: str = "") -> T:
    """Return `value`, which must be a `kind`. Raises RequestError for anything else."""
    if not isinstance(value, kind):
        article = "an" if kind.__name__[0] in "AEIO" else "a"
        raise refused(name, f"{article} {kind.__name__}", value, remedy)
    return value


def function(name: str, value: T) -> T:
    """Return `value`, which must be callable. Raises RequestError for anything else."""
    if not callable(value):
        raise refused(name, "a function", value, "Pass a callable, or leave it out.")
    return value


def text(name: str, value: object, example: str) -> str:
    """Return `value`, a string. Raises RequestError, with an example, for anything else."""
    if not isinstance(value, str):
        raise refused(name, "a string", value, f"Pass a name such as {example!r}.")
    return value


def path_of(name: str, value: object) -> Path:
    """Return `value` as a Path. Raises RequestError for anything else, bytes included."""
    try:
        if isinstance(value, (str, os.PathLike)):
            return Path(value)
    except Exception:  # __fspath__ is the caller's code
        pass
    raise refused(name, "a path", value, "Pass a str or a pathlib.Path.")


def file_path(name: str, value: object) -> Path:
    """Return `path_of`, without NUL characters, which no file system accepts."""
    path = path_of(name, value)
    if "\0" in str(path):
        raise refused(name, "a path without NUL characters", value)
    return path


def is_many(value: object) -> TypeGuard[Sequence[object]]:
    """Return whether `value` is a sequence or an array with dimensions, and no string."""
    if isinstance(value, (str, bytes, bytearray, memoryview)):
        return False
    try:
        if isinstance(value, Sequence) or _has_dimensions(value):
            return len(value) >= 0  # type: ignore[arg-type]  # arrays and tensors have one
    except Exception:  # __len__ and __getattr__ are the caller's code
        pass
    return False


def elements(name: str, value: object, rule: str) -> tuple[Any, ...]:
    """Return the elements of a list, a tuple or a vector.

    Raises RequestError, with `rule`, for anything else.
    """
    if isinstance(value, np.ndarray) and value.ndim == 1:
        return tuple(value)
    if not isinstance(value, Sequence) or isinstance(value, (str, bytes)):
        raise refused(name, rule, value)
    return tuple(value)


def many(name: str, value: Sequence[T], n: int) -> list[T]:
    """Return the n entries of a sequence or an array.

    Raises RequestError if it has another number of entries, or cannot be read.
    """
    try:
        count = len(value)
        if count == n:
            return list(value)
    except Exception as error:  # __len__ and __iter__ are the caller's code
        raise RequestError(f"`{name}` cannot be read: {reason(error)}.") from error
    rule = f"one value or {n} of them" if n > 1 else "one value"
    raise RequestError(f"`{name}` must be {rule}, got {count}. Pass one for all, or one each.")


def array_of(value: object, most: int = MAX_ELEMENTS) -> np.ndarray:
    """Return `value` as an array of any shape.

    Args:
        value: An array or a tensor of any size, or nested sequences.
        most: The most entries of nested sequences. numpy would fill all memory with
            range(10**10).

    Raises:
        Exception: Of any type, if it is none of these.
    """
    if getattr(value, "shape", None) is None:
        _count(value, most)
    return np.asarray(value)


def numbers(name: str, value: object, rule: str) -> NDArray[np.float64]:
    """Return `value` as an array of finite float64, of any shape.

    Raises RequestError, with `rule`, for anything else. Booleans and strings are not numbers.
    """
    try:
        array = array_of(value, MAX_LENGTH)
        if array.dtype == object and array.ndim == 1:  # Fractions, Decimals, very large integers
            array = np.array([_real(entry) for entry in array.tolist()])
        if array.dtype.kind not in "fiu":
            raise TypeError
        with np.errstate(over="ignore"):
            array = array.astype(np.float64)
        if np.isfinite(array).all():
            return array
    except Exception:  # the value is the caller's code
        pass
    raise refused(name, rule, value)


def size_of(name: str, value: object) -> tuple[int, ...]:
    """Return a shape as a tuple of ints.

    Raises RequestError for anything else, and for more than `MAX_ELEMENTS` elements.
    """
    if not is_many(value):
        raise refused(name, "a tuple of sizes", value, "Pass a tuple, such as (3, 32, 32).")
    if len(value) > MAX_DIMENSIONS:
        raise refused(name, f"a tuple of at most {MAX_DIMENSIONS} sizes", value)
    size = tuple(integer(name, entry, 0, MAX_ELEMENTS) for entry in many(name, value, len(value)))
    if prod(size) > MAX_ELEMENTS:
        raise refused(name, f"of at most {MAX_ELEMENTS} elements", size, "Pass a smaller one.")
    return size


@contextmanager
def enough_memory(what: str, remedy: str) -> Iterator[None]:
    """Turn a MemoryError of the block into a RequestError about `what`, with `remedy`."""
    try:
        yield
    except MemoryError as error:
        raise RequestError(f"{what} does not fit in this machine's memory. {remedy}") from error


def _has_dimensions(value: object) -> bool:
    # Without this check, a tensor of one element would pass for a number.
    return bool(getattr(value, "shape", ()))


def _real(value: object) -> float:
    plain = unwrapped(value)
    # float() parses text: "1_0" would be 10.
    if isinstance(plain, (bool, str, bytes, bytearray)) or _has_dimensions(plain):
        raise TypeError
    return float(plain)


def _count(value: object, most: int) -> int:
    """Return the number of entries of nested sequences. Raises ValueError for more than `most`."""
    # Numbers first: whether something is a Sequence takes a hundred times as long to find out.
    if isinstance(value, (float, int, str, bytes)) or not isinstance(value, Sequence):
        return 1
    count = len(value)
    if count <= most and not isinstance(value, range):
        count = sum(_count(entry, most) for entry in value)
    if count > most:
        raise ValueError(f"more than {most} entries")
    return count
