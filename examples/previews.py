"""Watch samples appear: a callback gets the denoised estimate after every step.

    python examples/previews.py

Writes previews.gif. The callback stops the run when the image has settled.
"""

import os

import numpy as np

from runtime import Cancelled, Preview, Sampler
from runtime.images import save_animation, tile

STEPS = int(os.environ.get("STEPS", "50"))
SETTLED = 0.01  # RMS change of the estimate between two steps, in samples of -1 … 1

sampler = Sampler.load("emoji32")
frames: list[np.ndarray] = []


def watch(preview: Preview) -> bool:
    """Keep the estimate; False stops the sampler, which raises Cancelled."""
    frames.append(preview.denoised)
    if len(frames) < 2:
        return True
    change = np.sqrt(np.mean((frames[-1] - frames[-2]) ** 2))
    print(f"step {preview.step} of {preview.steps}: changed by {change:.3f}")
    return bool(change > SETTLED)


try:
    sampler.sample(4, seed=1, label="noto/food-drink", steps=STEPS, on_step=watch)
except Cancelled:
    print("settled, so the rest was skipped")

sheets = [tile(image, columns=2) for image in sampler.to_uint8(np.stack(frames))]
save_animation("previews.gif", np.stack(sheets), least=256)
