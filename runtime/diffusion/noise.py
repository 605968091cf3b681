"""Noise as a pure function of (seed, stream, step, element): the same float32 bits on every
machine.

Random words: Philox4x64-10 (Salmon et al. 2011) with key (seed, stream) and counter (b + 1, step,
0, 0) for block b = 0, 1, …. Each block gives four 64-bit words. Elements 2j and 2j+1, in C order,
take words u = w[2j] and v = w[2j+1]:

    radius = √(-2 ln p),  p = (⌊u / 2¹²⌋ + ½) / 2⁵²,  angle = 2π (⌊v / 2¹²⌋ + ½) / 2⁵² - π
    element 2j = radius · cos(angle),  element 2j+1 = radius · sin(angle)    (Box & Muller 1958)

in float64, rounded to float32. ln, cos and sin are written here in +, -, ·, / and √, which IEEE 754
rounds the same way everywhere; the mathematical libraries of different machines do not.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import IntEnum
from math import factorial, pi, prod

import numpy as np
from numpy.typing import NDArray

from ..errors.arguments import enough_memory, integer, size_of

MAX_SEED = 2**64 - 1
CHUNK = 4096
"""Pairs at a time, so that what is between words and noise stays in the processor's cache."""


class Stream(IntEnum):
    """What a draw is for. Different streams of one seed are independent."""

    INITIAL = 0  # x_T
    STEP = 1  # the noise that a row of the program adds
    ENCODE = 2  # q(x_t | x_0) of an image that is passed in


def noise(seed: int, stream: Stream, step: int, shape: tuple[int, ...]) -> NDArray[np.float32]:
    """Draw standard normal noise of `shape` for one sample, float32.

    Element i does not depend on how many elements are drawn.

    Args:
        seed: 0 … 2⁶⁴-1.
        step: 0 … 2⁶⁴-1, the sample's own row.

    Raises:
        RequestError: An argument is out of range, or the noise does not fit in memory.
    """
    size = size_of("shape", shape)
    which = integer("stream", stream, 0, MAX_SEED, "Pass one of Stream.")
    with enough_memory(f"noise of shape {size}", "Ask for a smaller shape."):
        return noises([seed], which, step, size)[0]


def noises(
    seeds: Sequence[int], stream: int, step: int, shape: tuple[int, ...]
) -> NDArray[np.float32]:
    """Draw `noise` for each of n seeds, [n, *shape], for less than n calls would cost."""
    # Two words make two elements. An odd count drops the last element.
    count = prod(shape)
    pairs = (count + 1) // 2
    counter = np.array([0, integer("step", step, 0, MAX_SEED), 0, 0], np.uint64)
    words = np.empty((len(seeds), 2 * pairs), np.uint64)
    for row, seed in zip(words, seeds, strict=True):
        key = np.array([integer("seed", seed, 0, MAX_SEED), stream], np.uint64)
        # numpy increments the counter before the first block, hence b + 1 in the definition above.
        row[:] = np.random.Philox(key=key, counter=counter).random_raw(2 * pairs)
    # Pairs never cross samples, so all samples' pairs are one list, worked off in chunks.
    normal = np.empty((len(seeds), 2 * pairs), np.float32)
    flat_words = words.reshape(-1, 2)
    flat = normal.reshape(-1, 2)
    for first in range(0, len(flat), CHUNK):
        part = slice(first, first + CHUNK)
        _box_muller(flat_words[part], flat[part])
    return normal[:, :count].reshape(len(seeds), *shape)


def _box_muller(words: NDArray[np.uint64], normal: NDArray[np.float32]) -> None:
    """Fill normal [n, 2] from words [n, 2]."""
    # 52 bits and a half lie strictly inside (0, 1) and are exact in float64: the logarithm is
    # finite. Everything is in place, because allocation would cost as much as the arithmetic.
    unit = (words >> np.uint64(12)).T.astype(np.float64, order="C")
    unit += 0.5
    unit *= 2.0**-52
    radius = _log(unit[0])
    radius *= -2.0
    np.sqrt(radius, out=radius)
    cos, sin = _cos_sin_turn(unit[1])
    np.multiply(radius, cos, out=normal[:, 0], casting="same_kind")
    np.multiply(radius, sin, out=normal[:, 1], casting="same_kind")


def _polynomial(x: NDArray[np.float64], coefficients: tuple[float, ...]) -> NDArray[np.float64]:
    """Horner's rule, highest power first, in place."""
    y = x * coefficients[0]
    y += coefficients[1]
    for c in coefficients[2:]:
        y *= x
        y += c
    return y


_LN2 = 0.6931471805599453
_ATANH = tuple(1.0 / (2 * k + 1) for k in range(9, -1, -1))
_COS = tuple((-1.0) ** k / factorial(2 * k) for k in range(7, -1, -1))
_SIN = tuple((-1.0) ** k / factorial(2 * k + 1) for k in range(7, -1, -1))


_MANTISSA_BITS = 52
_LOWEST = np.float64(0.75).view(np.int64)


def _log(p: NDArray[np.float64]) -> NDArray[np.float64]:
    """ln p = e·ln 2 + 2 atanh((m-1)/(m+1)), elementwise, for p = m·2^e with m in [¾, 3/2).

    e and m are read from the bits.
    """
    # Counted from the bits of 0.75, so that the mantissa falls into [¾, 3/2) and not [1, 2).
    bits = p.view(np.int64)
    exponent = bits - _LOWEST
    exponent >>= _MANTISSA_BITS
    mantissa = (bits - (exponent << _MANTISSA_BITS)).view(np.float64)
    # ln m = 2·atanh(s), s = (m - 1)/(m + 1) within ±0.2, by its odd Taylor polynomial.
    s: NDArray[np.float64] = mantissa - 1.0
    mantissa += 1.0
    s /= mantissa
    tail = _polynomial(s * s, _ATANH)
    s *= 2.0
    s *= tail
    s += exponent * _LN2
    return s


def _cos_sin_turn(unit: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """cos and sin of 2π·unit - π: Taylor's polynomials of a quarter of the angle, doubled twice."""
    quarter = unit - 0.5
    quarter *= 0.5 * pi
    square = quarter * quarter
    cos = _polynomial(square, _COS)
    sin = _polynomial(square, _SIN)
    sin *= quarter
    twice = square
    # cos 2x = 1 - 2·sin² x and sin 2x = 2·sin x·cos x, in the two arrays that are there.
    for _ in range(2):
        np.multiply(sin, 2.0, out=twice)
        sin *= twice
        np.subtract(1.0, sin, out=sin)  # the next cosine
        cos *= twice
        cos, sin = sin, cos
    return cos, sin
