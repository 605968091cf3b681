"""Which samples are in which shard, and where a shard and its record are."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ..errors.arguments import integer

MAX_SAMPLES = 10**10
MAX_SHARDS = 1_000_000
DIGITS = 10
"""Digits of a sample's index in names."""
SHARDS = "shards"
RECORDS = "records"
MANIFEST = "manifest.json"


@dataclass(frozen=True)
class Layout:
    """The shards of n samples.

    Attributes:
        shard: Samples of each shard; the last one may have fewer.
        suffix: The ending of a shard's name; "" if a shard is a folder.
    """

    out: Path
    n: int
    shard: int
    suffix: str

    def __post_init__(self) -> None:
        """Check the numbers. Raises RequestError."""
        integer("n", self.n, 1, MAX_SAMPLES)
        integer("shard", self.shard, 1, MAX_SAMPLES)
        least = -(-self.n // MAX_SHARDS)
        integer("shard", self.shard, least, None, f"Pass at least {least} for {self.n} samples.")

    def __len__(self) -> int:
        """Return the number of shards."""
        return -(-self.n // self.shard)

    def samples(self, shard: int) -> range:
        """Return the indices of a shard's samples."""
        first = shard * self.shard
        return range(first, min(first + self.shard, self.n))

    def name(self, shard: int) -> str:
        return f"shard-{shard:06d}{self.suffix}"

    def path(self, shard: int) -> Path:
        return self.out / SHARDS / self.name(shard)

    def record(self, shard: int) -> Path:
        return self.out / RECORDS / f"shard-{shard:06d}.json"

    @property
    def manifest(self) -> Path:
        return self.out / MANIFEST


def sample_name(index: int) -> str:
    """Return the name of a sample inside its shard."""
    return f"{index:0{DIGITS}d}"
