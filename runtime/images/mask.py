"""Masks of inpainting, of any source, as arrays."""

from __future__ import annotations

import numpy as np

from ..errors import RequestError
from ..errors.messages import refused
from .arrays import Float32
from .read import ImageSource, read


def read_mask(mask: ImageSource, n: int, shape: tuple[int, ...], convert: bool = False) -> Float32:
    """Read a mask for n samples of a shape *S.

    Args:
        mask: A path or a Pillow image (white is 1), uint8 pixels, or an array of bool or 0 … 1
            that broadcasts to [n, *S].
        n: The number of samples.
        shape: *S, the shape of one sample.
        convert: See `read`.

    Returns:
        [n, *S], 0 … 1.

    Raises:
        RequestError: It is not a mask, is out of range, or has another shape.
    """
    if not isinstance(mask, np.ndarray):
        mask = read(mask, (1, *shape[1:]), 0.0, 1.0, convert, "mask")
    elif mask.dtype.kind not in "buif":
        raise refused("mask", "an array of bool or numbers", mask)
    # What overflows becomes infinite, and is refused below.
    with np.errstate(over="ignore"):
        values = np.asarray(mask, np.float32)
    # uint8 may be 0 and 1 as well as 0 and 255.
    if mask.dtype == np.uint8 and values.max(initial=0) > 1:
        values = values / np.float32(255)
    try:
        values = np.broadcast_to(values, (n, *shape))
    except ValueError:
        raise RequestError(
            f"mask has shape {mask.shape}, which does not broadcast to {(n, *shape)}. Pass [H, W] "
            f"or [n, 1, H, W]."
        ) from None
    if not ((values >= 0) & (values <= 1)).all():
        raise RequestError(
            f"`mask` must lie in 0 … 1 (1: kept), got {values.min():g} … {values.max():g}."
        )
    return values
