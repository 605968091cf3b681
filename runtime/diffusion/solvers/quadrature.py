"""Weights of polynomials through earlier estimates, and the integrals that solvers take of them."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from ..arrays import Float64

Int = NDArray[np.int_]


def past(value: Float64, count: int) -> Float64:
    """[n, count]: the value [n] at 1, 2, …, count levels before each; NaN if there is none."""
    n = len(value)
    if not count:
        return np.empty((n, 0))
    padded = np.concatenate([np.full(count, np.nan), value])
    return np.stack([padded[count - j : count - j + n] for j in range(1, count + 1)], -1)


def fit(nodes: Float64, moments: Float64, order: Int) -> Float64:
    """Solve Σ_j w_j · nodes_j^i = moments_i, i = 1 … order-1, for w [n, q].

    The weights integrate the polynomial through the nodes and 0.

    Args:
        nodes: [n, q], in units of the interval.
        moments: [n, q], the integrals of u^i.
        order: [n]. A row uses its first order-1 nodes; its other weights are 0.
    """
    w = np.zeros_like(nodes)
    # Rows of one order are one batch of linear systems.
    for p in range(2, nodes.shape[1] + 2):
        rows = order == p
        if rows.any():
            powers = nodes[rows, None, : p - 1] ** np.arange(1, p)[:, None]
            w[rows, : p - 1] = np.linalg.solve(powers, moments[rows, : p - 1, None])[..., 0]
    return w


def growing(h: Float64, count: int) -> Float64:
    """[n, count]: ∫ h·e^(-h(1-u))·u^i du over (0, 1), i = 1 … count, for h [n].

    The reverse ODE weighs a polynomial D so.
    """
    return _moments(h, count, np.exp(-h), h, -np.expm1(-h), lambda i, last: 1 - i * last / h)


def falling(h: Float64, count: int) -> Float64:
    """[n, count]: ∫ h·e^(-hu)·u^i du over (0, 1), i = 1 … count, for h [n].

    The reverse ODE weighs a polynomial eps so.
    """
    return _moments(
        h, count, np.ones_like(h), -h, -np.expm1(-h), lambda i, last: i * last / h - np.exp(-h)
    )


def _moments(
    h: Float64,
    count: int,
    scale: Float64,
    a: Float64,
    first: Float64,
    by_parts: Callable[[int, Float64], Float64],
) -> Float64:
    """∫ scale·h·e^(au)·u^i du over (0, 1): [n, count].

    first is the integral of u^0, by_parts(i, last) that of u^i from that of u^(i-1).
    """
    # Integration by parts divides by h and cancels for small h. There the series of e^(au) is
    # integrated instead: 18 terms reach float64's precision for |h| < 1.
    k = np.arange(18)
    small = np.abs(h) < 1
    terms = np.where(small, a, 0.0)[:, None] ** k / np.cumprod(np.maximum(k, 1.0))
    result = np.empty((len(h), count))
    last = first
    for i in range(1, count + 1):
        last = np.where(small, scale * h * (terms / (i + 1 + k)).sum(1), by_parts(i, last))
        result[:, i - 1] = last
    return result
