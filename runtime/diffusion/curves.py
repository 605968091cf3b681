"""A schedule between its knots: formulas of continuous schedules, interpolation for the others."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from .arrays import Float64


class Curve(NamedTuple):
    """A schedule as functions of real numbers: time → (alpha, sigma), and log-SNR → time.

    Both take and return arrays of any shape.
    """

    level: Callable[[Float64], tuple[Float64, Float64]]
    time: Callable[[Float64], Float64]


def log_snr_of(alpha: ArrayLike, sigma: ArrayLike) -> Float64:
    """Compute log(alpha² / sigma²) elementwise, for arrays of any one shape.

    It is +inf at the clean end (1, 0), and -inf if alpha is 0.
    """
    with np.errstate(divide="ignore"):
        return np.asarray(2.0 * (np.log(alpha) - np.log(sigma)))


def variance_preserving(log_snr: ArrayLike) -> tuple[Float64, Float64]:
    """Compute (alpha, sigma) on the unit circle from log-SNR, each of the shape of `log_snr`.

    Both are exact to rounding at both ends.
    """
    # alpha² = sigmoid(log-SNR) and sigma² = sigmoid(-log-SNR). logaddexp keeps the digits of the
    # smaller one, which 1 - sigmoid would cancel.
    half = 0.5 * np.asarray(log_snr, np.float64)
    alpha = np.exp(-0.5 * np.logaddexp(0.0, -2.0 * half))
    sigma = np.exp(-0.5 * np.logaddexp(0.0, 2.0 * half))
    return alpha, sigma


def interpolated(time: Float64, log_snr: Float64) -> Curve:
    """Interpolate a variance-preserving schedule: log-SNR is linear in time between knots.

    In a last interval that ends at log-SNR -inf, alpha/sigma is linear in time instead.

    Args:
        time: [T], strictly rising.
        log_snr: [T], strictly falling; -inf at the last knot only.
    """
    if np.isfinite(log_snr[-1]):

        def log_snr_at(t: Float64) -> Float64:
            return np.interp(t, time, log_snr)

        def time_at(lam: Float64) -> Float64:
            # np.interp needs rising abscissae; log-SNR falls, so its negative rises.
            return np.interp(-lam, -log_snr, time)

        return Curve(lambda t: variance_preserving(log_snr_at(t)), time_at)
    return _ending_in_pure_noise(time, log_snr)


def _ending_in_pure_noise(time: Float64, log_snr: Float64) -> Curve:
    """`interpolated` for a schedule whose last log-SNR is -inf."""
    if len(time) == 1:
        # One knot of pure noise, and nothing else.
        noise = variance_preserving(log_snr)
        return Curve(
            lambda t: (np.full_like(t, noise[0][0]), np.full_like(t, noise[1][0])),
            lambda lam: np.full_like(lam, time[0]),
        )
    inner = time[:-1]
    finite = log_snr[:-1]
    # No line in log-SNR reaches -inf. alpha/sigma falls to 0 at the last knot, so it has a line.
    ratio = math.exp(0.5 * log_snr[-2])
    start = time[-2]
    width = time[-1] - time[-2]

    def log_snr_at(t: Float64) -> Float64:
        with np.errstate(divide="ignore"):
            tail = 2.0 * np.log(ratio * np.clip((time[-1] - t) / width, 0.0, 1.0))
        return np.where(t <= start, np.interp(t, inner, finite), tail)

    def time_at(lam: Float64) -> Float64:
        # np.where evaluates both branches: the minimum keeps the unused one from overflowing.
        tail = time[-1] - width * np.exp(0.5 * np.minimum(lam, finite[-1])) / ratio
        return np.where(lam >= finite[-1], np.interp(-lam, -finite, inner), tail)

    return Curve(lambda t: variance_preserving(log_snr_at(t)), time_at)


def sigmoid(T: int, start: float, end: float, tau: float, clip_min: float) -> Curve:
    """The curve of the schedule `sigmoid`, whose formula is in `formulas.sigmoid`."""

    def S(v: ArrayLike) -> Float64:
        return 1.0 / (1.0 + np.exp(-np.asarray(v) / tau))

    low = S(start)
    high = S(end)

    def level(time: Float64) -> tuple[Float64, Float64]:
        # Knot i is at t = (i+1)/T: the clean end t = 0 is not a knot.
        alpha_bar = np.maximum(
            (high - S(start + (time + 1) / T * (end - start))) / (high - low), clip_min
        )
        return np.sqrt(alpha_bar), np.sqrt(1.0 - alpha_bar)

    def time_at(log_snr: Float64) -> Float64:
        # The formula solved for t: S(v) = high - ᾱ·(high - low), and v = tau·logit(S(v)).
        v = high - variance_preserving(log_snr)[0] ** 2 * (high - low)
        return (tau * np.log(v / (1.0 - v)) - start) / (end - start) * T - 1

    return Curve(level, time_at)


def flow(T: int, time_scale: float) -> Curve:
    """The curve of the schedule `flow`: alpha = 1 - t, sigma = t, time = time_scale·t."""
    return Curve(
        lambda time: (1.0 - time / time_scale, time / time_scale),
        # alpha/sigma = 1/t - 1 = e^(log-SNR / 2), solved for t.
        lambda log_snr: time_scale / (1.0 + np.exp(0.5 * log_snr)),
    )


def edm(**_: float) -> Curve:
    """The curve of the schedule `edm`: alpha = 1, time = ln(sigma)/4, for any knots."""
    return Curve(
        lambda time: (np.ones_like(time), np.exp(4.0 * time)),
        # log-SNR = -2·ln(sigma) = -8·time.
        lambda log_snr: -log_snr / 8.0,
    )


CURVES: Mapping[str, Callable[..., Curve]] = {"sigmoid": sigmoid, "flow": flow, "edm": edm}
"""The continuous schedules, as functions of their parameters."""
