"""How far samples are from the data: of a run's checkpoint, or of a bundle made from a run."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from runtime.errors import RequestError

from ..config import Config
from ..data.dataset import Dataset
from ..data.sources import load
from ..errors import CheckpointError
from ..parallel.processes import join
from ..randomness import MEASURED
from ..runs import checkpoint as checkpoints
from ..runs.folder import read_run
from ..training.step import Trainer
from .distances import NEIGHBOURS, compare
from .features import features_of

Sample = Callable[[int, int, NDArray[np.int64]], NDArray[np.uint8]]
"""sample(n, seed, label [n]) → images [n, H, W, C]."""


@dataclass(frozen=True)
class Changes:
    """Settings of a run that a measurement may change. None keeps the run's own."""

    quality_samples: int | None = None
    sample_solver: str | None = None
    sample_steps: int | None = None
    features: str | None = None

    def applied(self, config: Config) -> Config:
        given = {k: v for k, v in dataclasses.asdict(self).items() if v is not None}
        return dataclasses.replace(config, **given)


@dataclass(frozen=True)
class Evaluation:
    """The distances of one run or bundle.

    Attributes:
        of: Its folder.
        samples: How many samples were compared with as many images.
        distances: frechet, kernel, precision and recall.
        step: The checkpoint's; None for a bundle.
    """

    of: str
    samples: int
    distances: Mapping[str, float]
    step: int | None = None

    def to_json(self) -> dict[str, str | int | float]:
        step = {} if self.step is None else {"step": self.step}
        return {"of": self.of, **step, "samples": self.samples, **self.distances}


def require_comparable(config: Config, dataset: Dataset) -> None:
    """Check before training that a `Judge` will be able to measure.

    Raises:
        RequestError: There are too few images, or there is no file of features.
    """
    require_enough(min(config.quality_samples, len(dataset)))
    if config.features and not Path(config.features).is_file():
        raise RequestError(f"--features {config.features}: there is no such file.")


def require_enough(count: int) -> None:
    """Check that there are enough images for precision and recall.

    Raises:
        RequestError: There are too few.
    """
    if count <= NEIGHBOURS:
        raise RequestError(
            f"{count} images are too few to compare with: more than {NEIGHBOURS} are needed."
        )


class Judge:
    """Measures how far samples are from the data.

    It chooses images of the data once, and keeps their features.

    Args:
        folder: The run's folder, which keeps the classifier; None trains it each time.
    """

    def __init__(
        self, config: Config, dataset: Dataset, folder: Path | None, device: torch.device
    ) -> None:
        self.config = config
        self.features = features_of(config, dataset, folder, device)
        order = MEASURED.generator(0).permutation(len(dataset))
        chosen = order[: config.quality_samples]
        self.labels = dataset.labels[chosen]
        pictures, _ = dataset.gather(chosen)
        self.real = self.features(pictures)
        require_enough(len(self.real))  # fewer than were chosen if some cannot be read

    def __call__(self, sample: Sample) -> dict[str, float]:
        """Return frechet, kernel, precision and recall of what `sample` gives."""
        return compare(self.real, self.features_of(sample))

    def features_of(self, sample: Sample) -> NDArray[np.float32]:
        """Return the features of samples, [n, d], with the labels of the images and seeds 0, 1,
        …"""
        size = self.config.quality_batch
        made = []
        # Sample i has seed i and the label of image i, in batches of any size.
        for i in range(0, len(self.labels), size):
            labels = self.labels[i : i + size]
            made.append(self.features(sample(len(labels), i, labels)))
        return np.concatenate(made)


def of_run(run: Path, best: bool, device: str, changes: Changes | None = None) -> Evaluation:
    """Measure a run's newest checkpoint, or its best one.

    Raises:
        CheckpointError: `run` is not a run, or has no such checkpoint.
    """
    config, _ = read_run(run)
    # In float32 on any device, so that a run and its bundle give the same samples but for rounding.
    config = dataclasses.replace(config, device=device, precision="fp32")
    config = (changes or Changes()).applied(config)
    dataset = load(config)
    trainer = Trainer(config, dataset)
    checkpoint = checkpoints.newest(run / ("best" if best else "checkpoints"))
    if checkpoint is None:
        raise CheckpointError(f"{run} has no {'best ' if best else ''}checkpoint yet.")
    trainer.state.resume(checkpoint)
    judge = Judge(config, dataset, run, trainer.device)
    distances = judge(lambda n, seed, label: trainer.sample(n, seed=seed, label=label))
    return Evaluation(str(run), config.quality_samples, distances, checkpoint.step)


def of_bundle(
    folder: Path, guidance: float | None, device: str, changes: Changes | None = None
) -> Evaluation:
    """Measure a bundle made from a run, whose data must be on this machine.

    Raises:
        RequestError: The bundle was not made from a run.
    """
    from runtime.sampler import Sampler  # needs an inference library, which training does not

    sampler = Sampler.load(folder)
    record = sampler.bundle.provenance.get("config")
    if not isinstance(record, Mapping):
        raise RequestError(
            f"{folder} did not come from a run of trainer.fit: its record names no data to "
            f"compare with."
        )
    config = (changes or Changes()).applied(Config.from_json(record))
    dataset = load(config)
    labelled = bool(sampler.bundle.num_classes)

    def sample(n: int, seed: int, label: NDArray[np.int64]) -> NDArray[np.uint8]:
        # Without guidance the conditional network samples, as it does in a run's own measurements.
        return sampler.pictures(
            n,
            seed=seed,
            solver=config.sample_solver,
            steps=config.sample_steps,
            label=label.tolist() if labelled else None,
            guidance=(guidance or 1.0) if labelled else None,
        )

    judge = Judge(config, dataset, None, join(device).device)
    return Evaluation(str(folder), config.quality_samples, judge(sample))
