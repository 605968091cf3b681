"""How `--data` becomes a data set."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from ..config import Config
from ..errors import DataError
from . import folder as folders
from .arrays import npz
from .builtin import digits, emoji
from .dataset import Dataset
from .decode import describe
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
    if kind in ("digits", "emoji", "npz"):
        return _as_they_are(kind, place, config)
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


def _as_they_are(kind: str, place: str, config: Config) -> Pictures:
    """Return images that are not files of their own, and warn of options for files."""
    if kind == "npz":
        found = npz(Path(place), config.size, config.mode, config.condition_column)
    elif kind == "emoji":
        found = emoji(config.split, paired=config.task == "restyle")
    else:
        found = digits()
    C, H, W = found.sample_shape
    wanted = (config.size or H, config.size or W, {"RGB": 3, "L": 1}.get(config.mode, C))
    if wanted != (H, W, C) or config.crop != "centre":
        log.warning(
            "%s: --size, --mode and --crop are for image files, and these images stay %s",
            config.data,
            describe((H, W, C)),
        )
    return found


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


def require_same_data(
    place: Path, dataset: Dataset, record: object, classes: Sequence[str]
) -> None:
    """Check that labels mean what they meant in training, and warn if the images are others.

    Args:
        place: The run or the bundle.
        dataset: As it is now.
        record: What the run or the bundle states about the data that it was trained on.
        classes: Those that it was trained with.

    Raises:
        DataError: The data has other classes now.
    """
    if tuple(classes) != dataset.classes:
        raise DataError(
            f"{place} was trained with the classes {listed(classes) or 'none'}, and its data "
            f"has {listed(dataset.classes) or 'none'} now. Put the old data back."
        )
    fingerprint = record.get("fingerprint") if isinstance(record, Mapping) else None
    if fingerprint != dataset.fingerprint():
        log.warning(
            "the data of %s has changed since training: it is compared with the %d images that are "
            "there now",
            place,
            len(dataset),
        )
