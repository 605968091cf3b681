"""The inputs and outputs of step graphs: their names, shapes and types."""

from __future__ import annotations

import numpy as np

from ..bundle.bundle import Bundle
from ..bundle.conditions import LABEL
from ..diffusion.program import R


def shapes(bundle: Bundle, batch: int) -> dict[str, tuple[int, ...]]:
    """List the shapes of the step graph's inputs and outputs, by name."""
    S = bundle.sample_shape
    return {
        "state": (batch, R, *S),
        "noise": (batch, *S),
        "call": (batch, 6),
        "update": (batch, R, R + 2),
        LABEL: (batch,),
        **{condition.port: (batch, *condition.shape) for condition in bundle.conditions},
        "next_state": (batch, R, *S),
        "denoised": (batch, *S),
    }


def dtype_of(bundle: Bundle, port: str) -> type[np.float32] | type[np.int64]:
    """Return the element type of one of the step graph's inputs and outputs."""
    if port == LABEL:
        return np.int64
    return next((c.kind for c in bundle.conditions if c.port == port), np.float32)


def optional_ports(bundle: Bundle) -> set[str]:
    """Return the names in `shapes` that are no inputs of the bundle's graphs."""
    return set() if bundle.labels else {LABEL}


def inputs_of(bundle: Bundle) -> tuple[str, ...]:
    """Return the names in `shapes` of the step graph's inputs, which a step uploads."""
    return ("state", "noise", "call", "update", *conditions_of(bundle))


def conditions_of(bundle: Bundle) -> tuple[str, ...]:
    """Return the names in `shapes` of the inputs that stay the same over all rows."""
    return (LABEL, *(condition.port for condition in bundle.conditions))
