"""The proof that a program keeps the marginals that it declares, for a perfect network."""

from __future__ import annotations

import numpy as np

from ..errors import RequestError
from .arrays import Float64
from .update import CLEAN, D, R, Update, Z


def prove(solver: str, c_skip: Float64, c_out: Float64, answer: Float64, update: Update) -> None:
    """Prove that every row's numbers come to what the update declares, to 1e-12 of their terms.

    Args:
        solver: The solver's name, for messages.
        c_skip: [K, 1].
        c_out: [K, 1].
        answer: [K, 2], what a perfect network predicts, in units of (x_0, eps).

    Raises:
        RequestError: A row does not. The message names it.
    """
    # D is c_skip·x + c_out·F, which must be x_0 itself.
    level = update.moments[:-1, 0]
    clean = np.broadcast_to(CLEAN, level.shape)
    _require(solver, "the denoised estimate", c_skip * level, c_out * answer, clean)

    # What each register brings to each other one in a row: [K, R to, R from, 2].
    terms = update.M[:, :, :R, None] * update.moments[:-1, None]
    size = np.abs(terms).sum(2)
    # Signal adds up linearly. Noise too: a register of eps shares the noise of x, so it counts with
    # its sign, and is squared afterwards. z alone is independent, and adds its own square.
    size[..., 1] = size[..., 1] ** 2
    target = update.moments[1:].copy()
    target[..., 1] **= 2
    # A row may take x off its level on purpose, if it says by how much.
    beyond = np.stack([update.bias, update.excess], -1)
    target[:, 0] += beyond
    size[:, 0] += np.abs(beyond)
    signal = terms[..., 0].sum(2)
    _require(solver, "the signal", signal, update.M[:, :, D], target[..., 0], size[..., 0])
    variance = terms[..., 1].sum(2) ** 2
    _require(solver, "the variance", variance, update.M[:, :, Z] ** 2, target[..., 1], size[..., 1])


def _require(
    solver: str, what: str, a: Float64, b: Float64, declared: Float64, scale: Float64 | None = None
) -> None:
    """Raise RequestError unless a + b is `declared`, to 1e-12 of the size of the terms.

    scale: The size of the terms of a; its own if not given.
    """
    size = (np.abs(a) if scale is None else scale) + np.abs(b) + np.abs(declared)
    # Written so that NaN is wrong too.
    wrong = ~(np.abs(a + b - declared) <= 1e-12 * size)
    if wrong.any():
        row = int(np.argwhere(wrong)[0, 0])
        raise RequestError(
            f"solver {solver!r}, row {row}: {what} comes to {(a + b)[row]}, but "
            f"{declared[row]} is declared."
        )
