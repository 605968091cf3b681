"""The sample grids of a run, as images that are part of the page."""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image

T = TypeVar("T")
NAME = re.compile(r"step-(\d{1,15})\.png")
MOST = 40
"""Grids on a page."""
MOST_BYTES = 400_000
"""Bytes of all grids on a page, unless two alone are larger."""
MOST_PIXELS = 50_000_000
MOST_ENLARGED = 64
UNREADABLE = (
    OSError,
    ValueError,
    SyntaxError,
    Image.DecompressionBombError,
    Image.DecompressionBombWarning,
)
"""What Pillow raises for a damaged PNG."""


@dataclass(frozen=True)
class Grid:
    """A grid of samples: the step it was made at, and its image as a URL that holds the data."""

    step: int
    url: str


def grids(folder: Path) -> list[Grid]:
    """Return grids of a run's folder `samples`, evenly spaced in time. Other files are skipped."""
    paths = [path for path in folder.glob("step-*.png") if NAME.fullmatch(path.name)]
    paths.sort(key=_step)
    files = [(path, data) for path in chosen(paths, MOST) if (data := _small(path))]
    return [
        Grid(
            _step(path),
            f"data:image/png;base64,{base64.b64encode(data).decode()}",
        )
        for path, data in _fitting(files)
    ]


def _step(path: Path) -> int:
    return int(path.stem.partition("-")[2])


def chosen(values: Sequence[T], most: int) -> list[T]:
    """Return at most so many values, evenly spaced, with the first and the last."""
    if len(values) <= most:
        return list(values)
    return [values[round(i * (len(values) - 1) / (most - 1))] for i in range(most)]


def _fitting(files: Sequence[tuple[Path, bytes]]) -> list[tuple[Path, bytes]]:
    # Fewer grids rather than only early ones: the last one shows the result.
    most = MOST
    while True:
        some = chosen(files, most)
        if most <= 2 or sum(len(data) for _, data in some) <= MOST_BYTES:
            return some
        most -= 1


def _small(path: Path) -> bytes:
    """Return the image as a PNG without its enlargement, b"" if it cannot be read.

    Grids are stored enlarged, each pixel as a square; the browser can do this itself.
    """
    try:
        with Image.open(path, formats=["PNG"]) as image:
            if image.width * image.height > MOST_PIXELS:
                return b""
            pixels = np.asarray(image.convert("RGB" if image.mode != "L" else "L"))
    except UNREADABLE:
        return b""
    made = io.BytesIO()
    Image.fromarray(reduced(pixels)).save(made, "PNG")
    return made.getvalue()


def reduced(pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Undo the enlargement of an image of whole squares of one colour.

    Args:
        pixels: [k·H, k·W] or [k·H, k·W, C].

    Returns:
        [H, W] or [H, W, C] for the greatest such k.
    """
    for k in range(MOST_ENLARGED, 1, -1):
        if pixels.shape[0] % k or pixels.shape[1] % k:
            continue
        small = pixels[::k, ::k]
        if np.array_equal(small.repeat(k, 0).repeat(k, 1), pixels):
            return small
    return pixels
