"""The rules for the fields of bundle.json: what a value must be besides its JSON type."""

from __future__ import annotations

import math
import re
import sys

MAX_STEPS = 1_000_000
MAX_RANK = 4
MAX_SIZE = 65536
MAX_ELEMENTS = 2**28
MAX_MANIFEST = 2**28
"""The most bytes of a bundle.json; a schedule of a million knots takes 100 MB."""
# The limits keep a damaged or hostile bundle from asking for terabytes of memory.


def is_finite(value: object) -> bool:
    """Return whether a JSON value is a number that a float can hold."""
    # JSON has integers of any length; abs() compares them exactly where float() would overflow.
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    return abs(value) <= sys.float_info.max


def is_clip(value: float | None) -> bool:
    """Return whether this is a bound on |D|, above 0, or null for none."""
    return value is None or (is_finite(value) and value > 0)


def is_shape(sizes: list[object]) -> bool:
    """Return whether these are the sizes of a sample's axes, without the batch."""
    if not 0 < len(sizes) <= MAX_RANK:
        return False
    # True is an int by isinstance, but not a size.
    axes = [size for size in sizes if type(size) is int and 0 < size <= MAX_SIZE]
    return len(axes) == len(sizes) and math.prod(axes) <= MAX_ELEMENTS


def is_range(ends: list[float]) -> bool:
    """Return whether these are the smallest and the largest value of the data."""
    return len(ends) == 2 and all(map(is_finite, ends)) and ends[0] < ends[1]


def are_names(names: list[object]) -> bool:
    """Return whether these are the names of classes, all different."""
    return 0 < len(names) == len(set(map(str, names))) and all(isinstance(n, str) for n in names)


def is_sha256(text: str) -> bool:
    """Return whether this is a sha256 in lower-case hexadecimal digits."""
    return re.fullmatch("[0-9a-f]{64}", text) is not None


FIGURES = ("answer", "next_state", "trajectory", "psnr_db", "missed")
"""Figures of a report that are one number each."""
TIMES = "ms_a_call"
"""The figure that is numbers by the size of the batch."""


def is_report(value: dict[str, object]) -> bool:
    """Return whether this is {precision: {backend: {figure: number, or numbers by name}}}.

    Readers compute with the figures that are known, so each must be of its own kind.
    """
    for backends in value.values():
        if not isinstance(backends, dict):
            return False
        for figures in backends.values():
            if not isinstance(figures, dict):
                return False
            if not all(_is_figure(name, figure) for name, figure in figures.items()):
                return False
    return True


def _is_figure(name: str, value: object) -> bool:
    if isinstance(value, dict):
        return name not in FIGURES and all(map(is_finite, value.values()))
    return name != TIMES and is_finite(value)
