"""Pictures that are read when they are needed: a list of files, or of places in files, never held
all in memory."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..config import Config
from ..errors import DataError
from .decode import Decoding, UInt8, UnreadablePicture, unlike
from .labels import listed, printable


class Names(Sequence[str]):
    """A list of strings in two arrays, which a process that is forked shares without copying a page
    of it."""

    def __init__(self, names: Iterable[str]) -> None:
        encoded = [name.encode("utf-8", "surrogateescape") for name in names]
        self._ends = np.cumsum([0, *map(len, encoded)], dtype=np.int64)
        self._bytes = np.frombuffer(b"".join(encoded), np.uint8)

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, i: Any) -> Any:
        if not 0 <= i < len(self):
            raise IndexError(i)
        return (
            self._bytes[self._ends[i] : self._ends[i + 1]]
            .tobytes()
            .decode("utf-8", "surrogateescape")
        )


@dataclass(frozen=True, eq=False)
class Stream:
    """names[i] is what picture i is called, fetch(i) its file's path or bytes, labels [N] int64
    indices into `classes`.

    shape (H, W, C) is that of the first picture, `first`, and must be that of all. fingerprint: of
    names and sizes, not of pixels.
    """

    name: str
    names: Names
    fetch: Callable[[int], bytes | Path]
    labels: NDArray[np.int64]
    classes: tuple[str, ...]
    decoding: Decoding
    fingerprint: str
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

    def describe(self) -> dict[str, Any]:
        """What a bundle's provenance says of the data."""
        return {
            "name": self.name,
            "pictures": len(self),
            "fingerprint": self.fingerprint,
            "licence": self.licence,
            "note": self.note,
        }

    def read(self, i: int, centering: float = 0.5) -> UInt8:
        """Picture i, [H, W, C]. Raises UnreadablePicture, or DataError where the run refuses such
        pictures or it is not like the others."""
        try:
            picture = self.decoding(
                self.fetch(i), self.names[i], centering if self.random_crop else 0.5
            )
        except UnreadablePicture as error:
            if self.refuse:
                raise refused(self.names[i], error) from error
            raise
        if picture.shape != self.shape:
            raise unlike(self.names[i], picture.shape, self.first, self.shape)
        return picture


def streamed(
    config: Config,
    decoding: Decoding,
    probed: tuple[str, tuple],
    stamp: tuple[Iterable[str], Iterable[int]],
    **found: Any,
) -> Stream:
    """The stream that a config asks for. probed: see `probe`; stamp: names and sizes for the
    fingerprint; found: the stream's other fields."""
    first, shape = probed
    return Stream(
        decoding=decoding,
        fingerprint=fingerprint(*stamp, found["labels"], (decoding, config.crop)),
        shape=shape,
        first=first,
        random_crop=config.crop == "random",
        refuse=config.bad_pictures == "refuse",
        **found,
    )


def refused(name: str, error: Exception) -> DataError:
    return DataError(
        f"{printable(name)} cannot be read as an image ({error}). "
        "Remove it, or leave such images out with --bad-pictures skip."
    )


def vanished(classes: Sequence[str]) -> DataError:
    return DataError(
        f"no image of {'these classes' if len(classes) > 1 else 'this class'} can be read: "
        f"{listed(classes)}. "
        "Replace the images, or remove the class."
    )


def too_many(bad: int, count: int) -> bool:
    """Whether so many unreadable pictures end a run: more than 1 %, and more than one."""
    return bad > max(1, count // 100)


def too_many_error(bad: Sequence[str], count: int) -> DataError:
    return DataError(
        f"{len(bad)} of {count} images cannot be read, more than 1 %: {listed(bad)}. Remove or "
        f"replace them."
    )


def probe(
    name: str, names: Names, fetch: Callable[[int], bytes | Path], decoding: Decoding
) -> tuple[str, tuple]:
    """Name and shape of the first picture that can be read. Raises DataError where none of the
    first hundred can."""
    first = ""
    for i in range(min(100, len(names))):
        try:
            return names[i], decoding(fetch(i), names[i]).shape
        except UnreadablePicture as error:
            first = first or f"{printable(names[i])}: {error}"
    raise DataError(
        f"none of the first {min(100, len(names))} images in {printable(name)} can be read "
        f"({first})."
    )


def fingerprint(
    names: Iterable[str], sizes: Iterable[int], labels: NDArray[np.int64], how: object
) -> str:
    """sha256 over names, sizes in bytes, labels, and how pictures are decoded: what can be told
    without reading them."""
    digest = hashlib.sha256(repr(how).encode())
    for name, size in zip(names, sizes, strict=True):
        digest.update(f"{name}\0{size}\0".encode("utf-8", "surrogateescape"))
    digest.update(np.ascontiguousarray(labels).tobytes())
    return digest.hexdigest()
