"""From the bytes of an image file to pixels of the size and mode that a run trains on."""

from __future__ import annotations

import io
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from runtime.errors import RequestError, UnnoiseError
from runtime.images import eight_bits

from ..config.text import printable
from ..errors import DataError

if TYPE_CHECKING:  # Pillow is imported when it is needed: it takes long
    from PIL import Image

UInt8 = NDArray[np.uint8]


FORMATS = {
    "PNG": (".png", ".apng"),
    "JPEG": (".jpg", ".jpeg", ".jpe", ".jfif"),
    "WEBP": (".webp",),
    "AVIF": (".avif",),
    "JPEG2000": (".jp2", ".j2k", ".jpx"),
    "GIF": (".gif",),
    "TIFF": (".tif", ".tiff"),
    "BMP": (".bmp",),
    "DIB": (".dib",),
    "PPM": (".ppm", ".pgm", ".pbm", ".pnm"),
    "TGA": (".tga",),
    "QOI": (".qoi",),
}
"""Pillow's names of the formats that are trained on, and the endings of their files."""
OPTIONAL = {"WEBP": "webp", "AVIF": "avif", "JPEG2000": "jpg_2000"}
"""Formats that Pillow may have been built without, and its names for these features."""
OTHER_IMAGES = frozenset((
    ".heic", ".heif", ".hif", ".jxl", ".jxr", ".svg", ".psd", ".xcf", ".ico",
    ".icns", ".exr", ".hdr", ".dds", ".dng", ".cr2", ".cr3", ".nef", ".arw",
    ".orf", ".rw2", ".raf", ".raw", ".mpo", ".pcx", ".sgi", ".rgb", ".pfm",
    ".eps", ".mp4", ".m4v", ".mov", ".avi", ".webm", ".mkv",
))  # fmt: skip
"""Endings of images and videos that are not trained on, so that the trainer can report them."""


@cache
def endings() -> frozenset[str]:
    """Return the file endings that are read as images, lower case, with their dot."""
    from PIL import Image, features

    Image.init()
    return frozenset(
        ending
        for kind, found in FORMATS.items()
        if kind in Image.OPEN and (kind not in OPTIONAL or features.check(OPTIONAL[kind]))
        for ending in found
    )


def image_ending(ending: str) -> bool:
    """Return whether files with this ending are images or videos, readable or not."""
    return ending in OTHER_IMAGES or any(ending in found for found in FORMATS.values())


def image_bytes(head: bytes) -> bool:
    """Return whether a file that begins like this is an image, regardless of its name."""
    # ISO media files (AVIF, HEIC) and RIFF say what they hold behind a length.
    signatures = (b"\x89PNG\r\n", b"\xff\xd8\xff", b"GIF8", b"II*\0", b"MM\0*", b"qoif")
    container = head[:4] == b"RIFF" and head[8:12] == b"WEBP"
    still = head[4:8] == b"ftyp" and head[8:12] in (b"avif", b"heic", b"heix", b"mif1", b"msf1")
    return head.startswith(signatures) or container or still


class UnreadablePicture(Exception):
    """These bytes are not an image, or not all of one."""


@dataclass(frozen=True)
class Decoding:
    """How images are decoded. Its `repr` is part of a stream's fingerprint.

    Attributes:
        size: The shorter side is resized to it and the rest is cropped; 0 keeps the image's own.
        mode: RGB or L; "" keeps the image's own.
    """

    size: int = 0
    mode: str = ""

    def __call__(self, data: bytes | Path, name: str, centering: float = 0.5) -> UInt8:
        """Return an image, [H, W, C]. When it is converted, transparency is laid on white.

        Args:
            data: The file's bytes, or its path.
            name: What errors call the image.
            centering: Which part of an image that is not square is kept, 0 … 1.

        Raises:
            UnreadablePicture: The bytes are not an image.
            DataError: It has a mode that no network takes.
        """
        from PIL import Image, ImageOps

        try:
            with Image.open(io.BytesIO(data) if isinstance(data, bytes) else data) as opened:
                if self.size and self.mode:
                    # A JPEG can be unpacked at a half, a quarter, … of its size, which is faster.
                    # Twice the size leaves enough for the resampling below.
                    opened.draft(None, (2 * self.size, 2 * self.size))
                opened.load()
                image = ImageOps.exif_transpose(opened)
            image = self._converted(image, name)
            if self.size and image.mode in ("RGB", "L"):
                image = ImageOps.fit(
                    image,
                    (self.size, self.size),
                    Image.Resampling.LANCZOS,
                    0,
                    (centering, centering),
                )
        except (UnnoiseError, MemoryError):
            raise
        # Pillow raises a dozen kinds, struct.error for a cut-off EXIF among them.
        except Exception as error:
            raise UnreadablePicture(str(error) or type(error).__name__) from error
        if image.mode not in ("RGB", "L"):
            raise DataError(
                f"{printable(name)} has mode {image.mode}; RGB or L is needed. --mode RGB or "
                f"--mode L converts."
            )
        array = np.asarray(image, np.uint8)
        return array if array.ndim == 3 else array[..., None]

    def _converted(self, image: Image.Image, name: str) -> Image.Image:
        from PIL import Image

        if not self.mode:
            return image
        # Pillow's own conversion of 16 bits cuts values off at 255.
        try:
            image = eight_bits(image, printable(name))
        except RequestError as error:  # a worker reports errors of the data alone
            raise DataError(str(error)) from error
        if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        return image.convert(self.mode)


def describe(shape: tuple[int, ...]) -> str:
    """Return a text such as "8x6 RGB" for the shape (H, W, C)."""
    return f"{shape[1]}x{shape[0]} {'RGB' if shape[2] == 3 else 'L'}"


def unlike(name: str, shape: tuple[int, ...], first: str, expected: tuple[int, ...]) -> DataError:
    """Return the error for an image that differs from the first one in shape."""
    return DataError(
        f"{printable(name)} is {describe(shape)}, but {printable(first)} is {describe(expected)}. "
        "Say how to make them alike: --size N resizes and crops, --mode RGB or --mode L converts."
    )
