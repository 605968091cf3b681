"""The conditions of a module: declared from Python or on the command line, and their arrays."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from runtime.bundle.conditioned import Conditioned
from runtime.bundle.conditions import LABEL, LEARNED, MAX_CONDITIONS, Condition
from runtime.diffusion.arrays import Array
from runtime.engine.conditions import resolved_conditions
from runtime.errors import RequestError, unknown
from runtime.errors.arguments import array_of, elements
from runtime.errors.messages import reason, refused, shown

if TYPE_CHECKING:
    from runtime.bundle.bundle import Bundle

SETTINGS = ("dtype", "range", "meaning", "null", "examples")
"""What `--condition NAME:SHAPE` may be followed by."""


def declared_conditions(conditions: object) -> tuple[Condition, ...]:
    """Return conditions, checked. Raises RequestError for anything else, or a name twice."""
    rule = f"a list of at most {MAX_CONDITIONS} Conditions"
    found = elements("conditions", conditions, rule)
    if len(found) > MAX_CONDITIONS or not all(isinstance(c, Condition) for c in found):
        raise refused("conditions", rule, conditions)
    names = [condition.name for condition in found]
    if len({LABEL, *names}) <= len(names):
        raise RequestError(
            f"conditions must have different names, none of them {LABEL!r}, got {shown(names)}."
        )
    return found


def conditioned(conditions: object, nulls: object, examples: object) -> dict[str, Any]:
    """Return the fields of `Model` that say what a module is conditioned on, checked.

    Args:
        conditions: A list of Conditions.
        nulls: Learned null values [*shape], by name.
        examples: Real values [m, *shape], by name.

    Raises:
        RequestError: One of them is invalid.
    """
    declared = declared_conditions(conditions)
    return {
        "conditions": declared,
        "nulls": nulls_of(nulls, declared),
        "examples": _arrays("examples", examples, declared, many=True),
    }


def nulls_of(arrays: object, conditions: Sequence[Condition]) -> dict[str, Array]:
    """Return the learned null values [*shape] by the name of their condition.

    Raises:
        RequestError: One is missing, or is no finite array of its shape.
    """
    learned = [condition for condition in conditions if condition.null == LEARNED]
    found = _arrays("nulls", arrays, learned, many=False)
    if missing := [c.name for c in learned if c.name not in found]:
        raise RequestError(
            f"the null value of {missing[0]!r} is {LEARNED!r}, so `nulls` must hold it. Pass "
            f"nulls={{{missing[0]!r}: array}}."
        )
    return found


def _arrays(
    what: str, arrays: object, conditions: Sequence[Condition], many: bool
) -> dict[str, Array]:
    """Return arrays by name, [m, *shape] each if `many`, else [*shape]. Raises RequestError."""
    if arrays is not None and not isinstance(arrays, Mapping):
        raise refused(what, "a dict of arrays by the name of a condition", arrays)
    given = dict(arrays or {})
    known = {condition.name: condition for condition in conditions}
    for name in given:
        if name not in known:
            raise unknown(f"condition in {what}", name, known)
    return {
        name: _array(f"{what}[{name!r}]", value, known[name], many) for name, value in given.items()
    }


def _array(what: str, value: object, condition: Condition, many: bool) -> Array:
    sizes = ["m", *condition.shape] if many else [*condition.shape]
    rule = f"finite numbers of shape [{', '.join(map(str, sizes))}] in {condition.dtype}"
    try:
        # A torch parameter needs a gradient, which an array cannot have.
        detach = getattr(value, "detach", None)
        plain = detach() if callable(detach) else value
        array = array_of(plain).astype(condition.kind, casting="same_kind")
    except Exception:  # the value is the caller's class
        raise refused(what, rule, value) from None
    fits = array.shape[1:] == condition.shape if many else array.shape == condition.shape
    if array.ndim != len(sizes) or not fits or not array.size or not np.isfinite(array).all():
        raise refused(what, rule, value)
    if many:
        _require_taken(condition, array)
    return array


def _require_taken(condition: Condition, array: Array) -> None:
    """Raises RequestError for examples [m, *shape] that no request could have."""
    alone = cast("Bundle", Conditioned(name="examples", labels=None, conditions=(condition,)))
    for end in (array.min(), array.max()):
        full = np.full(condition.shape, end, condition.kind)
        resolved_conditions(alone, {condition.name: full})


@dataclass(frozen=True, eq=False)
class Declared:
    """A condition of the command line, with the arrays of its files."""

    condition: Condition
    null: Array | None = None
    examples: Array | None = None


def add_condition_option(group: argparse._ArgumentGroup) -> None:
    """Add --condition, whose values `described` takes."""
    group.add_argument(
        "--condition",
        type=declared,
        action="append",
        metavar="NAME:SHAPE",
        help="an array that the network takes by name, with settings behind more colons: "
        "dtype=int64, range=LOW,HIGH, null=NUMBER or FILE.npy, examples=FILE.npy, meaning=TEXT",
    )


def described(given: Sequence[Declared]) -> dict[str, Any]:
    """Return the arguments of `from_module` that --condition stands for."""
    nulls = {e.condition.name: e.null for e in given if e.null is not None}
    examples = {e.condition.name: e.examples for e in given if e.examples is not None}
    conditions = [entry.condition for entry in given]
    return {"conditions": conditions, "nulls": nulls, "examples": examples}


def declared(text: str) -> Declared:
    """Parse NAME:SHAPE[:KEY=VALUE…], for argparse, such as low_res:3,32,32:range=-1,1:null=0.

    A null or examples in an .npy file are read.
    """
    name, _, rest = text.partition(":")
    shape, *pairs = rest.split(":")
    try:
        settings = _settings(pairs)
        sizes = tuple(int(part) for part in shape.split(",")) if shape else ()
        ends = settings.get("range")
        null = settings.get("null")
        array = _loaded(null) if null is not None and null.endswith(".npy") else None
        examples = settings.get("examples")
        condition = Condition(
            name,
            sizes,
            settings.get("dtype", "float32"),
            None if ends is None else _numbers(ends),
            settings.get("meaning", ""),
            LEARNED if array is not None else _null(null),
        )
        return Declared(condition, array, None if examples is None else _loaded(examples))
    except Exception as error:  # numpy raises a dozen kinds for damaged files
        raise argparse.ArgumentTypeError(
            f"must be NAME:SHAPE, such as low_res:3,32,32:range=-1,1:null=0, got {shown(text)} "
            f"({reason(error)})"
        ) from error


def _settings(pairs: Sequence[str]) -> dict[str, str]:
    found: dict[str, str] = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if key not in SETTINGS or not equals:
            raise unknown("setting", pair, [f"{name}=" for name in SETTINGS])
        if key in found:
            raise RequestError(f"{key} must be given once, got it twice. Remove one.")
        found[key] = value
    return found


def _numbers(text: str) -> tuple[float, float]:
    low, high = (_number(part) for part in text.split(","))
    return low, high


def _null(text: str | None) -> float | None:
    return None if text is None else _number(text)


def _number(text: str) -> float:
    """Return an int if the text is one, which a condition of integers needs."""
    try:
        return int(text)
    except ValueError:
        return float(text)


def _loaded(path: str) -> Array:
    return np.load(Path(path), allow_pickle=False)
