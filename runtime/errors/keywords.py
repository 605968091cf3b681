"""Checks of keyword arguments: a misspelled name is an error that suggests the nearest one."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import lru_cache, wraps
from typing import ParamSpec, TypeVar

from . import RequestError, nearest
from .messages import reason, shown

P = ParamSpec("P")
T = TypeVar("T")


# Every program asks for its solver's; few functions are ever asked for.
@lru_cache(maxsize=256)
def option_names(function: Callable[..., object], skip: int) -> tuple[str, ...]:
    """Return the names of a function's parameters after the first `skip`."""
    return tuple(inspect.signature(function).parameters)[skip:]


def check_options(
    what: str,
    options: Iterable[object],
    known: Sequence[str],
    also: Iterable[str] = (),
) -> None:
    """Check the names of options.

    Args:
        what: The function or object that takes the options, for messages.
        options: The names, or a mapping by name.
        known: The names that are accepted.
        also: Names of arguments that are not options. The caller may have meant one of these.

    Raises:
        RequestError: A name is not `known`. The message suggests the nearest name.
    """
    for name in options:
        if isinstance(name, str) and name in known:
            continue
        # difflib takes seconds to compare very long strings.
        text = name[:60] if isinstance(name, str) else shown(name)
        candidates = [*known, *(other for other in also if other != name)]
        hint = nearest(text, candidates)
        if not known:
            raise RequestError(f"{what} takes no options, got {text!r}.{hint} Leave it out.")
        raise RequestError(f"unknown option of {what}: {text!r}.{hint} Known: {', '.join(known)}.")


def bind(
    what: str,
    function: Callable[..., T],
    positional: Sequence[object],
    options: Mapping[str, object],
    also: Iterable[str] = (),
) -> T:
    """Call `function` with keyword options from a user.

    Args:
        what: The function, for messages.
        positional: The first arguments of the call, which are not options.
        options: By name.
        also: See `check_options`.

    Raises:
        RequestError: The function does not take an option, or cannot use its value.
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


def named(function: Callable[P, T]) -> Callable[P, T]:
    """Return a method that raises RequestError for a keyword which it does not take.

    Python's own TypeError would not suggest the nearest name. The first parameter is `self` or
    `cls`.
    """
    what = function.__qualname__.removesuffix(".__init__")
    code = function.__code__
    # Read from the code object, because inspect.signature is slow and this runs at import time.
    known = code.co_varnames[1 : code.co_argcount + code.co_kwonlyargcount]

    @wraps(function)
    def checked(*args: P.args, **kwargs: P.kwargs) -> T:
        check_options(what, kwargs, known)
        return function(*args, **kwargs)

    return checked
