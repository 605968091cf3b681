"""Samples as the bytes of a response."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from runtime.engine.json_arrays import array_to_json
from runtime.errors import RequestError
from runtime.images import UInt8, tile, to_uint8
from runtime.images.write import FRAME_MS, LAST_MS

from .fields import ANIMATION_FORMATS, FORMATS
from .models import Model
from .problems import to_bytes

Float32 = NDArray[np.float32]
MEDIA_TYPES = {
    "png": "image/png",
    "webp": "image/webp",
    "npy": "application/x-npy",
    "json": "application/json",
    "jpeg": "image/jpeg",
    "gif": "image/gif",
}
MOST_SIDE = {"webp": 16_383, "jpeg": 65_500, "gif": 65_535}
"""Pixels of an image's longer side that a format allows; PNG allows any."""
GAP = 2
"""Pixels between the images of a sheet."""


def format_of(given: object, accept: str, model: Model, formats: Sequence[str] = FORMATS) -> str:
    """Choose the format of a response.

    Args:
        given: What the request says; it decides.
        accept: The Accept header.
        model: One whose samples are no images has no image formats.
        formats: Those that the response may have.

    Raises:
        RequestError: The samples are no images, and an image was asked for.
    """
    if isinstance(given, str):
        chosen = given
    else:
        # A browser accepts several kinds of images: the service's own order decides then.
        wanted = accept.lower()
        # Media types are compared as text; weights (q=) are not.
        by_header = [name for name in formats if MEDIA_TYPES[name] in wanted]
        chosen = (by_header or ["png" if model.shows_images else "npy"])[0]
    if chosen in ANIMATION_FORMATS and not model.shows_images:
        shape = "×".join(map(str, model.bundle.sample_shape))
        raise RequestError(
            f"the samples of {model.name} are {shape}, which is not an image. Ask for npy or json."
        )
    return chosen


def encode(
    model: Model, samples: Float32, kind: str, columns: int | None = None
) -> tuple[bytes, str]:
    """Encode samples.

    Args:
        model: The one that made them.
        samples: [n, *S].
        kind: One of FORMATS. An image of several samples is a sheet.
        columns: Images in a row of the sheet.

    Returns:
        The bytes and their media type.
    """
    if kind == "npy":
        file = io.BytesIO()
        np.save(file, samples)
        return file.getvalue(), MEDIA_TYPES[kind]
    if kind == "json":
        return to_bytes(as_json(model, samples)), MEDIA_TYPES[kind]
    pixels = to_uint8(samples, *model.bundle.sample_range)
    return image_bytes(_sheet(pixels, columns), kind), MEDIA_TYPES[kind]


def as_json(model: Model, samples: Float32) -> dict[str, object]:
    """Return samples [n, *S] as JSON: their float32, little-endian, in base64, and as images."""
    found: dict[str, object] = {"model": model.name, **array_to_json(samples)}
    if model.shows_images:
        found["images"] = as_base64(model, samples)
    return found


def as_base64(model: Model, samples: Float32, kind: str = "png") -> list[str]:
    """Return each of some samples [n, *S] as an image in base64."""
    pixels = to_uint8(samples, *model.bundle.sample_range)
    return [base64.b64encode(image_bytes(picture, kind)).decode() for picture in pixels]


def image_bytes(picture: UInt8, kind: str) -> bytes:
    """Return an image [H, W, C] as the bytes of a file. WebP is lossless.

    Raises:
        RequestError: It is too large for the format.
    """
    _check_side(picture, kind)
    file = io.BytesIO()
    image = _pillow(picture)
    if kind == "webp":
        image.save(file, "WEBP", lossless=True)
    elif kind == "jpeg":
        image.save(file, "JPEG", quality=95)
    else:
        image.save(file, "PNG")
    return file.getvalue()


def animation_bytes(frames: Sequence[UInt8], kind: str) -> bytes:
    """Return frames [H, W, C] as the bytes of an animation that repeats: APNG, WebP or GIF.

    Raises:
        RequestError: They are too large for the format.
    """
    _check_side(frames[0], kind)
    file = io.BytesIO()
    images = [_pillow(frame) for frame in frames]
    options = {"lossless": True} if kind == "webp" else {}
    times = [FRAME_MS] * (len(images) - 1) + [LAST_MS]
    images[0].save(
        file,
        kind.upper(),
        save_all=True,
        append_images=images[1:],
        duration=times,
        loop=0,
        **options,
    )
    return file.getvalue()


def encode_animation(
    model: Model, frames: Float32, kind: str, columns: int | None = None
) -> tuple[bytes, str]:
    """Encode the frames [K, n, *S] of n samples, see `encode`. Several samples are a sheet."""
    if kind == "json":
        return to_bytes(animation_as_json(model, frames)), MEDIA_TYPES[kind]
    if kind == "npy":
        return encode(model, frames, kind)
    pixels = model.sampler.to_uint8(frames)
    return animation_bytes([_sheet(frame, columns) for frame in pixels], kind), MEDIA_TYPES[kind]


def animation_as_json(model: Model, frames: Float32) -> dict[str, object]:
    """Return frames [K, n, *S] as JSON: their float32, and each sample's as an APNG in base64."""
    found: dict[str, object] = {"model": model.name, **array_to_json(frames)}
    if model.shows_images:
        pixels = model.sampler.to_uint8(frames)
        samples = [animation_bytes(list(pixels[:, i]), "png") for i in range(pixels.shape[1])]
        found["images"] = [base64.b64encode(sample).decode() for sample in samples]
    return found


def _sheet(pictures: UInt8, columns: int | None) -> UInt8:
    """Return images [n, H, W, C] as one image, a sheet if there are several."""
    n = len(pictures)
    if n == 1:
        return pictures[0]
    # More columns than images would be blank, and could fill the memory in every frame.
    return tile(pictures, columns and min(columns, n), GAP)


def _check_side(picture: UInt8, kind: str) -> None:
    """Raise RequestError if an image [H, W, C] is too large for a format."""
    height, width, _ = picture.shape
    most = MOST_SIDE.get(kind)
    if most is not None and max(height, width) > most:
        raise RequestError(
            f"an image has at most {most} pixels a side as {kind}, and this one has "
            f"{width}×{height}. Ask for png, for fewer samples, or for other `columns`."
        )


def _pillow(picture: UInt8) -> Image.Image:
    """Return an image [H, W, C] as Pillow's, which wants [H, W] for grey images."""
    flat = picture[..., 0] if picture.shape[2] == 1 else picture
    return Image.fromarray(np.ascontiguousarray(flat))


def previews_as_json(
    model: Model, views: Sequence[tuple[int, int, int, Float32]]
) -> list[dict[str, object]]:
    """Return previews as JSON. views: (sample, step, steps, denoised [*S])."""
    if not views:
        return []
    images: Sequence[str | None] = [None] * len(views)
    if model.shows_images:
        images = as_base64(model, np.stack([denoised for *_, denoised in views]))
    return [
        {"sample": sample, "step": step, "steps": steps, "image": image}
        for (sample, step, steps, _), image in zip(views, images, strict=True)
    ]
