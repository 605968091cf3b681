"""Noise: an independent implementation of the published generator, and the statistics of its
output."""

import math

import numpy as np
import pytest

from runtime import RequestError, Stream, noise
from runtime.diffusion.noise import CHUNK, MAX_SEED, _cos_sin_turn, _log, noises

M = 2**64 - 1


def philox(key: tuple[int, int], counter: list[int]) -> list[int]:
    """Philox4x64-10 (Salmon et al. 2011, section 4.2) in Python's integers."""
    k0, k1 = key
    c = list(counter)
    for _ in range(10):
        p0, p1 = 0xD2E7470EE14C6C93 * c[0], 0xCA5A826395121157 * c[2]
        c = [(p1 >> 64) ^ c[1] ^ k0, p1 & M, (p0 >> 64) ^ c[3] ^ k1, p0 & M]
        k0, k1 = (k0 + 0x9E3779B97F4A7C15) & M, (k1 + 0xBB67AE8584CAA73B) & M
    return c


def reference(seed: int, stream: int, step: int, count: int) -> list[float]:
    """The definition in docs/noise.md with the mathematical library's functions."""
    return [
        element
        for block in range(-(-count // 4))
        for element in reference_block(seed, stream, step, block)
    ][:count]


def reference_block(seed: int, stream: int, step: int, block: int) -> list[float]:
    """Elements 4·block … 4·block + 3."""
    found: list[float] = []
    w = philox((seed, stream), [block + 1, step, 0, 0])
    for u, v in ((w[0], w[1]), (w[2], w[3])):
        radius = math.sqrt(-2 * math.log(((u >> 12) + 0.5) / 2**52))
        angle = 2 * math.pi * (((v >> 12) + 0.5) / 2**52) - math.pi
        found += [radius * math.cos(angle), radius * math.sin(angle)]
    return found


@pytest.mark.parametrize(
    ("seed", "stream", "step"),
    [
        (0, Stream.INITIAL, 0),
        (7, Stream.STEP, 999),
        (MAX_SEED, Stream.ENCODE, 3),
        (2**63, Stream.STEP, 1),
    ],
)
def test_it_is_what_the_definition_says(seed: int, stream: Stream, step: int) -> None:
    found, expected = (
        noise(seed, stream, step, (5, 41)).reshape(-1),
        np.float32(reference(seed, stream, step, 205)),
    )
    # Two float64 evaluations that differ by a few ulp round to the same float32, except for rare
    # ties: at most one float32 ulp.
    np.testing.assert_array_max_ulp(found, expected, maxulp=1)
    assert (found == expected).mean() > 0.99


def test_logarithm_cosine_and_sine_are_those_of_the_mathematical_library() -> None:
    """A polynomial one term short is off by 2e-14 in ln and 4e-14 or more in cos and sin: too
    little to show in most float32 elements."""
    unit = np.r_[
        (np.arange(20_000) + 0.5) / 20_000,
        2.0 ** -np.arange(1.0, 54),
        0.75,
        np.nextafter(0.75, 0),
        1 - 2.0**-53,
    ]
    # A few roundings of 1e-16, relative also near p = 1, where ln p vanishes.
    np.testing.assert_allclose(_log(unit), [math.log(p) for p in unit], rtol=2e-15, atol=0)
    cos, sin = _cos_sin_turn(unit)
    # Doubling twice multiplies the rounding of the quarter angle's cosine; the angle itself, up to
    # π, is rounded to 4e-16 on both sides.
    angles = [2 * math.pi * u - math.pi for u in unit]
    np.testing.assert_allclose(cos, [math.cos(a) for a in angles], rtol=0, atol=1e-14)
    np.testing.assert_allclose(sin, [math.sin(a) for a in angles], rtol=0, atol=2e-15)


VECTORS = {
    (0, Stream.INITIAL, 0): [
        "-0x1.44ad640000000p-3",
        "-0x1.7dcefe0000000p+1",
        "0x1.ecfa260000000p+0",
        "0x1.a65ca40000000p-1",
    ],
    (1, Stream.STEP, 5): [
        "0x1.7a79920000000p-1",
        "0x1.4ed7e80000000p+0",
        "-0x1.025fa60000000p+0",
        "0x1.d3a0f00000000p-1",
    ],
    (MAX_SEED, Stream.ENCODE, 0): [
        "0x1.77ad860000000p-1",
        "0x1.fbe8fc0000000p-1",
        "0x1.f93cde0000000p-1",
        "-0x1.376d3a0000000p+0",
    ],
}


@pytest.mark.parametrize("key", VECTORS)
def test_the_published_vectors(key: tuple[int, Stream, int], root) -> None:
    found = [float(v).hex() for v in noise(*key, (4,))]
    assert found == VECTORS[key]
    page = (root / "docs" / "noise.md").read_text()
    assert all(v in page for v in found)


def test_an_element_does_not_depend_on_how_many_are_drawn_or_in_what_shape() -> None:
    long = noise(3, Stream.STEP, 4, (5 * CHUNK,))
    for count in (0, 1, 2, 7, 1999, 2 * CHUNK - 1, 2 * CHUNK + 1, 4 * CHUNK):
        np.testing.assert_array_equal(noise(3, Stream.STEP, 4, (count,)), long[:count])
    np.testing.assert_array_equal(noise(3, Stream.STEP, 4, (CHUNK, 1, 5)).reshape(-1), long)
    tail = [
        element
        for block in (CHUNK // 2 - 1, CHUNK // 2)
        for element in reference_block(3, Stream.STEP, 4, block)
    ]
    np.testing.assert_array_max_ulp(
        long[2 * CHUNK - 4 : 2 * CHUNK + 4], np.float32(tail), maxulp=1
    )  # across a chunk's end


def test_seeds_streams_and_steps_give_unlike_draws() -> None:
    keys = [(0, s, k) for s in Stream for k in (0, 1)] + [
        (1, Stream.INITIAL, 0),
        (2**64 - 1, Stream.INITIAL, 0),
    ]
    draws = np.stack([noise(*key, (4096,)) for key in keys])
    correlation = np.corrcoef(draws) - np.eye(len(keys))
    assert np.abs(correlation).max() < 5 / 4096**0.5  # five standard errors


def test_it_is_standard_normal() -> None:
    n = 400_000
    z = noise(12, Stream.INITIAL, 0, (n,)).astype(np.float64)
    for power, moment, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        assert (
            abs((z**power).mean() - moment) < 5 * (variance / n) ** 0.5
        )  # five standard errors of the mean of z^power
    pairs = z.reshape(-1, 2)
    assert abs((pairs[:, 0] * pairs[:, 1]).mean()) < 5 / (n / 2) ** 0.5
    assert abs(((pairs[:, 0] ** 2 - 1) * (pairs[:, 1] ** 2 - 1)).mean()) < 5 * 2 / (n / 2) ** 0.5
    ordered = np.sort(z)
    normal = 0.5 * (1 + np.vectorize(math.erf)(ordered / 2**0.5))
    assert (
        np.abs(normal - (np.arange(n) + 0.5) / n).max() < 1.95 / n**0.5
    )  # Kolmogorov-Smirnov at 0.1 %


@pytest.mark.parametrize("seed", [-1, 2**64, 1.0, True, "1", None])
def test_what_is_no_seed_is_refused(seed: object) -> None:
    with pytest.raises(RequestError, match="`seed` must be"):
        noise(seed, Stream.INITIAL, 0, (1,))  # type: ignore[arg-type]


@pytest.mark.parametrize("shape", [(3,), (3, 37, 41)])
def test_many_seeds_at_once_are_each_one_alone(shape: tuple[int, ...]) -> None:
    """4551 elements: no whole chunk, and a last pair of which one is dropped."""
    seeds = [5, MAX_SEED, 0, 5]
    together = noises(seeds, Stream.STEP, 4, shape)
    assert together.shape == (4, *shape)
    for seed, found in zip(seeds, together, strict=True):
        np.testing.assert_array_equal(found, noise(seed, Stream.STEP, 4, shape))
