"""A data set whose images are read when they are needed."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from ..config import Config
from ..errors import DataError
from ..parallel.processes import Processes
from .decode import UInt8, UnreadablePicture
from .image_files import ImageFiles
from .record import DataRecord
from .workers import StreamReader


@dataclass(frozen=True, eq=False)
class Stream:
    """A `Dataset` whose images are read when they are needed.

    Attributes:
        images: The images and how they are read, [N].
        labels: [N] int64, indices into `classes`.
        stamp: A sha256 over names and sizes, not over pixels; see `stamp_of`.
        licence: For the model card.
        note: One phrase for the model card.
        given: See `Dataset.given`.
    """

    name: str
    images: ImageFiles
    labels: NDArray[np.int64]
    classes: tuple[str, ...]
    stamp: str
    licence: str = "not stated"
    note: str = ""
    given: Mapping[str, NDArray[np.generic]] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.images)

    @property
    def sample_shape(self) -> tuple[int, int, int]:
        """(C, H, W)."""
        H, W, C = self.images.shape
        return C, H, W

    def fingerprint(self) -> str:
        """Return the stamp, and with vectors a sha256 over both."""
        if not self.given:
            return self.stamp
        digest = hashlib.sha256(self.stamp.encode())
        for name, array in self.given.items():
            digest.update(f"{name}{array.shape}".encode())
            digest.update(np.ascontiguousarray(array).tobytes())
        return digest.hexdigest()

    def describe(self) -> DataRecord:
        """Return what a run and a bundle state about the data."""
        return DataRecord(self.name, len(self), self.fingerprint(), self.licence, self.note)

    def unlabelled(self) -> Stream:
        """Return the same images without classes."""
        return replace(self, classes=())

    def image_names(self, indices: Iterable[int]) -> list[str]:
        """Return the names of images."""
        return [self.images.names[i] for i in indices]

    def gather(self, indices: NDArray[np.int64]) -> tuple[UInt8, NDArray[np.int64]]:
        """Return images [n, H, W, C], and their indices [n], without those that cannot be read.

        Raises:
            DataError: None of them can be read.
        """
        pictures = []
        kept = []
        for i in indices.tolist():
            try:
                pictures.append(self.images.read(i))
            except UnreadablePicture:
                continue
            kept.append(i)
        if not kept:
            raise DataError(f"none of the {len(indices)} images to compare with can be read.")
        return np.stack(pictures), np.array(kept, np.int64)

    def reader(self, config: Config, processes: Processes) -> StreamReader:
        """Return what reads the batches of one process, ahead of the steps."""
        return StreamReader(self.images, self.labels, config, processes)
