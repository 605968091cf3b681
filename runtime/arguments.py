"""Checks on what a caller hands in, each with an error that says what was found and what would do."""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable
from typing import Any, TypeVar

from .errors import RequestError, unknown

T = TypeVar("T")


def integer(name: str, value: Any, low: int, high: int | None = None) -> int:
    """`value` as an int in [low, high]. Raises RequestError for anything else, booleans and floats included."""
    try:
        if isinstance(value, bool):
            raise TypeError
        found = operator.index(value)
    except TypeError:
        raise RequestError(f"{name} must be an integer, found {value!r} ({type(value).__name__}).") from None
    if found < low or (high is not None and found > high):
        bounds = f"at least {low}" if high is None else f"from {low} to {high}"
        raise RequestError(f"{name} must be {bounds}, found {found}.")
    return found


def number(name: str, value: Any, low: float, high: float) -> float:
    """`value` as a finite float in [low, high]. Raises RequestError for anything else."""
    try:
        if isinstance(value, (bool, str)):
            raise TypeError
        found = float(value)
    except (TypeError, ValueError):
        raise RequestError(f"{name} must be a number, found {value!r} ({type(value).__name__}).") from None
    if not low <= found <= high:  # NaN fails this too
        raise RequestError(f"{name} must be a number from {low:g} to {high:g}, found {found}.")
    return found


def bind(what: str, function: Callable[..., T], *positional: Any, **options: Any) -> T:
    """Call `function` with keyword options from a user. Raises RequestError for an option that it does not take or cannot use."""
    known = [p.name for p in inspect.signature(function).parameters.values()][len(positional) :]
    for name in options:
        if name not in known:
            raise (
                unknown(f"option of {what}:", name, known)
                if known
                else RequestError(f"{what} takes no options, found {name!r}.")
            )
    try:
        return function(*positional, **options)
    except (TypeError, ValueError, ArithmeticError) as error:
        if isinstance(error, RequestError):
            raise
        raise RequestError(f"{what}: cannot use {options}: {error}") from error
