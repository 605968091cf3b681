"""Moving averages of the weights: by half-life and by power functions, and what combines the latter
into one of any other width (Karras et al. 2024)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from runtime.diffusion.schedule import Float64

from ..config import Config
from ..runs.checkpoint import Tensors


def half_life_decay(batch: int, half_life: float, step: int) -> float:
    """Return the decay of one step's update of an average by half-life.

    The half-life counts images. It is at most a twentieth of the images seen so far, which
    discounts the first weights early (the ramp-up of Karras et al. 2024).
    """
    return 0.5 ** (batch / max(min(half_life, (step + 1) * batch / 20), 1e-9))


@lru_cache
def exponent(width: float) -> float:
    """Return gamma of the power-function average of this width.

    The width is the standard deviation of the average's profile, relative to the training's length.
    width² = (gamma + 1) / ((gamma + 2)² (gamma + 3)), 0 < width < 0.288 (Karras et al. 2024, eq.
    126, and Algorithm 2).
    """
    roots = np.roots([1, 7, 16 - width**-2, 12 - width**-2])
    return float(np.real(roots[np.isreal(roots)]).max())


def power_decay(width: float, step: int) -> float:
    """Return the decay of one step's update of a power-function average.

    It is (1 - 1/t)^(gamma + 1) at t = step + 1, which gives the profile tau^gamma (Karras et al.
    2024, eq. 2).
    """
    return (1 - 1 / (step + 1)) ** (exponent(width) + 1)


class Averages:
    """The averages of one run: "ema" and "ema-N" by half-life, "power-W" by width.

    Attributes:
        of: Name → tensors by the weights' names.
    """

    def __init__(self, config: Config, weights: Mapping[str, Tensor]) -> None:
        self.batch = config.batch
        first, *others = config.ema_half_life
        self.half_lives = {"ema": first, **{f"ema-{n}": n for n in others}}
        self.widths = {power_name(width): width for width in config.ema_power}
        self.of: dict[str, Tensors] = {
            name: {k: w.detach().clone() for k, w in weights.items()}
            for name in (*self.half_lives, *self.widths)
        }

    def decay(self, name: str, step: int) -> float:
        if name in self.widths:
            return power_decay(self.widths[name], step)
        return half_life_decay(self.batch, self.half_lives[name], step)

    @torch.no_grad()
    def update(self, weights: Mapping[str, Tensor], step: int) -> None:
        """Take in the weights after step `step`. Each has the shape of its average."""
        values = list(weights.values())
        # In one call for all tensors: for small ones a call costs more than its arithmetic.
        lerp = torch._foreach_lerp_  # pyright: ignore[reportPrivateImportUsage]
        for name, average in self.of.items():
            lerp(list(average.values()), values, 1 - self.decay(name, step))


def power_name(width: float) -> str:
    return f"power-{width:g}"


def inner_products(a: Sequence[tuple[float, float]], b: Sequence[tuple[float, float]]) -> Float64:
    """Return ∫ p_i p_j of power-function profiles, [len(a), len(b)].

    A profile (t, gamma) is p(tau) = (gamma+1)/t · (tau/t)^gamma up to t (Karras et al. 2024,
    Algorithm 3).
    """
    ta, ga = np.array(a, np.float64).T
    tb, gb = np.array(b, np.float64).T
    ta = ta[:, None]
    ga = ga[:, None]
    least = np.minimum(ta, tb)
    most = np.maximum(ta, tb)
    of_most = np.where(ta > tb, ga, gb)  # the exponent of the profile that is longer
    found = (ga + 1) * (gb + 1) / ((ga + gb + 1) * most) * (least / most) ** of_most
    return found.astype(np.float64)


def combination(snapshots: Sequence[tuple[float, float]], t: float, gamma: float) -> Float64:
    """Return what each snapshot weighs in the average (t, gamma), [len(snapshots)].

    The weights sum to 1, and the profiles so weighted are nearest to the average's, by least
    squares. The weights of the paper's solution may not sum to 1, in particular after few steps.
    All weights of the network are then too large or too small.
    """
    # Lagrange's system: the last row asks for the sum, and the last unknown is its multiplier.
    n = len(snapshots)
    A = np.ones((n + 1, n + 1))
    A[:n, :n] = inner_products(snapshots, snapshots)
    A[n, n] = 0
    b = np.append(inner_products(snapshots, [(t, gamma)]), 1)
    return np.linalg.lstsq(A, b, rcond=1e-12)[0][:n].astype(np.float64)


def misfit(
    snapshots: Sequence[tuple[float, float]], weights: Float64, t: float, gamma: float
) -> float:
    """Return how far weighted snapshots are from the average (t, gamma), relative to its profile.

    0 is the average itself, and 1 is as far from it as no average at all.

    Args:
        snapshots: Their profiles (t, gamma).
        weights: What each weighs, [len(snapshots)]; see `combination`.
    """
    wanted = [(t, gamma)]
    square = inner_products(wanted, wanted)[0, 0]
    found = weights @ inner_products(snapshots, snapshots) @ weights
    both = weights @ inner_products(snapshots, wanted)[:, 0]
    return float(np.sqrt(max(0.0, found - 2 * both + square) / square))
