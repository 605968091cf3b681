"""Noise on its way to the device: drawn, uploaded and used at the same time, piece by piece."""

from __future__ import annotations

from contextlib import ExitStack

import numpy as np

from ..base import Rows
from .cuda import Cuda
from .cuda_api import Address, Stream
from .device_space import FLOAT_BYTES, stride

PIECE_BYTES = 8 * 2**20
"""Most noise of one piece, unless a single row has more."""
PIECE_ROWS = 8
"""Most rows of one piece: the device waits for the first piece, and the host for the last one."""
_PIECES = 2


def piece_rows(bucket: int, sample: int) -> int:
    """Compute the rows of a piece, a power of two.

    sample: The number of floats of one sample.
    """
    rows = max(1, min(PIECE_ROWS, PIECE_BYTES // stride(bucket * sample)))
    return 1 << (rows.bit_length() - 1)


class Noise:
    """Two pieces in pinned memory and two on the device.

    The host draws one piece while another is uploaded, and the device uses an earlier one.

    Args:
        shape: [B, *S], of one row's noise.
        stream: That computes.
        copying: That uploads.
    """

    def __init__(
        self,
        cuda: Cuda,
        shape: tuple[int, ...],
        stream: Stream,
        copying: Stream,
        owner: ExitStack,
    ) -> None:
        self._cuda = cuda
        self._shape = shape
        self._size = int(np.prod(shape))
        self._stream = stream
        self._copying = copying
        self.stride = stride(self._size)
        self.rows = piece_rows(shape[0], self._size // shape[0])
        floats = self.stride // FLOAT_BYTES
        self._hosts = [cuda.pinned((self.rows, floats), np.float32, owner) for _ in range(_PIECES)]
        self._pieces = [cuda.memory(self.rows * self.stride, owner) for _ in range(_PIECES)]
        self._sent = [cuda.event(owner) for _ in range(_PIECES)]
        self._taken = [cuda.event(owner) for _ in range(_PIECES)]
        self._turn = 0
        owner.callback(cuda.synchronize, copying)  # before any memory is freed

    @staticmethod
    def bytes(bucket: int, sample: int) -> int:
        """Compute what it takes on the device."""
        return _PIECES * piece_rows(bucket, sample) * stride(bucket * sample)

    def send(self, rows: Rows, first: int, count: int) -> Address:
        """Draw the noise of some rows and upload it; return where it will lie on the device.

        The stream that computes waits for it; the host does not. Call `taken` after what uses it.
        """
        cuda = self._cuda
        turn = self._turn
        host = self._hosts[turn]
        # The upload of this piece's earlier noise must have ended before it is drawn over.
        cuda.until(self._sent[turn])
        B = len(rows.x)
        for j in range(count):
            whole = host[j, : self._size].reshape(self._shape)
            rows.draw(first + j, whole[:B])
            whole[B:] = 0
        # The device must have used the earlier noise before this one arrives.
        cuda.wait(self._copying, self._taken[turn])
        cuda.upload(self._pieces[turn], host[:count], self._copying)
        cuda.record(self._sent[turn], self._copying)
        cuda.wait(self._stream, self._sent[turn])
        return self._pieces[turn]

    def taken(self) -> None:
        """Give the last piece back, once the stream has used it."""
        self._cuda.record(self._taken[self._turn], self._stream)
        self._turn = (self._turn + 1) % _PIECES
