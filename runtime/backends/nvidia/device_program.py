"""A batch's program on the device: uploaded once, and copied to where the graphs read it."""

from __future__ import annotations

from contextlib import ExitStack

import numpy as np

from ...diffusion.program import R
from ..base import Rows
from .cuda import Cuda, aligned
from .cuda_api import Address, Stream
from .device_space import FLOAT_BYTES

CALL = 6
"""Floats of a sample's `call` in one row."""
UPDATE = R * (R + 2)
"""Floats of a sample's `update` in one row."""
_LEAST = 64
"""Rows that there is room for at least."""


def row_bytes(bucket: int) -> tuple[int, int]:
    """Compute the bytes of a row's `call`, and of the whole row; `update` follows `call`."""
    call = aligned(bucket * CALL * FLOAT_BYTES)
    return call, call + aligned(bucket * UPDATE * FLOAT_BYTES)


def room(rows: int) -> int:
    """Round rows up to those that memory is allocated for."""
    return max(_LEAST, 1 << (rows - 1).bit_length())


class Program:
    """`call` and `update` of all rows, and the window that graphs read some rows from.

    Args:
        window: Rows of the window.
    """

    def __init__(
        self, cuda: Cuda, bucket: int, window: int, stream: Stream, owner: ExitStack
    ) -> None:
        self._cuda = cuda
        self._bucket = bucket
        self._stream = stream
        self._call, self._row = row_bytes(bucket)
        self._rows = 0
        self._held = owner.enter_context(ExitStack())
        self._window = cuda.memory(window * self._row, owner)
        owner.callback(cuda.synchronize, stream)  # before any memory is freed
        # The first runs, before a graph is captured, read rows that no program has filled.
        cuda.clear(self._window, window * self._row, stream)

    @staticmethod
    def bytes(bucket: int, window: int, rows: int) -> int:
        """Compute what it takes on the device."""
        return (window + room(rows)) * row_bytes(bucket)[1]

    def reserve(self, rows: int) -> None:
        """Make room for a program of so many rows. The stream must be idle."""
        if rows <= self._rows:
            return
        # Graphs know the window only, so the whole program can move.
        self._held.close()
        self._rows = 0
        count = room(rows)
        self._host = self._cuda.pinned((count, self._row // FLOAT_BYTES), np.float32, self._held)
        self._device = self._cuda.memory(count * self._row, self._held)
        self._rows = count

    def send(self, rows: Rows) -> None:
        """Upload a batch's program. That of the padding is zero, and so is its state."""
        K = len(rows.call)
        starts = {0: rows.call, self._call // FLOAT_BYTES: rows.update}
        for start, values in starts.items():
            width = values[0, 0].size
            filled = values.shape[1] * width
            host = self._host[:K, start : start + self._bucket * width]
            host[:, :filled] = values.reshape(K, filled)
            host[:, filled:] = 0
        self._cuda.upload(self._device, self._host[:K], self._stream)

    def move(self, first: int, count: int) -> None:
        """Copy rows first … first + count - 1 into the window."""
        source = self._device + first * self._row
        self._cuda.copy(self._window, source, count * self._row, self._stream)

    def addresses(self, slot: int) -> dict[str, Address]:
        """Return where the row in a slot of the window lies."""
        start = self._window + slot * self._row
        return {"call": start, "update": start + self._call}
