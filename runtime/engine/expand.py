"""The arguments of one call as requests, one a sample."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from ..bundle.bundle import Bundle
from ..diffusion.noise import MAX_SEED
from ..errors import RequestError
from ..errors.arguments import enough_memory, function, integer, is_many, many
from ..errors.messages import reason, refused, unwrapped
from .conditions import spread
from .loop import StepCallback
from .request import ARRAYS, FIELDS, Request

EACH = ("label", "guidance", *ARRAYS)
"""The fields of a request that a call takes once for all samples or once each."""
MAX_SAMPLES = 1_000_000
"""The most samples of one call. A result that does not fit in memory is refused too."""
ARGUMENTS = ("n", *FIELDS, "on_step", "convert")
"""What a misspelled keyword may have meant, besides the solver's options."""


def expand(bundle: Bundle, n: int, seed: object, settings: Mapping[str, object]) -> list[Request]:
    """Return the n requests of one call.

    Args:
        n: 1 … 1,000,000, as far as the result fits in memory.
        seed: Sample i has seed + i; or a sequence of n.
        settings: Fields of `Request`, of which those in `EACH` are one for all or one each. The
            rest are options of the solver. `convert` fits the images of conditions.

    Raises:
        RequestError: An argument cannot be used. Fields are checked when the request is resolved.
    """
    n = integer("n", n, 1, MAX_SAMPLES)
    check_memory(n, bundle.sample_shape)
    given: dict[str, Any] = {name: settings[name] for name in FIELDS if name in settings}
    options = {name: value for name, value in settings.items() if name not in FIELDS}
    # What images are read by, see `spread`.
    convert = options.pop("convert", False)
    # Checked here, because only here is it known which arguments a name may have meant.
    bundle.check_options(given.get("solver"), options, ARGUMENTS)
    each: dict[str, list[Any]] = {
        name: _each(name, given.pop(name), n) for name in EACH if name in given
    }
    each["seed"] = seeds_of(seed, n)
    each["conditions"] = spread(bundle, given.pop("conditions", {}), n, convert)
    return [
        Request(**given, **{name: values[i] for name, values in each.items()}, options=options)
        for i in range(n)
    ]


def seeds_of(seed: object, n: int) -> list[int]:
    """Return the seeds of n samples: seed + i, or those given."""
    if is_many(seed):
        return [integer("seed", entry, 0, MAX_SEED) for entry in many("seed", seed, n)]
    first = integer("seed", seed, 0, MAX_SEED - n + 1)
    return list(range(first, first + n))


def check_memory(n: int, shape: tuple[int, ...]) -> None:
    """Raise RequestError if n samples of a shape do not fit in memory."""
    # Before any network call: the result would not fit after minutes of work.
    with enough_memory(f"a result of {n} samples", "Ask for fewer at a time."):
        np.empty((n, *shape), np.float32)


def callback_of(on_step: StepCallback | None) -> StepCallback | None:
    """Return a step callback, checked, whose numpy False is a False."""
    if on_step is None:
        return None
    called = function("on_step", on_step)
    return lambda preview: unwrapped(called(preview))


def listed(requests: object) -> list[Request]:
    """Return the requests of any iterable as a list.

    Raises:
        RequestError: It is not an iterable, raises an error while it is read (the cause), or has
            more than `MAX_SAMPLES` entries.
    """

    # Made only to be raised: showing many requests takes longer than planning them.
    def refusal() -> RequestError:
        return refused("requests", "a list of Requests", requests, "Pass [request] for one.")

    # Iterables too, but of keys and characters: a likely mistake for [request].
    if isinstance(requests, (Request, Mapping, str, bytes)):
        raise refusal()
    try:
        entries: Iterable[Request] = iter(requests)  # type: ignore[call-overload]
    except Exception:  # __iter__ is the caller's code
        raise refusal() from None
    try:
        # One more than allowed, so that an endless generator ends.
        found = list(itertools.islice(entries, MAX_SAMPLES + 1))
    except Exception as error:
        raise RequestError(f"`requests` raised {type(error).__name__}: {reason(error)}.") from error
    if len(found) > MAX_SAMPLES:
        raise RequestError(
            f"`requests` must be at most {MAX_SAMPLES}, got more. Pass fewer at a time."
        )
    return found


def _each(name: str, value: object, n: int) -> list[object]:
    return many(name, value, n) if is_many(value) else [value] * n
