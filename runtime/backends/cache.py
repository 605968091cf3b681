"""What an inference library compiled for this machine, kept on disk for the next process.

No entry is needed, and none is trusted to be whole. The folder is $UNNOISE_CACHE, or unnoise in
$XDG_CACHE_HOME or ~/.cache; UNNOISE_CACHE=off keeps nothing. The library that wrote an entry reads
it back, and runs it like a program. So a folder that other users may write to is not used.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

UInt8 = NDArray[np.uint8]
Buffer: TypeAlias = bytes | memoryview

LIMIT = 4 * 2**30
"""Bytes that the folder may hold; beyond that the least recently used entries are removed."""
SUFFIX = ".compiled"
_TEMPORARY = re.compile(r"\.[0-9a-f]{16}")
_ABANDONED_S = 3600.0
"""After this time a temporary file counts as left by a process that was killed."""
_DIGEST = 32


def folder() -> Path | None:
    """Find the folder of entries; None if the environment turns the cache off, or has no home."""
    given = os.environ.get("UNNOISE_CACHE")
    if given is not None:
        return None if given.lower() in ("", "0", "off", "no", "none") else Path(given)
    base = os.environ.get("XDG_CACHE_HOME", "")
    try:
        return (Path(base) if os.path.isabs(base) else Path.home() / ".cache") / "unnoise"
    except RuntimeError:  # no home
        return None


def key(*parts: object) -> str:
    """Name what was compiled from `parts`, which must hold all that it depends on."""
    return hashlib.sha256(repr(parts).encode()).hexdigest()


def load(name: str) -> list[UInt8] | None:
    """Read the parts of an entry, each [n] bytes; None if it is missing or not what was stored."""
    if (place := private()) is None:
        return None
    path = place / (name + SUFFIX)
    try:
        with path.open("rb") as file:
            digest = file.read(_DIGEST)
            lengths = file.readline()
            # Into arrays, which libraries can read in place: entries are as large as the weights.
            parts = [np.empty(int(length), np.uint8) for length in lengths.split()]
            whole = [file.readinto(part.data) for part in parts] == [
                len(part) for part in parts
            ] and not file.read(1)
        if not whole or digest != _digest(lengths, [part.data for part in parts]):
            raise ValueError
        with contextlib.suppress(OSError):  # a cache that cannot be written to is of use as well
            path.touch()  # the time of its last use, for _prune
    except (OSError, MemoryError):  # as with too many open files: the entry may be whole
        return None
    except ValueError:
        forget(name)
        return None
    return parts


def store(name: str, parts: Sequence[Buffer]) -> None:
    """Keep an entry, whole or not at all. Several processes may do so at once.

    A folder that cannot be written to is no error.
    """
    lengths = " ".join(str(len(memoryview(part))) for part in parts).encode() + b"\n"
    with contextlib.suppress(OSError):
        if (place := private(make=True)) is None:
            return
        temporary = place / f".{os.urandom(8).hex()}"
        try:
            with temporary.open("wb") as file:
                file.writelines([_digest(lengths, parts), lengths, *parts])
            temporary.replace(place / (name + SUFFIX))
        finally:
            temporary.unlink(missing_ok=True)
        _prune(place)


def forget(name: str) -> None:
    """Remove an entry that the library does not accept."""
    with contextlib.suppress(OSError):
        if place := private():
            (place / (name + SUFFIX)).unlink()


def _digest(lengths: bytes, parts: Sequence[Buffer]) -> bytes:
    found = hashlib.sha256(lengths)
    for part in parts:
        found.update(part)
    return found.digest()


def private(below: str = "", make: bool = False) -> Path | None:
    """Find the folder, or one below it, if it is this user's and no one else may write to it."""
    place = folder()
    if place is None:
        return None
    if below:
        if private(make=make) is None:
            return None
        place = place / below
    try:
        if make:
            place.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = place.stat()
    except OSError:
        return None
    if os.name == "posix" and (status.st_uid != os.geteuid() or status.st_mode & 0o022):
        return None
    return place


def _prune(place: Path) -> None:
    # The newest first, by the time that `load` sets.
    entries = sorted((-e.stat().st_mtime, e.stat().st_size, e) for e in place.glob("*" + SUFFIX))
    total = 0
    for _, size, entry in entries:
        total += size
        if total > LIMIT:
            entry.unlink(missing_ok=True)
    for path in place.glob(".*"):
        # Other files may lie here, too.
        if _TEMPORARY.fullmatch(path.name) and time.time() - path.stat().st_mtime > _ABANDONED_S:
            path.unlink(missing_ok=True)
