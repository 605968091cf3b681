"""Checks of arguments. Each error names the argument, the rule and the value received."""

from __future__ import annotations

import difflib
import inspect
import operator
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from math import prod
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from . import RequestError, unknown
from .messages import reason, refused, shown, unwrapped

T = TypeVar("T")
MAX_LENGTH = 1_000_000
"""Most entries of a list of numbers: grid times, betas."""
MAX_DIMENSIONS = 32
MAX_ELEMENTS = 2**28
"""Most elements of one sample, as in a bundle."""


def _is_array(value: Any) -> bool:
    """Whether the value has dimensions. A tensor of one element would pass for a number."""
    return bool(getattr(value, "shape", ()))


def integer(name: str, value: Any, low: int, high: int | None = None, remedy: str = "") -> int:
    """`value` as an int in [low, high]. numpy integers and 0-d integer arrays are integers.

    Raises RequestError for anything else: booleans, floats, strings, arrays.
    """
    if type(value) is int and low <= value and (high is None or value <= high):
        return value
    bounds = f"at least {low}" if high is None else f"{low} to {high}"
    try:
        found = unwrapped(value)
        if isinstance(found, bool) or _is_array(found):
            raise TypeError
        found = operator.index(found)
    except Exception:
        example = remedy or f"Pass an int, such as {low}."
        raise refused(name, f"an integer, {bounds}", value, example) from None
    if found < low or (high is not None and found > high):
        other = "larger" if found < low else "smaller"
        raise refused(name, bounds, found, remedy or f"Pass a {other} one.")
    return found


def number(name: str, value: Any, low: float, high: float, remedy: str = "") -> float:
    """`value` as a float in [low, high]. numpy scalars and 0-d arrays are numbers.

    Raises RequestError for anything else: NaN, booleans, strings, complex numbers, arrays.
    """
    rule = f"a number from {low:g} to {high:g}"
    try:
        plain = unwrapped(value)
        if isinstance(plain, (bool, str, bytes, bytearray)) or _is_array(plain):
            raise TypeError
        found = float(plain)
    except OverflowError:
        raise refused(name, rule, value, remedy or "Pass a smaller one.") from None
    except Exception:
        raise refused(name, rule, value, remedy or "Pass an int or a float.") from None
    if not low <= found <= high:  # NaN fails this too
        raise refused(name, rule, found, remedy)
    return found


def flag(name: str, value: Any) -> bool:
    """`value` as a bool. Raises RequestError for anything else."""
    found = unwrapped(value)
    if not isinstance(found, bool):
        raise refused(name, "True or False", value)
    return found


def choice(name: str, value: Any, known: Iterable[str], what: str = "") -> str:
    """`value` as one of the names `known`. Raises RequestError, with the nearest name, for others.

    what: how the message calls the thing that is named; `name` by default.
    """
    names = list(known)
    found = unwrapped(value)
    if not isinstance(found, str):
        raise refused(name, "a name", value, f"Pass one of {', '.join(names)}.")
    if found not in names:
        raise unknown(what or name, found if len(found) <= 60 else found[:59] + "…", names)
    return str(found)


def instance(name: str, value: Any, kind: type[T], remedy: str = "") -> T:
    """`value`, which must be a `kind`. Raises RequestError for anything else."""
    if not isinstance(value, kind):
        article = "an" if kind.__name__[0] in "AEIO" else "a"
        raise refused(name, f"{article} {kind.__name__}", value, remedy)
    return value


def function(name: str, value: T) -> T:
    """`value`, which must be callable. Raises RequestError for anything else."""
    if not callable(value):
        raise refused(name, "a function", value, "Pass a callable, or leave it out.")
    return value


def text(name: str, value: Any, example: str) -> str:
    """`value`, a string. Raises RequestError, with an example, for anything else."""
    if not isinstance(value, str):
        raise refused(name, "a string", value, f"Pass a name such as {example!r}.")
    return value


def path_of(name: str, value: Any) -> Path:
    """`value` as a Path. Raises RequestError for anything that is no path, bytes included."""
    try:
        return Path(value)
    except Exception:
        raise refused(name, "a path", value, "Pass a str or a pathlib.Path.") from None


def file_path(name: str, value: Any) -> Path:
    """`path_of`, and raises RequestError for NUL characters, which no file system accepts."""
    path = path_of(name, value)
    if "\0" in str(path):
        raise refused(name, "a path without NUL characters", value)
    return path


def is_many(value: Any) -> bool:
    """Whether a value is a sequence or an array of one dimension or more, and no string."""
    if isinstance(value, (str, bytes, bytearray, memoryview)):
        return False
    try:
        return (isinstance(value, Sequence) or _is_array(value)) and len(value) >= 0
    except Exception:  # the value is somebody's own class
        return False


def elements(name: str, value: Any, rule: str) -> tuple[Any, ...]:
    """The elements of a list, a tuple or a vector. Raises RequestError, with `rule`, for others."""
    vector = isinstance(value, np.ndarray) and value.ndim == 1
    if not vector and (not isinstance(value, Sequence) or isinstance(value, (str, bytes))):
        raise refused(name, rule, value)
    return tuple(value)


def many(name: str, value: Any, n: int) -> list[Any]:
    """The n entries of a sequence or an array. Raises RequestError if their number is another."""
    try:
        count = len(value)
        if count == n:
            return list(value)
    except Exception as error:
        raise RequestError(f"`{name}` cannot be read: {reason(error)}.") from error
    rule = f"one value or {n} of them" if n > 1 else "one value"
    raise RequestError(f"`{name}` must be {rule}, got {count}. Pass one for all, or one each.")


def array_of(value: Any, most: int = MAX_ELEMENTS) -> NDArray[Any]:
    """`value` as an array: an array or a tensor of any size, or nested sequences of `most` entries.

    Raises any Exception if it is none. numpy itself would fill all memory with range(10**10).
    """
    if getattr(value, "shape", None) is None:
        _count(value, most)
    return np.asarray(value)


def _count(value: Any, most: int) -> int:
    """The entries of nested sequences. Raises ValueError if there are more than `most`."""
    if isinstance(value, (str, bytes)) or not isinstance(value, Sequence):
        return 1
    count = len(value)
    if count <= most and not isinstance(value, range):
        count = sum(_count(entry, most) for entry in value)
    if count > most:
        raise ValueError(f"more than {most} entries")
    return count


def numbers(name: str, value: Any, rule: str) -> NDArray[np.float64]:
    """`value` as an array of finite float64, of any shape.

    Raises RequestError, with `rule`, for anything else: booleans and strings are no numbers.
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
    except Exception:
        pass
    raise refused(name, rule, value)


def _real(value: Any) -> float:
    plain = unwrapped(value)
    if isinstance(plain, (bool, str, bytes, bytearray)):
        raise TypeError
    return float(plain)


def size_of(name: str, value: Any) -> tuple[int, ...]:
    """A shape as a tuple of ints.

    Raises RequestError for anything else, and for more than `MAX_ELEMENTS`.
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


def option_names(function: Callable[..., object], skip: int) -> list[str]:
    """The names of a function's parameters after the first `skip`."""
    return [p.name for p in inspect.signature(function).parameters.values()][skip:]


def check_options(
    what: str,
    options: Mapping[Any, Any],
    known: Sequence[str],
    also: Iterable[str] = (),
) -> None:
    """Raises RequestError for an option that is not `known`, with the nearest name.

    also: names of arguments that are no options, of which one may have been meant.
    """
    for name in options:
        if isinstance(name, str) and name in known:
            continue
        text = name[:60] if isinstance(name, str) else shown(name)
        candidates = [*known, *(other for other in also if other != name)]
        near = difflib.get_close_matches(text, candidates, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        if not known:
            raise RequestError(f"{what} takes no options, got {text!r}.{hint} Leave it out.")
        raise RequestError(f"unknown option of {what}: {text!r}.{hint} Known: {', '.join(known)}.")


def bind(
    what: str,
    function: Callable[..., T],
    positional: Sequence[Any],
    options: Mapping[str, Any],
    also: Iterable[str] = (),
) -> T:
    """Call `function` with keyword options from a user.

    Raises RequestError for an option that it does not take or cannot use.
    also: see `check_options`.
    """
    check_options(what, options, option_names(function, len(positional)), also)
    try:
        return function(*positional, **options)
    except RequestError:
        raise
    except MemoryError as error:
        raise RequestError(f"{what} with {shown(dict(options))} does not fit in memory.") from error
    except (TypeError, ValueError, ArithmeticError) as error:
        raise RequestError(f"{what} cannot use {shown(dict(options))}: {reason(error)}.") from error
