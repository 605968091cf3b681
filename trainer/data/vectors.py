"""Vectors that come with images, one for each: from JSON, arrays, or a table's column."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from torch import nn

from runtime.bundle.conditions import LABEL, RESERVED
from runtime.files import from_json

from ..errors import DataError
from .labels import listed

MOST = 4096
"""Numbers of a vector."""
TAKEN = (LABEL, *RESERVED, "self", "file", "allow_pickle")
"""Arguments of networks, of methods that take conditions by name, and of numpy.savez."""


def condition_name(column: str) -> str:
    """Return the name of a column or an array as a condition can have it."""
    plain = re.sub(r"\W+", "_", column, flags=re.ASCII).strip("_")
    # A network keeps the layers of vectors in a ModuleDict, whose attributes are no keys.
    is_free = plain not in TAKEN and not hasattr(nn.ModuleDict(), plain)
    return plain if re.match("[A-Za-z]", plain) and is_free else f"given_{plain}"


def vectors_of(values: Sequence[object], where: str) -> NDArray[np.float32]:
    """Return one vector for each image, [N, k].

    Args:
        values: A number, or a list of numbers, for each.
        where: What errors call them.

    Raises:
        DataError: They are not finite numbers, or not as many for each.
    """
    try:
        plain = np.asarray(values)
        # numpy would read text as numbers.
        if plain.dtype.kind not in "biufO":
            raise TypeError(f"they have the type {plain.dtype}")
        found = plain.astype(np.float32)
    except (TypeError, ValueError) as error:
        raise DataError(
            f"{where} must be numbers, or lists of numbers of one length ({error})."
        ) from error
    # A number for each image is a vector of one.
    found = found[:, None] if found.ndim == 1 else found
    if found.ndim != 2 or not 1 <= found.shape[1] <= MOST or not np.isfinite(found).all():
        raise DataError(
            f"{where} must be 1 to {MOST} finite numbers for each image, got shape "
            f"{list(found.shape)}. Correct the rows that have none."
        )
    return found


def by_name(file: Path, names: Sequence[str]) -> NDArray[np.float32]:
    """Return the vectors that a JSON file gives images by their names, [N, k].

    Args:
        file: {"a/1.png": [0.1, 0.2], …}.
        names: The images, relative to their folder.

    Raises:
        DataError: The file cannot be read, or does not name every image.
    """
    try:
        found = from_json(file.read_bytes())
    except (OSError, ValueError) as error:
        raise DataError(f"{file} cannot be read as JSON ({error}).") from error
    if not isinstance(found, Mapping):
        raise DataError(f'{file} must be {{"a/1.png": [0.1, 0.2], …}}.')
    if missing := [name for name in names if name not in found]:
        raise DataError(
            f"{file} has no vector for {len(missing)} images: {listed(missing, 3)}. Add them."
        )
    return vectors_of([found[name] for name in names], str(file))
