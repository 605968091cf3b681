"""Data N(MU, S²), whose denoiser, trajectory and marginals have a closed form, and grids with a
finite end."""

import numpy as np

from runtime.diffusion.grid import Grid
from runtime.diffusion.schedule import Schedule
from runtime.diffusion.update import CLEAN, D, R, Update, Z

MU, S = 0.3, 0.6


def gain(alpha: float, sigma: float) -> float:
    """Slope in x of E[x_0 | x_t = x], which is MU + gain·(x - alpha·MU)."""
    return alpha * S**2 / (alpha**2 * S**2 + sigma**2)


def ideal(x: float, level: np.ndarray) -> float:
    return MU + gain(*level) * (x - level[0] * MU)


def exact(x: float, here: np.ndarray, there: np.ndarray) -> float:
    """The probability-flow ODE from one level to another."""
    deviation = np.hypot(there[0] * S, there[1]) / np.hypot(here[0] * S, here[1])
    return there[0] * MU + deviation * (x - here[0] * MU)


def finite_grid(
    schedule: Schedule, n: int, spacing: str, low: float = -5.0, high: float = 4.0
) -> Grid:
    """log(alpha/sigma) from low to high in n intervals, even in ρ^(1/7) ("karras") or in itself
    ("even"); both ends finite."""
    lam = np.linspace(low, high, n + 1)
    if spacing == "karras":
        lam = -7 * np.log(np.linspace(np.exp(-low / 7), np.exp(-high / 7), n + 1))
    time = schedule.time_at(2 * lam)
    return Grid(spacing, time, *schedule.level(time), schedule)


def walk(update: Update, state: np.ndarray, first: int = 0, last: int | None = None) -> np.ndarray:
    """The registers after rows first … last-1, without noise."""
    for M, (level, *_) in zip(
        update.M[first:last],
        update.moments[first:-1][: None if last is None else last - first],
        strict=True,
    ):
        state = M[:, :R] @ state + M[:, D] * ideal(state[0], level)
    return state


def seeded(update: Update, row: int, x: float) -> np.ndarray:
    """The registers before `row`, exact for the trajectory that starts at x on row 0."""
    levels = update.moments[:, 0]
    state = np.zeros(R)
    state[0] = exact(x, levels[0], levels[row])
    for j in range(1, R):
        if update.moments[row, j].any():
            past = exact(x, levels[0], levels[row - j])
            estimate = ideal(past, levels[row - j])
            state[j] = (
                estimate
                if tuple(update.moments[row, j]) == CLEAN
                else (past - levels[row - j][0] * estimate) / levels[row - j][1]
            )
    return state


def mean_and_variance(update: Update) -> tuple[float, float]:
    """Of x at the end, propagated exactly through M and the ideal denoiser; all registers' joint
    covariance."""
    level = update.moments[0, 0]
    mean, cov = np.zeros(R), np.zeros((R, R))
    mean[0], cov[0, 0] = level[0] * MU, (level[0] * S) ** 2 + level[1] ** 2
    for M, moments in zip(update.M, update.moments[:-1], strict=True):
        slope = gain(*moments[0])
        A = M[:, :R].copy()
        A[:, 0] += M[:, D] * slope
        mean = A @ mean + M[:, D] * MU * (1 - slope * moments[0, 0])
        cov = A @ cov @ A.T + np.outer(M[:, Z], M[:, Z])
    return float(mean[0]), float(cov[0, 0])
