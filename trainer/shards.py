"""WebDataset: pictures in tar files. Each file is read once from end to end to learn where its members lie; any picture is then one read.

A picture is its name up to the first dot: a.jpg and a.cls, or a.png and a.json, belong together. Because the order of pictures is a
permutation of all, not of shards, a run goes on within a shard as exactly as elsewhere. Shards that are not files are fetched once.
"""

from __future__ import annotations

import hashlib
import os
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from runtime import cache
from runtime.errors import RequestError
from runtime.files import from_json, replacing
from runtime.progress import track

from .config import Config
from .decode import Decoding
from .errors import DataError
from .folder import ENDINGS, numbered
from .processes import lock
from .streams import Names, Stream, probe, streamed

LABELS = ("cls", "json")
"""Endings that hold the class where --label-column does not say."""


class Place(NamedTuple):
    """Where a member lies: its shard, and the bytes there."""

    shard: int
    offset: int
    size: int


def stream(urls: str, config: Config) -> Stream:
    """The pictures of the shards, braces expanded as webdataset does. Raises DataError where there are none, or where one lacks a class."""
    shards = [local(url) for url in _expanded(urls)]
    names, places, labels = [], [], []
    for i, shard in enumerate(track(shards, "indexing shards")):
        for name, place, label in _indexed(i, shard, config):
            names.append(f"{shard.name}/{name}")
            places.append(place)
            labels.append(label)
    if not names:
        raise DataError(f"no pictures in {urls} (looked for {', '.join(sorted(ENDINGS))}).")
    if any(label is None for label in labels) and any(label is not None for label in labels):
        raise DataError(
            f"{names[labels.index(None)]} has no class, and others have: give each one, or none with --no-labels."
        )
    classes, numbers = numbered(["all" if label is None else label for label in labels])
    where, listed = np.array(places, np.int64), Names(names)
    fetch = _reader(shards, where)
    decoding = Decoding(config.size, config.mode)
    return streamed(
        config,
        decoding,
        probe(urls, listed, fetch, decoding),
        (listed, where[:, 2].tolist()),
        name=config.name,
        names=listed,
        fetch=fetch,
        labels=numbers,
        classes=classes,
        note=f"{len(listed)} pictures of {len(shards)} tar files",
    )


def _reader(shards: list[Path], where: np.ndarray) -> Callable[[int], bytes]:
    """fetch(i): the bytes of picture i. Files are opened once in every process; reads name their place, so that a fork may share them."""
    opened: dict[tuple[int, int], int] = {}

    def fetch(i: int) -> bytes:
        shard, offset, size = where[i].tolist()
        key = (os.getpid(), shard)
        if key not in opened:
            opened[key] = os.open(shards[shard], os.O_RDONLY)
        return os.pread(opened[key], size, offset)

    return fetch


def _indexed(number: int, shard: Path, config: Config) -> Iterator[tuple[str, Place, str | None]]:
    """(name, place, class) of each picture in a shard, in its order. Raises DataError where the file is cut short or no tar file."""
    pictures: dict[str, tuple[str, Place]] = {}
    labels: dict[str, str] = {}
    try:
        with tarfile.open(shard, "r:") as tar:
            for member in tar:
                folder, _, base = member.name.rpartition("/")
                stem, _, ending = base.partition(".")
                key, ending = f"{folder}/{stem}" if folder else stem, ending.lower()
                if not member.isfile() or not stem:
                    continue
                if ending == config.image_column or (not config.image_column and f".{ending}" in ENDINGS):
                    pictures.setdefault(key, (member.name, Place(number, member.offset_data, member.size)))
                elif config.labels and (label := _label(tar, member, ending, config.label_column)) is not None:
                    labels[key] = label
    except (tarfile.TarError, OSError, EOFError) as error:
        raise DataError(
            f"{shard} cannot be read as an uncompressed tar file ({error}): fetch or write it again."
        ) from error
    for key, (name, place) in pictures.items():
        yield name, place, labels.get(key)


def _label(tar: tarfile.TarFile, member: tarfile.TarInfo, ending: str, column: str) -> str | None:
    """A class: the text of the ending `column` (default: cls), or that entry of a json member (default: label, cls)."""
    if ending not in (column, "json") and (column or ending not in LABELS):
        return None
    file: Any = tar.extractfile(member)
    data = file.read()
    if ending != "json":
        return data.decode().strip()
    try:
        value = from_json(data)
    except ValueError as error:
        raise DataError(f"{member.name} is no JSON ({error}).") from error
    found = [value[key] for key in ([column] if column else ["label", "cls"]) if key in value]
    return str(found[0]) if found else None


def _expanded(urls: str) -> list[str]:
    try:
        from webdataset.shardlists import expand_urls
    except ImportError as error:
        raise RequestError("--data wds: needs webdataset: pip install 'unnoise[data]'.") from error
    return list(expand_urls(urls))


def local(url: str) -> Path:
    """The shard as a file: itself, or what webdataset's gopen gives for its URL (http, s3, gs, pipe …), fetched once into the cache."""
    if "://" not in url and not url.startswith("pipe:"):
        if not Path(url).is_file():
            raise DataError(f"there is no file {url}: --data wds:PATTERN, such as wds:data/{{000..099}}.tar.")
        return Path(url)
    kept = cache.folder()
    if kept is None:
        raise RequestError(f"{url} must be kept somewhere, and UNNOISE_CACHE says that nothing is: set it to a folder.")
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
