"""Device memory for batches of one size, and its mirrors in pinned host memory."""

from __future__ import annotations

from contextlib import ExitStack

import numpy as np

from ...bundle.bundle import Bundle
from ...diffusion.arrays import Array
from ..base import Float32, Rows
from ..ports import dtype_of, shapes
from .cuda import Cuda, aligned
from .cuda_api import Address, Stream

FLOAT_BYTES = 4


def stride(size: int) -> int:
    """Return the bytes between two rows' slices of `size` floats each."""
    return aligned(size * FLOAT_BYTES)


def port_bytes(bundle: Bundle, batch: int) -> dict[str, int]:
    """List the bytes of a step graph's inputs and outputs, by name."""
    return {
        name: int(np.prod(shape)) * np.dtype(dtype_of(bundle, name)).itemsize
        for name, shape in shapes(bundle, batch).items()
    }


class Space:
    """The memory of a batch that does not depend on its program.

    Attributes:
        addresses: Of the step graph's inputs and outputs on the device, by name.
        silence: Of noise that is zero.
        shape: (bucket, *S), of a batch of samples.
    """

    def __init__(self, cuda: Cuda, bundle: Bundle, bucket: int, stream: Stream) -> None:
        self._cuda = cuda
        self._bundle = bundle
        self.bucket = bucket
        self.stream = stream
        self.shape = (bucket, *bundle.sample_shape)
        self.addresses = dict[str, Address]()
        self._hosts = dict[str, Array]()
        self._owner = ExitStack()
        self._sizes = port_bytes(bundle, bucket)
        # If an allocation fails, the earlier ones are freed with the attempt.
        with ExitStack() as attempt:
            for name, size in self._sizes.items():
                self.addresses[name] = cuda.memory(size, attempt)
            self.silence = cuda.memory(self._sizes["noise"], attempt)
            self._x = cuda.pinned(self.shape, np.float32, attempt)
            attempt.callback(cuda.synchronize, stream)  # before any memory is freed
            for name, address in (*self.addresses.items(), ("noise", self.silence)):
                cuda.clear(address, self._sizes[name], stream)
            self._owner = attempt.pop_all()

    @staticmethod
    def bytes(bundle: Bundle, bucket: int) -> int:
        """Compute what a space takes on the device."""
        sizes = port_bytes(bundle, bucket)
        return sum(sizes.values()) + sizes["noise"]

    def close(self) -> None:
        """Free the memory."""
        self._owner.close()

    @property
    def states(self) -> tuple[Address, Address]:
        """The addresses of the state before the first row, and after it."""
        return self.addresses["state"], self.addresses["next_state"]

    def host(self, name: str) -> Array:
        """Return an input's or output's mirror in pinned memory, allocated on first use."""
        if name not in self._hosts:
            shape = shapes(self._bundle, self.bucket)[name]
            kind = dtype_of(self._bundle, name)
            self._hosts[name] = self._cuda.pinned(shape, kind, self._owner)
        return self._hosts[name]

    def start(self, rows: Rows) -> None:
        """Upload a batch's samples and conditions.

        Only the first register of the state travels; the others start as zeros.
        """
        B = len(rows.x)
        self._x[:B] = rows.x
        self._x[B:] = 0
        self._cuda.clear(self.addresses["state"], self._sizes["state"], self.stream)
        pitch = self._sizes["state"] // self.bucket
        self._cuda.upload_columns(self.addresses["state"], pitch, self._x, self.stream)
        for name, values in rows.conditions.items():
            self.host(name)[:B] = values
            self.host(name)[B:] = 0
        self.upload(*rows.conditions)

    def finish(self, rows: int, batch: int) -> Float32:
        """Wait for the device; return x [B, *S] of the batch after so many rows."""
        # Row k writes the one state if k is even, the other if it is odd.
        pitch = self._sizes["state"] // self.bucket
        self._cuda.download_columns(self._x, self.states[rows % 2], pitch, self.stream)
        self._cuda.synchronize(self.stream)
        return self._x[:batch].copy()

    def upload(self, *names: str) -> None:
        """Copy inputs from the host to the device."""
        for name in names:
            self._cuda.upload(self.addresses[name], self.host(name), self.stream)

    def download(self, *names: str) -> None:
        """Copy outputs from the device to the host."""
        for name in names:
            self._cuda.download(self.host(name), self.addresses[name], self.stream)
