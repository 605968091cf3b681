"""Arrays as JSON: their shape, and their values in base64."""

from __future__ import annotations

import base64
from typing import Any

import numpy as np

from ..diffusion.arrays import Array
from ..errors.messages import refused

TYPES = {"float32": "<f4", "int64": "<i8"}
"""The types of values, by the name of their field."""


def array_to_json(value: Array) -> dict[str, object]:
    """Return an array of any shape as JSON: its shape, and its values in base64.

    The values are float32, or int64 for an array of integers, little-endian.
    """
    # Little-endian by name: a request may be sent to a machine of the other byte order.
    name = "int64" if value.dtype.kind in "iu" else "float32"
    array = np.ascontiguousarray(value, TYPES[name])
    # Of no shape `ascontiguousarray` makes one entry.
    return {"shape": list(value.shape), name: base64.b64encode(array.tobytes()).decode()}


def array_from_json(name: str, value: Any) -> Array:
    """Return the array that `array_to_json` describes, of any shape.

    Args:
        name: How a message calls it.
        value: Parsed JSON.

    Raises:
        RequestError: It describes no array.
    """
    rule = 'an object {"shape": […], "float32": base64}, or int64 instead of float32'
    try:
        kind = "int64" if "int64" in value else "float32"
        data = base64.b64decode(value[kind], validate=True)
        return np.frombuffer(data, TYPES[kind]).reshape(value["shape"]).astype(kind)
    except Exception:  # of the wrong type at any depth, or of another size than its shape
        raise refused(name, rule, value) from None
