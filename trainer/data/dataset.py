"""The training pictures: built-in emoji and digits, arrays, and files that are read at the start or
as they are needed."""

from __future__ import annotations

import hashlib
import logging
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..config import Config
from ..errors import DataError
from . import folder as folders
from .decode import describe
from .labels import class_name, listed, named, numbered, unused, whole_number
from .stream import Stream

log = logging.getLogger(__name__)

ASSETS = Path(__file__).parent / "assets"
EMOJI, DIGITS = ASSETS / "emoji32.npz", ASSETS / "digits.npz"
STYLES = ("noto", "twemoji")


@dataclass(frozen=True, eq=False)
class Pictures:
    """images [N, H, W, C] uint8, C 1 or 3; labels [N] int64, indices into `classes`. licence and
    note go into the model card."""

    name: str
    images: NDArray[np.uint8]
    labels: NDArray[np.int64]
    classes: tuple[str, ...]
    licence: str
    note: str

    @property
    def sample_shape(self) -> tuple[int, int, int]:
        """(C, H, W)."""
        _, H, W, C = self.images.shape
        return C, H, W

    @cached_property
    def fingerprint(self) -> str:
        """sha256 over shapes, pictures, labels and class names: equal only for equal data."""
        digest = hashlib.sha256(repr((self.images.shape, self.classes)).encode())
        digest.update(np.ascontiguousarray(self.images).tobytes())
        digest.update(np.ascontiguousarray(self.labels).tobytes())
        return digest.hexdigest()

    def describe(self) -> dict[str, Any]:
        """What a bundle's provenance says of the data."""
        return {
            "name": self.name,
            "pictures": len(self.images),
            "fingerprint": self.fingerprint,
            "licence": self.licence,
            "note": self.note,
        }


Source = Pictures | Stream
"""Either has labels, classes, sample_shape, fingerprint and describe()."""


def load(config: Config) -> Source:
    """Return the images that `config.data` names.

    Raises:
        DataError: There are no images, one is not like the others, or a label or a class name is
            not text that JSON can hold.
    """
    found = _load(config)
    if not config.labels:
        return replace(found, classes=())
    for name in found.classes:
        class_name(name, config.data)
    if empty := unused(found.classes, found.labels):
        log.warning("%s: %d classes have no images: %s", config.data, len(empty), listed(empty))
    return found


def _load(config: Config) -> Source:
    kind, _, place = config.data.partition(":")
    if kind == "digits":
        return digits()
    if kind == "emoji":
        return emoji(config.split)
    if kind == "npz":
        return npz(Path(place), config.size, config.mode)
    if kind == "hf":
        from .tables import stream

        return stream(place, config)
    if kind == "wds":
        from .shards import stream

        return stream(place, config)
    return folder(Path(place), config)


def folder(path: Path, config: Config) -> Source:
    """The pictures under `path`: a class per subfolder, or one class where there are no subfolders
    with pictures, or by config.label_file.

    All must have one size and mode, unless config.size or config.mode say to convert. They are read
    now where they take less than config.in_memory_mb decoded, else as they are needed. Raises
    DataError for pictures that are not alike, for a folder without pictures, and for more that
    cannot be read than config.bad_pictures allows.
    """
    listing, decoding, first, shape = folders.folder(path, config)
    if (
        config.crop == "random"
        or len(listing.names) * int(np.prod(shape)) > config.in_memory_mb * 2**20
    ):
        return folders.stream(config, listing, decoding, first, shape)
    images, labels, bad = folders.read_all(listing, config, decoding)
    note = f"{len(images)} pictures of a local folder" + (
        f", {bad} unreadable ones left out" if bad else ""
    )
    return Pictures(path.name, images, labels, listing.classes, "not stated", note)


def npz(path: Path, size: int = 0, mode: str = "") -> Pictures:
    """Read the arrays of a NumPy file.

    Args:
        path: It holds `images`, uint8 [N, H, W] or [N, H, W, C] with 1 or 3 channels; optionally
            `labels`, [N] whole numbers from 0 or text; and `classes`, the name of each number.
        size: 0, or the height and width that the images must have.
        mode: "", or the mode that they must have: images are taken as they are.

    Raises:
        DataError: The file is damaged, or its arrays are not these.
    """
    arrays = _arrays(path)
    images = _images(path, arrays)
    shape = images.shape[1:]
    if shape != (size or shape[0], size or shape[1], {"RGB": 3, "L": 1}.get(mode, shape[2])):
        raise DataError(
            f"{path} has images of {describe(shape)}, which are taken as they are: leave --size "
            f"and --mode out."
        )
    note = f"{len(images)} pictures of {path.name}"
    if "labels" not in arrays:
        labels, classes = np.zeros(len(images), np.int64), ("0",)
    else:
        values = named(_column(path, "labels", arrays), lambda i: f"{path}, labels[{i}]")
        if len(values) != len(images):
            raise DataError(
                f"{path} needs a label for each of {len(images)} images, got {len(values)} labels."
            )
        classes, labels = numbered(values)
    if "classes" in arrays:
        classes, labels = _renamed(path, classes, labels, _column(path, "classes", arrays))
    return Pictures(path.stem, images, labels, classes, "not stated", note)


def _arrays(path: Path) -> dict[str, NDArray[Any]]:
    """Return the arrays of the file that are of use."""
    try:
        with path.open("rb") as opened:  # numpy leaves the file open if it is no zip file
            loaded = np.load(opened, allow_pickle=False)
            if not isinstance(loaded, np.lib.npyio.NpzFile):
                raise ValueError("it is a single array; numpy.savez writes .npz files")
            names = [n for n in ("images", "labels", "classes") if n in loaded.files]
            return {name: loaded[name] for name in names}
    except Exception as error:  # zipfile, zlib and numpy raise a dozen kinds for damaged files
        raise DataError(
            f"{path} cannot be read as an .npz file ({type(error).__name__}: {error})."
        ) from error


def _images(path: Path, arrays: dict[str, NDArray[Any]]) -> NDArray[np.uint8]:
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


def _column(path: Path, name: str, arrays: dict[str, NDArray[Any]]) -> list[Any]:
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
    path: Path, labels: tuple[str, ...], of_image: NDArray[np.int64], classes: list[Any]
) -> tuple[tuple[str, ...], NDArray[np.int64]]:
    """Return the classes, and the index among them of each image's label, which is a number."""
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


def held_out(count: int) -> NDArray[np.bool_]:
    """[count]: True for the emoji that no network trains on unless told to: index % 10 == 0."""
    return np.arange(count) % 10 == 0


def emoji(split: str = "train") -> Pictures:
    """1,906 emoji in two styles, 32×32 RGB on white, labelled style/category. split: train (the
    held-out tenth left out) or all."""
    with np.load(EMOJI, allow_pickle=False) as file:
        images, category, categories = (
            file["images"],
            file["category"].astype(np.int64),
            file["categories"],
        )
    classes = tuple(
        f"{style}/{c.lower().replace(' & ', '-')}" for style in STYLES for c in categories
    )
    labels = category[:, None] + len(categories) * np.arange(len(STYLES))
    kept = np.ones(len(images), bool) if split == "all" else ~held_out(len(images))
    return Pictures(
        name="emoji",
        images=images[kept].reshape(-1, *images.shape[2:]),
        labels=labels[kept].reshape(-1),
        classes=classes,
        licence="Noto Emoji: Copyright Google LLC, Apache License 2.0. Twemoji: Copyright "
        "Twitter, Inc and other contributors, CC-BY 4.0.",
        note="every emoji, in both styles"
        if split == "all"
        else "emoji with index % 10 != 0, in both styles; index % 10 == 0 is held out and was "
        "never seen",
    )


def digits() -> Pictures:
    """1,797 handwritten digits, 8×8 grey, white on black."""
    with np.load(DIGITS, allow_pickle=False) as file:
        images, label = file["images"], file["label"]
    return Pictures(
        name="digits",
        images=np.round(images * (255 / 16)).astype(np.uint8)[..., None],
        labels=label.astype(np.int64),
        classes=tuple("0123456789"),
        licence="UCI Optical Recognition of Handwritten Digits (Alpaydin & Kaynak 1998), CC-BY "
        "4.0.",
        note="all 1,797 pictures of scikit-learn's load_digits",
    )
