"""What a solver decides: the moves of the loop's registers, and what the registers must hold."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .arrays import Float64
from .grid import Grid

R = 4
"""Registers of the loop, in every graph and engine."""
D = R
Z = R + 1
"""Columns of M that multiply the denoised estimate and the noise."""
CLEAN = (1.0, 0.0)
"""x_0, and a perfect D, in units of (x_0, eps)."""


@dataclass(frozen=True, eq=False)
class Update:
    """What a solver decides on a grid, for any network.

    Attributes:
        time: [K], the time at which each row calls the network.
        M: [K, R, R+2], the update of the registers.
        moments: [K+1, R, 2], the contents of the registers before each row and at the end, as
            (signal, noise) in units of (x_0, eps). x at a level is (alpha, sigma), D is (1, 0), eps
            is (0, 1), and an unused register is (0, 0).
        excess: [K], variance of x beyond its level that the row adds on purpose.
        bias: [K], signal of x beyond its level that the row adds on purpose.
    """

    time: Float64
    M: Float64
    moments: Float64
    excess: Float64
    bias: Float64

    @classmethod
    def blank(cls, levels: Float64, time: Float64) -> Update:
        """Make zero coefficients, to be filled in, for an x that walks along levels [K+1, 2].

        time: [K].
        """
        K = len(levels) - 1
        moments = np.zeros((K + 1, R, 2))
        moments[:, 0] = levels
        return cls(
            np.array(time, np.float64), np.zeros((K, R, R + 2)), moments, np.zeros(K), np.zeros(K)
        )


def levels(grid: Grid) -> Float64:
    """[n+1, 2]: (alpha, sigma) along the grid."""
    return np.stack([grid.alpha, grid.sigma], -1)
