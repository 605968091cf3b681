"""The images of each step, in an order that is a function of (seed, step).

Every epoch is a new permutation of all images. Step k takes places k·batch … (k+1)·batch of the
epochs laid end to end; each process takes its own stretch of these places.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import Sampler

from ..config import Config
from ..parallel.processes import Processes
from ..randomness import CROPS, ORDER


@lru_cache(maxsize=2)  # a batch touches two epochs at most, unless it is larger than the data
def _permutation(seed: int, epoch: int, count: int) -> NDArray[np.int64]:
    return ORDER.generator(seed, epoch).permutation(count)


def batch_indices(seed: int, step: int, batch: int, count: int) -> NDArray[np.int64]:
    """Return which of `count` images step `step` trains on, [batch]."""
    positions = np.arange(step * batch, (step + 1) * batch)
    indices = np.empty(batch, np.int64)
    # A batch may end one epoch and begin the next, or hold several of little data.
    for epoch in np.unique(positions // count).tolist():
        here = positions // count == epoch
        indices[here] = _permutation(seed, epoch, count)[positions[here] % count]
    return indices


def share_of(config: Config, processes: Processes) -> slice:
    """Return the stretch of a batch that this process trains on."""
    share = config.batch // processes.count
    return slice(processes.index * share, (processes.index + 1) * share)


class Wanted(Sampler[list[tuple[int, float]]]):
    """What one process reads for every step from `first` on: (image, where to crop) for each of its
    images. The crop is 0 … 1."""

    def __init__(self, config: Config, count: int, processes: Processes, first: int) -> None:
        self.config = config
        self.count = count
        self.processes = processes
        self.first = first

    def at(self, step: int) -> list[tuple[int, float]]:
        c = self.config
        mine = share_of(c, self.processes)
        indices = batch_indices(c.seed, step, c.batch, self.count)[mine]
        crops = CROPS.generator(c.seed, step).random(c.batch)[mine]
        return list(zip(indices.tolist(), crops.tolist(), strict=True))

    def __iter__(self) -> Iterator[list[tuple[int, float]]]:
        # To the run's last step, so that workers do not read ahead for nothing.
        for step in range(self.first, self.config.steps):
            yield self.at(step)

    def __len__(self) -> int:
        return max(0, self.config.steps - self.first)
