"""WebDataset: pictures in tar files. Each file is read once from end to end to learn where its
members lie; any picture is then one read.

A picture is its name up to the first dot: a.jpg and a.cls, or a.png and a.json, belong together.
Because the order of pictures is a permutation of all, not of shards, a run goes on within a shard
as exactly as elsewhere. Shards that are not files are fetched once.
"""

from __future__ import annotations

import hashlib
import logging
import math
import os
import re
import tarfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np

from runtime.backends import cache
from runtime.errors import RequestError, UnnoiseError
from runtime.files import from_json, replacing
from runtime.progress import track

from ..config import Config
from ..errors import DataError
from ..processes import lock
from .decode import Decoding, endings, image_ending
from .labels import label_name, listed, numbered, printable, utf8
from .stream import Files, Names, Stream, probe, stamp_of, streamed

log = logging.getLogger(__name__)

LABELS = ("cls", "json")
"""Endings that hold the class where --label-column does not say."""
LARGEST_LABEL = 16 * 2**20
MOST_SHARDS = 1_000_000


class Place(NamedTuple):
    """Where a member lies: its shard, and the bytes there."""

    shard: int
    offset: int
    size: int


def stream(urls: str, config: Config) -> Stream:
    """The pictures of the shards, braces expanded as webdataset does. Raises DataError where there
    are none, or where one lacks a class."""
    shards = [local(url) for url in _expanded(urls)]
    names = []
    places = []
    labels = []
    left_out: dict[str, list[str]] = {}
    lost: set[str] = set()
    for i, shard in enumerate(track(shards, "indexing shards")):
        index = _indexed(i, shard, config)
        for kind, members in index.left_out.items():
            left_out.setdefault(kind, []).extend(f"{shard.name}/{member}" for member in members)
        lost.update(label for key, label in index.labels.items() if key not in index.images)
        for key, (name, place) in index.images.items():
            names.append(f"{shard.name}/{name}")
            places.append(place)
            labels.append(index.labels.get(key))
    if not names:
        raise DataError(
            f"no images in {urls}{f': {_counted(left_out)}' if left_out else ''}. "
            f"Members that end in {', '.join(sorted(endings()))} are read."
        )
    if any(label is None for label in labels) and any(label is not None for label in labels):
        raise DataError(
            f"{printable(names[labels.index(None)])} has no class, and others have: "
            "give each one, or none with --no-labels."
        )
    if gone := sorted(lost.difference(filter(None, labels))):
        raise DataError(
            f"{urls}: these classes have no image that is read: {listed(gone)}. Left out: "
            f"{_counted(left_out)}."
        )
    if left_out:
        log.warning("%s: left out %s", urls, _counted(left_out))
    classes, numbers = numbered(["all" if label is None else label for label in labels])
    where = np.array(places, np.int64)
    listing = Names(names)
    fetch = _reader(shards, where)
    decoding = Decoding(config.size, config.mode)
    files = Files(
        name=config.name,
        names=listing,
        fetch=fetch,
        labels=numbers,
        classes=classes,
        note=f"{len(listing)} pictures of {len(shards)} tar files",
    )
    first = probe(urls, listing, fetch, decoding)
    stamp = stamp_of(listing, where[:, 2].tolist(), numbers, decoding, config.crop)
    return streamed(config, files, decoding, first, stamp)


def _reader(shards: list[Path], where: np.ndarray) -> Callable[[int], bytes]:
    """fetch(i): the bytes of picture i. Files are opened once in every process; reads name their
    place, so that a fork may share them."""
    opened: dict[tuple[int, int], int] = {}

    def fetch(i: int) -> bytes:
        shard, offset, size = where[i].tolist()
        key = (os.getpid(), shard)
        if key not in opened:
            opened[key] = os.open(shards[shard], os.O_RDONLY)
        return os.pread(opened[key], size, offset)

    return fetch


@dataclass
class Index:
    """What a shard holds, by key: a member's name up to the first dot. left_out: kind → members."""

    images: dict[str, tuple[str, Place]] = field(default_factory=dict)
    labels: dict[str, str] = field(default_factory=dict)
    left_out: dict[str, list[str]] = field(default_factory=dict)

    def leave_out(self, kind: str, name: str) -> None:
        self.left_out.setdefault(kind, []).append(name)


def _indexed(number: int, shard: Path, config: Config) -> Index:
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
                        index.labels[key] = label
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
    """Return a label member's bytes. Raises DataError if it is too large or the file is cut short."""
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


def _counted(left_out: dict[str, list[str]]) -> str:
    return "; ".join(
        f"{len(names)} {kind} ({listed(names, 3)})" for kind, names in left_out.items()
    )


def _expanded(urls: str) -> list[str]:
    try:
        from webdataset.shardlists import expand_urls
    except ImportError as error:
        raise RequestError("--data wds: needs webdataset: pip install 'unnoise[data]'.") from error
    counts = [abs(int(b) - int(a)) + 1 for a, b in re.findall(r"\{(\d+)\.\.(\d+)", urls[:10_000])]
    if math.prod(counts) > MOST_SHARDS:
        raise RequestError(f"--data wds: {urls[:200]} names more than {MOST_SHARDS} shards.")
    try:
        return list(expand_urls(urls))
    except Exception as error:  # braceexpand and webdataset raise several kinds
        raise RequestError(f"--data wds: {urls[:200]} cannot be expanded ({error}).") from error


def local(url: str) -> Path:
    """The shard as a file: itself, or what webdataset's gopen gives for its URL (http, s3, gs, pipe
    …), fetched once into the cache."""
    if "://" not in url and not url.startswith("pipe:"):
        if not Path(url).is_file():
            raise DataError(
                f"there is no file {url}: --data wds:PATTERN, such as wds:data/{{000..099}}.tar."
            )
        return Path(url)
    kept = cache.folder()
    if kept is None:
        raise RequestError(
            f"{url} must be kept somewhere, and UNNOISE_CACHE says that nothing is: set it to a "
            f"folder."
        )
    place = kept / "shards" / f"{hashlib.sha256(url.encode()).hexdigest()[:32]}.tar"
    if place.exists():
        return place
    place.parent.mkdir(parents=True, exist_ok=True)
    with lock(place.with_suffix(".lock"), wait=True):
        if not place.exists():  # the first process of a run fetches for all
            _fetch(url, place)
    return place


def _fetch(url: str, place: Path) -> None:
    from webdataset.gopen import gopen

    try:
        with replacing(place) as temporary, temporary.open("wb") as out, gopen(url) as source:
            while block := source.read(1 << 20):
                out.write(block)
            out.flush()
            tarfile.open(temporary).close()
    except Exception as error:
        raise DataError(f"{url} cannot be fetched ({type(error).__name__}: {error}).") from error
