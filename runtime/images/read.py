"""Images of any source as samples: paths, Pillow images and arrays."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, TypeAlias

import numpy as np

from ..errors import RequestError
from ..errors.arguments import enough_memory, flag, path_of, size_of
from ..errors.messages import reason, shown, shown_path
from .arrays import Float32, UInt8, from_uint8, is_image, value_range

if TYPE_CHECKING:
    from PIL.Image import Image as PillowImage

ImageSource: TypeAlias = "str | os.PathLike[str] | PillowImage | np.ndarray"
"""One image: a path, a Pillow image, uint8 [H, W] or [H, W, C], or a float sample [*S]."""
ImageSources: TypeAlias = "ImageSource | Sequence[ImageSource]"
"""One image or several: an `ImageSource`, a sequence of these, or one array of all [n, …]."""

ORIENTATION = 0x0112
"""The tag of EXIF that says how an image is turned."""
TURNED = range(2, 9)
"""Its values for images that are not upright."""


def read(
    pictures: ImageSources,
    shape: tuple[int, ...],
    low: float = -1.0,
    high: float = 1.0,
    convert: bool = False,
    what: str = "picture",
) -> Float32:
    """Read one or more images as samples [n, *shape], float32 in low … high.

    Args:
        pictures: A path, a Pillow image, an array, or a sequence of these. uint8 arrays are images
            ([H, W], [H, W, C] or [n, H, W, C]); float arrays are samples (`shape` or
            [n, *shape]). Of an animation the first frame is read.
        shape: The shape of one sample, [C, H, W] unless all images are float arrays.
        low: The sample's value for black.
        high: The sample's value for white.
        convert: Turn images upright, put them on white, change them to the mode of `shape`, crop
            the middle and resize.
        what: What the images are called in messages.

    Raises:
        RequestError: There is no image; or `convert` is false and one has another size or mode, is
            transparent, or is stored turned.
    """
    convert = flag("convert", convert)
    low, high = value_range(low, high)
    shape = size_of("shape", shape)
    if isinstance(pictures, np.ndarray) and pictures.ndim > (
        len(shape) if pictures.dtype.kind == "f" else 3
    ):
        pictures = list(pictures)
    many = isinstance(pictures, (list, tuple))
    found = list(pictures) if many else [pictures]
    if not found:
        raise RequestError(f"no {what} was given. Pass at least one.")
    names = [f"{what} {i}" if many else f"the {what}" for i in range(len(found))]
    remedy = "Pass fewer images at a time."
    # A float array that holds NaN raises an error below, so numpy's warning is not needed.
    with enough_memory(f"{len(found)} images of {shape}", remedy), np.errstate(invalid="ignore"):
        return np.stack(
            [_sample(*pair, shape, low, high, convert) for pair in zip(found, names, strict=True)]
        )


def eight_bits(image: PillowImage, name: str) -> PillowImage:
    """Return an image of 16 bits a pixel as one of 8, and any other unchanged.

    Raises:
        RequestError: The image has 32 bits a pixel, so nothing says which value is white.
    """
    from PIL import Image

    if image.mode in ("I", "F"):
        raise RequestError(
            f"{name} has mode {image.mode}, 32 bits a pixel, and nothing says which value is "
            f"white: save it with 8 or 16 bits."
        )
    # Pillow itself clips at 255, which makes all but the darkest 256th part white.
    if image.mode.startswith("I;16"):
        return Image.fromarray(np.round(np.asarray(image) / 257).astype(np.uint8))
    return image


def _sample(
    picture: object, name: str, shape: tuple[int, ...], low: float, high: float, convert: bool
) -> Float32:
    """Return one image as a sample [*shape]."""
    if isinstance(picture, np.ndarray) and picture.dtype.kind == "f":
        return _float_sample(picture, name, shape, low, high)
    if not is_image(shape):
        raise RequestError(
            f"samples of shape {shape} are not images. Pass float arrays of that shape."
        )
    image, called = _image(picture, name)
    try:
        fitting = _fitting(image, called, shape, convert)
    except (RequestError, MemoryError):
        raise
    except Exception as error:  # an image that is closed, empty or of an unusual mode
        raise RequestError(f"{called} cannot be used as an image: {reason(error)}.") from error
    return from_uint8(fitting[None], low, high)[0]


def _float_sample(
    sample: np.ndarray, name: str, shape: tuple[int, ...], low: float, high: float
) -> Float32:
    """Return a sample [*shape] as float32, checked."""
    if sample.shape != shape:
        raise RequestError(
            f"{name} is a float array of shape {sample.shape}, a sample of {shape} expected."
        )
    # Samples may overshoot the range a little; pixels of 0 … 255 are far outside.
    slack = 0.25 * (high - low)
    if not ((sample >= low - slack) & (sample <= high + slack)).all():  # NaN fails this too
        raise RequestError(
            f"{name} holds values outside {low:g} … {high:g}, the range of float samples. Pass "
            f"pixels of 0 … 255 as uint8."
        )
    return sample.astype(np.float32)


def _image(picture: object, name: str) -> tuple[PillowImage, str]:
    """Return a Pillow image, and what to call it in messages."""
    from PIL import Image

    if isinstance(picture, Image.Image):
        return picture, name
    if isinstance(picture, np.ndarray):
        return _image_of_pixels(picture, name), name
    if not isinstance(picture, (str, os.PathLike)):
        raise RequestError(
            f"{name} must be a path, a Pillow image or an array, got {shown(picture)} "
            f"({type(picture).__name__})."
        )
    path = path_of(name, picture)
    try:
        with Image.open(path) as image:
            # Pillow reads lazily, and the file is closed at the end of this block.
            image.load()
            return image, shown_path(path)
    except FileNotFoundError:
        raise RequestError(f"there is no image {shown_path(path)}.") from None
    except Exception as error:  # damaged files raise many kinds of errors inside Pillow
        raise RequestError(
            f"{shown_path(path)} cannot be read as an image: {reason(error)}."
        ) from error


def _image_of_pixels(pixels: np.ndarray, name: str) -> PillowImage:
    """Return the Pillow image of pixels [H, W] or [H, W, C]."""
    from PIL import Image

    if pixels.dtype != np.uint8 or pixels.ndim not in (2, 3):
        raise RequestError(
            f"{name} must be uint8 [H, W] or [H, W, C] or a float sample, got {pixels.dtype} "
            f"{pixels.shape}."
        )
    flat = pixels[..., 0] if pixels.shape[2:] == (1,) else pixels
    try:
        return Image.fromarray(flat)
    except (TypeError, ValueError):
        raise RequestError(f"{name} has shape {pixels.shape}: 1 to 4 channels come last.") from None


def _fitting(image: PillowImage, name: str, shape: tuple[int, ...], convert: bool) -> UInt8:
    """Return the pixels [H, W, C] of exactly the sample's size and mode."""
    from PIL import Image, ImageOps

    mode = "L" if shape[0] == 1 else "RGB"
    size = (shape[2], shape[1])
    if convert:
        # Cameras store the orientation alongside the pixels.
        image = eight_bits(ImageOps.exif_transpose(image), name)
        # convert() alone drops alpha, which shows the arbitrary colours of transparent pixels.
        if image.has_transparency_data:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        image = image.convert(mode)
        if image.size != size:
            image = ImageOps.fit(image, size, Image.Resampling.LANCZOS)
    # Black and white becomes grey without loss.
    if (image.mode, mode) == ("1", "L"):
        image = image.convert("L")
    if image.mode != mode or image.size != size:
        raise RequestError(
            f"{name} is {image.width}×{image.height} {image.mode}, {size[0]}×{size[1]} {mode} "
            f"expected: change it, or convert it (convert=True, --convert)."
        )
    # A key colour of the mode itself, or an orientation: the pixels alone would be another image.
    if not convert and (image.has_transparency_data or image.getexif().get(ORIENTATION) in TURNED):
        raise RequestError(
            f"{name} is transparent or stored turned (EXIF): change it, or convert it "
            "(convert=True, --convert)."
        )
    return np.asarray(image).reshape(shape[1], shape[2], shape[0])
