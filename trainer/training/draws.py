"""What a step is trained on, as a function of (seed, step): images with noise, or a teacher's
paths."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from ..config import Config
from ..data.dataset import Dataset
from ..data.loader import batch_indices, share_of
from ..data.tasks import Task
from ..objectives.objective import Draws, Objective
from ..parallel.processes import Processes
from ..randomness import NOISE, STEP
from .trajectories import Trajectories


class Source(Protocol):
    """Gives each step of one process what it is trained on.

    Attributes:
        bad: Indices of images that could not be read since somebody last emptied it.
        waited: Seconds spent waiting for images since somebody last set it to 0.
    """

    bad: set[int]
    waited: float

    def prepare(self, stop: Callable[[], bool]) -> bool:
        """Make what all steps need. Returns whether it is there; if not, `stop` said so."""
        ...

    def draw(self, step: int) -> Draws:
        """Return this process's share of a step, on its device."""
        ...

    def close(self) -> None:
        """Stop what reads ahead."""
        ...


class NoisedImages:
    """Images of the data, each with noise of its own (a `Source`).

    Labels and noise levels are drawn for the whole batch from (seed, step). The noise of an image
    is drawn from (seed, its place among all). So the draws do not depend on the number of
    processes.
    """

    def __init__(
        self,
        config: Config,
        dataset: Dataset,
        processes: Processes,
        objective: Objective,
        task: Task | None = None,
    ) -> None:
        self.config = config
        self.device = processes.device
        self.task = task
        self.objective = objective
        self.null_label = len(dataset.classes)
        self.mine = share_of(config, processes)
        self.reader = dataset.reader(config, processes)
        self.bad = set[int]()
        self.waited = 0.0

    def prepare(self, stop: Callable[[], bool]) -> bool:
        """Do nothing: images are read step by step."""
        return True

    def draw(self, step: int) -> Draws:
        """Return this process's share of a step, on its device.

        Raises:
            DataError: An image is not like the others, or the workers that read are gone.
        """
        c = self.config
        mine = self.mine
        begun = time.perf_counter()
        batch = self.reader.take(step)
        self.waited += time.perf_counter() - begun
        self.bad.update(batch.bad)
        # The order of these draws decides their values.
        generator = STEP.generator(c.seed, step)
        # One draw for both: guidance contrasts with an image that has neither.
        share = torch.rand(c.batch, generator=generator)[mine]
        t = self.objective.draw_times(generator)[mine]
        mirrored = (torch.rand(c.batch, generator=generator) < 0.5)[mine]
        x0 = batch.images.to(self.device, non_blocking=True).float().div_(127.5).sub_(1)
        if c.flips:
            x0 = torch.where(mirrored.to(self.device)[:, None, None, None], x0.flip(3), x0)
        label = torch.where(share < c.label_dropout, self.null_label, batch.labels)
        first = step * c.batch + mine.start
        eps = self._noise(first, x0)
        given: dict[str, Tensor] = {}
        if self.task:
            places = range(first, first + len(x0))
            given = self.task.of(x0, batch.indices, places, mirrored if c.flips else None)
            given = self.task.dropped(given, (share < c.condition_dropout).to(self.device))
        return Draws(x0, label.to(self.device), t.to(self.device), eps, given)

    def _noise(self, first: int, x0: Tensor) -> Tensor:
        """Return standard normal noise like x0, whose first image has the place `first`."""
        eps = torch.empty_like(x0)
        # Image by image: a share of the batch then has the same noise as in the whole batch.
        generator = torch.Generator(self.device)
        for i in range(len(x0)):
            NOISE.reset(generator, self.config.seed, first + i)
            eps[i].normal_(generator=generator)
        return eps

    def close(self) -> None:
        """Stop the workers."""
        self.reader.close()


class TeacherPaths:
    """Points on the teacher's paths: as x0 where a path ends, as eps the noise that makes the point
    of it (a `Source`)."""

    def __init__(
        self,
        config: Config,
        processes: Processes,
        objective: Objective,
        paths: Trajectories,
    ) -> None:
        assert config.distillation is not None
        self.config = config
        self.processes = processes
        self.objective = objective
        self.mine = share_of(config, processes)
        self.levels = torch.tensor(config.distillation.levels)
        self.paths = paths
        self.bad = set[int]()
        self.waited = 0.0

    def prepare(self, stop: Callable[[], bool]) -> bool:
        """Make the paths that are not in the run's folder. Returns whether all are there."""
        return self.paths.make(self.processes, stop)

    def draw(self, step: int) -> Draws:
        """Return this process's share of a step, on its device."""
        c = self.config
        device = self.processes.device
        indices = batch_indices(c.seed, step, c.batch, self.paths.count)[self.mine]
        t = self.objective.draw_times(STEP.generator(c.seed, step))[self.mine]
        number = (t[:, None] == self.levels).int().argmax(1)
        x0, eps = (torch.from_numpy(a) for a in self.paths.take(indices, number.numpy()))
        label = torch.from_numpy(self.paths.labels[indices])
        given = {
            name: torch.from_numpy(value).to(device)
            for name, value in self.paths.conditions(indices).items()
        }
        return Draws(x0.to(device), label.to(device), t.to(device), eps.to(device), given)

    def close(self) -> None:
        """Do nothing: nothing reads ahead."""
