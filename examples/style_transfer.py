"""Style transfer: redraw an image of one class in the style of another, at several strengths.

    python examples/style_transfer.py docs/pictures/face.png

Writes styles.png: in the first row by inversion (translate), in the second by noising (stylize).
Inversion keeps more of the image. docs/translation.md has the measurements.
"""

import os
import sys

import numpy as np

from runtime import Sampler
from runtime.images import read, save, tile

STEPS = int(os.environ.get("STEPS", "30"))
STRENGTHS = (0.2, 0.4, 0.6, 0.8)
SOURCE = "noto/smileys-emotion"
TARGET = "twemoji/smileys-emotion"

sampler = Sampler.load("emoji32")
image = read(sys.argv[1], sampler.bundle.sample_shape, *sampler.bundle.sample_range)

rows = []
for method in ("translate", "stylize"):
    rows.append(image)
    for strength in STRENGTHS:
        if method == "translate":
            # Walk up to noise as SOURCE, and back down as TARGET.
            made = sampler.translate(image, SOURCE, TARGET, strength=strength, steps=STEPS)
        else:
            # Add noise up to a level, and denoise as TARGET.
            made = sampler.stylize(image, strength, label=TARGET, steps=STEPS)
        rows.append(made)
        change = np.sqrt(np.mean((made - image) ** 2))
        print(f"{method} {strength:.1f}: RMS change {change:.2f}")

save("styles.png", tile(sampler.to_uint8(np.concatenate(rows)), 1 + len(STRENGTHS)), least=512)
