"""The training pictures: built-in emoji and digits, or a folder with a subfolder per class."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from runtime.pictures import eight_bits
from runtime.progress import track

from .config import Config
from .errors import DataError

log = logging.getLogger(__name__)

EMOJI = Path(__file__).parent / "assets" / "emoji32.npz"
STYLES = ("noto", "twemoji")
ENDINGS = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm"}


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


def load(config: Config) -> Pictures:
    """The pictures that `config.data` names. Raises DataError where there are none, or where one is not like the others."""
    kind, _, path = config.data.partition(":")
    if kind == "digits":
        return digits()
    return emoji(config.split) if kind == "emoji" else folder(Path(path), config)


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
    """scikit-learn's 1,797 handwritten digits, 8×8 grey, white on black."""
    from sklearn.datasets import load_digits

    found: Any = load_digits()
    images = np.round(found.images * (255 / 16)).astype(np.uint8)[..., None]
    return Pictures(
        name="digits",
        images=images,
        labels=found.target.astype(np.int64),
        classes=tuple("0123456789"),
        licence="UCI Optical Recognition of Handwritten Digits (Alpaydin & Kaynak 1998), CC-BY 4.0.",
        note="all 1,797 pictures of scikit-learn's load_digits",
    )


def folder(path: Path, config: Config) -> Pictures:
    """The pictures under `path`: a class per subfolder, or one class where there are no subfolders with pictures.

    All must have one size and mode, unless config.size or config.mode say to convert. Raises DataError otherwise, for a folder without
    pictures, and for a picture that cannot be read unless config.bad_pictures is "skip".
    """
    from PIL import Image

    if not path.is_dir():
        raise DataError(
            f"{path} is not a folder. --data folder:PATH needs a folder with a subfolder of pictures per class."
        )
    classes = sorted(p.name for p in path.iterdir() if p.is_dir() and any(_pictures_in(p)))
    found = [(file, i) for i, name in enumerate(classes) for file in _pictures_in(path / name)]
    if not found:
        classes, found = [path.name], [(file, 0) for file in _pictures_in(path)]
    if not found:
        raise DataError(f"no pictures in {path} (looked for {', '.join(sorted(ENDINGS))} there and in its subfolders).")
    images, labels, first, skipped = [], [], path, 0
    for file, label in track(found, f"reading {path.name}"):
        try:
            picture = _read(file, config)
        except (
            OSError,
            ValueError,
            SyntaxError,
            Image.DecompressionBombError,
        ) as error:  # what Pillow raises for a file that is no picture or is cut short
            if config.bad_pictures == "refuse":
                raise DataError(
                    f"{file} cannot be read as a picture ({error}). Remove it, or leave such pictures out with --bad-pictures skip."
                ) from error
            log.warning("skipped %s: %s", file, error)
            skipped += 1
            continue
        if images and picture.shape != images[0].shape:
            raise DataError(
                f"{file} is {_describe(picture)}, but {first} is {_describe(images[0])}. "
                "Say how to make them alike: --size N resizes and crops, --mode RGB or --mode L converts."
            )
        first = first if images else file
        images.append(picture)
        labels.append(label)
    if not images:
        raise DataError(f"none of the {len(found)} pictures in {path} can be read.")
    note = f"{len(images)} pictures of a local folder" + (f", {skipped} unreadable ones left out" if skipped else "")
    return Pictures(path.name, np.stack(images), np.array(labels, np.int64), tuple(classes), "not stated", note)


def _pictures_in(path: Path) -> Iterable[Path]:
    return sorted(p for p in path.iterdir() if p.suffix.lower() in ENDINGS and p.is_file())


def _describe(picture: NDArray[np.uint8]) -> str:
    return f"{picture.shape[1]}x{picture.shape[0]} {'RGB' if picture.shape[2] == 3 else 'L'}"


def _read(file: Path, config: Config) -> NDArray[np.uint8]:
    """One picture [H, W, C]. Transparency is laid on white when converting."""
    from PIL import Image, ImageOps

    with Image.open(file) as opened:
        opened.load()
        image = ImageOps.exif_transpose(opened)
    if config.mode:
        image = eight_bits(image, file.name)
        if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        image = image.convert(config.mode)
    if image.mode not in ("RGB", "L"):
        raise DataError(f"{file} has mode {image.mode}; RGB or L is needed. --mode RGB or --mode L converts.")
    if config.size:
        image = ImageOps.fit(image, (config.size, config.size), Image.Resampling.LANCZOS)
    array = np.asarray(image, np.uint8)
    return array if array.ndim == 3 else array[..., None]
