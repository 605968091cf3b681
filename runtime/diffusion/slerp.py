"""Interpolation between two noises."""

from __future__ import annotations

import numpy as np

from ..errors import RequestError
from ..errors.arguments import number
from ..errors.messages import refused
from .arrays import Float32


def slerp(a: Float32, b: Float32, t: float) -> Float32:
    """Interpolate between two points on the sphere: (sin((1-t)θ)·a + sin(tθ)·b) / sin θ.

    θ is the angle between a and b. A straight line would leave the sphere on which Gaussian noise
    lies, and the middle would have too little variance.

    Args:
        a: Any shape.
        b: The shape of a.
        t: 0 … 1; 0 is a and 1 is b, bit-exactly.

    Returns:
        float32, of the shape of a.

    Raises:
        RequestError: t is out of range, or a and b are not float arrays of one shape.

    Source: Shoemake, Animating rotation with quaternion curves, 1985.
    """
    t = number("t", t, 0.0, 1.0)
    for name, value in (("a", a), ("b", b)):
        if not isinstance(value, np.ndarray) or value.dtype.kind != "f":
            raise refused(name, "a float array", value)
    if a.shape != b.shape:
        raise RequestError(f"`a` and `b` must have one shape, got {a.shape} and {b.shape}.")
    if t in (0.0, 1.0):
        return (b if t else a).astype(np.float32)
    # The angle, in float64: float32 loses half of its digits near 0 and π.
    x, y = (v.astype(np.float64).ravel() for v in (a, b))
    norms = np.sqrt((x @ x) * (y @ y))
    cos = np.clip(x @ y / norms, -1.0, 1.0) if norms > 0 else 1.0  # zero has no direction
    angle = np.arccos(cos)
    # One direction, or opposite ones, between which no arc is the shortest: a straight line.
    if np.sin(angle) < 1e-6:
        return ((1 - t) * a + t * b).astype(np.float32)
    arc = np.sin((1 - t) * angle) * a.astype(np.float64) + np.sin(t * angle) * b
    return (arc / np.sin(angle)).astype(np.float32)
