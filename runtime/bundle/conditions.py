"""Conditions: arrays that a network is conditioned on. A class label is one with a vocabulary."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ..diffusion.arrays import Array
from ..errors import RequestError
from ..errors.arguments import choice, elements, integer, number, text
from ..errors.messages import reason, refused, shown
from .format import null_file
from .rules import MAX_ELEMENTS, MAX_RANK, MAX_SIZE

LABEL = "label"
"""The name of the class label, as a condition and as an input of graphs."""
PREFIX = "condition_"
"""Before the name of a condition, the name of the graphs' input."""
LEARNED = "learned"
"""The null value that training found: an array, in a file of the bundle."""
DTYPES: Mapping[str, type[np.float32] | type[np.int64]] = {"float32": np.float32, "int64": np.int64}
MAX_CONDITIONS = 16
"""The most conditions of a bundle."""
RESERVED = ("x", "time")
"""Names of a network's other arguments."""
LARGEST = {"float32": 1e30, "int64": 2.0**53}
"""The bound on values, either way: floats that cannot overflow, integers that JSON can hold."""
_NAME = "[A-Za-z][A-Za-z0-9_]{0,62}"
_FIELDS = ("name", "shape", "dtype", "range", "meaning", "null")


@dataclass(frozen=True)
class Condition:
    """An array [B, *shape] that a network is conditioned on.

    Args:
        name: A Python identifier; the network takes the array by this name.
        shape: Without the batch, 0 to 4 axes. () is one number for each sample.
        dtype: "float32" or "int64".
        range: The smallest and the largest value; None for no bound, with float32 alone. For
            [1 or 3, H, W] it is what black and white are, so images can be passed.
        meaning: What the array holds, in a few words.
        null: The value that guidance contrasts with. A number fills the array, "learned" is an
            array that was trained, and None means that there is no such value.

    Raises:
        RequestError: A field is invalid.
    """

    name: str
    shape: tuple[int, ...] = ()
    dtype: str = "float32"
    range: tuple[float, float] | None = None
    meaning: str = ""
    null: float | str | None = None

    def __post_init__(self) -> None:
        name = text("name", self.name, "low_res")
        if not re.fullmatch(_NAME, name) or name in RESERVED:
            rule = (
                f"up to 63 letters, digits and '_', first a letter, and not {' or '.join(RESERVED)}"
            )
            raise refused("name", rule, name)
        where = f"{name}: shape"
        sizes = elements(where, self.shape, f"0 to {MAX_RANK} integers")
        shape = tuple(integer(where, size, 1, MAX_SIZE) for size in sizes)
        if len(shape) > MAX_RANK or np.prod(shape, dtype=float) > MAX_ELEMENTS:
            raise refused(where, f"at most {MAX_RANK} axes and {MAX_ELEMENTS} values", shape)
        choice(f"{name}: dtype", self.dtype, DTYPES)
        text(f"{name}: meaning", self.meaning, "the image at half its size")
        # Frozen, so that the checked values can only be set this way.
        object.__setattr__(self, "shape", shape)
        object.__setattr__(self, "range", self._checked_range())
        object.__setattr__(self, "null", self._checked_null())

    def _checked_range(self) -> tuple[float, float] | None:
        where = f"{self.name}: range"
        rule = "two rising numbers, such as (-1, 1)"
        if self.range is None:
            if self.dtype == "int64":
                # An index beyond a network's table makes the inference library fail.
                raise refused(where, f"{rule}, because dtype is int64", None)
            return None
        ends = [self._value(where, end) for end in elements(where, self.range, rule)]
        if len(ends) != 2 or not ends[0] < ends[1]:
            raise refused(where, rule, tuple(ends))
        return ends[0], ends[1]

    def _checked_null(self) -> float | str | None:
        where = f"{self.name}: null"
        if self.null is None or (isinstance(self.null, str) and self.null == LEARNED):
            return self.null
        return self._value(where, self.null, f'Pass a number, "{LEARNED}" or None.')

    def _value(self, where: str, value: object, remedy: str = "") -> float:
        bound = LARGEST[self.dtype]
        if self.dtype == "int64":
            return integer(where, value, -int(bound), int(bound), remedy)
        return number(where, value, -bound, bound, remedy)

    @classmethod
    def from_json(cls, value: object) -> Condition:
        """Return the condition that an entry of bundle.json describes.

        Raises:
            RequestError: A field is missing or invalid.
        """
        if not isinstance(value, dict):
            raise refused("a condition", "an object", value)
        if missing := [name for name in _FIELDS if name not in value]:
            raise RequestError(f"a condition lacks {', '.join(missing)}, got {shown(value)}.")
        return cls(**{name: value[name] for name in _FIELDS})

    def to_json(self) -> dict[str, object]:
        """Return the entry of bundle.json."""
        ends = None if self.range is None else list(self.range)
        return {**vars(self), "shape": list(self.shape), "range": ends}

    @property
    def port(self) -> str:
        """The name of the graphs' input. The prefix keeps it from the names of other values."""
        return self.name if self.name == LABEL else f"{PREFIX}{self.name}"

    @property
    def kind(self) -> type[np.float32] | type[np.int64]:
        """The numpy type of the array."""
        return DTYPES[self.dtype]

    @property
    def is_image(self) -> bool:
        """Whether images can be passed: [1 or 3, H, W] float32 with a range."""
        channels = len(self.shape) == 3 and self.shape[0] in (1, 3)
        return channels and self.dtype == "float32" and self.range is not None

    def __str__(self) -> str:
        sizes = "×".join(map(str, self.shape))
        noun = "float" if self.dtype == "float32" else "integer"
        what = f"{sizes} {noun}s" if sizes else f"one {noun}"
        what = f"an image of {sizes}" if self.is_image else what
        ends = f" in {self.range[0]:g} … {self.range[1]:g}" if self.range else ""
        return f"{self.name}: {what}{ends}" + (f" ({self.meaning})" if self.meaning else "")

    def draw(self, generator: np.random.Generator) -> Array:
        """Return random values [*shape] in the range, or of variance 1 without one."""
        if self.range is None:
            return generator.standard_normal(self.shape, np.float32)
        low, high = self.range
        if self.dtype == "int64":
            return generator.integers(int(low), int(high), self.shape, np.int64, endpoint=True)
        unit = np.asarray(generator.random(self.shape, np.float32))
        return (np.float32(low) + unit * np.float32(high - low)).clip(low, high).astype(np.float32)


def read_conditions(entries: Sequence[object]) -> tuple[tuple[Condition, ...], list[str]]:
    """Return the conditions that entries of bundle.json describe, and their faults in words."""
    found: list[Condition] = []
    faults: list[str] = []
    for entry in entries[:MAX_CONDITIONS]:
        try:
            found.append(Condition.from_json(entry))
        except RequestError as error:
            faults.append(f"a condition is not valid ({reason(error)})")
    if len(entries) > MAX_CONDITIONS:
        faults.append(f"{len(entries)} conditions, at most {MAX_CONDITIONS} expected")
    names = [condition.name for condition in found]
    # The class label is an input of its own.
    if len({LABEL, *names}) <= len(names):
        faults.append(f"conditions are named {shown(names)}, different names expected")
    return tuple(found), faults


def null_faults(conditions: Sequence[Condition], sizes: Mapping[str, int]) -> list[str]:
    """Return a fault for each learned null value without a file of its size.

    Args:
        sizes: In bytes, of the bundle's files.
    """
    faults: list[str] = []
    for condition in conditions:
        file = null_file(condition.name)
        size = np.dtype(condition.kind).itemsize * math.prod(condition.shape)
        if condition.null == LEARNED and sizes.get(file) != size:
            faults.append(f"no file {file!r} of {size} bytes, the null value of a condition")
    return faults
