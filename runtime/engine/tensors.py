"""What the tensors and parameters of the Open Inference Protocol mean, in `serve` and in Triton."""

from __future__ import annotations

import json

from ..errors import RequestError

KINDS = {"float32": "FP32", "int64": "INT64"}
"""The data type of a condition's input."""


def label_of(value: object) -> object:
    """Return the label of an entry: a tensor of integers has no word for the null label but -1."""
    return None if isinstance(value, int) and value < 0 else value


def setting_of(name: str, value: object) -> object:
    """Return a parameter. Triton's are text or numbers, so a list or an object may be its JSON.

    Raises:
        RequestError: It begins like a list or an object, and is not JSON.
    """
    if not isinstance(value, str) or value[:1] not in ("[", "{"):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError) as error:
        raise RequestError(f"`{name}` cannot be read as JSON ({error}).") from None
