"""The contents of a folder of training images, and the files that are left out."""

from __future__ import annotations

import os
import re
import shlex
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from ..config.text import printable
from ..errors import DataError
from .decode import endings, image_bytes, image_ending
from .labels import listed

SPLIT = re.compile(r"(train|training|test|testing|val|valid|validation|dev|eval)([-_ ]?\d+)?", re.I)
"""Folders with these names are parts of a data set, not classes."""
SIDECARS = frozenset((
    ".txt", ".json", ".csv", ".xml", ".yaml", ".yml", ".md", ".html", ".caption",
    ".cls", ".npy", ".npz", ".zip", ".db", ".ini",
))  # fmt: skip
SNIFFED = 100
"""Files of a folder, at most, whose first bytes are read because their ending says nothing."""

IMAGES = "images with an ending that is not read"
HIDDEN = "hidden images and folders"
LINKS = "links that lead nowhere"
LOOPS = "links to a folder above"
SPECIAL = "entries that are not regular files"
OTHER = "other files"


@dataclass
class Contents:
    """Names in one folder.

    Attributes:
        left_out: Why → names that are not trained on.
    """

    images: list[str] = field(default_factory=list)
    folders: list[str] = field(default_factory=list)
    left_out: dict[str, list[str]] = field(default_factory=dict)

    def leave_out(self, kind: str, name: str) -> None:
        self.left_out.setdefault(kind, []).append(name)


def contents(path: Path) -> Contents:
    """List one folder.

    Raises:
        DataError: The folder cannot be read.
    """
    found = Contents()
    try:
        with os.scandir(path) as entries:
            for entry in entries:
                _sort(entry, found)
    except OSError as error:
        raise DataError(f"the folder {printable(str(path))} cannot be listed ({error}).") from error
    # Sorted, because the order of a folder's entries differs between file systems, and the order of
    # images decides what each step trains on.
    found.images.sort()
    found.folders.sort()
    _sniff(path, found)
    for names in found.left_out.values():
        names.sort()
    return found


def _sort(entry: os.DirEntry[str], found: Contents) -> None:
    ending = os.path.splitext(entry.name)[1].lower()
    try:
        is_folder = entry.is_dir()
        is_file = entry.is_file()
    except OSError:  # a link to itself
        is_folder = is_file = False
    if entry.name.startswith((".", "__MACOSX")):
        if is_folder or image_ending(ending):
            found.leave_out(HIDDEN, entry.name)
    elif is_folder:
        found.folders.append(entry.name)
    elif not is_file:
        found.leave_out(LINKS if entry.is_symlink() else SPECIAL, entry.name)
    elif ending in endings():
        found.images.append(entry.name)
    else:
        found.leave_out(IMAGES if image_ending(ending) else OTHER, entry.name)


def _sniff(path: Path, found: Contents) -> None:
    """Move files from OTHER to IMAGES if their first bytes are those of an image."""
    unclear = [
        n for n in found.left_out.get(OTHER, []) if os.path.splitext(n)[1].lower() not in SIDECARS
    ]
    for name in unclear[:SNIFFED]:
        try:
            with (path / name).open("rb") as file:
                if image_bytes(file.read(16)):
                    found.left_out[OTHER].remove(name)
                    found.leave_out(IMAGES, name)
        except OSError:
            continue
    if not found.left_out.get(OTHER, [""]):
        del found.left_out[OTHER]


def identity(path: Path) -> tuple[int, int]:
    """Return the identity of this folder, through any link."""
    status = os.stat(path)
    return status.st_dev, status.st_ino


@dataclass(frozen=True)
class Survey:
    """A folder, its subfolders by name, and the folders below these by their path from it."""

    path: Path
    root: Contents
    classes: Mapping[str, Contents]
    deeper: Mapping[str, Contents]

    def images(self) -> list[str]:
        """Return every image at any depth, by its path from the folder."""
        below = {**self.classes, **self.deeper}
        inner = [f"{folder}/{name}" for folder, found in below.items() for name in found.images]
        return self.root.images + inner

    def left_out(self) -> dict[str, list[str]]:
        """Return kind → files that are not trained on, by their path from the folder."""
        found = {kind: list(names) for kind, names in self.root.left_out.items()}
        for folder, inside in {**self.classes, **self.deeper}.items():
            for kind, names in inside.left_out.items():
                found.setdefault(kind, []).extend(f"{folder}/{name}" for name in names)
        return found


def survey(path: Path) -> Survey:
    """Look through a folder and everything below it. Links to a folder above are not followed.

    Raises:
        DataError: A folder cannot be read.
    """
    root = contents(path)
    top = identity(path)
    classes: dict[str, Contents] = {}
    for name in root.folders:
        # A link to the folder itself would be a class of all images.
        if identity(path / name) == top:
            root.leave_out(LOOPS, name)
        else:
            classes[name] = contents(path / name)
    seen = {top, *(identity(path / name) for name in classes)}
    deeper = {
        inner: found
        for name, inside in classes.items()
        for inner, found in _below(path, name, inside, seen)
    }
    return Survey(path, root, classes, deeper)


def _below(
    path: Path, name: str, top: Contents, seen: set[tuple[int, int]]
) -> Iterator[tuple[str, Contents]]:
    """Yield every folder below path/name that is not in `seen`, and add it there."""
    # With a list, not by recursion: a tree may be deeper than Python's stack.
    waiting = [(name, top)]
    while waiting:
        parent, inside = waiting.pop()
        for folder in inside.folders:
            inner = f"{parent}/{folder}"
            key = identity(path / inner)
            if key not in seen:
                seen.add(key)
                found = contents(path / inner)
                yield inner, found
                waiting.append((inner, found))


def require_layout(found: Survey) -> None:
    """Check that every image of the folder has a class.

    Raises:
        DataError: Images are deeper than the class folders, or the subfolders are the parts of a
            data set. Or a subfolder has only images that are not read.
    """
    shown = printable(str(found.path))
    counts = {name: len(inside.images) for name, inside in found.classes.items() if inside.images}
    deeper = {name: len(inside.images) for name, inside in found.deeper.items() if inside.images}
    if deeper:
        raise _nested(found, sum(counts.values()) + len(found.root.images), deeper)
    # A network would learn to distinguish the training images from the test images.
    if len(counts) > 1 and all(SPLIT.fullmatch(name) for name in counts):
        raise DataError(
            f"{shown} has the parts of a data set, not classes: {_counted(counts)}. "
            f"Name one of them: {_data(found.path / max(counts, key=lambda name: counts[name]))}."
        )
    # A folder without any image is not a class, but one whose images are all left out is a mistake.
    for name, inside in found.classes.items():
        hidden = [
            n
            for n in inside.left_out.get(HIDDEN, [])
            if image_ending(os.path.splitext(n)[1].lower())
        ]
        lost = inside.left_out.get(IMAGES, []) + inside.left_out.get(LINKS, []) + hidden
        if lost and not inside.images:
            raise DataError(
                f"the class folder {printable(f'{found.path}/{name}')} has no image that is read, "
                f"but {len(lost)} that are not: {listed(lost, 3)}. Convert them to one of "
                f"{', '.join(sorted(endings()))}, or move the folder away."
            )


def _nested(found: Survey, used: int, deeper: Mapping[str, int]) -> DataError:
    shown = printable(str(found.path))
    # The remedy names the folder with the most images one level below its subfolders.
    parents = Counter({os.path.dirname(name): 0 for name in deeper})
    for name, count in deeper.items():
        parents[os.path.dirname(name)] += count
    best = parents.most_common(1)[0][0]
    many = f"{sum(deeper.values())} images in deeper folders ({_counted(deeper)})"
    if used:
        return DataError(
            f"{shown} has {used} images in itself and its subfolders, but also {many}, which "
            "would be left out. Move them into one folder per class, or name their classes with "
            "--label-file."
        )
    return DataError(
        f"{shown} has no images in itself or its subfolders, but {many}. Name the folder that "
        f"holds the class folders, such as {_data(found.path / best)}."
    )


def _counted(counts: Mapping[str, int], most: int = 5) -> str:
    return listed([f"{name}: {count}" for name, count in counts.items()], most)


def _data(path: Path) -> str:
    return f"--data {shlex.quote(f'folder:{printable(str(path))}')}"


def summary(found: Survey) -> str:
    """Return one line that counts and names the files left out, or "" if there are none."""
    left_out = found.left_out()
    parts = [
        f"{len(names)} {kind} ({_endings(names) if kind == OTHER else listed(names, 3)})"
        for kind, names in left_out.items()
    ]
    if empty := [name for name, inside in found.classes.items() if not inside.images]:
        parts.append(f"{len(empty)} folders without images, which are no classes ({listed(empty)})")
    return f"{printable(str(found.path))}: left out {'; '.join(parts)}" if parts else ""


def _endings(names: list[str]) -> str:
    counts = Counter(os.path.splitext(name)[1].lower() or "no ending" for name in names)
    return ", ".join(f"{printable(ending)}: {count}" for ending, count in counts.most_common(5))
