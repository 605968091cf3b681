"""Between arrays and pictures. Pillow is imported on first use."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .errors import RequestError
from .errors.arguments import (
    array_of,
    enough_memory,
    flag,
    integer,
    number,
    path_of,
    reason,
    refused,
    shown,
    size_of,
)
from .errors.messages import shown_path
from .files import replacing

UInt8 = NDArray[np.uint8]
Float32 = NDArray[np.float32]
LARGEST = 1e30
"""Bound of the data's range, either way."""
MAX_BYTES = 2**28
"""Most bytes of one sheet or enlarged image."""


def to_uint8(samples: NDArray[Any], low: float = -1.0, high: float = 1.0) -> UInt8:
    """Samples [n, C, H, W] in the range low … high → pictures [n, H, W, C] of 0 … 255, rounded,
    values outside the range cut.

    Raises RequestError for another shape and for NaN.
    """
    low, high = _range(low, high)
    samples = _array("samples", samples, "buif", "an array of numbers [n, 1 or 3, H, W]")
    if samples.ndim != 4 or samples.shape[1] not in (1, 3):
        raise RequestError(f"images need samples [n, 1 or 3, H, W], got shape {samples.shape}.")
    if (broken := np.isnan(samples).any(axis=(1, 2, 3))).any():
        raise RequestError(
            f"images need numbers, got NaN in {broken.sum()} of {len(samples)} samples "
            f"(the first is number {broken.argmax()}). Check the weights and the arrays you "
            f"passed in."
        )
    with enough_memory(f"an image of each of {len(samples)} samples", "Convert fewer at a time."):
        unit = (np.asarray(samples, np.float64) - low) / (high - low)
    return np.round(np.clip(unit, 0.0, 1.0) * 255.0).astype(np.uint8).transpose(0, 2, 3, 1)


def _range(low: Any, high: Any) -> tuple[float, float]:
    """The data's range as floats. Raises RequestError unless low < high, both within float32."""
    low = number("low", low, -LARGEST, LARGEST)
    high = number("high", high, -LARGEST, LARGEST)
    if not low < high:
        raise RequestError(f"`low` must be below `high`, got {low:g} and {high:g}.")
    return low, high


def _array(name: str, value: Any, kinds: str, rule: str) -> NDArray[Any]:
    """`value` as an array of one of these kinds of numbers. Raises RequestError for anything
    else."""
    try:
        array = array_of(value)
        if array.dtype.kind in kinds:
            return array
    except Exception:
        pass
    raise refused(name, rule, value)


def _images(pictures: Any, name: str = "pictures") -> UInt8:
    """`pictures` as uint8 [n, H, W, C]. Raises RequestError for anything else."""
    if not isinstance(pictures, np.ndarray) or pictures.dtype != np.uint8 or pictures.ndim != 4:
        raise refused(name, "a uint8 array [n, H, W, C]", pictures)
    return pictures


def _size(what: str, *sides: int) -> None:
    """Raises RequestError if an image of these sides has more than `MAX_BYTES`."""
    if math.prod(sides) > MAX_BYTES:
        raise RequestError(
            f"{what} of {'×'.join(map(str, sides))} bytes is too large: at most {MAX_BYTES} bytes. "
            "Ask for fewer images, fewer columns or a smaller width."
        )


def from_uint8(pictures: UInt8, low: float = -1.0, high: float = 1.0) -> NDArray[np.float32]:
    """Pictures [n, H, W, C] of 0 … 255 → samples [n, C, H, W], float32 in the range low … high."""
    low, high = _range(low, high)
    pictures = _images(pictures)
    unit = pictures.transpose(0, 3, 1, 2).astype(np.float32) / np.float32(255)
    return np.ascontiguousarray(unit * np.float32(high - low) + np.float32(low))


def tile(pictures: UInt8, columns: int | None = None, gap: int = 2) -> UInt8:
    """Pictures [n, H, W, C] on one white sheet, row by row, `columns` to a row (default: as square
    as it gets).

    Raises RequestError where there is no picture.
    """
    n, H, W, C = _images(pictures).shape
    if n == 0:
        raise RequestError(
            f"a sheet needs at least 1 image, got none (shape {pictures.shape}). Ask for n=1 or "
            f"more."
        )
    gap = integer("gap", gap, 0, MAX_BYTES)
    if columns is None:
        columns = math.ceil(math.sqrt(n))
    columns = integer("columns", columns, 1, MAX_BYTES)
    rows = -(-n // columns)
    _size("a sheet", rows * (H + gap) + gap, columns * (W + gap) + gap, C)
    sheet = np.full((rows * (H + gap) + gap, columns * (W + gap) + gap, C), 255, np.uint8)
    for i, picture in enumerate(pictures):
        y = gap + i // columns * (H + gap)
        x = gap + i % columns * (W + gap)
        sheet[y : y + H, x : x + W] = picture
    return sheet


def picture_format(path: Path) -> str:
    """Pillow's name for the format that the file name's ending asks for. Raises RequestError for an
    ending that it cannot write."""
    from PIL import Image

    path = path_of("path", path)
    Image.init()
    found = Image.EXTENSION.get(path.suffix.lower())
    if found not in Image.SAVE:
        ending = shown_path(path.suffix) or shown(path.name)
        raise RequestError(f"cannot write images as {ending}: use a name that ends in .png.")
    return found


def animation_format(path: Path) -> str:
    """`picture_format` of a file that can move. Raises RequestError for one that cannot."""
    kind = picture_format(path)
    if kind not in ("GIF", "PNG", "WEBP"):
        ending = path_of("path", path).suffix
        raise RequestError(
            f"cannot write an animation as {ending}: use a name that ends in .gif, .png or .webp."
        )
    return kind


def save(path: str | Path, picture: UInt8, least: int = 0) -> None:
    """Write one picture [H, W, C]; the format is the file name's ending.

    Enlarged by a whole factor, pixels kept square, until it is `least` wide. Raises RequestError,
    see `picture_format`.
    """
    from PIL import Image

    path = path_of("path", path)
    kind = picture_format(path)
    image = Image.fromarray(_enlarged(_image_of(picture), least))
    with replacing(path) as temporary, _writing(path):
        image.save(temporary, kind)


def _image_of(picture: Any) -> UInt8:
    """One image, uint8 [H, W, C] with 1 to 4 channels. Raises RequestError for anything else."""
    if (
        not isinstance(picture, np.ndarray)
        or picture.dtype != np.uint8
        or picture.ndim != 3
        or picture.size == 0
        or picture.shape[2] > 4
    ):
        raise refused("picture", "a uint8 array [H, W, C] with 1 to 4 channels", picture)
    return picture


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    """Turn what Pillow raises while it writes into a RequestError. OSErrors stay as they are."""
    try:
        yield
    except OSError:
        raise
    except Exception as error:
        raise RequestError(
            f"{shown_path(path)} cannot be written: {reason(error)}. Use another format, such as "
            f".png, or a smaller image."
        ) from error


def _enlarged(picture: UInt8, least: int) -> UInt8:
    """[H, W, C] made at least `least` wide by a whole factor; [H, W] where C is 1."""
    H, W, C = picture.shape
    factor = max(1, -(-integer("least", least, 0, MAX_BYTES) // W))
    _size("an image", H * factor, W * factor, C)
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

    pictures: a path, a Pillow image, an array, or a sequence of these; uint8 arrays are pictures
    ([H, W], [H, W, C] or [n, H, W, C]), float arrays are samples (`shape` or [n, *shape]). convert:
    turn upright, put on white, change to `shape`'s mode, crop the middle and resize.
    what: they are called in errors. Raises RequestError where there is no picture, and where one is
    of another size or mode and convert is false.
    """
    convert = flag("convert", convert)
    low, high = _range(low, high)
    shape = size_of("shape", shape)
    if isinstance(pictures, np.ndarray) and pictures.ndim > (
        len(shape) if pictures.dtype.kind == "f" else 3
    ):
        pictures = list(pictures)
    many = isinstance(pictures, (list, tuple))
    found = list(pictures) if many else [pictures]
    if not found:
        raise RequestError(f"no {what} was given.")
    names = [f"{what} {i}" if many else f"the {what}" for i in range(len(found))]
    remedy = "Pass fewer images at a time."
    with enough_memory(f"{len(found)} images of {shape}", remedy), np.errstate(invalid="ignore"):
        return np.stack(
            [_sample(*pair, shape, low, high, convert) for pair in zip(found, names, strict=True)]
        )


def _sample(
    picture: Any, name: str, shape: tuple[int, ...], low: float, high: float, convert: bool
) -> Float32:
    """One picture as a sample [*shape]."""
    if isinstance(picture, np.ndarray) and picture.dtype.kind == "f":
        if picture.shape != shape:
            raise RequestError(
                f"{name} is a float array of shape {picture.shape}, a sample of {shape} expected."
            )
        slack = 0.25 * (high - low)
        if not ((picture >= low - slack) & (picture <= high + slack)).all():  # NaN fails this too
            raise RequestError(
                f"{name} holds values outside {low:g} … {high:g}, which float samples lie in; "
                f"pictures of 0 … 255 go in as uint8."
            )
        return picture.astype(np.float32)
    if len(shape) != 3 or shape[0] not in (1, 3):
        raise RequestError(
            f"samples of shape {shape} are no pictures: hand in float arrays of that shape."
        )
    image, called = _image(picture, name)
    try:
        fitting = _fitting(image, called, shape, convert)
    except (RequestError, MemoryError):
        raise
    except Exception as error:  # an image that is closed, empty or of an unusual mode
        raise RequestError(f"{called} cannot be used as an image: {reason(error)}.") from error
    return from_uint8(fitting[None], low, high)[0]


def _image(picture: Any, name: str) -> tuple[Any, str]:
    """As a Pillow image, and what to call it in an error."""
    from PIL import Image

    if isinstance(picture, Image.Image):
        return picture, name
    if isinstance(picture, np.ndarray):
        if picture.dtype != np.uint8 or picture.ndim not in (2, 3):
            raise RequestError(
                f"{name} must be uint8 [H, W] or [H, W, C] or a float sample, got {picture.dtype} "
                f"{picture.shape}."
            )
        flat = picture[..., 0] if picture.shape[2:] == (1,) else picture
        try:
            return Image.fromarray(flat), name
        except (TypeError, ValueError):
            raise RequestError(
                f"{name} has shape {picture.shape}: 1 to 4 channels come last."
            ) from None
    if not isinstance(picture, (str, os.PathLike)):
        raise RequestError(
            f"{name} must be a path, a Pillow image or an array, got {shown(picture)} "
            f"({type(picture).__name__})."
        )
    path = path_of(name, picture)
    try:
        with Image.open(path) as image:
            image.load()
            return image, shown_path(path)
    except FileNotFoundError:
        raise RequestError(f"there is no image {shown_path(path)}.") from None
    except Exception as error:  # damaged files raise many kinds of errors inside Pillow
        raise RequestError(
            f"{shown_path(path)} cannot be read as an image: {reason(error)}."
        ) from error


def _fitting(image: Any, name: str, shape: tuple[int, ...], convert: bool) -> UInt8:
    """[H, W, C] of exactly the sample's size and mode."""
    from PIL import Image, ImageOps

    mode = "L" if shape[0] == 1 else "RGB"
    size = (shape[2], shape[1])
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
            f"{name} is {image.width}×{image.height} {image.mode}, {size[0]}×{size[1]} {mode} "
            f"expected: "
            "change it, or ask for it to be converted (convert=True, --convert)."
        )
    return np.asarray(image).reshape(shape[1], shape[2], shape[0])


def eight_bits(image: Any, name: str) -> Any:
    """A Pillow image of 16 bits a pixel as one of 8, where Pillow itself would cut at 255; any
    other as it is.

    Raises RequestError for whole or real numbers of 32 bits, of which nothing says how bright they
    are.
    """
    from PIL import Image

    if image.mode in ("I", "F"):
        raise RequestError(
            f"{name} has mode {image.mode}, 32 bits a pixel, and nothing says which value is "
            f"white: save it with 8 or 16 bits."
        )
    if image.mode.startswith("I;16"):
        return Image.fromarray(np.round(np.asarray(image) / 257).astype(np.uint8))
    return image


def save_animation(
    path: str | Path, frames: UInt8, least: int = 0, frame_ms: int = 60, last_ms: int = 1500
) -> None:
    """Write frames [n, H, W, C] as a GIF, an APNG or a WebP that repeats, by the file name's
    ending; enlarged as by `save`."""
    from PIL import Image

    path = path_of("path", path)
    kind = animation_format(path)
    if len(_images(frames, "frames")) == 0:
        raise RequestError("an animation needs at least 1 frame, got none.")
    frame_ms = integer("frame_ms", frame_ms, 1, 60_000)
    last_ms = integer("last_ms", last_ms, 1, 60_000)
    images = [Image.fromarray(_enlarged(_image_of(frame), least)) for frame in frames]
    times = [frame_ms] * (len(images) - 1) + [last_ms]
    with replacing(path) as temporary, _writing(path):
        images[0].save(
            temporary, kind, save_all=True, append_images=images[1:], duration=times, loop=0
        )
