"""Images in a folder: which files there are, and the class of each."""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from runtime.files import from_json
from runtime.terminal.progress import track

from ..config import Config
from ..config.text import printable, text_fault
from ..errors import DataError
from .decode import UnreadablePicture, endings
from .image_files import ImageFiles, Names, open_images, stamp_of
from .labels import class_name, label_name, listed, numbered, unused
from .stream import Stream
from .survey import Survey, require_layout, summary, survey
from .unreadable import too_many, too_many_error, vanished

log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Listing:
    """Files under `path`, and the class of each.

    Attributes:
        names: The files' paths, each with `path` before it.
        labels: [N] int64, indices into `classes`.
    """

    path: Path
    names: Names
    labels: NDArray[np.int64]
    classes: tuple[str, ...]

    def file(self, i: int) -> Path:
        return Path(self.names[i])


def listing(path: Path, label_file: str = "") -> Listing:
    """List the images under `path`: a class per subfolder, one class, or by a JSON label file.

    One warning counts and names the files that are left out.

    Raises:
        DataError: There are no images, or the layout leaves images without a class.
    """
    if not path.is_dir():
        raise DataError(
            f"{printable(str(path))} is not a folder. "
            "--data folder:PATH needs a folder with a subfolder of images per class."
        )
    found = survey(path)
    if not label_file:
        require_layout(found)
    if skipped := summary(found):
        log.warning("%s", skipped)
    return _labelled(found, Path(label_file)) if label_file else _by_folder(found)


def _by_folder(found: Survey) -> Listing:
    path = found.path
    beside = found.root.images
    classes = {
        name: inside.images for name, inside in sorted(found.classes.items()) if inside.images
    }
    count = sum(map(len, classes.values()))
    if classes and beside:
        raise DataError(
            f"{printable(str(path))} has {len(beside)} images itself ({listed(beside, 1)}) and "
            f"{count} in {len(classes)} subfolders ({listed(list(classes), 3)}). "
            "Move one or the other away, or name the class of each with --label-file."
        )
    if not classes and not beside:
        raise DataError(
            f"no images in {printable(str(path))} or its subfolders. "
            f"Files that end in {', '.join(sorted(endings()))} are read."
        )
    if not classes:
        return Listing(path, _under(path, beside), np.zeros(len(beside), np.int64), (title(path),))
    # Sorted by class and then by name, on every machine.
    names = [f"{name}/{file}" for name, files in classes.items() for file in files]
    counts = [len(files) for files in classes.values()]
    labels = np.repeat(np.arange(len(classes), dtype=np.int64), counts)
    return Listing(path, _under(path, names), labels, tuple(classes))


def title(path: Path) -> str:
    """Return a folder's own name, also for `.` and `..`."""
    name = path.name if path.name not in ("", "..") else os.path.basename(os.path.realpath(path))
    return name or "all"


def _under(path: Path, names: list[str]) -> Names:
    return Names(str(path / name) for name in names)


def _labelled(found: Survey, label_file: Path) -> Listing:
    """Return the listing by a JSON file: {"a/1.png": "cats", …}, or StyleGAN's {"labels":
    [["a/1.png", 3], …]}."""
    path = found.path
    label_of = _read_labels(label_file)
    names = sorted(label_of)  # not in the order of the file: the same labels are the same data
    missing = [name for name in names if not _is_file(path / name)]
    if missing:
        raise DataError(
            f"{label_file} names {listed([ascii(name) for name in missing], 3)}, which "
            f"{'is' if len(missing) == 1 else 'are'} not in {printable(str(path))}."
        )
    if skipped := sorted(set(found.images()) - set(names)):
        log.warning(
            "%s does not name %d of the images in %s, which are left out (%s)",
            label_file,
            len(skipped),
            printable(str(path)),
            listed(skipped, 3),
        )
    classes, labels = numbered(label_of[name] for name in names)
    return Listing(path, _under(path, names), labels, classes)


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):  # a name that is too long, or that no file can have
        return False


def _read_labels(label_file: Path) -> dict[str, str]:
    """Return image → class.

    Raises:
        DataError: The file is not JSON of one of the two forms, or gives an image two classes.
    """
    try:
        value = from_json(label_file.read_bytes())
    except (OSError, ValueError) as error:
        raise DataError(f"the label file {label_file} cannot be read as JSON ({error}).") from error
    # A list, or null, distinguishes StyleGAN's form from an image that is called "labels".
    if (
        isinstance(value, dict)
        and isinstance(value.get("labels"), list | None)
        and "labels" in value
    ):
        value = value["labels"]
    pairs = list(value.items()) if isinstance(value, dict) else value
    if not isinstance(pairs, list) or not pairs:
        raise DataError(f"the label file {label_file} names no images. {FORMS}")
    found: dict[str, str] = {}
    for i, pair in enumerate(pairs):
        where = f"{label_file}, entry {i}"
        if not isinstance(pair, list | tuple) or len(pair) != 2 or not isinstance(pair[0], str):
            raise DataError(
                f"{where} must be an image's name and its class, got {_short(pair)}. {FORMS}"
            )
        name = _plain(pair[0], where)
        label = label_name(pair[1], f"{where} ({name!a})")
        if found.setdefault(name, label) != label:
            raise DataError(f"{where}: {name!a} has two classes, {found[name]!r} and {label!r}.")
    return found


FORMS = 'Write {"a/1.png": "cats", …}, or {"labels": [["a/1.png", 3], …]}.'


def _short(value: object) -> str:
    return ascii(value)[:80]


def _plain(name: str, where: str) -> str:
    """Return the path in its shortest form.

    Raises:
        DataError: It is not inside the folder, or is not text.
    """
    # A label file may come from anywhere: it must not name files outside the folder.
    if text_fault(name):
        raise DataError(f"{where}: the name {name!a} {text_fault(name)}.")
    if not name or os.path.isabs(name) or ".." in Path(name).parts:
        raise DataError(
            f"{where}: {name!r} must be a path inside the folder of --data, without '..'."
        )
    return os.path.normpath(name)


def folder(path: Path, config: Config) -> tuple[Listing, ImageFiles]:
    """Return the listing, and the images as they are read.

    Raises:
        DataError: See `listing` and `open_images`; or a class name is not text that JSON can hold.
    """
    found = listing(path, config.label_file)
    if config.labels:
        for name in found.classes:
            class_name(name, f"the folder {printable(str(path))}")
    return found, open_images(config, str(path), found.names, found.file)


def stream(config: Config, found: Listing, images: ImageFiles) -> Stream:
    """Return the images of a folder, each to be read when it is needed."""
    path = found.path
    sizes = [os.stat(name).st_size for name in found.names]
    # Relative names: moving the folder does not change the fingerprint.
    relative = (os.path.relpath(name, path) for name in found.names)
    return Stream(
        name=path.name,
        images=images,
        labels=found.labels,
        classes=found.classes,
        stamp=stamp_of(relative, sizes, found.labels, images.decoding, config.crop),
        note=f"{len(found.names)} pictures of a local folder",
    )


def read_all(
    found: Listing, config: Config, images: ImageFiles
) -> tuple[NDArray[np.uint8], NDArray[np.int64], int]:
    """Read all images of a folder.

    Returns:
        images [N, H, W, C], labels [N], and how many images could not be read.

    Raises:
        DataError: See `trainer.data.sources.folder`.
    """
    pixels: list[NDArray[np.uint8]] = []
    labels: list[int] = []
    bad: list[str] = []
    for i in track(range(len(images)), f"reading {found.path.name}"):
        try:
            pixels.append(images.read(i))
        except UnreadablePicture as error:
            log.warning("skipped %s: %s", printable(images.names[i]), error)
            bad.append(images.names[i])
            continue
        labels.append(int(found.labels[i]))
    if not pixels:
        raise DataError(
            f"none of the {len(found.names)} images in {printable(str(found.path))} can be read."
        )
    if too_many(len(bad), len(found.names)):
        raise too_many_error(bad, len(found.names))
    if config.labels and (gone := unused(found.classes, np.array(labels, np.int64))):
        raise vanished(gone)
    return np.stack(pixels), np.array(labels, np.int64), len(bad)
