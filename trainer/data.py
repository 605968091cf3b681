"""The training pictures: built-in emoji and digits, arrays, and files that are read at the start or as they are needed."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from . import folder as folders
from .config import Config
from .decode import describe
from .errors import DataError
from .folder import numbered
from .streams import Stream

ASSETS = Path(__file__).parent / "assets"
EMOJI, DIGITS = ASSETS / "emoji32.npz", ASSETS / "digits.npz"
STYLES = ("noto", "twemoji")


@dataclass(frozen=True, eq=False)
class Pictures:
    """images [N, H, W, C] uint8, C 1 or 3; labels [N] int64, indices into `classes`. licence and note go into the model card."""

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
    """The pictures that `config.data` names. Raises DataError where there are none, or where one is not like the others."""
    found = _load(config)
    return found if config.labels else replace(found, classes=())


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
    """The pictures under `path`: a class per subfolder, or one class where there are no subfolders with pictures, or by config.label_file.

    All must have one size and mode, unless config.size or config.mode say to convert. They are read now where they take less than
    config.in_memory_mb decoded, else as they are needed. Raises DataError for pictures that are not alike, for a folder without pictures, and
    for more that cannot be read than config.bad_pictures allows.
    """
    listing, decoding, first, shape = folders.folder(path, config)
    if config.crop == "random" or len(listing.names) * int(np.prod(shape)) > config.in_memory_mb * 2**20:
        return folders.stream(config, listing, decoding, first, shape)
    images, labels, bad = folders.read_all(listing, config, decoding)
    note = f"{len(images)} pictures of a local folder" + (f", {bad} unreadable ones left out" if bad else "")
    return Pictures(path.name, images, labels, listing.classes, "not stated", note)


def npz(path: Path, size: int = 0, mode: str = "") -> Pictures:
    """Arrays of a NumPy file: images uint8 [N, H, W] or [N, H, W, C], labels [N] and classes, their names, where there are any.

    Raises DataError for other arrays, and for a size or a mode that the pictures have not: they are taken as they are.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            found = {name: file[name] for name in ("images", "labels", "classes") if name in file.files}
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read as an .npz file ({error}).") from error
    images = found.get("images", np.zeros(0))
    images = images[..., None] if images.ndim == 3 else images
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] not in (1, 3) or not len(images):
        raise DataError(f"{path} needs images, uint8 [N, H, W, 1 or 3], found {images.dtype} {list(images.shape)}.")
    shape = images.shape[1:]
    if shape != (size or shape[0], size or shape[1], {"RGB": 3, "L": 1}.get(mode, shape[2])):
        raise DataError(
            f"{path} has pictures of {describe(shape)}, which are taken as they are: leave --size and --mode out."
        )
    labels = found.get("labels", np.zeros(len(images), np.int64))
    if labels.shape != (len(images),) or labels.dtype.kind not in "iuU":
        raise DataError(f"{path} needs a label for each picture, found labels of shape {list(labels.shape)}.")
    classes, labels = numbered(labels.tolist())
    if "classes" in found:
        names = [str(name) for name in found["classes"]]
        if not all(name.isdigit() and int(name) < len(names) for name in classes):
            raise DataError(f"{path} has {len(names)} classes, and labels {', '.join(classes)[:80]} beyond them.")
        labels = np.array([int(name) for name in classes], np.int64)[labels]
        classes = tuple(names)
    return Pictures(path.stem, images, labels, classes, "not stated", f"{len(images)} pictures of {path.name}")


def held_out(count: int) -> NDArray[np.bool_]:
    """[count]: True for the emoji that no network trains on unless told to: index % 10 == 0."""
    return np.arange(count) % 10 == 0


def emoji(split: str = "train") -> Pictures:
    """1,906 emoji in two styles, 32×32 RGB on white, labelled style/category. split: train (the held-out tenth left out) or all."""
    with np.load(EMOJI, allow_pickle=False) as file:
        images, category, categories = file["images"], file["category"].astype(np.int64), file["categories"]
    classes = tuple(f"{style}/{c.lower().replace(' & ', '-')}" for style in STYLES for c in categories)
    labels = category[:, None] + len(categories) * np.arange(len(STYLES))
    kept = np.ones(len(images), bool) if split == "all" else ~held_out(len(images))
    return Pictures(
        name="emoji",
        images=images[kept].reshape(-1, *images.shape[2:]),
        labels=labels[kept].reshape(-1),
        classes=classes,
        licence="Noto Emoji: Copyright Google LLC, Apache License 2.0. Twemoji: Copyright Twitter, Inc and other contributors, CC-BY 4.0.",
        note="every emoji, in both styles"
        if split == "all"
        else "emoji with index % 10 != 0, in both styles; index % 10 == 0 is held out and was never seen",
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
        licence="UCI Optical Recognition of Handwritten Digits (Alpaydin & Kaynak 1998), CC-BY 4.0.",
        note="all 1,797 pictures of scikit-learn's load_digits",
    )
