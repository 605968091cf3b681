"""Device memory for batches of one size, and its mirror in pinned host memory."""

from __future__ import annotations

from contextlib import ExitStack

import numpy as np

from ...bundle.bundle import Bundle
from ...diffusion.arrays import Array
from ..ports import dtype_of, shapes
from .cuda import Cuda, aligned
from .cuda_api import Address, Stream
from .tensorrt_engine import Context, Engine

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
        pinned: Their mirrors in host memory.
        silence: Of noise that is zero.
    """

    def __init__(self, cuda: Cuda, bundle: Bundle, bucket: int, stream: Stream) -> None:
        self._cuda = cuda
        self.bucket = bucket
        self.stream = stream
        self.addresses = dict[str, Address]()
        self.pinned = dict[str, Array]()
        self._owner = ExitStack()
        self._activations = dict[bool, tuple[Address, int]]()
        sizes = port_bytes(bundle, bucket)
        # If an allocation fails, the earlier ones are freed with the attempt.
        with ExitStack() as attempt:
            for name, shape in shapes(bundle, bucket).items():
                self.addresses[name] = cuda.memory(sizes[name], attempt)
                self.pinned[name] = cuda.pinned(shape, dtype_of(bundle, name), attempt)
            self.silence = cuda.memory(sizes["noise"], attempt)
            attempt.callback(cuda.synchronize, stream)  # before any memory is freed
            for name, address in (*self.addresses.items(), ("noise", self.silence)):
                cuda.clear(address, sizes[name], stream)
            self._owner = attempt.pop_all()

    @staticmethod
    def bytes(bundle: Bundle, bucket: int) -> int:
        """Compute what a space takes on the device, without activations."""
        sizes = port_bytes(bundle, bucket)
        return sum(sizes.values()) + sizes["noise"]

    def close(self) -> None:
        """Free the memory."""
        self._owner.close()

    @property
    def states(self) -> tuple[Address, Address]:
        """The addresses of the state before the first row, and after it."""
        return self.addresses["state"], self.addresses["next_state"]

    def context(self, engine: Engine, guided: bool) -> Context:
        """Make a context of the engine.

        All contexts of one engine share their activations: they run one after another, on one
        stream.
        """
        if guided not in self._activations:
            size = engine.activations(self.bucket)
            self._activations[guided] = self._cuda.memory(size, self._owner), size
        return engine.context(self.bucket, *self._activations[guided], self.stream)

    def activated(self, guided: bool) -> bool:
        """Whether memory for that engine's activations is allocated."""
        return guided in self._activations

    def upload(self, *names: str) -> None:
        """Copy inputs from the host to the device."""
        for name in names:
            self._cuda.upload(self.addresses[name], self.pinned[name], self.stream)

    def download(self, *names: str) -> None:
        """Copy outputs from the device to the host."""
        for name in names:
            self._cuda.download(self.pinned[name], self.addresses[name], self.stream)
