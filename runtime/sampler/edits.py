"""Editing: images into images, as requests for the sampler."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Unpack

from ..backends.base import Float32
from ..images import ImageSource, ImageSources
from ..images.mask import read_mask
from .inversion import Inverting, with_own

# For type checkers alone: making the TypedDicts would slow `import runtime`.
if TYPE_CHECKING:
    from ..engine.keywords import EditKeywords

PAINTING: Mapping[str, object] = {"solver": "repaint"}
"""How images are inpainted by default."""


class Editing(Inverting):
    """The editing methods of `Sampler`. Each makes requests and runs them as one batch.

    Images may be paths, Pillow images, uint8 arrays or float samples, see `runtime.images.read`;
    one, or a sequence. Image i has seed + i.
    """

    def stylize(
        self,
        pictures: ImageSources,
        strength: float = 0.5,
        seed: int = 0,
        *,
        convert: bool = False,
        **how: Unpack[EditKeywords],
    ) -> Float32:
        """Noise images to an intermediate level and denoise them again.

        Args:
            pictures: n images.
            strength: 0 … 1, the share of the grid that is walked. 0 is one step; 1 forgets the
                images.
            seed: Image i is noised with seed + i.
            convert: Fit images, those of conditions too, see `runtime.images.read`.
            how: The label, conditions and other arguments of `sample`.

        Returns:
            float32 [n, *S].

        Raises:
            RequestError: An argument cannot be used.

        Source: Meng et al., SDEdit, 2022.
        """
        x = self._read(pictures, convert)
        return self._sample(
            len(x), with_own(how, picture=x, strength=strength, convert=convert), seed
        )

    def inpaint(
        self,
        pictures: ImageSources,
        mask: ImageSource,
        seed: int = 0,
        *,
        convert: bool = False,
        **how: Unpack[EditKeywords],
    ) -> Float32:
        """Paint images where `mask` is 0; where it is 1 they are returned bit-exact.

        Args:
            pictures: n images.
            mask: A path or a Pillow image (white is 1), or an array of bool or 0 … 1 that
                broadcasts to [n, *S]. Values between 0 and 1 mix the two.
            seed: Image i has seed + i.
            convert: See `stylize`.
            how: Arguments of `sample`. The default solver "repaint", with its options `jump` and
                `resample`, goes back and forth so that the parts agree.

        Returns:
            float32 [n, *S].

        Raises:
            RequestError: An argument cannot be used.
        """
        x = self._read(pictures, convert)
        kept = read_mask(mask, len(x), self.bundle.sample_shape, convert)
        own = with_own({**PAINTING, **how}, known=x, mask=kept, convert=convert)
        return self._sample(len(x), own, seed)
