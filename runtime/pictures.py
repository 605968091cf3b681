"""Between arrays and pictures. Pillow is imported on first use."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .errors import RequestError
from .files import replacing

UInt8 = NDArray[np.uint8]
Float32 = NDArray[np.float32]


def to_uint8(samples: NDArray[Any], low: float = -1.0, high: float = 1.0) -> UInt8:
    """Samples [n, C, H, W] in the range low … high → pictures [n, H, W, C] of 0 … 255, rounded, values outside the range cut.

    Raises RequestError for another shape and for NaN.
    """
    if samples.ndim != 4 or samples.shape[1] not in (1, 3):
        raise RequestError(f"pictures need samples [n, 1 or 3, H, W], found shape {samples.shape}.")
    if (broken := np.isnan(samples).any(axis=(1, 2, 3))).any():
        raise RequestError(
            f"pictures need numbers, found NaN in {broken.sum()} of {len(samples)} samples (the first at {broken.argmax()}): "
            "look for it in the weights, or in what was handed in."
        )
    unit = (np.asarray(samples, np.float64) - low) / (high - low)
    return np.round(np.clip(unit, 0.0, 1.0) * 255.0).astype(np.uint8).transpose(0, 2, 3, 1)


def from_uint8(pictures: UInt8, low: float = -1.0, high: float = 1.0) -> NDArray[np.float32]:
    """Pictures [n, H, W, C] of 0 … 255 → samples [n, C, H, W], float32 in the range low … high."""
    unit = pictures.transpose(0, 3, 1, 2).astype(np.float32) / np.float32(255)
    return np.ascontiguousarray(unit * np.float32(high - low) + np.float32(low))


def tile(pictures: UInt8, columns: int | None = None, gap: int = 2) -> UInt8:
    """Pictures [n, H, W, C] on one white sheet, row by row, `columns` to a row (default: as square as it gets).

    Raises RequestError where there is no picture.
    """
    n, H, W, C = pictures.shape
    if n == 0:
        raise RequestError(
            f"a sheet needs at least 1 picture, found none (shape {pictures.shape}): ask for n=1 or more."
        )
    columns = columns or math.ceil(math.sqrt(n))
    rows = math.ceil(n / columns)
    sheet = np.full((rows * (H + gap) + gap, columns * (W + gap) + gap, C), 255, np.uint8)
    for i, picture in enumerate(pictures):
        y, x = gap + i // columns * (H + gap), gap + i % columns * (W + gap)
        sheet[y : y + H, x : x + W] = picture
    return sheet


def picture_format(path: Path) -> str:
    """Pillow's name for the format that the file name's ending asks for. Raises RequestError for an ending that it cannot write."""
    from PIL import Image

    Image.init()
    found = Image.EXTENSION.get(path.suffix.lower())
    if found not in Image.SAVE:
        raise RequestError(f"cannot write pictures as {path.suffix or path.name!r}: use a name that ends in .png.")
    return found


def animation_format(path: Path) -> str:
    """`picture_format` of a file that can move. Raises RequestError for one that cannot."""
    kind = picture_format(path)
    if kind not in ("GIF", "PNG", "WEBP"):
        raise RequestError(f"cannot write an animation as {path.suffix}: use a name that ends in .gif, .png or .webp.")
    return kind


def save(path: str | Path, picture: UInt8, least: int = 0) -> None:
    """Write one picture [H, W, C]; the format is the file name's ending.

    Enlarged by a whole factor, pixels kept square, until it is `least` wide. Raises RequestError, see `picture_format`.
    """
    from PIL import Image

    path = Path(path)
    kind = picture_format(path)
    with replacing(path) as temporary:
        Image.fromarray(_enlarged(picture, least)).save(temporary, kind)


def _enlarged(picture: UInt8, least: int) -> UInt8:
    """[H, W, C] made at least `least` wide by a whole factor; [H, W] where C is 1."""
    factor = max(1, math.ceil(least / picture.shape[1]))
    enlarged = picture.repeat(factor, axis=0).repeat(factor, axis=1)
    return enlarged[..., 0] if picture.shape[2] == 1 else enlarged


def read(
    pictures: Any,
    shape: tuple[int, ...],
    low: float = -1.0,
    high: float = 1.0,
    convert: bool = False,
    what: str = "picture",
) -> Float32:
    """One or more pictures as samples [n, *shape], float32 in the range low … high.

    pictures: a path, a Pillow image, an array, or a sequence of these; uint8 arrays are pictures ([H, W], [H, W, C] or [n, H, W, C]), float
    arrays are samples (`shape` or [n, *shape]). convert: turn upright, put on white, change to `shape`'s mode, crop the middle and resize.
    what: they are called in errors.
    Raises RequestError where there is no picture, and where one is of another size or mode and convert is false.
    """
    if isinstance(pictures, np.ndarray) and pictures.ndim > (len(shape) if pictures.dtype.kind == "f" else 3):
        pictures = list(pictures)
    many = isinstance(pictures, (list, tuple))
    found = list(pictures) if many else [pictures]
    if not found:
        raise RequestError(f"no {what} was given.")
    names = [f"{what} {i}" if many else f"the {what}" for i in range(len(found))]
    return np.stack([_sample(*pair, shape, low, high, convert) for pair in zip(found, names, strict=True)])


def _sample(picture: Any, name: str, shape: tuple[int, ...], low: float, high: float, convert: bool) -> Float32:
    """One picture as a sample [*shape]."""
    if isinstance(picture, np.ndarray) and picture.dtype.kind == "f":
        if picture.shape != shape:
            raise RequestError(f"{name} is a float array of shape {picture.shape}, a sample of {shape} expected.")
        slack = 0.25 * (high - low)
        if not ((picture >= low - slack) & (picture <= high + slack)).all():  # NaN fails this too
            raise RequestError(
                f"{name} holds values outside {low:g} … {high:g}, which float samples lie in; pictures of 0 … 255 go in as uint8."
            )
        return picture.astype(np.float32)
    if len(shape) != 3 or shape[0] not in (1, 3):
        raise RequestError(f"samples of shape {shape} are no pictures: hand in float arrays of that shape.")
    return from_uint8(_fitting(*_image(picture, name), shape, convert)[None], low, high)[0]


def _image(picture: Any, name: str) -> tuple[Any, str]:
    """As a Pillow image, and what to call it in an error."""
    from PIL import Image

    if isinstance(picture, Image.Image):
        return picture, name
    if isinstance(picture, np.ndarray):
        if picture.dtype != np.uint8 or picture.ndim not in (2, 3):
            raise RequestError(
                f"{name} must be uint8 [H, W] or [H, W, C] or a float sample, found {picture.dtype} {picture.shape}."
            )
        flat = picture[..., 0] if picture.shape[2:] == (1,) else picture
        try:
            return Image.fromarray(flat), name
        except (TypeError, ValueError):
            raise RequestError(f"{name} has shape {picture.shape}: 1 to 4 channels come last.") from None
    if not isinstance(picture, (str, os.PathLike)):
        raise RequestError(f"{name} must be a path, a Pillow image or an array, found {type(picture).__name__}.")
    try:
        with Image.open(picture) as image:
            image.load()
            return image, str(picture)
    except FileNotFoundError:
        raise RequestError(f"there is no picture {picture}.") from None
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise RequestError(f"{picture} cannot be read as a picture: {error}.") from error


def _fitting(image: Any, name: str, shape: tuple[int, ...], convert: bool) -> UInt8:
    """[H, W, C] of exactly the sample's size and mode."""
    from PIL import Image, ImageOps

    mode, size = "L" if shape[0] == 1 else "RGB", (shape[2], shape[1])
    if convert:
        image = eight_bits(ImageOps.exif_transpose(image), name)
        if image.has_transparency_data:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        image = image.convert(mode)
        if image.size != size:
            image = ImageOps.fit(image, size, Image.Resampling.LANCZOS)
    if (image.mode, mode) == ("1", "L"):
        image = image.convert("L")
    if image.mode != mode or image.size != size:
        raise RequestError(
            f"{name} is {image.width}×{image.height} {image.mode}, {size[0]}×{size[1]} {mode} expected: "
            "change it, or ask for it to be converted (convert=True, --convert)."
        )
    return np.asarray(image).reshape(shape[1], shape[2], shape[0])


def eight_bits(image: Any, name: str) -> Any:
    """A Pillow image of 16 bits a pixel as one of 8, where Pillow itself would cut at 255; any other as it is.

    Raises RequestError for whole or real numbers of 32 bits, of which nothing says how bright they are.
    """
    from PIL import Image

    if image.mode in ("I", "F"):
        raise RequestError(
            f"{name} has mode {image.mode}, 32 bits a pixel, and nothing says which value is white: save it with 8 or 16 bits."
        )
    if image.mode.startswith("I;16"):
        return Image.fromarray(np.round(np.asarray(image) / 257).astype(np.uint8))
    return image


def save_animation(path: str | Path, frames: UInt8, least: int = 0, frame_ms: int = 60, last_ms: int = 1500) -> None:
    """Write frames [n, H, W, C] as a GIF, an APNG or a WebP that repeats, by the file name's ending; enlarged as by `save`."""
    from PIL import Image

    path = Path(path)
    kind = animation_format(path)
    images = [Image.fromarray(_enlarged(frame, least)) for frame in frames]
    times = [frame_ms] * (len(images) - 1) + [last_ms]
    with replacing(path) as temporary:
        images[0].save(temporary, kind, save_all=True, append_images=images[1:], duration=times, loop=0)
