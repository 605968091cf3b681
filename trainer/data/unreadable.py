"""Images that cannot be read: how many a run leaves out, and the error if there are more."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ..config.text import printable
from ..errors import DataError
from .dataset import Dataset
from .labels import listed, unused


def refused(name: str, error: Exception) -> DataError:
    """Return the error of `--bad-pictures refuse`."""
    return DataError(
        f"{printable(name)} cannot be read as an image ({error}). "
        "Remove it, or leave such images out with --bad-pictures skip."
    )


def vanished(classes: Sequence[str]) -> DataError:
    """Return the error for classes that have images of which none can be read."""
    return DataError(
        f"no image of {'these classes' if len(classes) > 1 else 'this class'} can be read: "
        f"{listed(classes)}. "
        "Replace the images, or remove the class."
    )


def too_many(bad: int, count: int) -> bool:
    """Return whether so many unreadable images end a run: more than 1 %, and more than one."""
    return bad > max(1, count // 100)


def too_many_error(bad: Sequence[str], count: int) -> DataError:
    """Return the error for too many of them. bad: their names."""
    return DataError(
        f"{len(bad)} of {count} images cannot be read, more than 1 %: {listed(bad)}. Remove or "
        f"replace them."
    )


def require_few(dataset: Dataset, bad: set[int]) -> None:
    """Check that a run may continue without the images at these indices.

    Raises:
        DataError: They are too many, or all images of a class.
    """
    if too_many(len(bad), len(dataset)):
        raise too_many_error(dataset.image_names(sorted(bad)), len(dataset))
    if not dataset.classes:
        return
    kept = np.ones(len(dataset), bool)
    kept[list(bad)] = False
    # A class that never had an image is not missed.
    empty = set(unused(dataset.classes, dataset.labels))
    if gone := set(unused(dataset.classes, dataset.labels[kept])) - empty:
        raise vanished(sorted(gone))
