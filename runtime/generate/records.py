"""The record of a shard: its samples, its hash, and what it was made with."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from ..files import from_json, to_json
from .drafts import write_text
from .environment import Environment
from .layout import Layout

_BLOCK = 1 << 20


@dataclass(frozen=True)
class Record:
    """A shard as it was made.

    Attributes:
        first: Index of its first sample.
        count: Number of its samples.
        bytes: Size of the file, or of all files of the folder.
        sha256: See `digest`.
    """

    name: str
    first: int
    count: int
    bytes: int
    sha256: str
    environment: Environment

    @classmethod
    def read(cls, layout: Layout, shard: int) -> Record | None:
        """Return the record of a shard; None if there is none for these samples."""
        try:
            value = from_json(layout.record(shard).read_bytes())
            record = cls(**value)
        except (OSError, ValueError, TypeError):
            return None
        samples = layout.samples(shard)
        wanted = (layout.name(shard), samples.start, len(samples))
        is_of_shard = (record.name, record.first, record.count) == wanted
        return record if is_of_shard and record._is_whole() else None

    def _is_whole(self) -> bool:
        """Whether the fields that are read from a file have their types."""
        kinds = ((self.bytes, int), (self.sha256, str), (self.environment, Mapping))
        return all(isinstance(value, kind) for value, kind in kinds)

    def write(self, layout: Layout, shard: int) -> None:
        """Write the record, or replace it."""
        write_text(layout.record(shard), to_json(asdict(self)))


def is_present(layout: Layout, shard: int) -> bool:
    """Whether a shard and its record exist. The content is not read, see `verified`."""
    return layout.path(shard).exists() and Record.read(layout, shard) is not None


def verified(layout: Layout, shard: int) -> Record | None:
    """Return the record of a shard whose content has the hash of the record, else None."""
    record = Record.read(layout, shard)
    try:
        if record is None or digest(layout.path(shard)) != (record.sha256, record.bytes):
            return None
    except OSError:  # it is missing, or cannot be read
        return None
    return record


def digest(path: Path) -> tuple[str, int]:
    """Return the sha256 and the size of a file or a folder.

    The hash of a folder is that of the output of `sha256sum *` in it.
    """
    if not path.is_dir():
        return _file_digest(path)
    total = 0
    listing = hashlib.sha256()
    for file in sorted(path.iterdir(), key=lambda file: file.name):
        found, size = _file_digest(file)
        listing.update(f"{found}  {file.name}\n".encode())
        total += size
    return listing.hexdigest(), total


def _file_digest(path: Path) -> tuple[str, int]:
    digest = hashlib.sha256()
    size = 0
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
            size += len(block)
    return digest.hexdigest(), size
