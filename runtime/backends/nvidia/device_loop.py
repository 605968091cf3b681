"""The reverse loop on the device: K enqueues of the step engine captured once into one CUDA graph,
then launched again for every program.

Row k reads its own slice of the uploaded program and of the noise; the two states are input and
output in turn. A new solver or grid of as many rows and the same guidance is an upload, not a
capture. docs/gpu.md has a drawing.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from itertools import pairwise
from typing import Any

import numpy as np

from ...bundle.bundle import Bundle
from ...errors import CaptureError, GpuError
from ..base import Float32, Rows, shapes
from .cuda import Address, Cuda, aligned
from .tensorrt_engine import Context, Engine

NOISE_BYTES = 256 * 2**20
"""Of noise on the device. Programs whose rows take more are cut into several graphs, and noise for
the next is uploaded while one runs."""
PIECE_BYTES = 16 * 2**20
"""Of noise in pinned memory: while one piece travels the next is drawn into another."""
KINDS: Mapping[str, Any] = {"label": np.int64}
_FLOAT = 4


def stride(size: int) -> int:
    """Bytes between two rows' slices of so many floats."""
    return aligned(size * _FLOAT)


def port_bytes(bundle: Bundle, batch: int) -> dict[str, int]:
    """Of a step graph's inputs and outputs."""
    return {
        name: int(np.prod(shape)) * np.dtype(KINDS.get(name, np.float32)).itemsize
        for name, shape in shapes(bundle, batch).items()
    }


class Space:
    """Device memory for batches of one size, and its mirror in pinned host memory: what does not
    depend on the program."""

    def __init__(self, cuda: Cuda, bundle: Bundle, bucket: int, stream: Any) -> None:
        self._cuda = cuda
        self.bucket = bucket
        self.stream = stream
        self._ports = shapes(bundle, bucket)
        self.addresses = {}
        self.pinned = {}
        self._owner = ExitStack()
        self._activations = dict[bool, tuple[Address, int]]()
        sizes = port_bytes(bundle, bucket)
        with ExitStack() as attempt:
            for name, shape in self._ports.items():
                self.addresses[name] = cuda.memory(sizes[name], attempt)
                self.pinned[name] = cuda.pinned(shape, KINDS.get(name, np.float32), attempt)
            self.silence = cuda.memory(sizes["noise"], attempt)
            attempt.callback(cuda.synchronize, stream)  # before any of it goes
            for name, address in (*self.addresses.items(), ("noise", self.silence)):
                cuda.clear(address, sizes[name], stream)
            self._owner = attempt.pop_all()

    @staticmethod
    def bytes(bundle: Bundle, bucket: int) -> int:
        """What one takes on the device, activations apart."""
        sizes = port_bytes(bundle, bucket)
        return sum(sizes.values()) + sizes["noise"]

    def close(self) -> None:
        self._owner.close()

    @property
    def states(self) -> tuple[Address, Address]:
        """Before the first row, and after it."""
        return self.addresses["state"], self.addresses["next_state"]

    def context(self, engine: Engine, guided: bool) -> Context:
        """A context of the engine. All of one graph share their activations: they run one after
        another, on one stream."""
        if guided not in self._activations:
            size = engine.activations(self.bucket)
            self._activations[guided] = self._cuda.memory(size, self._owner), size
        return engine.context(self.bucket, *self._activations[guided], self.stream)

    def activated(self, guided: bool) -> bool:
        """Whether there is memory for that graph's activations."""
        return guided in self._activations

    def upload(self, *names: str) -> None:
        for name in names:
            self._cuda.upload(self.addresses[name], self.pinned[name], self.stream)

    def download(self, *names: str) -> None:
        for name in names:
            self._cuda.download(self.pinned[name], self.addresses[name], self.stream)


class DeviceLoop:
    """The loop over K rows for batches of one size, with guidance in the rows given; noisy: whether
    any row takes noise.

    One or more captured graphs, or, where capture is refused (`note` says why), the same rows by
    plain enqueues. `close` frees all.
    """

    def __init__(
        self,
        cuda: Cuda,
        space: Space,
        engines: Mapping[bool, Engine],
        guided: Any,
        noisy: bool,
        copying: Any,
    ) -> None:
        self._cuda = cuda
        self._space = space
        self._guided = [bool(g) for g in guided]
        self._copying = copying
        self._noise_stride, self._chunk = (
            noise_plan(space, len(self._guided)) if noisy else (0, len(self._guided))
        )
        self.note = ""
        self._graphs = list[Any]()
        self._owner = ExitStack()
        with ExitStack() as attempt:
            self._allocate(attempt)
            self._contexts = {
                kind: space.context(engines[kind], kind) for kind in sorted(set(self._guided))
            }
            self._capture(attempt)
            self._owner = attempt.pop_all()

    @staticmethod
    def bytes(space_bucket: int, sample: int, K: int, noisy: bool) -> int:
        """What one takes on the device. sample: floats of one."""
        program = K * (stride(space_bucket * 6) + stride(space_bucket * 24))
        if not noisy:
            return program
        slice_ = stride(space_bucket * sample)
        chunk = chunk_rows(slice_, K)
        return program + slice_ * (K if chunk == K else 2 * chunk)

    @property
    def how(self) -> str:
        if self.note:
            return "plain enqueues"
        return "one graph" if len(self._graphs) == 1 else f"{len(self._graphs)} graphs"

    def close(self) -> None:
        self._owner.close()

    def run(self, rows: Rows) -> tuple[Float32, float]:
        """x after the last row, and the milliseconds that it took on the device."""
        cuda = self._cuda
        space = self._space
        B = len(rows.x)
        self._stage(rows)
        space.upload("state", "label")
        for address, host in self._program.values():
            cuda.upload(address, host, space.stream)
        cuda.record(self._start, space.stream)
        for i, (first, end) in enumerate(self._segments):
            self._send_noise(rows, i, first, end)
            if self.note:
                self._enqueue(first, end)
            else:
                cuda.launch(self._graphs[i], space.stream)
            if self._halves:
                cuda.record(self._read[i % len(self._halves)], space.stream)
        cuda.record(self._end, space.stream)
        after = ("state", "next_state")[len(self._guided) % 2]
        space.download(after)
        cuda.synchronize(space.stream)
        return space.pinned[after][:B, 0].copy(), cuda.milliseconds(self._start, self._end)

    def _allocate(self, owner: ExitStack) -> None:
        cuda = self._cuda
        K = len(self._guided)
        bucket = self._space.bucket
        self._program = {}
        for name, width in (("call", 6), ("update", 24)):
            size = stride(bucket * width)
            host = cuda.pinned((K, size // _FLOAT), np.float32, owner)
            self._program[name] = cuda.memory(K * size, owner), host
        cuts = [*range(0, K, self._chunk), K]
        self._segments = list(pairwise(cuts))
        halves = min(2, len(self._segments)) if self._noise_stride else 0
        self._halves = [cuda.memory(self._chunk * self._noise_stride, owner) for _ in range(halves)]
        self._read = [cuda.event(owner) for _ in range(halves)]
        self._ready = [cuda.event(owner) for _ in range(halves)]
        piece = min(self._chunk, max(1, PIECE_BYTES // self._noise_stride)) if halves else 0
        self._pieces = [
            (
                cuda.pinned((piece, self._noise_stride // _FLOAT), np.float32, owner),
                cuda.event(owner),
            )
            for _ in range(2 if halves else 0)
        ]
        self._start = cuda.event(owner, timed=True)
        self._end = cuda.event(owner, timed=True)
        for stream in (self._copying, self._space.stream):
            owner.callback(cuda.synchronize, stream)  # before any of it goes

    def _capture(self, owner: ExitStack) -> None:
        """The vendor's recipe: run once plainly, so that nothing is initialised under capture; then
        capture, and, where that fails, say so."""
        cuda = self._cuda
        stream = self._space.stream
        for kind in self._contexts:
            self._enqueue(self._guided.index(kind), self._guided.index(kind) + 1)
        cuda.synchronize(stream)
        try:
            for context in self._contexts.values():
                if not context.capturable(stream):
                    raise CaptureError("the library says that its work cannot be captured")
            for first, end in self._segments:
                self._graphs.append(self._captured(first, end))
        except CaptureError as error:
            self.note = str(error)
            while self._graphs:
                cuda.destroy(self._graphs.pop())
        for graph in self._graphs:
            owner.callback(cuda.destroy, graph)

    def _captured(self, first: int, end: int) -> Any:
        try:
            return self._cuda.capture(lambda: self._enqueue(first, end), self._space.stream)
        except GpuError as error:
            raise CaptureError(f"{end - first} rows could not be captured: {error}") from error

    def _enqueue(self, first: int, end: int) -> None:
        """Rows first … end - 1 on the stream, each bound to its own slices."""
        states = self._space.states
        for k in range(first, end):
            context = self._contexts[self._guided[k]]
            slices = {
                name: address + k * host.strides[0]
                for name, (address, host) in self._program.items()
            }
            slices |= {
                "state": states[k % 2],
                "next_state": states[1 - k % 2],
                "noise": self._noise_at(k),
            }
            context.bind({**self._space.addresses, **slices})
            context.enqueue(self._space.stream)

    def _noise_at(self, k: int) -> Address:
        if not self._halves:
            return self._space.silence
        half = self._halves[k // self._chunk % len(self._halves)]
        return half + k % self._chunk * self._noise_stride

    def _stage(self, rows: Rows) -> None:
        """The batch and its program into pinned memory. The padding's rows are zero: its state
        becomes zero, and stays."""
        K = len(self._guided)
        B = len(rows.x)
        bucket = self._space.bucket
        pinned = self._space.pinned
        pinned["state"][:] = 0
        pinned["label"][:] = 0
        pinned["state"][:B, 0] = rows.x
        pinned["label"][:B] = rows.label
        for name, values in (("call", rows.call), ("update", rows.update)):
            host = self._program[name][1]
            width = values[0, 0].size
            host[:, : B * width] = values.reshape(K, -1)
            host[:, B * width : bucket * width] = 0

    def _send_noise(self, rows: Rows, i: int, first: int, end: int) -> None:
        """Draw the noise of segment i and send it on its own stream, while the device still runs
        the segment before it."""
        if not self._halves:
            return
        cuda = self._cuda
        half = i % len(self._halves)
        if i >= len(self._halves):
            cuda.wait(
                self._copying, self._read[half]
            )  # who reads this half must be done before it is written again
        size = len(self._pieces[0][0])
        B = len(rows.x)
        shape = self._space.pinned["noise"].shape
        for turn, begin in enumerate(range(first, end, size)):
            host, sent = self._pieces[turn % 2]
            cuda.until(sent)
            count = min(size, end - begin)
            for j in range(count):
                whole = host[j, : int(np.prod(shape))].reshape(shape)
                rows.draw(begin + j, whole[:B])
                whole[B:] = 0
            offset = (begin - first) * self._noise_stride
            cuda.upload(self._halves[half] + offset, host[:count], self._copying)
            cuda.record(sent, self._copying)
        cuda.record(self._ready[half], self._copying)
        cuda.wait(self._space.stream, self._ready[half])


def chunk_rows(slice_: int, K: int) -> int:
    """Rows to a graph: all, or, where their noise is more than NOISE_BYTES, as many as half of that
    holds, an even number."""
    return K if K * slice_ <= NOISE_BYTES else min(K, max(2, NOISE_BYTES // 2 // slice_ // 2 * 2))


def noise_plan(space: Space, K: int) -> tuple[int, int]:
    """(bytes between the noise of two rows, rows to a graph)."""
    slice_ = stride(space.pinned["noise"].size)
    return slice_, chunk_rows(slice_, K)
