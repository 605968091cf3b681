"""Samples on their way into a shard, and how they are encoded."""

from __future__ import annotations

import io
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from ..backends.base import Float32
from ..images import UInt8, to_uint8


class Entries(NamedTuple):
    """Samples that follow each other.

    Attributes:
        first: Index of the first, counted from the first sample of all shards.
        labels: Their numbers; None is the null label.
        samples: [b, *S].
    """

    first: int
    seeds: list[int]
    labels: list[int | None]
    samples: Float32


@dataclass(frozen=True)
class Content:
    """What a shard holds.

    Attributes:
        count: Number of samples.
        shape: *S.
        value_range: The smallest and the largest value of the data.
        names: Of the labels; empty if the bundle has none.
    """

    count: int
    shape: tuple[int, ...]
    value_range: tuple[float, float]
    names: tuple[str, ...]

    def images(self, samples: Float32) -> UInt8:
        """Convert samples [b, C, H, W] to images [b, H, W, C]."""
        return to_uint8(samples, *self.value_range)


class Writer(Protocol):
    """Writes one shard, from its first sample to its last."""

    def add(self, entries: Entries) -> None:
        """Write samples that follow those before."""
        ...

    def close(self) -> None:
        """Write the rest and close all files."""
        ...


def png(image: UInt8) -> bytes:
    """Return an image [H, W, C] as a PNG file, without a time and without metadata."""
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(image[..., 0] if image.shape[2] == 1 else image).save(buffer, "PNG")
    return buffer.getvalue()


def encoder() -> Mapping[str, str]:
    """Return the versions of the libraries that the bytes of `png` depend on."""
    import PIL
    from PIL import features

    return {"pillow": PIL.__version__, "zlib": str(features.version("zlib"))}


def entry_json(entries: Entries, i: int, content: Content) -> dict[str, object]:
    """Return what is known of entry i, as JSON."""
    label = entries.labels[i]
    found: dict[str, object] = {"index": entries.first + i, "seed": entries.seeds[i]}
    if content.names:
        found["label"] = label
        found["label_name"] = None if label is None else content.names[label]
    return found
