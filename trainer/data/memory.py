"""Images that are all in memory."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from numpy.typing import NDArray

from ..config import Config
from ..parallel.processes import Processes
from .dataset import Batch
from .loader import batch_indices, share_of
from .record import DataRecord


@dataclass(frozen=True, eq=False)
class Pictures:
    """A `Dataset` in memory.

    Attributes:
        images: [N, H, W, C] uint8, C 1 or 3.
        labels: [N] int64, indices into `classes`.
        licence: For the model card.
        note: One phrase for the model card.
        given: See `Dataset.given`.
    """

    name: str
    images: NDArray[np.uint8]
    labels: NDArray[np.int64]
    classes: tuple[str, ...]
    licence: str
    note: str
    given: Mapping[str, NDArray[np.generic]] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def sample_shape(self) -> tuple[int, int, int]:
        """(C, H, W)."""
        _, H, W, C = self.images.shape
        return C, H, W

    def fingerprint(self) -> str:
        """Return the sha256 over shapes, images, labels and class names: equal only for equal
        data."""
        digest = hashlib.sha256(repr((self.images.shape, self.classes)).encode())
        digest.update(np.ascontiguousarray(self.images).tobytes())
        digest.update(np.ascontiguousarray(self.labels).tobytes())
        for name, array in self.given.items():
            digest.update(f"{name}{array.shape}".encode())
            digest.update(np.ascontiguousarray(array).tobytes())
        return digest.hexdigest()

    def describe(self) -> DataRecord:
        """Return what a run and a bundle state about the data."""
        return DataRecord(self.name, len(self.images), self.fingerprint(), self.licence, self.note)

    def unlabelled(self) -> Pictures:
        """Return the same images without classes."""
        return replace(self, classes=())

    def image_names(self, indices: Iterable[int]) -> list[str]:
        """Return what images are called in a message."""
        return [f"image {i} of {self.name}" for i in indices]

    def gather(self, indices: NDArray[np.int64]) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
        """Return images [n, H, W, C], and their indices [n]: here, all that were asked for."""
        return self.images[indices], indices

    def reader(self, config: Config, processes: Processes) -> MemoryReader:
        """Return what reads the batches of one process."""
        return MemoryReader(self, config, processes)


class MemoryReader:
    """Takes the batches of one process from memory."""

    def __init__(self, pictures: Pictures, config: Config, processes: Processes) -> None:
        self.config = config
        self.mine = share_of(config, processes)
        # Both are views. The images are stored with their channels last, and each batch is made
        # contiguous.
        self._images = torch.from_numpy(pictures.images).permute(0, 3, 1, 2)
        self._labels = torch.from_numpy(pictures.labels)

    def take(self, step: int) -> Batch:
        """Return the batch of a step; see `Reader.take`."""
        # Crops are drawn for streams alone: these images have been cropped.
        indices = batch_indices(self.config.seed, step, self.config.batch, len(self._images))
        index = torch.from_numpy(indices[self.mine])
        images = self._images[index].contiguous()
        return Batch(images, self._labels[index], indices=tuple(index.tolist()))

    def close(self) -> None:
        """Do nothing: no worker reads ahead."""
