"""Samples as arrays of pixels and back, and many images on one sheet."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from ..errors import RequestError
from ..errors.arguments import array_of, enough_memory, integer, number
from ..errors.messages import refused

UInt8 = NDArray[np.uint8]
Float32 = NDArray[np.float32]
LARGEST = 1e30
"""The bound on the data's range, either way."""
MAX_BYTES = 2**28
"""The most bytes of one sheet or enlarged image."""


def is_image(shape: Sequence[int]) -> bool:
    """Whether samples of the shape *S, without the batch, are images."""
    return len(shape) == 3 and shape[0] in (1, 3)


def to_uint8(samples: np.ndarray, low: float = -1.0, high: float = 1.0) -> UInt8:
    """Convert samples [n, C, H, W] in low … high to images [n, H, W, C] of 0 … 255.

    Values are rounded to the nearest; those outside the range are clipped to it.

    Raises:
        RequestError: The samples have another shape, or hold NaN.
    """
    low, high = value_range(low, high)
    samples = _numbers(samples)
    if samples.ndim != 4 or not is_image(samples.shape[1:]):
        raise RequestError(f"images need samples [n, 1 or 3, H, W], got shape {samples.shape}.")
    # A cast would silently turn NaN into a random pixel.
    if (broken := np.isnan(samples).any(axis=(1, 2, 3))).any():
        raise RequestError(
            f"images need numbers, got NaN in {broken.sum()} of {len(samples)} samples "
            f"(the first is number {broken.argmax()}). Check the weights and the arrays you "
            f"passed in."
        )
    with enough_memory(f"an image of each of {len(samples)} samples", "Convert fewer at a time."):
        unit = (np.asarray(samples, np.float64) - low) / (high - low)
        pixels = np.round(np.clip(unit, 0.0, 1.0) * 255.0).astype(np.uint8)
    return pixels.transpose(0, 2, 3, 1)


def from_uint8(pictures: UInt8, low: float = -1.0, high: float = 1.0) -> Float32:
    """Convert images [n, H, W, C] of 0 … 255 to samples [n, C, H, W] in low … high."""
    low, high = value_range(low, high)
    pictures = images_of(pictures)
    unit = pictures.transpose(0, 3, 1, 2).astype(np.float32) / np.float32(255)
    return np.ascontiguousarray(unit * np.float32(high - low) + np.float32(low))


def tile(pictures: UInt8, columns: int | None = None, gap: int = 2) -> UInt8:
    """Place images [n, H, W, C] on one white sheet [H', W', C], row by row.

    Args:
        pictures: At least one.
        columns: Images to a row; None makes the sheet as square as possible.
        gap: Pixels between and around the images.

    Raises:
        RequestError: There is no image, or the sheet would be too large.
    """
    n, H, W, C = images_of(pictures).shape
    if n == 0:
        raise RequestError(
            f"a sheet needs at least 1 image, got none (shape {pictures.shape}). Ask for n=1 or "
            f"more."
        )
    gap = integer("gap", gap, 0, MAX_BYTES)
    columns = columns_of(n, columns)
    sheet = np.full(sheet_shape(n, (H, W, C), columns, gap), 255, np.uint8)
    for i, picture in enumerate(pictures):
        y = gap + i // columns * (H + gap)
        x = gap + i % columns * (W + gap)
        sheet[y : y + H, x : x + W] = picture
    return sheet


def columns_of(n: int, columns: int | None) -> int:
    """Return the number of images to a row of a sheet of n images, see `tile`."""
    if columns is None:
        return math.ceil(math.sqrt(n))
    return integer("columns", columns, 1, MAX_BYTES)


def sheet_shape(
    n: int, picture: tuple[int, int, int], columns: int | None = None, gap: int = 2
) -> tuple[int, int, int]:
    """Return the shape [H', W', C] of the sheet that `tile` makes of n images [H, W, C].

    Raises:
        RequestError: The sheet would be too large.
    """
    H, W, C = picture
    columns = columns_of(n, columns)
    rows = -(-n // columns)
    shape = (rows * (H + gap) + gap, columns * (W + gap) + gap, C)
    check_size("a sheet", *shape)
    return shape


def value_range(low: object, high: object) -> tuple[float, float]:
    """Return the data's range as floats.

    Raises:
        RequestError: `low` is not below `high`, or one of them is beyond `LARGEST`.
    """
    # Well inside float32, so that high - low cannot overflow.
    low = number("low", low, -LARGEST, LARGEST)
    high = number("high", high, -LARGEST, LARGEST)
    if not low < high:
        raise RequestError(f"`low` must be below `high`, got {low:g} and {high:g}.")
    return low, high


def images_of(pictures: object, name: str = "pictures") -> UInt8:
    """Return `pictures` as uint8 [n, H, W, C]. Raises RequestError for anything else."""
    if not isinstance(pictures, np.ndarray) or pictures.dtype != np.uint8 or pictures.ndim != 4:
        raise refused(name, "a uint8 array [n, H, W, C]", pictures)
    return pictures


def check_size(what: str, *sides: int) -> None:
    """Raise RequestError if an image of these sides has more than `MAX_BYTES`."""
    # A mistyped width would otherwise fill the memory before anything is written.
    if math.prod(sides) > MAX_BYTES:
        raise RequestError(
            f"{what} of {'×'.join(map(str, sides))} bytes is too large: at most {MAX_BYTES} bytes. "
            "Ask for fewer images, fewer columns or a smaller width."
        )


def _numbers(samples: object) -> np.ndarray:
    try:
        array = array_of(samples)
        if array.dtype.kind in "buif":
            return array
    except Exception:  # the samples are the caller's class
        pass
    raise refused("samples", "an array of numbers [n, 1 or 3, H, W]", samples)
