"""Pairs of images by name: the conditions in `source/`, the images to learn in `target/`."""

from __future__ import annotations

import logging
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ..config import Config
from ..config.text import printable
from ..errors import DataError
from . import folder as folders
from .decode import UnreadablePicture
from .image_files import ImageFiles, Names, open_images
from .labels import listed
from .memory import Pictures
from .survey import summary, survey

log = logging.getLogger(__name__)

MEGABYTE = 2**20


def pairs(path: Path, config: Config) -> Pictures:
    """Read pairs of images into memory; a class per subfolder of both.

    Raises:
        DataError: A folder is missing, an image has no partner or cannot be read, or they do not
            fit in the memory that config.in_memory_mb allows.
    """
    for part in ("source", "target"):
        if not (path / part).is_dir():
            raise DataError(
                f"{printable(str(path))} has no folder {part}/. --data pairs:PATH needs source/ "
                "and target/ with images of the same names."
            )
    target = path / "target"
    listing, wanted = folders.folder(target, config)
    # By the path inside the folder: classes are subfolders of both.
    relative = [os.path.relpath(name, target) for name in listing.names]
    names = Names(str(path / "source" / name) for name in relative)
    missing = [name for name, file in zip(relative, names, strict=True) if not Path(file).is_file()]
    if missing:
        raise DataError(
            f"{printable(str(path))}: {len(missing)} images of target/ have none of the same name "
            f"in source/: {listed(missing, 3)}. Add them, or remove these."
        )
    source = survey(path / "source")
    if skipped := summary(source):
        log.warning("%s", skipped)
    alone = sorted(set(source.images()) - set(relative))
    if alone:
        raise DataError(
            f"{printable(str(path))}: {len(alone)} images of source/ have none of the same name in "
            f"target/: {listed(alone, 3)}. Add them, or remove these."
        )
    given = open_images(config, str(path / "source"), names, lambda i: Path(names[i]))
    needed = len(names) * int(np.prod(wanted.shape) + np.prod(given.shape))
    # Workers read one file an image, so pairs are not streamed.
    if needed > config.in_memory_mb * MEGABYTE:
        raise DataError(
            f"{printable(str(path))} takes {needed / MEGABYTE:.0f} MB, and pairs are read into "
            f"memory. Pass --in-memory-mb {needed // MEGABYTE + 1}, or a smaller --size."
        )
    pictures = Pictures(
        name=folders.title(path),
        images=_read(wanted),
        labels=listing.labels,
        classes=listing.classes,
        licence="not stated",
        note=f"{len(names)} pairs of a local folder",
    )
    return replace(pictures, given={"source": _read(given)})


def _read(images: ImageFiles) -> NDArray[np.uint8]:
    found = []
    for i in range(len(images)):
        try:
            found.append(images.read(i))
        except UnreadablePicture as error:
            raise DataError(
                f"{printable(images.names[i])} cannot be read ({error}). Remove it from source/ "
                "and target/."
            ) from error
    return np.stack(found)
