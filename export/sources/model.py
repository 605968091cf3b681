"""What can be exported: a network, with everything that a bundle says of it."""

from __future__ import annotations

import contextlib
import platform
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from typing import Any

import numpy as np

from runtime.bundle.conditions import Condition
from runtime.bundle.spec import Labels, ModelSpec
from runtime.diffusion.arrays import Array
from runtime.diffusion.program import Network
from runtime.errors import RequestError
from runtime.errors.arguments import elements, integer
from runtime.errors.messages import described, printable, refused, shown
from runtime.files import to_json

ONNX_FILE = "onnx_file"
"""The entry of the provenance of a network that was read from an ONNX file."""
LIBRARIES = ("numpy", "onnx", "onnxruntime", "torch")
"""The libraries that make and check an export."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Model(ModelSpec):
    """A network's description, and the network itself as a function of arrays.

    `TorchModel` has a PyTorch module, `OnnxModel` an ONNX file.

    Attributes:
        provenance: The model's origin, for the model card.
        nulls: The learned null values [*shape] of conditions, by name.
        examples: Real conditions [m, *shape] by name, for checks and calibration.
    """

    provenance: Mapping[str, Any]
    nulls: Mapping[str, Array] = field(default_factory=dict)
    examples: Mapping[str, Array] = field(default_factory=dict)

    def reference(self) -> Network:
        """Return what every graph is compared with.

        It is F [n, *S] of x [n, *S], time [n], label [n] if any, and conditions [n, …] by name.
        """
        raise NotImplementedError

    def learned_null(self, condition: Condition) -> Array:
        """Return the learned null value of a condition, [*shape]."""
        return self.nulls[condition.name]

    def draw_conditions(self, count: int, first: int = 0) -> dict[str, Array]:
        """Return conditions [count, *shape] by name: the examples in turn, or random ones."""
        turns = np.arange(first, first + count)
        taken = {name: found[turns % len(found)] for name, found in self.examples.items()}
        return {**super().draw_conditions(count, first), **taken}

    def draw_different(self, count: int, first: int = 0) -> dict[str, Array]:
        """Return conditions [count, *shape] by name, no two the same as far as that can be.

        Samples that have the same one would hide that a network mixes them, so few examples are
        not enough: two draws of so many need twice as many.
        """
        few = [name for name, found in self.examples.items() if len(found) < 2 * count]
        random = super().draw_conditions(count, first)
        return self.draw_conditions(count, first) | {name: random[name] for name in few}


Way = tuple[str, int]
"""A solver and its number of steps."""


def ways_of(spec: ModelSpec, ways: Sequence[Way]) -> tuple[Way, ...]:
    """Return the ways in which images are sampled that precisions are compared by.

    Args:
        ways: Those of a model that takes any number of steps. One that was distilled is sampled by
            its own solver with each number that it knows.
    """
    if spec.distilled:
        return tuple((spec.defaults.solver, count) for count in sorted(spec.distilled.levels))
    return tuple((solver, steps_of(spec, steps)) for solver, steps in ways)


def steps_of(spec: ModelSpec, steps: int) -> int:
    """Return the most steps, up to `steps`, that the model's own grid has.

    Not every grid has every number: leading(1) has none of as many steps as there are knots.
    """
    most = spec.allowed_steps(steps)
    if spec.distilled:
        return most
    for count in range(most, 0, -1):
        with contextlib.suppress(RequestError):
            return len(spec.grid(count))
    return spec.defaults.steps


def checked_ways(ways: object) -> tuple[Way, ...]:
    """Return the ways in which images are sampled, checked. Raises RequestError."""
    rule = 'a list of (solver, steps), such as [("ddim", 50)]'
    found: list[Way] = []
    for way in elements("ways", ways, rule):
        pair = elements("ways", way, rule)
        if len(pair) != 2 or not isinstance(pair[0], str):
            raise refused("ways", rule, ways)
        found.append((pair[0], integer("ways", pair[1], 1)))
    if not found:
        raise refused("ways", f"{rule}, not empty", ways)
    return tuple(found)


def bundle_name(name: str) -> str:
    """Return the name of a folder or a class, changed into one that a bundle can have."""
    return re.sub(r"[^A-Za-z0-9_.-]", "-", name).lstrip("-.") or "network"


def json_object(name: str, value: object) -> dict[str, Any]:
    """Return a mapping as JSON can hold it, {} for None, with numpy scalars as Python numbers.

    Raises:
        RequestError: The value is not a mapping, or a bundle could not store it as JSON.
    """
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise refused(name, "a dictionary", value)
    # Encoded here, because lone surrogates pass as strings and fail only when they are written.
    try:
        plain = {key: _plain(inner) for key, inner in _string_keys(value)}
        to_json(plain).encode("utf-8")
    except (TypeError, ValueError, RecursionError) as error:
        raise RequestError(
            f"`{name}` must be JSON (strings, finite numbers, lists, dictionaries with string "
            f"keys), got {shown(value)} ({described(error)})."
        ) from error
    return plain


def _plain(value: object) -> object:
    if isinstance(value, Mapping):
        return {key: _plain(inner) for key, inner in _string_keys(value)}
    if isinstance(value, (list, tuple)):
        return [_plain(inner) for inner in value]
    if isinstance(value, np.generic) or (isinstance(value, np.ndarray) and value.ndim == 0):
        return value.item()
    return value


def _string_keys(value: Mapping[Any, Any]) -> list[tuple[str, Any]]:
    for key in value:
        if not isinstance(key, str):
            raise TypeError(f"the key {shown(key)} is not a string")
    return list(value.items())


def make_labels(count: int, null_label: int | None, names: Sequence[str] | None) -> Labels | None:
    """Return the labels of a network with `count` of them, the null label included; None for 0.

    Raises RequestError for a null label that is not one of them, and unless `names` has a
    different name for each class.
    """
    if names is not None:
        names = elements("label_names", names, "a list of names, one for each class")
    if count == 0 or (count == 1 and null_label is not None):
        if null_label is not None or names:
            raise RequestError("null_label and label_names need classes: give num_classes too.")
        return None
    if null_label is not None:
        null_label = integer("null_label", null_label, 0, count - 1)
    numbers = [i for i in range(count) if i != null_label]
    if names is None:
        # If the null label is not the last one, a class has another number in the bundle.
        moved = numbers != list(range(len(numbers)))
        names = [f"class{i}" if moved else str(i) for i in numbers]
    rule = f"label_names must be {len(numbers)} different names, one for each class, got"
    if not all(isinstance(n, str) and n and printable(n) == n for n in names):
        raise RequestError(f"{rule} {shown(names)}. Each must be a string, not empty, in Unicode.")
    if len(names) != len(numbers) or len(set(names)) != len(names):
        raise RequestError(f"{rule} {len(names)}: {shown(list(names))}.")
    return Labels(tuple(names), null_label is not None)


def versions() -> dict[str, str]:
    """Return the versions of what makes and checks an export: of the libraries in use."""
    return {
        "python": platform.python_version(),
        **{name: metadata.version(name) for name in LIBRARIES if sys.modules.get(name)},
    }
