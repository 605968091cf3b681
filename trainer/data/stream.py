"""Images that are read when they are needed: a list of files, or of places in files."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import overload

import numpy as np
from numpy.typing import NDArray

from ..config import Config
from ..errors import DataError
from ..parallel.processes import Processes
from .decode import Decoding, UInt8, UnreadablePicture, unlike
from .labels import printable
from .record import DataRecord
from .unreadable import refused
from .workers import StreamReader

PROBED = 100
"""Images of which the first readable one gives the shape of all."""


class Names(Sequence[str]):
    """A list of strings in two arrays.

    A forked worker shares the arrays. It would copy the pages of a list of `str` one by one,
    because reading an object writes its reference count.
    """

    def __init__(self, names: Iterable[str]) -> None:
        # surrogateescape: file names may be any bytes.
        encoded = [name.encode("utf-8", "surrogateescape") for name in names]
        self._ends = np.cumsum([0, *map(len, encoded)], dtype=np.int64)
        self._bytes = np.frombuffer(b"".join(encoded), np.uint8)

    def __len__(self) -> int:
        return len(self._ends) - 1

    @overload
    def __getitem__(self, i: int) -> str: ...

    @overload
    def __getitem__(self, i: slice) -> list[str]: ...

    def __getitem__(self, i: int | slice) -> str | list[str]:
        if isinstance(i, slice):
            return [self[k] for k in range(len(self))[i]]
        if not 0 <= i < len(self):
            raise IndexError(i)
        name = self._bytes[self._ends[i] : self._ends[i + 1]].tobytes()
        return name.decode("utf-8", "surrogateescape")


@dataclass(frozen=True, eq=False)
class Stream:
    """A `Dataset` whose images are read when they are needed.

    Attributes:
        names: What each image is called, [N].
        fetch: i → the path or the bytes of image i's file.
        labels: [N] int64, indices into `classes`.
        stamp: A sha256 over names and sizes, not over pixels; see `stamp_of`.
        shape: (H, W, C) of the first image, which all must have.
        first: The name of the first image.
        random_crop: Whether an image that is not square is cropped elsewhere each time.
        refuse: Whether an unreadable image ends the run.
        licence: For the model card.
        note: One phrase for the model card.
    """

    name: str
    names: Names
    fetch: Callable[[int], bytes | Path]
    labels: NDArray[np.int64]
    classes: tuple[str, ...]
    decoding: Decoding
    stamp: str
    shape: tuple[int, int, int]
    first: str
    random_crop: bool = False
    refuse: bool = False
    licence: str = "not stated"
    note: str = ""

    def __len__(self) -> int:
        return len(self.names)

    @property
    def sample_shape(self) -> tuple[int, int, int]:
        """(C, H, W)."""
        H, W, C = self.shape
        return C, H, W

    def fingerprint(self) -> str:
        """Return the stamp."""
        return self.stamp

    def describe(self) -> DataRecord:
        """Return what a run and a bundle state about the data."""
        return DataRecord(self.name, len(self), self.stamp, self.licence, self.note)

    def unlabelled(self) -> Stream:
        """Return the same images without classes."""
        return replace(self, classes=())

    def image_names(self, indices: Iterable[int]) -> list[str]:
        """Return the names of images."""
        return [self.names[i] for i in indices]

    def read(self, i: int, centering: float = 0.5) -> UInt8:
        """Return image i, [H, W, C].

        Args:
            i: The index of the image.
            centering: Where it is cropped, 0 … 1. Only a stream with `random_crop` uses it.

        Raises:
            UnreadablePicture: The file is not an image.
            DataError: It is not, and the run refuses such images; or it is not like the others.
        """
        centering = centering if self.random_crop else 0.5
        try:
            picture = self.decoding(self.fetch(i), self.names[i], centering)
        except UnreadablePicture as error:
            if self.refuse:
                raise refused(self.names[i], error) from error
            raise
        if picture.shape != self.shape:
            raise unlike(self.names[i], picture.shape, self.first, self.shape)
        return picture

    def gather(self, indices: NDArray[np.int64]) -> tuple[UInt8, NDArray[np.int64]]:
        """Return images [n, H, W, C], and their indices [n], without those that cannot be read.

        Raises:
            DataError: None of them can be read.
        """
        pictures = []
        kept = []
        for i in indices.tolist():
            try:
                pictures.append(self.read(i))
            except UnreadablePicture:
                continue
            kept.append(i)
        if not kept:
            raise DataError(f"none of the {len(indices)} images to compare with can be read.")
        return np.stack(pictures), np.array(kept, np.int64)

    def reader(self, config: Config, processes: Processes) -> StreamReader:
        """Return what reads the batches of one process, ahead of the steps."""
        return StreamReader(self, config, processes)


@dataclass(frozen=True, eq=False)
class Files:
    """Where the images of a stream are, as a folder, a table or shards list them; see `Stream`."""

    name: str
    names: Names
    fetch: Callable[[int], bytes | Path]
    labels: NDArray[np.int64]
    classes: tuple[str, ...]
    licence: str = "not stated"
    note: str = ""


@dataclass(frozen=True)
class First:
    """The first image that can be read: its name, and its shape (H, W, C)."""

    name: str
    shape: tuple[int, int, int]


def streamed(config: Config, files: Files, decoding: Decoding, first: First, stamp: str) -> Stream:
    """Return the stream that a config asks for. stamp: see `stamp_of`."""
    return Stream(
        name=files.name,
        names=files.names,
        fetch=files.fetch,
        labels=files.labels,
        classes=files.classes,
        licence=files.licence,
        note=files.note,
        decoding=decoding,
        stamp=stamp,
        shape=first.shape,
        first=first.name,
        random_crop=config.crop == "random",
        refuse=config.bad_pictures == "refuse",
    )


def probe(
    name: str, names: Names, fetch: Callable[[int], bytes | Path], decoding: Decoding
) -> First:
    """Return the first image that can be read.

    Raises:
        DataError: None of the first hundred can be read. `name` is what the error calls the data.
    """
    fault = ""  # of the first image, for the error
    for i in range(min(PROBED, len(names))):
        try:
            H, W, C = decoding(fetch(i), names[i]).shape
            return First(names[i], (H, W, C))
        except UnreadablePicture as error:
            fault = fault or f"{printable(names[i])}: {error}"
    raise DataError(
        f"none of the first {min(PROBED, len(names))} images in {printable(name)} can be read "
        f"({fault})."
    )


def stamp_of(
    names: Iterable[str],
    sizes: Iterable[int],
    labels: NDArray[np.int64],
    decoding: Decoding,
    crop: str,
) -> str:
    """Return what tells a stream from others without reading its images.

    It is the sha256 over names, sizes in bytes, labels, and how images are decoded and cropped.
    Runs store it: the bytes that are hashed must not change.
    """
    digest = hashlib.sha256(repr((decoding, crop)).encode())
    for name, size in zip(names, sizes, strict=True):
        digest.update(f"{name}\0{size}\0".encode("utf-8", "surrogateescape"))
    digest.update(np.ascontiguousarray(labels).tobytes())
    return digest.hexdigest()
