"""Editing by inversion: the noise that images come from, and what else comes from it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, Unpack

import numpy as np
from numpy.typing import NDArray

from ..backends.base import Float32
from ..bundle.bundle import Bundle
from ..diffusion.noise import MAX_SEED
from ..diffusion.slerp import slerp
from ..diffusion.tuned import TUNED
from ..engine.expand import MAX_SAMPLES, expand
from ..engine.job import begin
from ..engine.loop import Result, StepCallback
from ..engine.request import Planner, Request
from ..errors import RequestError
from ..errors.arguments import integer, number
from ..errors.messages import unwrapped
from ..images import ImageSource, ImageSources, read

# For type checkers alone: making the TypedDicts would slow `import runtime`.
if TYPE_CHECKING:
    from ..engine.keywords import Labels, Scales, TranslateKeywords, WalkKeywords

INVERTING: Mapping[str, object] = {"solver": "dpmpp_2m", "grid": "log_snr", "guidance": 1.0}
"""How images are inverted by default. A solver of second order returns more nearly than DDIM."""


class Inversion(NamedTuple):
    """The noise that images come from.

    Attributes:
        noise: [n, *S], an x_T for `sample(start=...)`.
        back: [n, *S], the samples that this noise gives.
        error: [n], the RMS difference between `back` and the images.
    """

    noise: Float32
    back: Float32
    error: NDArray[np.float64]


class Inverting(ABC):
    """The methods of `Sampler` that invert images, and what all editing methods share.

    Images may be paths, Pillow images, uint8 arrays or float samples, see `runtime.images.read`;
    one, or a sequence.
    """

    bundle: Bundle
    _planner: Planner

    @abstractmethod
    def run(self, requests: Iterable[Request], on_step: StepCallback | None = None) -> Result:
        """Run requests, see `Sampler.run`; samples are [n, *S]."""

    def invert(
        self, pictures: ImageSources, *, convert: bool = False, **how: Unpack[WalkKeywords]
    ) -> Inversion:
        """Find the noise that images come from, by running the sampler upwards.

        `sample(n, start=noise, …)` with the same `how` returns to the images. Pass solver, grid and
        guidance too: here their defaults are "dpmpp_2m", "log_snr" and 1, and not the bundle's.

        Args:
            pictures: n images.
            convert: Fit images to the bundle's size and mode, see `runtime.images.read`.
            how: Arguments of `sample`. The solver must be deterministic; higher orders return more
                nearly. With `strength`, the noise is an x [n, *S] at the level where that share of
                the grid begins. The share must hold a level above the least noisy one.

        Raises:
            RequestError: An argument cannot be used.

        Source: Song et al., Denoising diffusion implicit models, 2021, section 4.3.
        """
        x = self._read(pictures, convert)
        settings = {**inverting(self.bundle, how), **how, "convert": convert}
        noise = self._climb(x, settings)
        # The way back shows how much of the images the noise holds.
        back = self._sample(len(x), with_own(settings, start=noise))
        difference = (back.astype(np.float64) - x).reshape(len(x), -1)
        return Inversion(noise, back, np.sqrt((difference**2).mean(1)))

    def translate(
        self,
        pictures: ImageSources,
        source: Labels,
        target: Labels,
        *,
        strength: float = 0.4,
        guidance: Scales = None,
        convert: bool = False,
        **how: Unpack[TranslateKeywords],
    ) -> Float32:
        """Invert images under one label and sample them back under another.

        The defaults of `strength` and `guidance` were measured, see docs/translation.md.

        Args:
            pictures: n images.
            source: The label that the images have, one or n.
            target: The label that they get, one or n.
            strength: Up to 1, how far up the grid; 1 is pure noise. A larger share gives more of
                the target and keeps less of the image. It must hold 2 steps of the default grid.
            guidance: Of the way back. None is 3, or 1 if the bundle cannot be guided.
            convert: See `invert`.
            how: See `invert`.

        Returns:
            float32 [n, *S].

        Raises:
            RequestError: An argument cannot be used.

        Source: Su et al., Dual diffusion implicit bridges, 2023.
        """
        x = self._read(pictures, convert)
        defaults = {**inverting(self.bundle, how), "strength": strength}
        settings = {**defaults, **how, "convert": convert}
        if guidance is None:
            guidance = 3.0 if self.bundle.can_guide else 1.0
        noise = self._climb(x, with_own(settings, label=source))
        back = {**with_own(settings, label=target, start=noise), "guidance": guidance}
        return self._sample(len(x), back)

    def interpolate(
        self,
        first: int | ImageSource,
        second: int | ImageSource,
        n: int = 8,
        *,
        convert: bool = False,
        **how: Unpack[WalkKeywords],
    ) -> Float32:
        """Sample n steps from `first` to `second`, both ends included.

        The noise of the two ends is interpolated on the sphere. A solver that adds noise draws that
        of the seed `first` for all samples, so only this end is its seed's own sample.

        Args:
            first: A seed, or an image, which is inverted.
            second: A seed or an image.
            n: 2 … 1,000,000.
            convert: See `invert`.
            how: See `invert`; conditions are the same for all samples.

        Returns:
            float32 [n, *S].

        Raises:
            RequestError: An argument cannot be used.

        Source: Song et al., Denoising diffusion implicit models, 2021, equation 67.
        """
        n = integer("n", n, 2, MAX_SAMPLES)
        settings = {**inverting(self.bundle, how), **how, "convert": convert}
        a = self._noise_of(first, convert, settings)
        b = self._noise_of(second, convert, settings)
        starts = [slerp(a, b, t) for t in np.linspace(0.0, 1.0, n)]
        # Samples whose steps draw different noise would be unrelated to their neighbours. No step
        # draws noise if `first` is an image, because a solver that does cannot invert it.
        seed = unwrapped(first)
        seeds = [seed if isinstance(seed, int) else 0] * n
        return self._sample(n, with_own(settings, start=np.stack(starts)), seeds)

    def variations(
        self,
        picture: ImageSource,
        n: int = 8,
        amount: float = 0.3,
        seed: int = 0,
        *,
        convert: bool = False,
        **how: Unpack[WalkKeywords],
    ) -> Float32:
        """Sample n variations of an image, by turning its noise toward other noise.

        Args:
            picture: One image, which is inverted.
            n: 1 … 1,000,000.
            amount: 0 … 1. 0 is the image, up to the error of inversion; 1 is the samples of the
                seeds.
            seed: Variation i turns toward the noise of seed + i.
            convert: See `invert`.
            how: See `invert`.

        Returns:
            float32 [n, *S].

        Raises:
            RequestError: An argument cannot be used.
        """
        n = integer("n", n, 1, MAX_SAMPLES)
        amount = number("amount", amount, 0.0, 1.0)
        seed = integer("seed", seed, 0, MAX_SEED - n + 1)
        settings = {**inverting(self.bundle, how), **how, "convert": convert}
        own = self._noise_of(self._read(picture, convert), convert, settings)
        # Along the arc the noise keeps its variance, which the network expects.
        starts = [slerp(own, self._noise_of(seed + i, convert, settings), amount) for i in range(n)]
        return self._sample(n, with_own(settings, start=np.stack(starts)), seed)

    def _read(self, pictures: ImageSources, convert: bool) -> Float32:
        return read(pictures, self.bundle.sample_shape, *self.bundle.sample_range, convert=convert)

    def _climb(self, x: Float32, settings: Mapping[str, object]) -> Float32:
        """Run samples [n, *S] upwards from the least noisy knot."""
        # Taken as the mean of q(x_t|x_0) there: the noise of that knot is too little to see.
        start = x * self.bundle.schedule.alpha[0].astype(np.float32)
        return self._sample(len(x), with_own(settings, start=start, up=True))

    def _noise_of(
        self, end: int | ImageSource, convert: bool, settings: Mapping[str, object]
    ) -> Float32:
        """Return x_T [*S] of a seed, or of one image."""
        given = unwrapped(end)
        if isinstance(given, int):
            if settings.get("strength", 1.0) != 1:
                raise RequestError(
                    "`strength` is for images: the noise of a seed is at the top of the grid. "
                    "Leave it out."
                )
            # Other noise needs no steps, and its seed is given here.
            own = {name: v for name, v in settings.items() if name not in ("on_step", "seed")}
            request = expand(self.bundle, 1, given, own)[0]
            return begin(self._planner.job(request), self.bundle.sample_shape)
        x = self._read(given, convert)
        if len(x) != 1:
            raise RequestError(f"one image is needed here, got {len(x)}. Pass one.")
        return self._climb(x, settings)[0]

    def _sample(
        self, n: int, settings: Mapping[str, object], seed: int | Sequence[int] = 0
    ) -> Float32:
        """Return n samples [n, *S] of settings that may hold `on_step` and `seed` too."""
        given: dict[str, Any] = dict(settings)
        on_step = given.pop("on_step", None)
        seed = given.pop("seed", seed)
        return self.run(expand(self.bundle, n, seed, given), on_step).samples


def inverting(bundle: Bundle, how: Mapping[str, object] | None = None) -> Mapping[str, object]:
    """Return how samples are inverted and made again from their noise, unless the caller says so.

    A network that was distilled has levels of its own, and makes samples from noise alone. A tuned
    solver has levels of its own, too.

    Args:
        how: What the caller says.
    """
    if bundle.distilled:
        return {}
    solver = {**INVERTING, **(how or {})}["solver"]
    solver = bundle.defaults.solver if solver is None else solver
    if isinstance(solver, str) and solver == TUNED:
        return {name: value for name, value in INVERTING.items() if name != "grid"}
    return INVERTING


def with_own(settings: Mapping[str, object], **own: object) -> dict[str, object]:
    """Return the caller's settings with a method's own.

    Raises RequestError if a name is in both, because one of the values would be ignored.
    """
    if twice := sorted(settings.keys() & {"n", *own}):
        raise RequestError(f"`{twice[0]}` is set by this method. Leave it out.")
    return {**settings, **own}
