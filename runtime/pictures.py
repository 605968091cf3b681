"""Between arrays and pictures. Pillow is imported on first use."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .errors import RequestError
from .files import replacing

UInt8 = NDArray[np.uint8]


def to_uint8(samples: NDArray[Any], low: float = -1.0, high: float = 1.0) -> UInt8:
    """Samples [n, C, H, W] in the range low … high → pictures [n, H, W, C] of 0 … 255, rounded, values outside the range cut.

    Raises RequestError for another shape and for NaN.
    """
    if samples.ndim != 4 or samples.shape[1] not in (1, 3):
        raise RequestError(f"pictures need samples [n, 1 or 3, H, W], found shape {samples.shape}.")
    if (broken := np.isnan(samples).any(axis=(1, 2, 3))).any():
        raise RequestError(
            f"pictures need numbers, found NaN in {broken.sum()} of {len(samples)} samples (the first at {broken.argmax()}): "
            "look for it in the weights, or in what was handed in."
        )
    unit = (np.asarray(samples, np.float64) - low) / (high - low)
    return np.round(np.clip(unit, 0.0, 1.0) * 255.0).astype(np.uint8).transpose(0, 2, 3, 1)


def from_uint8(pictures: UInt8, low: float = -1.0, high: float = 1.0) -> NDArray[np.float32]:
    """Pictures [n, H, W, C] of 0 … 255 → samples [n, C, H, W], float32 in the range low … high."""
    unit = pictures.transpose(0, 3, 1, 2).astype(np.float32) / np.float32(255)
    return np.ascontiguousarray(unit * np.float32(high - low) + np.float32(low))


def tile(pictures: UInt8, columns: int | None = None, gap: int = 2) -> UInt8:
    """Pictures [n, H, W, C] on one white sheet, row by row, `columns` to a row (default: as square as it gets).

    Raises RequestError where there is no picture.
    """
    n, H, W, C = pictures.shape
    if n == 0:
        raise RequestError(
            f"a sheet needs at least 1 picture, found none (shape {pictures.shape}): ask for n=1 or more."
        )
    columns = columns or math.ceil(math.sqrt(n))
    rows = math.ceil(n / columns)
    sheet = np.full((rows * (H + gap) + gap, columns * (W + gap) + gap, C), 255, np.uint8)
    for i, picture in enumerate(pictures):
        y, x = gap + i // columns * (H + gap), gap + i % columns * (W + gap)
        sheet[y : y + H, x : x + W] = picture
    return sheet


def picture_format(path: Path) -> str:
    """Pillow's name for the format that the file name's ending asks for. Raises RequestError for an ending that it cannot write."""
    from PIL import Image

    Image.init()
    found = Image.EXTENSION.get(path.suffix.lower())
    if found not in Image.SAVE:
        raise RequestError(f"cannot write pictures as {path.suffix or path.name!r}: use a name that ends in .png.")
    return found


def save(path: str | Path, picture: UInt8, least: int = 0) -> None:
    """Write one picture [H, W, C]; the format is the file name's ending.

    Enlarged by a whole factor, pixels kept square, until it is `least` wide. Raises RequestError, see `picture_format`.
    """
    from PIL import Image

    path = Path(path)
    kind = picture_format(path)
    factor = max(1, math.ceil(least / picture.shape[1]))
    enlarged = picture.repeat(factor, axis=0).repeat(factor, axis=1)
    image = Image.fromarray(enlarged[..., 0] if picture.shape[2] == 1 else enlarged)
    with replacing(path) as temporary:
        image.save(temporary, kind)
