"""How far samples are from pictures, by features of both [n, d]: Fréchet and kernel distance,
precision and recall. In float64."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from runtime.diffusion.schedule import Float64

NEIGHBOURS = 3
BLOCK = 2048


def frechet(real: NDArray[Any], made: NDArray[Any]) -> float:
    """|m_a - m_b|² + tr(C_a + C_b - 2 (C_a C_b)^½), of the normal distributions with the same
    moments (Heusel et al. 2017)."""
    (m_a, C_a), (m_b, C_b) = (_moments(x) for x in (real, made))
    values, vectors = np.linalg.eigh(C_a)
    root = (vectors * np.sqrt(np.maximum(values, 0))) @ vectors.T
    crossed = np.sqrt(np.maximum(np.linalg.eigvalsh(root @ C_b @ root), 0)).sum()
    return float(((m_a - m_b) ** 2).sum() + np.trace(C_a) + np.trace(C_b) - 2 * crossed)


def _moments(x: NDArray[Any]) -> tuple[Float64, Float64]:
    x = x.astype(np.float64)
    return x.mean(0), np.atleast_2d(np.cov(x, rowvar=False))


def kernel(real: NDArray[Any], made: NDArray[Any]) -> float:
    """The squared maximum mean discrepancy under (x·y/d + 1)³, unbiased: it may fall below 0
    (Bińkowski et al. 2018)."""
    a = real.astype(np.float64)
    b = made.astype(np.float64)

    def total(x: Float64, y: Float64) -> float:
        return sum(float(((part @ y.T / y.shape[1] + 1) ** 3).sum()) for part in _blocks(x))

    def within(x: Float64) -> float:
        own = (((x**2).sum(1) / x.shape[1] + 1) ** 3).sum()
        return (total(x, x) - own) / (len(x) * (len(x) - 1))

    return float(within(a) + within(b) - 2 * total(a, b) / (len(a) * len(b)))


def precision_recall(
    real: NDArray[Any], made: NDArray[Any], neighbours: int = NEIGHBOURS
) -> tuple[float, float]:
    """Share of samples within reach of a picture, and of pictures within reach of a sample; the
    reach of a point is the distance to its third neighbour among its own kind (Kynkäänniemi et al.
    2019)."""

    def covered(points: NDArray[Any], by: NDArray[Any]) -> float:
        reach = np.concatenate(
            [np.partition(_distances(x, by), neighbours, 1)[:, neighbours] for x in _blocks(by)]
        )
        return float(
            np.concatenate([(_distances(x, by) <= reach).any(1) for x in _blocks(points)]).mean()
        )

    return covered(made, real), covered(real, made)


def _blocks(x: NDArray[Any]) -> list[NDArray[Any]]:
    """Of so many rows that 50,000 by 50,000 distances never are in memory at once."""
    return [x[i : i + BLOCK] for i in range(0, len(x), BLOCK)]


def _distances(a: NDArray[Any], b: NDArray[Any]) -> Float64:
    """[len(a), len(b)], squared."""
    a = a.astype(np.float64)
    b = b.astype(np.float64)
    found: Float64 = (a**2).sum(1)[:, None] + (b**2).sum(1) - 2 * a @ b.T
    return np.maximum(found, 0)


def compare(real: NDArray[Any], made: NDArray[Any]) -> dict[str, float]:
    precision, recall = precision_recall(real, made)
    return {
        "frechet": frechet(real, made),
        "kernel": kernel(real, made),
        "precision": precision,
        "recall": recall,
    }
