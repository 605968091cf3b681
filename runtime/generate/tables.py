"""Conditions of a plan, from files: sample i has row i of a table, and the rows repeat."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..errors import RequestError
from ..errors.messages import refused, shown_path


@dataclass(frozen=True)
class Table:
    """The values of a condition.

    Attributes:
        name: The condition's.
        path: A file of numpy, [rows, *shape].
        sha256: Of the file: another table makes other samples.
    """

    name: str
    path: Path
    sha256: str

    def open(self) -> np.ndarray:
        """Return the rows, [rows, *shape], which stay on the disk. Raises RequestError."""
        try:
            rows = np.load(self.path, mmap_mode="r", allow_pickle=False)
        except Exception as error:  # damaged files raise many kinds of errors inside numpy
            raise _unreadable(self.name, self.path, error) from error
        if not isinstance(rows, np.ndarray) or rows.ndim < 1 or not len(rows):
            raise refused(self.name, "an array with a row for each sample", rows)
        return rows


def read_tables(value: object, folder: Path) -> tuple[Table, ...]:
    """Return the tables that a plan's `conditions` name.

    Args:
        value: The files by condition.
        folder: That of the plan: paths are relative to it.

    Raises:
        RequestError: The value is no such object, or a file cannot be read.
    """
    if not isinstance(value, Mapping) or not all(isinstance(file, str) for file in value.values()):
        example = 'Write {"low_res": "low_res.npy"}.'
        raise refused("conditions", "a JSON object of file names", value, example)
    return tuple(_table(name, folder / file) for name, file in sorted(value.items()))


def _table(name: str, path: Path) -> Table:
    try:
        with path.open("rb") as file:
            return Table(name, path.absolute(), hashlib.file_digest(file, "sha256").hexdigest())
    except OSError as error:
        raise _unreadable(name, path, error) from error


def _unreadable(name: str, path: Path, error: Exception) -> RequestError:
    return RequestError(
        f"the table of the condition {name!r}, {shown_path(path)}, cannot be read ({error}). "
        "Write it with numpy.save."
    )
