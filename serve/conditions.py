"""Conditions of a request: arrays in JSON, and images in JSON or as parts of a form."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Mapping
from typing import cast

from runtime import Bundle
from runtime.bundle.conditions import MAX_CONDITIONS, Condition
from runtime.engine.conditions import spread
from runtime.engine.json_arrays import array_from_json
from runtime.errors import RequestError
from runtime.errors.arguments import many
from runtime.errors.messages import refused
from runtime.images import read

from .bodies import decode, pixels_of
from .schema import Field, Kind, array_schema, flag, named
from .settings import Settings

PART = "conditions."
"""Before the name of a condition, the name of the part of a form that holds its image."""
MOST_DEPTH = 6
"""Lists within lists: samples, and the axes of a condition."""
RULE = (
    'a number, a list of numbers, an object {"shape": [...], "float32": base64}, an image '
    '{"image": base64}, null, or a list of these'
)


def condition() -> Kind:
    """A condition of all samples, or of each. Images become bytes, arrays arrays.

    A string outside an object is refused: `Sampler` would take it for a path.
    """
    image = {
        "type": "object",
        "required": ["image"],
        "properties": {"image": {"type": "string", "contentEncoding": "base64"}},
    }
    kinds = [{"type": ["number", "array", "null"]}, array_schema(), image]
    return Kind({"anyOf": kinds}, _checked, RULE)


def _checked(name: str, value: object, depth: int = 0) -> object:
    if value is None or (isinstance(value, (int, float)) and not isinstance(value, bool)):
        return value
    if isinstance(value, list) and depth < MOST_DEPTH:
        return [_checked(name, entry, depth + 1) for entry in value]
    if not isinstance(value, Mapping):
        raise refused(name, RULE, value)
    image = value.get("image")
    if not isinstance(image, str):
        return array_from_json(name, value)
    # Images come one for all samples or one each; only numbers are nested deeper.
    if depth > 1:
        raise refused(name, RULE, value)
    try:
        return base64.b64decode(image, validate=True)
    except (binascii.Error, ValueError):
        raise refused(name, RULE, value) from None


CONDITIONS = Field(
    "conditions",
    named(condition(), MAX_CONDITIONS),
    "The model's conditions by name, for all samples or one each; see /v1/info. An image may also "
    f"be a part of a form, named {PART}NAME.",
)
CONVERT = Field(
    "convert",
    flag(),
    "Turn, crop and resize images to the size and mode that is needed. Otherwise these must fit.",
    default=True,
)


def conditions_of(
    bundle: Bundle, given: Mapping[str, object], files: Mapping[str, bytes], settings: Settings
) -> dict[str, object]:
    """Return the conditions of a request as `Sampler` takes them, their images decoded.

    No image is decoded before all of them are known to be usable.

    Args:
        bundle: Of the model; it checks the values.
        given: The checked fields of the request.
        files: The parts of its form.
        settings: The bounds. `pixels` holds for all images together, too.

    Raises:
        RequestError: A condition is unknown or given twice, or an image cannot be used.
    """
    values = given.get("conditions")
    found: dict[str, object] = dict(values) if isinstance(values, Mapping) else {}
    for part, data in files.items():
        if not part.startswith(PART):
            continue
        name = part.removeprefix(PART)
        if name in found:
            raise RequestError(f"the condition {name[:60]!r} is given twice. Send it once.")
        found[name] = data
    n = cast("int", given.get("n", 1))
    convert = bool(given.get("convert", True))
    # It refuses unknown names; the values are checked when the requests are made.
    spread(bundle, dict.fromkeys(found), n, convert)
    known = {c.name: c for c in bundle.conditions}
    _check_images(found, known, n, settings)
    return {name: _decoded(value, known[name], convert, settings) for name, value in found.items()}


def _check_images(
    found: Mapping[str, object], known: Mapping[str, Condition], n: int, settings: Settings
) -> None:
    """Check the images of conditions by their number and their headers. Raises RequestError."""
    pixels = 0
    for name, value in found.items():
        entries = value if isinstance(value, list) else [value]
        images = [entry for entry in entries if isinstance(entry, bytes)]
        if not images:
            continue
        if not known[name].is_image:
            raise RequestError(f"the condition {known[name]} takes no image. Send its values.")
        if len(entries) > 1:
            many(name, entries, n)
        pixels += sum(pixels_of(name, image, settings) for image in images)
    if pixels > settings.pixels:
        raise RequestError(
            f"the images of all conditions may have at most {settings.pixels} pixels together, "
            f"got {pixels}. Send smaller images."
        )


def _decoded(value: object, of: Condition, convert: bool, settings: Settings) -> object:
    """Return a value with each image, which is bytes, as an array [*shape]."""
    if isinstance(value, list):
        return [_decoded(entry, of, convert, settings) for entry in value]
    if not isinstance(value, bytes):
        return value
    low, high = of.range or (-1.0, 1.0)
    # The image itself is much larger than the array, and is dropped before the next one.
    return read(decode(of.name, value, settings), of.shape, low, high, convert, of.name)[0]
