"""Memory of large networks: when to keep less of it, and how to give it back to the system."""

from __future__ import annotations

import ctypes
import sys

from ..bundle.bundle import Bundle
from ..bundle.format import WEIGHTS, inside

HEAVY_BYTES = 64 * 2**20
"""Weights of so many bytes are not kept alongside a library's own copy of them, and a library's
free memory is given back. Below that, a second copy costs less than reading it again."""


def is_heavy(bundle: Bundle, folder: str) -> bool:
    """Whether the weights of one of a bundle's precisions are large, see HEAVY_BYTES."""
    file = bundle.files.get(inside(folder, WEIGHTS))
    return file is not None and file.size >= HEAVY_BYTES


def trim() -> None:
    """Give the free memory of C's heap back to the system, if this is glibc.

    Inference libraries free more than the weights while they load a graph, in pieces that glibc
    keeps for later.
    """
    if sys.platform != "linux":
        return
    give_back = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if give_back is not None:
        give_back(0)
