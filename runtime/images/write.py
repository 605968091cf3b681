"""Images and animations as files; the name's ending selects the format."""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import numpy as np

from ..errors import RequestError
from ..errors.arguments import enough_memory, integer, path_of
from ..errors.messages import reason, refused, shown, shown_path
from ..files import replacing
from .arrays import MAX_BYTES, UInt8, check_size, images_of

FRAME_MS = 60
LAST_MS = 1500
"""How long an animation shows each frame, and its last one."""


ICONS = ("ICO", "ICNS")
"""Formats that have sizes of their own, to which Pillow would resize an image."""
MODES = {1: "L", 2: "LA", 3: "RGB", 4: "RGBA"}
"""Pillow's names for images of so many channels."""


def picture_format(path: str | Path, channels: int = 3) -> str:
    """Return Pillow's name for the format that a file name's ending selects.

    Raises:
        RequestError: Pillow cannot write a file of that ending, or not with so many channels.
    """
    from PIL import Image

    path = path_of("path", path)
    mode = MODES[integer("channels", channels, 1, 4)]
    # Pillow knows the endings of its plugins only after they are loaded.
    Image.init()
    found = Image.EXTENSION.get(path.suffix.lower())
    if found is None or found in ICONS or not _is_written(found, mode):
        ending = shown_path(path.suffix) or shown(path.name)
        of_mode = f" of mode {mode}" if found in Image.SAVE and mode != "RGB" else ""
        raise RequestError(
            f"cannot write images{of_mode} as {ending}: use a name that ends in .png."
        )
    return found


@cache
def _is_written(kind: str, mode: str) -> bool:
    """Whether Pillow writes a format, tried with a small image: a plugin may only seem to."""
    from PIL import Image

    try:
        Image.new(mode, (16, 16)).save(io.BytesIO(), kind)
    except Exception:  # plugins raise many kinds of errors
        return False
    return True


def animation_format(path: str | Path, channels: int = 3) -> str:
    """Return the `picture_format` of a file that can hold an animation.

    Raises:
        RequestError: The format cannot hold one.
    """
    kind = picture_format(path, channels)
    if kind not in ("GIF", "PNG", "WEBP"):
        ending = path_of("path", path).suffix
        raise RequestError(
            f"cannot write an animation as {ending}: use a name that ends in .gif, .png or .webp."
        )
    return kind


def save(path: str | Path, picture: UInt8, least: int = 0) -> None:
    """Write one image [H, W, C] in the format of the file name's ending.

    Args:
        path: The file, which is replaced.
        picture: uint8, with 1 to 4 channels.
        least: The least width in pixels. A smaller image is enlarged by a whole factor.

    Raises:
        RequestError: The format or the image cannot be written, see `picture_format`.
    """
    from PIL import Image

    path = path_of("path", path)
    # The format is passed on, because the temporary file has another ending.
    picture = _image_of(picture)
    kind = picture_format(path, picture.shape[2])
    image = Image.fromarray(_enlarged(picture, least))
    with replacing(path) as temporary, _writing(path):
        image.save(temporary, kind)


def save_animation(
    path: str | Path,
    frames: UInt8,
    least: int = 0,
    frame_ms: int = FRAME_MS,
    last_ms: int = LAST_MS,
) -> None:
    """Write frames [n, H, W, C] as a GIF, an APNG or a WebP that repeats.

    Args:
        path: The file, which is replaced.
        frames: At least one.
        least: See `save`.
        frame_ms: How long each frame is shown.
        last_ms: How long the last frame is shown.

    Raises:
        RequestError: There is no frame, or the animation cannot be written.
    """
    from PIL import Image

    path = path_of("path", path)
    if len(images_of(frames, "frames")) == 0:
        raise RequestError("an animation needs at least 1 frame, got none.")
    kind = animation_format(path, _image_of(frames[0]).shape[2])
    frame_ms = integer("frame_ms", frame_ms, 1, 60_000)
    last_ms = integer("last_ms", last_ms, 1, 60_000)
    with enough_memory(f"an animation of {len(frames)} frames", "Write fewer or smaller ones."):
        images = [Image.fromarray(_enlarged(_image_of(frame), least)) for frame in frames]
    times = [frame_ms] * (len(images) - 1) + [last_ms]
    with replacing(path) as temporary, _writing(path):
        images[0].save(
            temporary, kind, save_all=True, append_images=images[1:], duration=times, loop=0
        )


def _image_of(picture: object) -> UInt8:
    """Return one image [H, W, C] with 1 to 4 channels. Raises RequestError for anything else."""
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
    """Turn what Pillow raises while it writes into a RequestError."""
    try:
        yield
    except Exception as error:
        # A full disk is not the request's fault. Pillow's own errors have no number.
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise RequestError(
            f"{shown_path(path)} cannot be written: {reason(error)}. Use another format, such as "
            f".png, or a smaller image."
        ) from error


def enlargement(shape: tuple[int, ...], least: int) -> int:
    """Return the whole factor that makes an image [H, W, C] at least `least` pixels wide.

    Raises:
        RequestError: The enlarged image would be too large.
    """
    H, W, C = shape
    # A whole factor keeps pixels square and their values exact.
    factor = max(1, -(-integer("least", least, 0, MAX_BYTES) // W))
    check_size("an image", H * factor, W * factor, C)
    return factor


def _enlarged(picture: UInt8, least: int) -> UInt8:
    """Return [H, W, C] at least `least` wide; [H, W] if C is 1, as Pillow wants grey images."""
    factor = enlargement(picture.shape, least)
    enlarged = picture.repeat(factor, axis=0).repeat(factor, axis=1)
    return enlarged[..., 0] if picture.shape[2] == 1 else enlarged
