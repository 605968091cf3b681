"""How far samples are from the data, no matter what makes them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from runtime.errors import RequestError

from ..config import Config
from ..data.dataset import Dataset
from ..randomness import MEASURED
from .distances import NEIGHBOURS, compare
from .features import features_of

Sample = Callable[[int, int, NDArray[np.int64]], NDArray[np.uint8]]
"""sample(n, seed, label [n]) → images [n, H, W, C]."""


def require_comparable(config: Config, dataset: Dataset, device: torch.device) -> None:
    """Check before training that a `Judge` will be able to measure.

    Raises:
        RequestError: There are too few images, or the file of features gives none for an image.
    """
    require_enough(min(config.quality_samples, len(dataset)))
    if config.features:
        C, H, W = dataset.sample_shape
        features_of(config, dataset, None, device)(np.zeros((1, H, W, C), np.uint8))


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
