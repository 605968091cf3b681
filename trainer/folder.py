"""Pictures in a folder: which files there are, and of which class each is."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from runtime.files import from_json
from runtime.progress import track

from .config import Config
from .decode import Decoding, UnreadablePicture, unlike
from .errors import DataError
from .streams import Names, Stream, probe, refused, streamed, too_many, too_many_error

log = logging.getLogger(__name__)

ENDINGS = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm"}


@dataclass(frozen=True, eq=False)
class Listing:
    """Files under `path`, each name with `path` before it, and the class of each."""

    path: Path
    names: Names
    labels: NDArray[np.int64]
    classes: tuple[str, ...]

    def file(self, i: int) -> Path:
        return Path(self.names[i])


def listing(path: Path, label_file: str = "") -> Listing:
    """The pictures under `path`: a class per subfolder; or one class where there are no subfolders with pictures; or by a JSON file.

    Hidden files and folders, and __MACOSX, are passed over. Raises DataError where there are none, or some beside subfolders with pictures.
    """
    if not path.is_dir():
        raise DataError(
            f"{path} is not a folder. --data folder:PATH needs a folder with a subfolder of pictures per class."
        )
    if label_file:
        return _labelled(path, Path(label_file))
    found = [(name, sorted(_pictures_in(path / name))) for name in sorted(_folders_in(path))]
    found = [(name, files) for name, files in found if files]
    names = [f"{name}/{file}" for name, files in found for file in files]
    labels = np.repeat(np.arange(len(found), dtype=np.int64), [len(files) for _, files in found])
    beside = sorted(_pictures_in(path))
    if names and beside:
        raise DataError(
            f"{path} has {len(beside)} pictures itself ({beside[0]}, …) and {len(names)} in {len(found)} subfolders ({found[0][0]}, …): "
            "move one or the other away, or say the class of each with --label-file."
        )
    if not names:
        names = beside
        found, labels = [(path.name, names)], np.zeros(len(names), np.int64)
    if not names:
        raise DataError(f"no pictures in {path} (looked for {', '.join(sorted(ENDINGS))} there and in its subfolders).")
    return Listing(path, _under(path, names), labels, tuple(name for name, _ in found))


def _under(path: Path, names: list[str]) -> Names:
    return Names(str(path / name) for name in names)


def _folders_in(path: Path) -> list[str]:
    return [p.name for p in path.iterdir() if p.is_dir() and not p.name.startswith((".", "__MACOSX"))]


def _pictures_in(path: Path) -> list[str]:
    return [
        p.name for p in path.iterdir() if p.suffix.lower() in ENDINGS and not p.name.startswith(".") and p.is_file()
    ]


def _labelled(path: Path, label_file: Path) -> Listing:
    """By a JSON file: {"a/1.png": "cats", …}, or StyleGAN's {"labels": [["a/1.png", 3], …]}."""
    try:
        value = from_json(label_file.read_bytes())
        pairs = value["labels"] if isinstance(value, Mapping) and isinstance(value.get("labels"), list) else value
        of = {str(name): str(label) for name, label in (pairs.items() if isinstance(pairs, Mapping) else pairs)}
    except (OSError, ValueError, TypeError) as error:
        raise DataError(
            f"{label_file} does not say the class of each picture ({error}): "
            'write {"a/1.png": "cats", …}, or {"labels": [["a/1.png", 3], …]}.'
        ) from error
    names = sorted(of)
    if missing := [name for name in names if ".." in Path(name).parts or not (path / name).is_file()]:
        raise DataError(f"{label_file} names {missing[0]!r} and {len(missing) - 1} more that are not in {path}.")
    classes, labels = numbered([of[name] for name in names])
    if not names:
        raise DataError(f"{label_file} names no pictures.")
    return Listing(path, _under(path, names), labels, classes)


def numbered(values: list[Any]) -> tuple[tuple[str, ...], NDArray[np.int64]]:
    """Class names, sorted (whole numbers by their size), and the index of each value among them."""
    kinds = sorted({str(v) for v in values}, key=lambda v: (not v.isdigit(), int(v) if v.isdigit() else 0, v))
    index = {name: i for i, name in enumerate(kinds)}
    return tuple(kinds), np.array([index[str(v)] for v in values], np.int64)


def folder(path: Path, config: Config) -> tuple[Listing, Decoding, str, tuple]:
    """The listing, how its pictures are decoded, and name and shape (H, W, C) of the first that can be read."""
    found, decoding = listing(path, config.label_file), Decoding(config.size, config.mode)
    return found, decoding, *probe(str(path), found.names, found.file, decoding)


def stream(config: Config, found: Listing, decoding: Decoding, first: str, shape: tuple) -> Stream:
    """Of a folder, read as it is needed."""
    path = found.path
    sizes = [os.stat(name).st_size for name in found.names]
    relative = (os.path.relpath(name, path) for name in found.names)
    return streamed(
        config,
        decoding,
        (first, shape),
        (relative, sizes),
        name=path.name,
        names=found.names,
        fetch=found.file,
        labels=found.labels,
        classes=found.classes,
        note=f"{len(found.names)} pictures of a local folder",
    )


def read_all(found: Listing, config: Config, decoding: Decoding) -> tuple[NDArray[np.uint8], NDArray[np.int64], int]:
    """images [N, H, W, C], labels [N], and how many could not be read. Raises DataError, see `trainer.data.load`."""
    images: list[NDArray[np.uint8]] = []
    labels, bad, first = [], [], found.path
    for i in track(range(len(found.names)), f"reading {found.path.name}"):
        file = found.file(i)
        try:
            picture = decoding(file, str(file))
        except UnreadablePicture as error:
            if config.bad_pictures == "refuse":
                raise refused(str(file), error) from error
            log.warning("skipped %s: %s", file, error)
            bad.append(str(file))
            continue
        if images and picture.shape != images[0].shape:
            raise unlike(str(file), picture.shape, str(first), images[0].shape)
        first = first if images else file
        images.append(picture)
        labels.append(found.labels[i])
    if not images:
        raise DataError(f"none of the {len(found.names)} pictures in {found.path} can be read.")
    if too_many(len(bad), len(found.names)):
        raise too_many_error(bad, len(found.names))
    return np.stack(images), np.array(labels, np.int64), len(bad)
