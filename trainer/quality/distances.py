"""How far samples are from images, by features of both: Fréchet and kernel distance, precision and
recall. All are computed in float64."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from runtime.diffusion.schedule import Float64

Features = NDArray[np.floating]
"""[n, d]: a row per image."""

NEIGHBOURS = 3
"""The neighbour whose distance is the reach of a point, as in Kynkäänniemi et al. 2019."""
BLOCK = 2048
"""Rows at a time, so that 50,000 by 50,000 distances are never in memory at once."""


def frechet(real: Features, made: Features) -> float:
    """Return the squared Fréchet distance of the normal distributions with the same moments.

    It is |m_a - m_b|² + tr(C_a + C_b - 2 (C_a C_b)^½) (Heusel et al. 2017).

    Args:
        real: Features of images, [n, d].
        made: Features of samples, [m, d].
    """
    m_a, C_a = _moments(real)
    m_b, C_b = _moments(made)
    # tr (C_a C_b)^½ = tr (C_a^½ C_b C_a^½)^½, and that matrix is symmetric: no complex roots.
    values, vectors = np.linalg.eigh(C_a)
    root = (vectors * np.sqrt(np.maximum(values, 0))) @ vectors.T
    # Rounding makes eigenvalues that are 0 slightly negative.
    crossed = np.sqrt(np.maximum(np.linalg.eigvalsh(root @ C_b @ root), 0)).sum()
    return float(((m_a - m_b) ** 2).sum() + np.trace(C_a) + np.trace(C_b) - 2 * crossed)


def _moments(x: Features) -> tuple[Float64, Float64]:
    """Return the mean [d] and the covariance [d, d]."""
    x = x.astype(np.float64)
    return x.mean(0), np.atleast_2d(np.cov(x, rowvar=False))


def kernel(real: Features, made: Features) -> float:
    """Return the squared maximum mean discrepancy under (x·y/d + 1)³.

    The estimate is unbiased, so it may fall below 0 (Bińkowski et al. 2018).

    Args:
        real: Features of images, [n, d].
        made: Features of samples, [m, d].
    """
    a = real.astype(np.float64)
    b = made.astype(np.float64)

    def total(x: Float64, y: Float64) -> float:
        return sum(float(((part @ y.T / y.shape[1] + 1) ** 3).sum()) for part in _blocks(x))

    def within(x: Float64) -> float:
        # A point's kernel with itself is left out: this is what makes the estimate unbiased.
        itself = (((x**2).sum(1) / x.shape[1] + 1) ** 3).sum()
        return (total(x, x) - itself) / (len(x) * (len(x) - 1))

    return float(within(a) + within(b) - 2 * total(a, b) / (len(a) * len(b)))


def precision_recall(
    real: Features, made: Features, neighbours: int = NEIGHBOURS
) -> tuple[float, float]:
    """Return precision and recall (Kynkäänniemi et al. 2019).

    Precision is the share of samples within reach of an image, recall that of images within reach
    of a sample. The reach of a point is the distance to its third neighbour of its own kind.

    Args:
        real: Features of images, [n, d].
        made: Features of samples, [m, d].
    """

    def covered(points: Features, by: Features) -> float:
        # Index `neighbours`, because a point is its own nearest neighbour.
        reach = np.concatenate(
            [np.partition(_distances(x, by), neighbours, 1)[:, neighbours] for x in _blocks(by)]
        )
        return float(
            np.concatenate([(_distances(x, by) <= reach).any(1) for x in _blocks(points)]).mean()
        )

    return covered(made, real), covered(real, made)


def _blocks(x: Features) -> list[Features]:
    return [x[i : i + BLOCK] for i in range(0, len(x), BLOCK)]


def _distances(a: Features, b: Features) -> Float64:
    """Return squared distances, [len(a), len(b)]."""
    a = a.astype(np.float64)
    b = b.astype(np.float64)
    # |a|² + |b|² - 2 a·b needs no [len(a), len(b), d] array; rounding can take it below 0.
    squared: Float64 = (a**2).sum(1)[:, None] + (b**2).sum(1) - 2 * a @ b.T
    return np.maximum(squared, 0)


def compare(real: Features, made: Features) -> dict[str, float]:
    """Return frechet, kernel, precision and recall of features real [n, d] and made [m, d]."""
    precision, recall = precision_recall(real, made)
    return {
        "frechet": frechet(real, made),
        "kernel": kernel(real, made),
        "precision": precision,
        "recall": recall,
    }
