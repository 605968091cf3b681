"""The columns of a run's logs as arrays, for any contents of the files."""

from __future__ import annotations

import csv
import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

Values = NDArray[np.float64]
"""[n], NaN for a row without a value."""
MOST_POINTS = 1000
"""Points of a curve on the page: more than a screen has pixels for."""
SMOOTH_SHARE = 60
"""The standard deviation of the smoothing is this fraction of the rows, …"""
LEAST_SMOOTH = 1.5
"""… and at least this many rows."""
NO_WEIGHT = 1e-9
"""Of the sum of weights around a row; rounding makes as much of 0."""
LAST_STEP = 10**15
LARGEST = 1e30
"""Beyond this, squares and float32 overflow."""


@dataclass(frozen=True)
class Log:
    """A log of a run.

    Attributes:
        step: [n], ascending.
        columns: [n] by name, without the columns that hold no number at all.
        fault: Why parts of the file were left out; "" if nothing was.
    """

    step: Values
    columns: Mapping[str, Values] = field(default_factory=dict)
    fault: str = ""

    def get(self, name: str) -> Values:
        """Return a column, [n]: NaN everywhere if the log does not have it."""
        return self.columns.get(name, np.full(len(self.step), math.nan))


def read(path: Path) -> Log:
    """Return what can be read of a log. It never raises: a report shows the rest.

    Rows without a step, and rows that a kill cut short, are left out.
    """
    rows: list[dict[str, str]] = []
    fault = ""
    try:
        with path.open(newline="", encoding="utf-8", errors="replace") as file:
            table = csv.DictReader(file)
            if "step" not in (table.fieldnames or ("step",)):
                fault = "its first line names no column `step`"
            rows = [row for row in table if None not in row.values()]
    except FileNotFoundError:
        pass
    except (OSError, csv.Error) as error:
        fault = str(error)
    return _log(rows, f"{path.name} cannot be read: {fault}." if fault else "", path.name)


def _log(rows: list[dict[str, str]], fault: str, name: str) -> Log:
    step = np.array([_number(row.get("step", "")) for row in rows], np.float64)
    # Sorted, because a curve that runs backwards cannot be read.
    step[(step < 0) | (step > LAST_STEP)] = math.nan
    order = np.argsort(step, kind="stable")[: np.isfinite(step).sum()]
    columns = {}
    bad = [] if fault or len(order) == len(rows) else ["step"]
    for column in rows[0] if rows else ():
        # Fields beyond the last column have the name None.
        if not isinstance(column, str):
            continue
        texts = [rows[i].get(column, "") for i in order]
        values = np.array([_number(text) for text in texts], np.float64)
        if not all(map(_is_number, texts)):
            bad.append(column)
        if column != "step" and np.isfinite(values).any():
            columns[column] = values
    if bad:
        fault = f"{name}: values that are not numbers were left out ({', '.join(bad)})."
    return Log(step[order], columns, fault)


def _number(text: object) -> float:
    """Return the number that a field holds, NaN if it holds none or one that cannot be drawn."""
    try:
        value = float(str(text))
    except ValueError:
        return math.nan
    return value if abs(value) <= LARGEST else math.nan


def _is_number(text: object) -> bool:
    """Whether a field is empty or holds a number, finite or not."""
    try:
        float(str(text) or 0)
    except ValueError:
        return False
    return True


def smooth(values: Values) -> Values:
    """Return values [n] smoothed by a Gaussian window over the rows around each.

    The window is symmetric, so that the curve does not lag behind a falling loss. Rows without a
    value have no weight.
    """
    width = max(LEAST_SMOOTH, len(values) / SMOOTH_SHARE)
    reach = min(math.ceil(3 * width), (len(values) - 1) // 2)
    window = np.exp(-0.5 * (np.arange(-reach, reach + 1) / width) ** 2)
    there = np.isfinite(values)
    size = len(values) + 2 * reach

    def around(x: Values) -> Values:
        # A log of a long run has tens of thousands of rows, too many to convolve one by one.
        product = np.fft.rfft(x, size) * np.fft.rfft(window, size)
        return np.fft.irfft(product, size)[reach : reach + len(values)]

    weights = around(there.astype(np.float64))
    sums = around(np.where(there, values, 0))
    return np.divide(sums, weights, out=np.full(len(values), math.nan), where=weights > NO_WEIGHT)


def kept(values: Values, most: int = MOST_POINTS) -> NDArray[np.int64]:
    """Return the rows that a curve of values [n] shows, at most `most` (at least 2), ascending."""
    n = len(values)
    if n <= most:
        return np.arange(n)
    # Of each stretch the least and the greatest value, so that no spike is lost.
    low = np.nan_to_num(values, nan=math.inf)
    high = np.nan_to_num(values, nan=-math.inf)
    rows: set[int] = set()
    for a, b in itertools.pairwise(np.linspace(0, n, most // 2 + 1).astype(int).tolist()):
        rows |= {a + int(np.argmin(low[a:b])), a + int(np.argmax(high[a:b]))}
    return np.array(sorted(rows))
