"""Winograd's algorithm for convolutions of three taps: its transformations, and its tiles."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

from .maps import Map

POINTS = (0.0, 0.75, -0.75, 1.5, -1.5)
"""The points at which the polynomials are evaluated, besides infinity: of the simple fractions,
those with the smallest rounding errors."""
TILE = 4
"""Results at a time along a side: 36 multiplications for 16 results of 9 each."""
SIDE = TILE + 2
"""Pixels along a side that the results of a tile depend on."""


class Winograd(NamedTuple):
    """outputs ((kernels g) ⊙ (inputs d)): TILE results of a 3-tap filter g on SIDE neighbours d,
    with SIDE multiplications.

    outputs [TILE, SIDE], kernels [SIDE, 3], inputs [SIDE, SIDE]. (Winograd 1980, by the
    construction of Toom and Cook; Lavin & Gray 2016.)
    """

    outputs: NDArray[np.float64]
    kernels: NDArray[np.float64]
    inputs: NDArray[np.float64]


def winograd() -> Winograd:
    """Return the transformations at POINTS."""
    points = np.array(POINTS)
    outputs = np.zeros((TILE, SIDE))
    kernels = np.zeros((SIDE, 3))
    inputs = np.zeros((SIDE, SIDE))
    # A column or row for each finite point: outputs and kernels evaluate polynomials there, and
    # inputs has the coefficients of Lagrange's, whose denominators the kernels take over because
    # these are transformed once.
    for i, p in enumerate(points):
        others = np.delete(points, i)
        outputs[:, i] = p ** np.arange(TILE)
        kernels[i] = p ** np.arange(3) / np.prod(p - others)
        inputs[i, :-1] = np.poly(others)[::-1]
    # At infinity a polynomial is its leading coefficient.
    outputs[-1, -1] = kernels[-1, -1] = 1
    inputs[-1] = np.poly(points)[::-1]
    return Winograd(outputs, kernels, inputs)


class Tiles:
    """The tiles that cover a map."""

    def __init__(self, m: Map) -> None:
        self.map = m
        self.high = -(-m.height // TILE)
        self.wide = -(-m.width // TILE)

    @property
    def count(self) -> int:
        return self.high * self.wide

    def inputs(self) -> NDArray[np.int64]:
        """Return the row of the map's tensor for each point of each tile [SIDE², tiles]; -1 is
        outside the map."""
        rows = self.map.rows(1, self.high * TILE + 2, self.wide * TILE + 2)
        # Neighbouring tiles share two rows of pixels, so windows of SIDE start every TILE pixels.
        windows = sliding_window_view(rows, (SIDE, SIDE))[::TILE, ::TILE]
        return windows.transpose(2, 3, 0, 1).reshape(SIDE**2, self.count)

    def outputs(self) -> NDArray[np.int64]:
        """Return the place of each pixel [height·width] in results [TILE², tiles] laid out flat."""
        places = np.arange(TILE**2 * self.count).reshape(TILE, TILE, self.high, self.wide)
        grid = places.transpose(2, 0, 3, 1).reshape(self.high * TILE, self.wide * TILE)
        # The tiles at the far edges reach beyond the map.
        return grid[: self.map.height, : self.map.width].reshape(-1)
