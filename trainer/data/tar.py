"""The index of a tar file of images: the place and the class of each.

An image and its class share a name up to the first dot: a.jpg and a.cls, or a.png and a.json. The
file is read once from end to end; any image is one read afterwards.
"""

from __future__ import annotations

import os
import tarfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from runtime.errors import UnnoiseError
from runtime.files import from_json

from ..config import Config
from ..errors import DataError
from .decode import endings, image_ending
from .labels import label_name, utf8

LABELS = ("cls", "json")
"""Endings that hold the class where --label-column does not say."""
LARGEST_LABEL = 16 * 2**20
"""Bytes of a label member: a larger one is not a label."""


class Place(NamedTuple):
    """The place of a member: its shard, and the bytes there."""

    shard: int
    offset: int
    size: int


@dataclass
class Index:
    """What a shard holds.

    Attributes:
        images: Key → name and place. A key is a member's name up to the first dot.
        labels: Key → class.
        left_out: Why → names of members.
    """

    images: dict[str, tuple[str, Place]] = field(default_factory=dict)
    labels: dict[str, str] = field(default_factory=dict)
    left_out: dict[str, list[str]] = field(default_factory=dict)

    def leave_out(self, kind: str, name: str) -> None:
        self.left_out.setdefault(kind, []).append(name)

    def add_label(self, key: str, label: str, shard: Path) -> None:
        """Give an image its class. Raises DataError if it has another one."""
        if (other := self.labels.setdefault(key, label)) != label:
            raise DataError(
                f"{shard}: {key!a} has two classes, {other!r} and {label!r}. Name the ending, or "
                "the entry, that counts with --label-column."
            )


def indexed(number: int, shard: Path, config: Config) -> Index:
    """Read a shard's headers and labels.

    Raises:
        DataError: The file is not a whole uncompressed tar file, or a member cannot be used.
    """
    index = Index()
    places: dict[str, Place] = {}
    others: list[tuple[str, str]] = []
    try:
        with tarfile.open(shard, "r:") as tar:
            for member in tar:
                if member.isdir():
                    continue
                place = _place(number, shard, member, places)
                key, ending = _key(member.name)
                if not key or place is None:
                    _leave_out(index, member, ending)
                elif ending == config.image_column or (
                    not config.image_column and f".{ending}" in endings()
                ):
                    if key in index.images:
                        index.leave_out("second images of the same name", member.name)
                    else:
                        index.images[key] = (member.name, place)
                elif config.labels and _is_label(ending, config.label_column):
                    data = _small(shard, place, member.name)
                    label = _label(
                        data, ending, config.label_column, f"{shard}, member {member.name!a}"
                    )
                    if label is not None:
                        index.add_label(key, label, shard)
                    others.append((key, member.name))
                else:
                    others.append((key, member.name))
            _require_end(shard, tar.offset)
    except UnnoiseError:
        raise
    except Exception as error:  # tarfile raises a dozen kinds for damaged headers
        raise DataError(
            f"{shard} cannot be read as an uncompressed tar file ({type(error).__name__}: "
            f"{error}). "
            "Fetch or write it again."
        ) from error
    # Only now it is clear which members have no image: a label may come before it.
    for key, name in others:
        ending = os.path.splitext(name)[1].lower()
        if key not in index.images:
            kind = (
                "images with an ending that is not read"
                if image_ending(ending)
                else "members without an image"
            )
            index.leave_out(kind, name)
    return index


def _key(name: str) -> tuple[str, str]:
    """Return what a member has in common with its image's, "" for a hidden file, and its ending."""
    folder, _, base = name.rpartition("/")
    stem, _, ending = base.partition(".")
    if not stem or "__MACOSX" in folder:
        return "", os.path.splitext(base)[1][1:].lower()
    return (f"{folder}/{stem}" if folder else stem), ending.lower()


def _place(
    number: int, shard: Path, member: tarfile.TarInfo, places: dict[str, Place]
) -> Place | None:
    """Return where a member's bytes are, None if it is not a file. Hard links lead to their file.

    Raises:
        DataError: The name is given twice, or the bytes are not stored in one piece.
    """
    # A tar file may hold a name twice, and the later one counts: here that is a mistake.
    if member.name in places:
        raise DataError(
            f"{shard}: the member {member.name!a} is there twice. Write the shard with unique "
            f"names."
        )
    if member.issparse():
        raise DataError(
            f"{shard}: the member {member.name!a} is stored as a sparse file. "
            "Write the shard again without this option."
        )
    # A hard link has no bytes of its own.
    if member.islnk() and member.linkname in places:
        place = places[member.linkname]
    elif member.isreg():
        place = Place(number, member.offset_data, member.size)
    else:
        return None
    places[member.name] = place
    return place


def _leave_out(index: Index, member: tarfile.TarInfo, ending: str) -> None:
    if image_ending(f".{ending}") or image_ending(os.path.splitext(member.name)[1].lower()):
        index.leave_out(
            "hidden images" if member.isreg() else "links and special files", member.name
        )


def _require_end(shard: Path, offset: int) -> None:
    """Check that the last header that was read is where the archive ends.

    tarfile takes a damaged header for the end, and stops at the first of two joined archives.
    """
    size = shard.stat().st_size
    if offset > size:
        raise DataError(
            f"{shard} is cut short: {size} bytes of at least {offset}. Fetch or write it again."
        )
    with shard.open("rb") as file:
        file.seek(offset)
        while block := file.read(1 << 20):
            if block.strip(b"\0"):
                raise DataError(
                    f"{shard}: what follows byte {offset} is not a member of the tar file: a "
                    f"header "
                    "is damaged or cut short, or two tar files were joined. Fetch or write it "
                    "again."
                )
    if size - offset < tarfile.BLOCKSIZE:
        raise DataError(f"{shard} is cut short: it has no end marker. Fetch or write it again.")


def _is_label(ending: str, column: str) -> bool:
    return ending == "json" or ending == column or (not column and ending in LABELS)


def _small(shard: Path, place: Place, name: str) -> bytes:
    """Return a label member's bytes.

    Raises:
        DataError: It is too large, or the file is cut short.
    """
    if place.size > LARGEST_LABEL:
        raise DataError(
            f"{shard}: the label {name!a} must have at most {LARGEST_LABEL} bytes, got "
            f"{place.size}."
        )
    with shard.open("rb") as file:
        file.seek(place.offset)
        data = file.read(place.size)
    if len(data) < place.size:
        raise DataError(f"{shard} is cut short in the member {name!a}. Fetch or write it again.")
    return data


def _label(data: bytes, ending: str, column: str, where: str) -> str | None:
    """Return a class: the text of a member, or the entry of a JSON member called `column`.

    By default the entry is label, or cls. None if a JSON member has no such entry.
    """
    if ending != "json":
        return label_name(utf8(data, where).strip(), where)
    try:
        value = from_json(data)
    except ValueError as error:
        raise DataError(f"{where}: it cannot be read as JSON ({error}).") from error
    if not isinstance(value, dict):
        raise DataError(
            f'{where}: it must be a JSON object such as {{"label": 3}}, got {ascii(value)[:80]}.'
        )
    found = [value[key] for key in ([column] if column else ["label", "cls"]) if key in value]
    return label_name(found[0], where) if found else None
