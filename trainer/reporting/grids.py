"""The sample grids of a run, as images that are part of the page."""

from __future__ import annotations

import base64
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")
NAME = re.compile(r"step-(\d{1,15})\.png")
SIGNATURE = b"\x89PNG\r\n\x1a\n"
MOST = 40
"""Grids on a page."""
MOST_BYTES = 1_000_000
"""Bytes of all grids on a page, unless two alone are larger."""


@dataclass(frozen=True)
class Grid:
    """A grid of samples: the step it was made at, and its image as a URL that holds the data."""

    step: int
    url: str


def grids(folder: Path) -> list[Grid]:
    """Return grids of a run's folder `samples`, evenly spaced in time. Other files are skipped."""
    paths = [path for path in sorted(folder.glob("step-*.png")) if NAME.fullmatch(path.name)]
    files = [(path, data) for path in paths if (data := _png(path))]
    return [
        Grid(int(path.stem.partition("-")[2]), f"data:image/png;base64,{_text(data)}")
        for path, data in _fitting(files)
    ]


def chosen(values: Sequence[T], most: int) -> list[T]:
    """Return at most so many values, evenly spaced, with the first and the last."""
    if len(values) <= most:
        return list(values)
    return [values[round(i * (len(values) - 1) / (most - 1))] for i in range(most)]


def _fitting(files: Sequence[tuple[Path, bytes]]) -> list[tuple[Path, bytes]]:
    most = MOST
    while True:
        some = chosen(files, most)
        if most <= 2 or sum(len(data) for _, data in some) <= MOST_BYTES:
            return some
        most -= 1


def _png(path: Path) -> bytes:
    """Return the file, b"" if it is no PNG or cannot be read."""
    try:
        data = path.read_bytes()
    except OSError:
        return b""
    return data if data.startswith(SIGNATURE) else b""


def _text(data: bytes) -> str:
    return base64.b64encode(data).decode()
