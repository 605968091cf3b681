"""The data behind the figures of the book, and panels to draw it on."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from runtime import Schedule, Stream, make_program, make_schedule, noise, to_uint8

Array = NDArray[np.float64]

ASSETS = Path("trainer/data/assets")
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")


def digits() -> Array:
    """Return the digits, [1797, 1, 8, 8] in -1 … 1."""
    with np.load(ASSETS / "digits.npz") as file:
        return file["images"][:, None] / 8 - 1


def emoji(index: int, style: int = 0) -> Array:
    """Return one emoji, [3, 32, 32] in -1 … 1. Style 0 is Noto, 1 is Twemoji."""
    with np.load(ASSETS / "emoji32.npz") as file:
        return file["images"][index, style].transpose(2, 0, 1) / 127.5 - 1


def category(index: int) -> int:
    """Return the category of an emoji, which is its label in Noto's style."""
    with np.load(ASSETS / "emoji32.npz") as file:
        return int(file["category"][index])


def denoiser(x: Array, alpha: float, sigma: float, data: Array) -> Array:
    """Return E[x_0 | x_t = x] if x_0 is one of `data` with equal probability, [B, *S]."""
    distance = ((x[:, None] - alpha * data) ** 2).sum((2, 3, 4))
    weight = np.exp(-(distance - distance.min(1, keepdims=True)) / (2 * sigma**2))
    weight /= weight.sum(1, keepdims=True)
    return np.einsum("bn,nchw->bchw", weight, data)


def gaussian_error(solver: str, n: int) -> float:
    """Return the error of a solver on data N(0.3, 0.6²), whose trajectories are known."""
    schedule, mean, deviation = make_schedule("linear"), 0.3, 0.6
    ends = np.exp(-0.5 * np.array([-10.0, 8.0]) / 7)  # log-SNR -10 and 8, even in ρ^(1/7)
    time = schedule.time_at(-14 * np.log(np.linspace(*ends, n + 1)))
    program = make_program(schedule, "x0", solver, None, time)
    levels = program.moments[:n, 0]
    state = np.zeros(4)
    spread = np.hypot(levels[0, 0] * deviation, levels[0, 1])
    state[0] = levels[0, 0] * mean + spread
    for M, (alpha, sigma) in zip(program.update[:n], levels, strict=True):
        gain = alpha * deviation**2 / ((alpha * deviation) ** 2 + sigma**2)
        D = mean + gain * (state[0] - alpha * mean)
        state = M[:, :4] @ state + M[:, 4] * D
    alpha, sigma = program.moments[n, 0]
    return abs(state[0] - alpha * mean - np.hypot(alpha * deviation, sigma))


def jump(x_0: Array, schedule: Schedule, t: int, seed: int = 0) -> Array:
    """Return x_t for t = 0 … T."""
    if t == 0:
        return x_0
    eps = noise(seed, Stream.ENCODE, 0, x_0.shape)
    return schedule.alpha[t - 1] * x_0 + schedule.sigma[t - 1] * eps


def show(axes: Axes, image: Array, title: str = "", side: str = "") -> None:
    """Draw a sample [C, H, W] in -1 … 1, with a title above and a word to its left."""
    pixels = to_uint8(image[None])[0]
    axes.imshow(pixels if pixels.shape[2] == 3 else pixels[..., 0], cmap="gray", vmin=0, vmax=255)
    axes.set(xticks=[], yticks=[])
    axes.set_title(title, fontsize=9)
    axes.set_ylabel(side, fontsize=9, rotation=0, ha="right", va="center")
    axes.spines[:].set_visible(False)


def gallery(rows: Sequence[Sequence[Array]], titles: Sequence[str], sides: Sequence[str]) -> Figure:
    """Draw rows of samples under titles."""
    figure = Figure((0.95 * len(rows[0]) + 1.1, 0.98 * len(rows) + 0.25), layout="constrained")
    grid = figure.subplots(len(rows), len(rows[0]), squeeze=False)
    for i, row in enumerate(rows):
        for j, image in enumerate(row):
            show(grid[i, j], image, titles[j] if i == 0 else "", sides[i] if j == 0 else "")
    return figure


def plots(count: int) -> tuple[Figure, list[Axes]]:
    """Return a figure with panels side by side."""
    figure = Figure((4.1 * count if count > 1 else 6.4, 3.1), layout="constrained")
    panels = list(figure.subplots(1, count, squeeze=False)[0])
    for axes in panels:
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_prop_cycle(color=COLOURS)
        axes.grid(alpha=0.25)
    return figure, panels
