"""How `--data` becomes a data set."""

from __future__ import annotations

import logging
import os
from dataclasses import replace
from pathlib import Path

import numpy as np

from ..config import Config
from . import folder as folders
from .arrays import npz
from .builtin import digits, emoji
from .dataset import Dataset
from .labels import class_name, listed, unused
from .memory import Pictures
from .pairs import pairs
from .tasks import task_of
from .vectors import by_name

log = logging.getLogger(__name__)

MEGABYTE = 2**20


def load(config: Config) -> Dataset:
    """Return the images that `config.data` names.

    Raises:
        DataError: There are no images, one is not like the others, or a label or a class name is
            not text that JSON can hold.
    """
    dataset = _load(config)
    if config.conditioned:
        task_of(config, dataset)  # refuses images that do not suit the task
    # Without labels no class is checked: folders may then have any names.
    if not config.labels:
        return dataset.unlabelled()
    for name in dataset.classes:
        class_name(name, config.data)
    if empty := unused(dataset.classes, dataset.labels):
        log.warning("%s: %d classes have no images: %s", config.data, len(empty), listed(empty))
    return dataset


def _load(config: Config) -> Dataset:
    kind, _, place = config.data.partition(":")
    if kind == "digits":
        return digits()
    if kind == "emoji":
        return emoji(config.split, paired=config.task == "restyle")
    if kind == "npz":
        return npz(Path(place), config.size, config.mode, config.condition_column)
    if kind == "pairs":
        return pairs(Path(place), config)
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
        DataError: The folder has no images, or they differ in size or mode while config.size and
            config.mode do not convert them. Or more of them cannot be read than config.bad_pictures
            allows.
    """
    # One image is decoded: the size of all follows, because they must have one shape.
    listing, images = folders.folder(path, config)
    decoded_bytes = len(images) * int(np.prod(images.shape))
    # A random crop differs in every epoch, so decoded images would be of no use.
    if config.condition_column:
        # Streamed, because images that cannot be read would shift the vectors of others.
        relative = [os.path.relpath(name, path) for name in listing.names]
        vectors = by_name(Path(config.condition_column), relative)
        return replace(folders.stream(config, listing, images), given={"vector": vectors})
    if config.crop == "random" or decoded_bytes > config.in_memory_mb * MEGABYTE:
        return folders.stream(config, listing, images)
    pixels, labels, bad = folders.read_all(listing, config, images)
    left_out = f", {bad} unreadable ones left out" if bad else ""
    note = f"{len(pixels)} pictures of a local folder{left_out}"
    return Pictures(path.name, pixels, labels, listing.classes, "not stated", note)
