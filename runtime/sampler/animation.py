"""Animation: the frames of samples on their way from noise, and of images on their way to it."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Unpack

import numpy as np

from ..backends.base import Float32
from ..bundle.bundle import Bundle
from ..diffusion.noise import Stream, noises
from ..engine.expand import ARGUMENTS, MAX_SAMPLES, callback_of, expand, seeds_of
from ..engine.job import begin
from ..engine.loop import Preview, StepCallback
from ..errors import RequestError
from ..errors.arguments import enough_memory, integer
from ..errors.keywords import bind
from ..images import ImageSources
from .edits import Editing

# For type checkers alone: making the TypedDicts would slow `import runtime`.
if TYPE_CHECKING:
    from ..engine.keywords import LabelKeywords


class Animating(Editing):
    """`Sampler.animate`, which watches every step of its requests."""

    def animate(
        self,
        n: int = 1,
        seed: int | Sequence[int] = 0,
        *,
        pictures: ImageSources | None = None,
        convert: bool = False,
        on_step: StepCallback | None = None,
        **how: Unpack[LabelKeywords],
    ) -> Float32:
        """Return the frames of n samples on their way from noise, or of images on their way to it.

        Args:
            n: 1 … 1,000,000; with images their number, or 1.
            seed: Sample i has seed + i; or a sequence of n.
            pictures: Images that are noised step by step with q(x_t|x_{t-1}), which needs no
                network.
            convert: See `stylize`.
            on_step: See `sample`; images, which need no network, do not call it.
            how: Arguments of `sample`; with images only `steps` and `grid`.

        Returns:
            float32 [K + 1, n, *S], for K rows of the program.

        Raises:
            RequestError: An argument cannot be used.
            Cancelled: on_step returned False.
        """
        n = integer("n", n, 1, MAX_SAMPLES)
        on_step = callback_of(on_step)
        if pictures is not None:
            return self._noising(self._read(pictures, convert), n, seed, how)
        requests = expand(self.bundle, n, seed, {**how, "convert": convert})
        jobs = [self._planner.job(request) for request in requests]
        shape = (len(jobs[0].table) + 1, n, *self.bundle.sample_shape)
        with enough_memory(f"an animation of {n} samples", "Take fewer samples or fewer steps."):
            frames = np.empty(shape, np.float32)
        frames[0] = [begin(job, self.bundle.sample_shape) for job in jobs]

        # A preview's arrays are those of one batch, so `samples` says where they belong.
        def keep(preview: Preview) -> object:
            frames[preview.step, preview.samples] = preview.x
            return on_step and on_step(preview)

        self.run(requests, keep)
        return frames

    def _noising(self, x: Float32, n: int, seed: object, how: Mapping[str, object]) -> Float32:
        """Return the frames [K + 1, n, *S] of images on their way to noise."""
        if n not in (1, len(x)):
            raise RequestError(
                f"`n` must be the number of images, {len(x)}, if these are given, got {n}. "
                f"Leave `n` out."
            )
        seeds = seeds_of(seed, len(x))
        with enough_memory("the animation", "Take fewer images or fewer steps."):
            return bind(
                "animate with pictures", _forward_process, (self.bundle, x, seeds), how, ARGUMENTS
            )


def _forward_process(
    bundle: Bundle,
    x: Float32,
    seeds: Sequence[int],
    steps: int | None = None,
    grid: str | Sequence[float] | None = None,
) -> Float32:
    """Return [K + 1, n, *S]: images x [n, *S] noised level by level up a grid of K intervals."""
    knots = bundle.grid(steps, grid)
    levels = np.stack([knots.alpha, knots.sigma], -1)[::-1]
    frames = [x]
    for k, ((alpha, sigma), (next_alpha, next_sigma)) in enumerate(itertools.pairwise(levels)):
        keep = next_alpha / alpha
        # √(σ'² - keep²·σ²), as a product: the difference of squares would cancel.
        add = np.sqrt((next_sigma - keep * sigma) * (next_sigma + keep * sigma))
        z = noises(seeds, Stream.ENCODE, k, x.shape[1:])
        frames.append((keep * frames[-1] + add * z).astype(np.float32))
    return np.stack(frames)
