"""Sample from any function with any solver: no bundle, no inference library, only numpy.

    python examples/any_callable.py

The function is that of a mixture of two Gaussians, whose best prediction of the noise is known. In
its place may stand an ONNX session, a JAX function or a server. See docs/solvers-anywhere.md.
"""

import os

import numpy as np

from runtime import Stream, make_program, make_schedule, noise, run

STEPS = int(os.environ.get("STEPS", "20"))
MEANS = np.array([[-2.0, 0.0], [2.0, 1.0]])
SPREAD = 0.3
COUNT = 200
schedule = make_schedule("scaled_linear")


def predict_noise(x: np.ndarray, time: np.ndarray) -> np.ndarray:
    """Return eps [B, 2] of x [B, 2] at time [B]."""
    alpha, sigma = (level[:, None] for level in schedule.level(time))
    variance = (alpha * SPREAD) ** 2 + sigma**2
    offsets = x[:, None] - alpha[:, None] * MEANS
    # How likely x came from each Gaussian, and the mean of the noise in either case.
    logits = -(offsets**2).sum(2) / (2 * variance)
    weights = np.exp(logits - logits.max(1, keepdims=True))
    weights /= weights.sum(1, keepdims=True)
    return sigma / variance * (weights[:, :, None] * offsets).sum(1)


for solver in ("ddim", "dpmpp_2m", "unipc", "ddpm"):
    program = make_program(schedule, "epsilon", solver, STEPS)
    start = np.stack([noise(seed, Stream.INITIAL, 0, (2,)) for seed in range(COUNT)])

    def fresh(row: int) -> np.ndarray:
        """Return the noise [B, 2] that a row of the program adds."""
        return np.stack([noise(seed, Stream.STEP, row, (2,)) for seed in range(COUNT)])

    samples = run(program, predict_noise, program.start * start.astype(np.float64), fresh)
    distance = np.sqrt(((samples[:, None] - MEANS) ** 2).sum(2)).min(1)
    right = (samples[:, 0] > 0).mean()
    print(
        f"{solver}: RMS distance to a mean {np.sqrt((distance**2).mean()):.3f}, right {right:.2f}"
    )
