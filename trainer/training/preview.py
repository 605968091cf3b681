"""Samples of a network in training, for grids and for the measurement of quality."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from runtime.diffusion.noise import noises
from runtime.diffusion.program import run
from runtime.errors import RequestError
from runtime.images import sheet_shape, tile, to_uint8

from ..config import Config
from ..data.tasks import Task
from ..randomness import SAMPLE_START, SAMPLE_STEPS

UNLABELLED_GRID = 64
"""Samples of a grid if there are no classes, or too many for a grid that shows each."""
MOST_CLASSES_SHOWN = 32
SEEDS_PER_CLASS = 2
COMPARED = 24
"""Images of a grid that shows conditions."""
ACROSS = 3
"""Images to a row of that grid, with what belongs to each."""
GAP = 2
"""Pixels between the images of a grid."""


@dataclass(frozen=True)
class Preview:
    """Samples by the runtime's own solvers, so that a bundle of the run gives the same ones.

    Attributes:
        network: Its weights are passed with each call.
        sample_shape: (C, H, W).
        num_classes: 0 if the network is not conditioned on labels.
    """

    config: Config
    network: nn.Module
    device: torch.device
    sample_shape: tuple[int, int, int]
    num_classes: int
    task: Task | None = None

    @torch.no_grad()
    def sample(
        self,
        count: int,
        weights: Mapping[str, Tensor],
        seed: int = 0,
        label: NDArray[np.int64] | None = None,
        solver: str = "",
        steps: int = 0,
    ) -> NDArray[np.uint8]:
        """Return samples with the seeds `seed`, `seed` + 1, …

        Args:
            count: How many.
            weights: Whole weights by name, usually an average.
            label: [count]; by default all classes in turn.
            solver: By default the config's sample_solver.
            steps: By default the config's sample_steps.

        Returns:
            [count, H, W, C].
        """
        program = self.config.sample_program(solver, steps)
        # Split weights were gathered on the CPU.
        weights = {name: tensor.to(self.device) for name, tensor in weights.items()}

        def network(
            x: np.ndarray, time: np.ndarray, *label: np.ndarray, **given: np.ndarray
        ) -> np.ndarray:
            inputs = tuple(torch.from_numpy(a).to(self.device) for a in (x, time, *label))
            named = {k: torch.from_numpy(a).to(self.device) for k, a in given.items()}
            prediction = torch.func.functional_call(self.network, weights, inputs, named)
            return prediction.float().cpu().numpy()

        seeds = [seed + i for i in range(count)]
        conditions: dict[str, NDArray[np.float32]] = {}
        if self.task:
            # The label is that of the image whose conditions are given.
            _, label, conditions = self.task.shown(count, seed)
        elif label is None:
            label = np.arange(count) % max(1, self.num_classes)
        x = noises(seeds, SAMPLE_START, 0, self.sample_shape) * np.float32(program.start)
        self.network.eval()  # no dropout, and no activations computed again
        samples = run(
            program,
            network,
            x,
            lambda row: noises(seeds, SAMPLE_STEPS, row, self.sample_shape),
            label=np.asarray(label, np.int64) if self.num_classes else None,
            conditions=conditions,
        )
        self.network.train()
        return to_uint8(samples)

    def grid(self, weights: Mapping[str, Tensor]) -> NDArray[np.uint8]:
        """Return one sheet of samples, [H, W, C]: each class with its seeds, if they are few.

        If the network is conditioned on images, each is between its condition and the original.
        """
        if self.task and self.task.conditions:
            return self._compared(weights)
        shown = 1 < self.num_classes <= MOST_CLASSES_SHOWN
        C, H, W = self.sample_shape
        wanted = SEEDS_PER_CLASS * self.num_classes if shown else UNLABELLED_GRID
        count = fitting(wanted, (H, W, C))
        classes = max(1, self.num_classes)
        size = self.config.quality_batch
        # As many at once as in measurements, which the memory is known to hold.
        parts = [
            self.sample(len(seeds), weights, seed=int(seeds[0]), label=seeds % classes)
            for seeds in np.split(np.arange(count), range(size, count, size))
        ]
        return tile(np.concatenate(parts))

    def _compared(self, weights: Mapping[str, Tensor]) -> NDArray[np.uint8]:
        """Return one sheet: conditions that are images, samples, and the data's own images."""
        assert self.task is not None
        _, H, W = self.sample_shape
        seen = [condition for condition in self.task.conditions if condition.is_image]
        width = (len(seen) + 2) * (W + GAP)
        count = fitting(COMPARED, (H, width, 3), ACROSS)
        images, _, given = self.task.shown(count)
        columns = []
        for condition in seen:
            small = to_uint8(given[condition.name], *(condition.range or (-1, 1)))
            large = small.repeat(H // small.shape[1], 1).repeat(W // small.shape[2], 2)
            columns.append(large)
        columns += [self.sample(count, weights), images]
        # A grey image next to a coloured one.
        C = max(column.shape[3] for column in columns)
        shown = [np.broadcast_to(column, (*column.shape[:3], C)) for column in columns]
        # What belongs together stands side by side.
        each = np.stack(shown, axis=1)
        return tile(each.reshape(-1, *each.shape[2:]), columns=len(columns) * min(ACROSS, count))


def fitting(wanted: int, image: tuple[int, int, int], across: int | None = None) -> int:
    """Return how many images a sheet holds, of those wanted: all, unless they are very large.

    Args:
        wanted: How many.
        image: (H, W, C) of each.
        across: Images to a row; None makes the sheet as square as possible.
    """
    count = wanted
    while count > 1:
        try:
            sheet_shape(count, image, across and min(across, count), GAP)
        except RequestError:
            count //= 2
        else:
            break
    return count
