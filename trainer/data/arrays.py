"""Images from the arrays of a NumPy file."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ..errors import DataError
from .decode import describe
from .labels import listed, named, numbered, whole_number
from .memory import Pictures
from .vectors import condition_name, vectors_of

Arrays = dict[str, np.ndarray]


def npz(path: Path, size: int = 0, mode: str = "", vectors: str = "") -> Pictures:
    """Read the arrays of a NumPy file.

    Args:
        path: It holds `images`, uint8 [N, H, W] or [N, H, W, C] with 1 or 3 channels. Optional:
            `labels`, [N] whole numbers from 0 or text; and `classes`, the name of each number.
        size: 0, or the height and width that the images must have.
        mode: "", or the mode that they must have: images are taken as they are.
        vectors: "", or the name of an array [N] or [N, k] of vectors.

    Raises:
        DataError: The file is damaged, or its arrays are not these.
    """
    arrays = _arrays(path, vectors)
    images = _images(path, arrays)
    shape = images.shape[1:]
    if shape != (size or shape[0], size or shape[1], {"RGB": 3, "L": 1}.get(mode, shape[2])):
        raise DataError(
            f"{path} has images of {describe(shape)}, which are taken as they are: leave --size "
            f"and --mode out."
        )
    note = f"{len(images)} pictures of {path.name}"
    if "labels" not in arrays:
        labels = np.zeros(len(images), np.int64)
        classes = ("0",)
    else:
        values = named(_column(path, "labels", arrays), lambda i: f"{path}, labels[{i}]")
        if len(values) != len(images):
            raise DataError(
                f"{path} needs a label for each of {len(images)} images, got {len(values)} labels."
            )
        classes, labels = numbered(values)
    if "classes" in arrays:
        classes, labels = _renamed(path, classes, labels, _column(path, "classes", arrays))
    given = (
        {condition_name(vectors): _vectors(path, vectors, arrays, len(images))} if vectors else {}
    )
    return Pictures(path.stem, images, labels, classes, "not stated", note, given)


def _arrays(path: Path, vectors: str = "") -> Arrays:
    """Return the arrays of the file that are of use."""
    try:
        # Opened here, because numpy leaves the file open if it is not a zip file.
        with path.open("rb") as opened:
            loaded = np.load(opened, allow_pickle=False)
            if not isinstance(loaded, np.lib.npyio.NpzFile):
                raise ValueError("it is a single array; numpy.savez writes .npz files")
            names = [n for n in ("images", "labels", "classes", vectors) if n in loaded.files]
            return {name: loaded[name] for name in names}
    except Exception as error:  # zipfile, zlib and numpy raise a dozen kinds for damaged files
        raise DataError(
            f"{path} cannot be read as an .npz file ({type(error).__name__}: {error})."
        ) from error


def _vectors(path: Path, name: str, arrays: Arrays, count: int) -> NDArray[np.float32]:
    if name not in arrays or not arrays[name].ndim or len(arrays[name]) != count:
        raise DataError(
            f"{path} needs an array {name!r} of a vector for each of {count} images. Name another "
            "one with --condition-column."
        )
    return vectors_of(list(arrays[name]), f"{path}, {name}")


def _images(path: Path, arrays: Arrays) -> NDArray[np.uint8]:
    """Return the images, [N, H, W, C]."""
    if "images" not in arrays:
        raise DataError(
            f"{path} needs images, uint8 [N, H, W, 1 or 3], and has no array of that name."
        )
    images = arrays["images"]
    images = images[..., None] if images.ndim == 3 else images
    if (
        images.dtype != np.uint8
        or images.ndim != 4
        or images.shape[-1] not in (1, 3)
        or not images.size
    ):
        raise DataError(
            f"{path} needs images, uint8 [N, H, W, 1 or 3], got {images.dtype} "
            f"{list(images.shape)}."
        )
    return images


def _column(path: Path, name: str, arrays: Arrays) -> list[str | int]:
    """Return a one-dimensional array of text or whole numbers as a list."""
    values = arrays[name]
    if values.ndim != 1 or values.dtype.kind not in "iuUS":
        raise DataError(
            f"{path} needs {name} of one dimension, whole numbers or text, got {values.dtype} "
            f"{list(values.shape)}."
        )
    try:
        return values.tolist()
    except (ValueError, SystemError) as error:  # code points beyond Unicode
        raise DataError(f"{path}: {name} is not text ({error}).") from error


def _renamed(
    path: Path, labels: tuple[str, ...], of_image: NDArray[np.int64], classes: list[str | int]
) -> tuple[tuple[str, ...], NDArray[np.int64]]:
    """Return the classes, and the index among them of each image's label.

    Args:
        labels: The distinct labels, which are numbers.
        of_image: [N], the index in `labels` of each image's label.
        classes: The name of each number.
    """
    names = named(classes, lambda i: f"{path}, classes[{i}]")
    if len(set(names)) < len(names):
        raise DataError(f"{path}: classes must differ from each other, got {listed(names)}.")
    numbers = [whole_number(label) for label in labels]
    beyond = [i for i, n in enumerate(numbers) if n is None or n >= len(names)]
    if beyond:
        first = int(np.flatnonzero(np.isin(of_image, beyond))[0])
        raise DataError(
            f"{path} has {len(names)} classes, and labels beyond them: "
            f"{listed([labels[i] for i in beyond])} (labels[{first}] is the first)."
        )
    return tuple(names), np.array(numbers, np.int64)[of_image]
