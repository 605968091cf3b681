"""Images in files, or at places in files: what each is called, and how it is read."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import overload

import numpy as np
from numpy.typing import NDArray

from ..config import Config
from ..config.text import printable
from ..errors import DataError
from .decode import Decoding, UInt8, UnreadablePicture, unlike
from .unreadable import refused

Fetch = Callable[[int], bytes | Path]
"""i → the bytes of image i's file, or its path."""
PROBED = 100
"""Images that are tried at the start: the first readable one gives the shape of all."""


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
class ImageFiles:
    """Images that are read one at a time.

    Attributes:
        names: What each image is called, [N].
        fetch: i → the path or the bytes of image i's file.
        shape: (H, W, C) of the first image, which all must have.
        first: The name of the first image.
        random_crop: Whether an image that is not square is cropped elsewhere each time.
        refuse: Whether an unreadable image ends the run.
    """

    names: Names
    fetch: Fetch
    decoding: Decoding
    shape: tuple[int, int, int]
    first: str
    random_crop: bool = False
    refuse: bool = False

    def __len__(self) -> int:
        return len(self.names)

    def read(self, i: int, centering: float = 0.5) -> UInt8:
        """Return image i, [H, W, C].

        Args:
            i: The index of the image.
            centering: The position of the crop, 0 … 1. It is used only if `random_crop` is set.

        Raises:
            UnreadablePicture: The file is not an image.
            DataError: The file is not an image and the run refuses such files, or the image
                differs from the first one in shape.
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


def open_images(config: Config, place: str, names: Names, fetch: Fetch) -> ImageFiles:
    """Return images that are decoded as a config asks, with the shape of the first readable one.

    Args:
        place: What errors call the data.
        names: What each image is called, [N].
        fetch: i → the path or the bytes of image i's file.

    Raises:
        DataError: None of the first hundred can be read.
    """
    decoding = Decoding(config.size, config.mode)
    # The first image may be the one that is damaged, so a few are tried before the run is refused.
    fault = ""  # of the first image, for the error
    for i in range(min(PROBED, len(names))):
        try:
            H, W, C = decoding(fetch(i), names[i]).shape
        except UnreadablePicture as error:
            fault = fault or f"{printable(names[i])}: {error}"
            continue
        return ImageFiles(
            names=names,
            fetch=fetch,
            decoding=decoding,
            shape=(H, W, C),
            first=names[i],
            random_crop=config.crop == "random",
            refuse=config.bad_pictures == "refuse",
        )
    raise DataError(
        f"none of the first {min(PROBED, len(names))} images in {printable(place)} can be read "
        f"({fault})."
    )


def stamp_of(
    names: Iterable[str],
    sizes: Iterable[int],
    labels: NDArray[np.int64],
    decoding: Decoding,
    crop: str,
) -> str:
    """Return a fingerprint of images that is computed without reading them.

    It is a sha256 over names, sizes, labels, and how images are decoded and cropped. Runs store
    it: the bytes that are hashed must not change.

    Args:
        names: What each image is called, [N].
        sizes: The size of each file in bytes, [N].
        labels: [N] int64, indices into the classes.
        crop: The config's `crop`.
    """
    digest = hashlib.sha256(repr((decoding, crop)).encode())
    for name, size in zip(names, sizes, strict=True):
        digest.update(f"{name}\0{size}\0".encode("utf-8", "surrogateescape"))
    digest.update(np.ascontiguousarray(labels).tobytes())
    return digest.hexdigest()
