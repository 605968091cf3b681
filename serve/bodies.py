"""Request bodies: JSON and multipart, within their limits and in memory."""

from __future__ import annotations

import asyncio
import io
import warnings
from collections.abc import AsyncGenerator, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass

from PIL import Image
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import ClientDisconnect, Request

from runtime.errors import RequestError
from runtime.errors.messages import reason
from runtime.files import from_json

from .problems import ClientGone, Problem
from .settings import KIB, MIB, Settings

IMAGE_KINDS = ("PNG", "JPEG", "WEBP")
"""Pillow's names of the formats that are decoded; no other decoder is tried."""

MOST_SIDE = 65_535
"""Pixels of an image's longer side, the most that JPEG allows."""


async def read_json(request: Request, settings: Settings) -> object:
    """Return the JSON value of a body; {} for an empty one.

    Raises:
        Problem: It is of another type (415), too large (413), or takes too long (408).
        RequestError: It is not strict JSON.
        ClientGone: The client left.
    """
    _check_type(request, "application/json")
    body = bytearray()
    async with _in_time(settings):
        try:
            # Counted as it arrives: a body need not say its length, or may lie.
            async for chunk in request.stream():
                body += chunk
                if len(body) > settings.json_bytes:
                    raise too_large("a JSON body", settings.json_bytes)
        except ClientDisconnect:
            raise ClientGone from None
    if not body:
        return {}
    try:
        return from_json(bytes(body))
    except ValueError as error:  # also bytes that are not UTF-8, and huge integers
        raise RequestError(f"the body is not JSON: {reason(error)}.") from None


@dataclass(frozen=True)
class Form:
    """A multipart body: its files by name, and its texts with their names, in order."""

    files: Mapping[str, bytes]
    texts: Sequence[tuple[str, str]]

    @property
    def names(self) -> list[str]:
        """The names of all its parts."""
        return [*self.files, *(name for name, _ in self.texts)]


class _InMemory(MultiPartParser):
    """A parser that never writes a temporary file: the body's size is limited as it arrives."""

    spool_max_size = 2**62

    def close(self) -> None:
        """Close all files, those of parts that never ended among them."""
        for file in self._files_to_close_on_error:
            file.close()


async def read_form(request: Request, settings: Settings, texts: int) -> Form:
    """Return a multipart body.

    texts: most fields that are no files.

    Raises:
        Problem: It is of another type (415), too large (413), or takes too long (408).
        RequestError: It is not multipart/form-data, has too many parts, or a file twice.
        ClientGone: The client left.
    """
    _check_type(request, "multipart/form-data")
    parser = _InMemory(
        request.headers,
        request.stream(),
        max_files=settings.parts,
        max_fields=texts,
        # The whole body is counted as it arrives, and texts are measured below.
        max_part_size=settings.upload_bytes,
    )
    async with _in_time(settings):
        try:
            # `receive` counts the bytes and raises the 413.
            form = await parser.parse()
        except (MultiPartException, ValueError) as error:  # also text that its charset refuses
            raise RequestError(f"the multipart body cannot be read: {_plain(error)}.") from None
        except ClientDisconnect:
            raise ClientGone from None
    found_files: dict[str, bytes] = {}
    found_texts: list[tuple[str, str]] = []
    try:
        for name, value in form.multi_items():
            # Which of two would count is anybody's guess. A text may be an entry of a list.
            if name in found_files or (not isinstance(value, str) and name in dict(found_texts)):
                raise RequestError(f"the part {name[:60]!r} is given twice. Send it once.")
            if not isinstance(value, str):
                found_files[name] = await value.read()
            elif len(value) > settings.json_bytes:
                raise too_large(f"the text {name[:60]!r}", settings.json_bytes)
            else:
                found_texts.append((name, value))
    finally:
        parser.close()
    return Form(found_files, found_texts)


def decode(name: str, data: bytes, settings: Settings) -> Image.Image:
    """Decode an uploaded image. Its header is checked before any pixel is decoded.

    Args:
        name: How messages call it.
        data: A PNG, JPEG or WebP file.
        settings: The bounds.

    Raises:
        RequestError: It is no such file, damaged, or has too many pixels.
    """
    with _readable(name, settings):
        image = _opened(name, data, settings)
        # Pixels from here on.
        image.load()
    return image


def pixels_of(name: str, data: bytes, settings: Settings) -> int:
    """Return the pixels of an uploaded image, from its header alone. See `decode`."""
    with _readable(name, settings):
        image = _opened(name, data, settings)
    return image.width * image.height


def _opened(name: str, data: bytes, settings: Settings) -> Image.Image:
    """Open an image that is small enough, and read its header alone."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        image = Image.open(io.BytesIO(data), formats=IMAGE_KINDS)
    if image.width * image.height > settings.pixels:
        raise _too_many_pixels(name, settings)
    # Pillow takes seconds for millions of rows of one pixel, in a file of some KiB.
    if max(image.size) > MOST_SIDE:
        raise RequestError(
            f"`{name}` has more than {MOST_SIDE} pixels a side. Send a smaller image."
        )
    return image


@contextmanager
def _readable(name: str, settings: Settings) -> Iterator[None]:
    """Raise what Pillow raises as a RequestError."""
    try:
        yield
    except RequestError:
        raise
    except Image.DecompressionBombError:
        raise _too_many_pixels(name, settings) from None
    except Exception as error:  # damaged files raise many kinds of errors inside Pillow
        raise RequestError(
            f"`{name}` cannot be read as PNG, JPEG or WebP: {_plain(error)}. Send another file."
        ) from None


def _plain(error: Exception) -> str:
    # Pillow's sentence for an unknown file shows the object that it was read from.
    unknown = type(error).__name__ == "UnidentifiedImageError"
    return "it is no such file" if unknown else reason(error).rstrip(".")


def too_large(what: str, most: int) -> Problem:
    """The response to a body that is too large."""
    size = f"{most // MIB} MiB" if most >= MIB else f"{most // KIB} KiB"
    return Problem(413, f"{what} may have at most {size} ({most} bytes). Send a smaller one.")


def _too_many_pixels(name: str, settings: Settings) -> RequestError:
    return RequestError(f"`{name}` has more than {settings.pixels} pixels. Send a smaller image.")


def media_type(request: Request) -> str:
    """Return the type of a body, without its parameters. It has no case."""
    return request.headers.get("content-type", "").partition(";")[0].strip().lower()


def _check_type(request: Request, kind: str) -> None:
    given = media_type(request)
    if given != kind:
        # A page of another origin can send any other type without asking first.
        raise Problem(415, f"the Content-Type must be {kind}, got {given[:60] or 'none'!r}.")


@asynccontextmanager
async def _in_time(settings: Settings) -> AsyncGenerator[None, None]:
    """Raise a 408 if the block takes longer than a body may."""
    try:
        async with asyncio.timeout(settings.body_s):
            yield
    except TimeoutError:
        raise Problem(
            408, f"the body must arrive within {settings.body_s:g} s. Send it again.", 1.0
        ) from None
