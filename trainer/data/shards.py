"""WebDataset: images in tar files, read from where `trainer.data.tar` finds them.

The order of images is a permutation of all, not of shards, so a run resumes within a shard as
exactly as elsewhere. Shards that are not local files are fetched once.
"""

from __future__ import annotations

import hashlib
import itertools
import logging
import math
import os
import re
import tarfile
from collections.abc import Callable
from glob import glob
from pathlib import Path

import numpy as np

from runtime.backends import cache
from runtime.errors import RequestError
from runtime.files import lock, replacing
from runtime.terminal.progress import track

from ..config import Config
from ..config.text import printable
from ..errors import DataError
from .decode import endings
from .image_files import Names, open_images, stamp_of
from .labels import listed, numbered
from .stream import Stream
from .tar import indexed

log = logging.getLogger(__name__)

MOST_SHARDS = 1_000_000
MOST_OPEN = 256
"""Files that a process keeps open; most systems allow 1,024."""


def stream(urls: str, config: Config) -> Stream:
    """Return the images of all shards.

    Args:
        urls: A path or URL, in which webdataset expands braces.

    Raises:
        DataError: There are no images, or some have a class and others have none.
    """
    shards = [local(url) for url in _expanded(urls)]
    names = []
    places = []
    labels = []
    left_out: dict[str, list[str]] = {}
    lost: set[str] = set()  # classes of images that are left out
    for i, shard in enumerate(track(shards, "indexing shards")):
        index = indexed(i, shard, config)
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
    # A file may lack the class of some by mistake: nothing says which class they would be.
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
    images = open_images(config, urls, listing, _reader(shards, where))
    sizes = where[:, 2].tolist()
    return Stream(
        name=config.name,
        images=images,
        labels=numbers,
        classes=classes,
        stamp=stamp_of(listing, sizes, numbers, images.decoding, config.crop),
        note=f"{len(listing)} pictures of {len(shards)} tar files",
    )


def _reader(shards: list[Path], where: np.ndarray) -> Callable[[int], bytes]:
    """Return fetch(i), the bytes of image i. where: [N, 3], a `Place` for each image."""
    # By process: a worker that inherits a file opens its own, and pread needs no shared position.
    opened: dict[tuple[int, int], int] = {}

    def fetch(i: int) -> bytes:
        shard, offset, size = where[i].tolist()
        key = (os.getpid(), shard)
        try:
            if key not in opened:
                if len(opened) >= MOST_OPEN:
                    os.close(opened.pop(next(iter(opened))))
                opened[key] = os.open(shards[shard], os.O_RDONLY)
            return os.pread(opened[key], size, offset)
        except OSError as error:
            # Not one unreadable image: the file itself is gone.
            raise DataError(
                f"{shards[shard]} cannot be read any more ({error.strerror}). Put it back, and "
                "re-run the same command."
            ) from error

    return fetch


def _counted(left_out: dict[str, list[str]]) -> str:
    return "; ".join(
        f"{len(names)} {kind} ({listed(names, 3)})" for kind, names in left_out.items()
    )


def _expanded(urls: str) -> list[str]:
    try:
        from webdataset.shardlists import expand_urls
    except ImportError as error:
        raise RequestError("--data wds: needs webdataset: pip install 'unnoise[data]'.") from error
    # Counted before they are expanded: a slip of the hand would fill the memory with names.
    counts = [abs(int(b) - int(a)) + 1 for a, b in re.findall(r"\{(\d+)\.\.(\d+)", urls[:10_000])]
    if math.prod(counts) > MOST_SHARDS:
        raise RequestError(f"--data wds: {urls[:200]} names more than {MOST_SHARDS} shards.")
    try:
        found = list(expand_urls(urls))
    except Exception as error:  # braceexpand and webdataset raise several kinds
        raise RequestError(f"--data wds: {urls[:200]} cannot be expanded ({error}).") from error
    # webdataset expands braces alone. A pattern of no file is named as it is.
    every = [(sorted(glob(url)) if _is_local(url) and "*" in url else []) or [url] for url in found]
    return list(itertools.chain.from_iterable(every))


def _is_local(url: str) -> bool:
    return "://" not in url and not url.startswith("pipe:")


def local(url: str) -> Path:
    """Return the shard as a file.

    A URL (http, s3, gs, pipe, …) is fetched once into the cache, by webdataset's gopen.

    Raises:
        DataError: There is no such file, or it cannot be fetched.
        RequestError: There is no folder for the cache.
    """
    if _is_local(url):
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
            # gopen gives an error page of a server as it gives a file: only a tar file is kept.
            tarfile.open(temporary).close()
    except Exception as error:
        raise DataError(f"{url} cannot be fetched ({type(error).__name__}: {error}).") from error
