"""What a data set is, and the batches that are read from one."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from ..config import Config
from ..parallel.processes import Processes
from .record import DataRecord


@dataclass(frozen=True)
class Batch:
    """What a process trains on in one step.

    Attributes:
        images: [b, C, H, W] uint8.
        labels: [b] int64.
        indices: Which images these are, [b].
        bad: Indices of images that could not be read. Other images take their places.
        error: Why there is no batch, "" if there is one. A worker cannot raise: DataLoader would
            turn the message into a page of traceback.
    """

    images: Tensor
    labels: Tensor
    bad: tuple[int, ...] = ()
    indices: tuple[int, ...] = ()
    error: str = ""

    def pin_memory(self) -> Batch:
        """Return the batch in memory that a GPU copies from. DataLoader calls this."""
        return replace(self, images=self.images.pin_memory(), labels=self.labels.pin_memory())


class Reader(Protocol):
    """Reads the batches of one process from one data set."""

    def take(self, step: int) -> Batch:
        """Return the batch of a step. Steps that follow each other may have been read ahead.

        Raises:
            DataError: An image is not like the others, or the workers that read are gone.
        """
        ...

    def close(self) -> None:
        """Stop what reads ahead."""
        ...


class Dataset(Protocol):
    """Images to train on, all of one shape, with a label each.

    `Pictures` holds them in memory; `Stream` reads each when it is needed. Every difference between
    the two is a method here, so no other module needs to know which one it has.
    """

    @property
    def name(self) -> str:
        """What the data is called."""
        ...

    @property
    def labels(self) -> NDArray[np.int64]:
        """[N], indices into `classes`; all 0 if there are no classes."""
        ...

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes, () if the network is not conditioned on them."""
        ...

    @property
    def given(self) -> Mapping[str, NDArray[np.generic]]:
        """What the data gives each image by name: images [N, h, w, c] uint8, vectors [N, k]."""
        ...

    @property
    def sample_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of every image."""
        ...

    def __len__(self) -> int:
        """Return the number of images, N."""
        ...

    def fingerprint(self) -> str:
        """Return a sha256 that changes with the data."""
        ...

    def describe(self) -> DataRecord:
        """Return what a run and a bundle state about the data."""
        ...

    def unlabelled(self) -> Dataset:
        """Return the same images without classes."""
        ...

    def image_names(self, indices: Iterable[int]) -> list[str]:
        """Return what images are called in a message or a list of files."""
        ...

    def gather(self, indices: NDArray[np.int64]) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
        """Return some images, for measurements.

        Returns:
            Images [n, H, W, C], and their indices [n]. Images that cannot be read are left out.

        Raises:
            DataError: None of them can be read.
        """
        ...

    def reader(self, config: Config, processes: Processes) -> Reader:
        """Return what reads the training batches of one process."""
        ...
