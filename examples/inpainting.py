"""Inpainting: keep the part of an image that a mask marks, and sample the rest, several times.

    python examples/inpainting.py docs/pictures/face.png docs/pictures/mask.png

Writes inpainted.png: the image, and four ways to fill it in. White in the mask is kept.
"""

import os
import sys

import numpy as np

from runtime import Sampler
from runtime.images import read, save, tile

STEPS = int(os.environ.get("STEPS", "25"))

path, mask = sys.argv[1:]
sampler = Sampler.load("emoji32")
shape = sampler.bundle.sample_shape
image = read(path, shape, *sampler.bundle.sample_range)

# RePaint goes back and forth, so that the new part agrees with the old one.
filled = sampler.inpaint(
    np.repeat(image, 4, 0), mask, seed=0, label="noto/smileys-emotion", steps=STEPS
)

known = read(mask, (1, *shape[1:]), 0.0, 1.0) == 1
assert (np.where(known, filled, 0) == np.where(known, image, 0)).all()  # bit-exact
save("inpainted.png", tile(sampler.to_uint8(np.concatenate([image, filled])), 5), least=512)
