"""Every random stream of the trainer, in one table.

A stream has a purpose and a key. The key is a function of the run's seed and of a counter that says
which draw it is (a step, an epoch, an image). No generator keeps state between steps, so a resumed
run draws the same values as an uninterrupted run. Processes that share a step draw parts of one
whole.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from runtime.diffusion.noise import Stream as NoiseStream

MASK = 2**64 - 1


def mixed(seed: int, purpose: int, counter: int) -> int:
    """Mix three whole numbers into a seed of 64 bits.

    This is the finalizer of splitmix64 (Steele et al. 2014, "Fast splittable pseudorandom number
    generators"), so that neighbouring counters give unrelated generators.
    """
    z = (
        seed * 0x9E3779B97F4A7C15
        + purpose * 0xD1B54A32D192ED03
        + counter * 0x8CB92BA72F3D8DD7
        + 0x9E3779B97F4A7C15
    ) & MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
    return z ^ (z >> 31)


@dataclass(frozen=True)
class TorchStream:
    """A stream that torch's generators draw from."""

    key: Callable[[int, int], int]
    """(the run's seed, counter) → the generator's seed."""

    def generator(
        self, seed: int, counter: int = 0, device: torch.device | None = None
    ) -> torch.Generator:
        """Return a generator of its own, at the start of the stream."""
        return torch.Generator(device or "cpu").manual_seed(self.key(seed, counter))

    def reset(self, generator: torch.Generator, seed: int, counter: int) -> None:
        """Put an existing generator at the start of the stream; making one takes longer."""
        generator.manual_seed(self.key(seed, counter))

    def reset_global(self, seed: int, counter: int = 0) -> None:
        """Put torch's global generator there, which initializers and dropout draw from."""
        torch.manual_seed(self.key(seed, counter))


@dataclass(frozen=True)
class NumpyStream:
    """A stream that NumPy's Philox draws from."""

    key: Callable[[int, int], tuple[int, int]]
    """(the run's seed, counter) → Philox's key."""

    def generator(self, seed: int, counter: int = 0) -> np.random.Generator:
        """Return a generator of its own, at the start of the stream."""
        key = np.array(self.key(seed, counter), np.uint64)
        return np.random.Generator(np.random.Philox(key=key))


# --- Training. Every value below decides what a run learns: changing one changes all weights.

# No counter. The first weights of the network, in the order in which its layers are made.
WEIGHTS = TorchStream(lambda seed, _: seed)

# Counter: the epoch. The order of all images in this epoch.
ORDER = NumpyStream(lambda seed, epoch: (seed, epoch))

# Counter: the step. The position of each image's crop, for --crop random. Epochs stay below
# 2⁶³, so that ORDER never has the same key.
CROPS = NumpyStream(lambda seed, step: (seed, 2**63 + step))

# Counter: the step. For the whole batch, in this order: which labels are dropped, the noise levels,
# which images are mirrored, and with a task which conditions are dropped.
STEP = TorchStream(lambda seed, step: mixed(seed, 0, step))

# Counter: the place of the image among all that the run trains on. The noise that is added to it.
NOISE = TorchStream(lambda seed, place: mixed(seed, 1, place))

# Counter: see `dropout_counter`. The activations that dropout sets to zero.
DROPOUT = TorchStream(lambda seed, counter: mixed(seed, 2, counter))

# Counter: the place of the image among all that the run trains on. The part that --task inpaint
# leaves out.
MASKS = TorchStream(lambda seed, place: mixed(seed, 3, place))

# DataLoader draws a seed for its workers, which draw nothing. A generator of its own keeps it from
# advancing the global one. The number is the seed of a new torch.Generator.
WORKERS = TorchStream(lambda seed, counter: 67280421310721)

# --- Measurement. These ignore the run's seed, so that all runs on the same data are measured by
# the same images and the same classifier. Their keys are also those of ORDER for seed 0, which does
# no harm: nothing is drawn from both that would be compared.

# The first weights of the classifier whose features are compared.
CLASSIFIER_WEIGHTS = TorchStream(lambda seed, counter: 0)

# In this order: which images the classifier sees, then for each of its steps the batch, and how
# each image of it is rotated where the data has no classes.
CLASSIFIER_BATCHES = NumpyStream(lambda seed, counter: (0, 0))

# Which images of the data samples are compared with.
MEASURED = NumpyStream(lambda seed, counter: (0, 1))

# --- Sampling. The runtime's own streams, keyed by the seed of the sample.

# The noise that a sample starts from.
SAMPLE_START = NoiseStream.INITIAL

# Counter: the row of the program. The noise that a stochastic solver adds.
SAMPLE_STEPS = NoiseStream.STEP

# --- Distillation. The runtime's streams as well, for seeds that no measurement has.

# The start of the teacher's path i, whose seed is FIRST_TRAJECTORY_SEED + i.
TRAJECTORY_START = NoiseStream.INITIAL

FIRST_TRAJECTORY_SEED = 2**40

MOST_PROCESSES = 4096
"""Processes of one run that `dropout_counter` distinguishes."""


def dropout_counter(step: int, part: int, parts: int, process: int) -> int:
    """Return the counter of DROPOUT: each part of a step has its own, in each process."""
    return (step * parts + part) * MOST_PROCESSES + process
