"""The conditions of a request: read from what a caller passes, and checked."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import TypeAlias, cast

import numpy as np

from ..bundle.bundle import Bundle
from ..bundle.conditions import Condition
from ..diffusion.arrays import Array
from ..errors import RequestError, nearest
from ..errors.arguments import array_of, flag, is_many, many
from ..errors.messages import refused, shown
from ..images import ImageSources, read

ConditionValue: TypeAlias = "ImageSources | float | Sequence[float | None] | None"
"""Numbers [*shape] or [n, *shape], or images; None is the null value."""
Conditions: TypeAlias = Mapping[str, ConditionValue]
"""By name, for all samples or one each."""


def spread(bundle: Bundle, given: object, n: int, convert: object) -> list[dict[str, object]]:
    """Return the conditions of each of n samples, from those of one call.

    Args:
        given: `Conditions`.
        convert: Whether images are fitted, see `runtime.images.read`.

    Raises:
        RequestError: A condition is unknown, has a wrong shape, or no image can be read.
    """
    convert = flag("convert", convert)
    known = {condition.name: condition for condition in bundle.conditions}
    each = {
        name: _each(known[name], value, n, convert) for name, value in _named(bundle, given).items()
    }
    return [{name: values[i] for name, values in each.items()} for i in range(n)]


def resolved_conditions(bundle: Bundle, given: object) -> dict[str, Array]:
    """Return the conditions of one sample as arrays [*shape] by name, null values filled in.

    Raises:
        RequestError: A condition is unknown, missing, of another shape or out of range.
    """
    values = _named(bundle, given)
    missing = [c.name for c in bundle.conditions if c.name not in values]
    if missing:
        raise RequestError(f"{bundle.name} needs the condition {missing[0]!r}. {wanted(bundle)}")
    return {c.name: _array(bundle, c, values[c.name]) for c in bundle.conditions}


def contrasts(bundle: Bundle, label: object, given: Mapping[str, object]) -> bool:
    """Whether a sample's label or conditions differ from the null values of guidance.

    Args:
        label: As in the request; None is the null label.
        given: Its conditions, complete; None is the null value.
    """
    labelled = bundle.null_label is not None and label is not None
    nullable = [c.name for c in bundle.conditions if c.null is not None]
    return labelled or any(given[name] is not None for name in nullable)


def wanted(bundle: Bundle) -> str:
    """Return the conditions of a bundle in a sentence, for messages."""
    if not bundle.conditions:
        return "It has no conditions: leave them out."
    return f"It takes {'; '.join(map(str, bundle.conditions))}."


def _named(bundle: Bundle, given: object) -> Mapping[str, object]:
    """Return conditions by name. Raises RequestError for an unknown one."""
    if given is None:
        return {}
    if not isinstance(given, Mapping):
        raise refused("conditions", "a dict by name", given, wanted(bundle))
    known = [condition.name for condition in bundle.conditions]
    for name in given:
        if name not in known:
            hint = nearest(name[:60], known) if isinstance(name, str) else ""
            raise RequestError(
                f"unknown condition {shown(name)} of {bundle.name}.{hint} {wanted(bundle)}"
            )
    return given


def _each(condition: Condition, value: object, n: int, convert: bool) -> Sequence[object]:
    """Return a condition of each of n samples: a value for all of them, or one each."""
    if value is None:
        return [None] * n
    if isinstance(value, (list, tuple)) and any(entry is None for entry in value):
        # A null value among others.
        entries = many(condition.name, value, n)
        return [_each(condition, entry, 1, convert)[0] for entry in entries]
    if condition.is_image and not _is_floats(value, condition):
        ends = condition.range or (-1.0, 1.0)
        images = cast(ImageSources, value)
        found = read(images, condition.shape, *ends, convert, condition.name)
        return _repeated(condition, found, n)
    try:
        array = array_of(value)
    except Exception:  # the value is the caller's class
        raise refused(condition.name, _rule(condition), value) from None
    if array.ndim == len(condition.shape) + 1:
        return _repeated(condition, array, n)
    return [array] * n


def _repeated(condition: Condition, array: Array, n: int) -> Sequence[object]:
    """Return the n entries of an array [n, *shape] or [1, *shape]."""
    return [array[0]] * n if len(array) == 1 else many(condition.name, list(array), n)


def _is_floats(value: object, condition: Condition) -> bool:
    """Whether a value of an image condition is numbers in its range, and no image."""
    if isinstance(value, (str, os.PathLike)) or hasattr(value, "getbands"):
        return False
    if is_many(value) and not hasattr(value, "dtype"):
        # A list of images, or nested lists of floats.
        return bool(value) and all(_is_floats(entry, condition) for entry in value)
    return getattr(getattr(value, "dtype", None), "kind", "f") == "f"


def _array(bundle: Bundle, condition: Condition, value: object) -> Array:
    """Return a condition [*shape] of one sample in its own type, checked."""
    if value is None:
        if condition.null is None:
            raise RequestError(
                f"{bundle.name} was trained with the condition {condition.name!r} only, got None. "
                f"{wanted(bundle)}"
            )
        return bundle.null_of(condition)
    rule = _rule(condition)
    kinds = "fiu" if condition.dtype == "float32" else "iu"
    try:
        found = array_of(value)
    except Exception:  # the value is the caller's class, or a tensor that needs a gradient
        raise refused(condition.name, rule, value, wanted(bundle)) from None
    if found.shape != condition.shape or found.dtype.kind not in kinds:
        raise refused(condition.name, rule, value, wanted(bundle))
    # What overflows becomes infinite, and the next check names it.
    with np.errstate(over="ignore"):
        array = found.astype(condition.kind, copy=False)
    low, high = _bounds(condition)
    if not ((array >= low) & (array <= high) & np.isfinite(array)).all():  # NaN fails this too
        ends = " … ".join(dict.fromkeys([str(found.min()), str(found.max())]))
        raise RequestError(f"`{condition.name}` must be {rule}, got {ends}. {wanted(bundle)}")
    return array


def _rule(condition: Condition) -> str:
    """Return what the value of one sample must be, in words."""
    kind = "finite numbers" if condition.dtype == "float32" else "integers"
    ends = f" in {condition.range[0]:g} … {condition.range[1]:g}" if condition.range else ""
    return f"{kind} of shape {condition.shape} for each sample{ends}"


def _bounds(condition: Condition) -> tuple[float, float]:
    """Return the smallest and the largest value that is taken."""
    if condition.range is None:
        return -np.inf, np.inf
    low, high = condition.range
    # Images may overshoot their range a little, as those that are edited may.
    slack = 0.25 * (high - low) if condition.is_image else 0.0
    return low - slack, high + slack
