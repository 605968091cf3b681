"""At which noise levels classifier-free guidance holds."""

from __future__ import annotations

import numpy as np

from ..errors import RequestError
from ..errors.arguments import is_many, many, number
from ..errors.messages import refused
from .arrays import Float64
from .curves import log_snr_of


def guidance_scales(
    guidance: float, interval: tuple[float, float] | None, alpha: Float64, sigma: Float64
) -> Float64:
    """Return the guidance scale of each row, [K]: 1 outside the interval, an unguided row.

    Args:
        interval: (low, high], in sigma/alpha; None for everywhere.
        alpha: [K].
        sigma: [K].

    Raises:
        RequestError: See `interval_of`.
    """
    scale = np.full(len(alpha), guidance)
    if interval is not None:
        low, high = interval_of(interval)
        rho = np.exp(-0.5 * log_snr_of(alpha, sigma))
        # A guidance of 1 makes the row an unguided one, which costs half.
        scale[(rho <= low) | (rho > high)] = 1.0
    return scale


def interval_of(value: object) -> tuple[float, float]:
    """Return the (low, high) of a guidance interval, 0 ≤ low < high ≤ inf.

    Raises RequestError for anything else.
    """
    rule = "two noise levels (low, high) of sigma/alpha"
    if not is_many(value) or len(value) != 2:
        raise refused("guidance_interval", rule, value)
    entries = many("guidance_interval", value, 2)
    low, high = (number("guidance_interval", level, 0.0, np.inf) for level in entries)
    if not low < high:
        raise RequestError(
            f"`guidance_interval` must rise from low to high, got ({low:g}, {high:g})."
        )
    return low, high
