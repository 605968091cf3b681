"""What a data set is, and how `--data` becomes one."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from ..config import Config
from ..parallel.processes import Processes
from . import folder as folders
from .arrays import npz
from .builtin import digits, emoji
from .labels import class_name, listed, unused
from .loader import Reader
from .memory import Pictures
from .record import DataRecord

log = logging.getLogger(__name__)

MEGABYTE = 2**20


class Dataset(Protocol):
    """Images to train on, all of one shape, with a label each.

    `Pictures` holds them in memory; `Stream` reads each when it is needed. Whatever differs between
    the two is a method here, so that nothing outside this room asks which one it has.
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


def load(config: Config) -> Dataset:
    """Return the images that `config.data` names.

    Raises:
        DataError: There are no images, one is not like the others, or a label or a class name is
            not text that JSON can hold.
    """
    found = _load(config)
    # Without labels no class is checked: folders may then have any names.
    if not config.labels:
        return found.unlabelled()
    for name in found.classes:
        class_name(name, config.data)
    if empty := unused(found.classes, found.labels):
        log.warning("%s: %d classes have no images: %s", config.data, len(empty), listed(empty))
    return found


def _load(config: Config) -> Dataset:
    kind, _, place = config.data.partition(":")
    if kind == "digits":
        return digits()
    if kind == "emoji":
        return emoji(config.split)
    if kind == "npz":
        return npz(Path(place), config.size, config.mode)
    # Imported if asked for, because few runs need them.
    if kind == "hf":
        from .tables import stream

        return stream(place, config)
    if kind == "wds":
        from .shards import stream

        return stream(place, config)
    return folder(Path(place), config)


def folder(path: Path, config: Config) -> Dataset:
    """Return the images under `path`: a class per subfolder, or by config.label_file.

    They are read now if they take less than config.in_memory_mb when decoded; otherwise, and for
    random crops, they are streamed.

    Raises:
        DataError: The folder has no images, they differ in size or mode and config.size and
            config.mode do not convert them, or more of them cannot be read than
            config.bad_pictures allows.
    """
    listing, decoding, first = folders.folder(path, config)
    decoded_bytes = len(listing.names) * int(np.prod(first.shape))
    if config.crop == "random" or decoded_bytes > config.in_memory_mb * MEGABYTE:
        return folders.stream(config, listing, decoding, first)
    images, labels, bad = folders.read_all(listing, config, decoding)
    left_out = f", {bad} unreadable ones left out" if bad else ""
    note = f"{len(images)} pictures of a local folder{left_out}"
    return Pictures(path.name, images, labels, listing.classes, "not stated", note)
