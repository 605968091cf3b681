"""The reverse loop on the device: K enqueues of the step engine, captured once into a CUDA graph.

The graph is reused for every program with the same number of rows and the same guidance. A new
solver or grid is an upload, not a capture. Row k reads its own slice of the uploaded program and of
the noise; the two states are input and output in turn. docs/gpu.md has a drawing.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from ...diffusion.arrays import Bool
from ...errors import CaptureError, GpuError
from ..base import Float32, Rows
from .cuda import Cuda
from .cuda_api import Address, Event, Graph, Stream
from .device_space import FLOAT_BYTES, Space, stride
from .tensorrt_engine import Engine

NOISE_BYTES = 256 * 2**20
"""Most noise on the device. Programs that take more are cut into several graphs, and the noise of
the next one is uploaded while one runs."""
PIECE_BYTES = 16 * 2**20
"""Noise in pinned memory: while one piece is uploaded, the next is drawn into another."""


class DeviceLoop:
    """The loop over K rows, for batches of one size and programs with guidance in the same rows.

    It is one or more captured graphs. If capture is refused, for which `note` gives the reason, the
    same rows run by plain enqueues. `close` frees all.

    Args:
        engines: The step engine by whether a row is guided.
        guided: [K], the rows that are guided.
        noisy: Whether any row takes noise.
        copying: The stream that uploads noise.
    """

    def __init__(
        self,
        cuda: Cuda,
        space: Space,
        engines: Mapping[bool, Engine],
        guided: Bool,
        noisy: bool,
        copying: Stream,
    ) -> None:
        self._cuda = cuda
        self._space = space
        self._guided = [bool(g) for g in guided]
        self._copying = copying
        K = len(self._guided)
        self._noise_stride, self._chunk = noise_plan(space, K) if noisy else (0, K)
        self.note = ""
        self._graphs = list[Graph]()
        self._owner = ExitStack()
        # If an allocation fails, the earlier ones are freed with the attempt.
        with ExitStack() as attempt:
            self._allocate(attempt)
            self._contexts = {
                kind: space.context(engines[kind], kind) for kind in sorted(set(self._guided))
            }
            self._capture(attempt)
            self._owner = attempt.pop_all()

    @staticmethod
    def bytes(space_bucket: int, sample: int, K: int, noisy: bool) -> int:
        """Compute what a loop takes on the device.

        sample: The number of floats of one sample.
        """
        program = K * (stride(space_bucket * 6) + stride(space_bucket * 24))
        if not noisy:
            return program
        slice_ = stride(space_bucket * sample)
        chunk = chunk_rows(slice_, K)
        return program + slice_ * (K if chunk == K else 2 * chunk)

    @property
    def how(self) -> str:
        """How rows run: "one graph", "3 graphs" or "plain enqueues"."""
        if self.note:
            return "plain enqueues"
        return "one graph" if len(self._graphs) == 1 else f"{len(self._graphs)} graphs"

    def close(self) -> None:
        """Free the loop's graphs and memory."""
        self._owner.close()

    def run(self, rows: Rows) -> tuple[Float32, float]:
        """Run a batch; return x [B, *S] after the last row, and its milliseconds on the device."""
        cuda = self._cuda
        space = self._space
        B = len(rows.x)
        # The batch and its whole program go up before the first row.
        self._stage(rows)
        space.upload("state", *rows.conditions)
        for address, host in self._program.values():
            cuda.upload(address, host, space.stream)
        # Each segment waits for its noise on the device only: the host is already drawing the next.
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
        # Row k writes the one state if k is even, the other if it is odd.
        after = ("state", "next_state")[len(self._guided) % 2]
        space.download(after)
        cuda.synchronize(space.stream)
        return space.pinned[after][:B, 0].copy(), cuda.milliseconds(self._start, self._end)

    def _allocate(self, owner: ExitStack) -> None:
        cuda = self._cuda
        K = len(self._guided)
        bucket = self._space.bucket
        # Every row's slice of the program, at an address that the engine accepts.
        self._program = dict[str, tuple[Address, Float32]]()
        for name, width in (("call", 6), ("update", 24)):
            size = stride(bucket * width)
            host = cuda.pinned((K, size // FLOAT_BYTES), np.float32, owner)
            self._program[name] = cuda.memory(K * size, owner), host
        # Rows with noise for one graph each, and the two halves that graphs take it from in turn.
        cuts = [*range(0, K, self._chunk), K]
        self._segments = list(pairwise(cuts))
        halves = min(2, len(self._segments)) if self._noise_stride else 0
        self._halves = [cuda.memory(self._chunk * self._noise_stride, owner) for _ in range(halves)]
        self._read = [cuda.event(owner) for _ in range(halves)]
        self._ready = [cuda.event(owner) for _ in range(halves)]
        self._pieces = self._allocate_pieces(owner) if halves else []
        self._start = cuda.event(owner, timed=True)
        self._end = cuda.event(owner, timed=True)
        for stream in (self._copying, self._space.stream):
            owner.callback(cuda.synchronize, stream)  # before any memory is freed

    def _allocate_pieces(self, owner: ExitStack) -> list[tuple[NDArray[np.float32], Event]]:
        """Pinned memory for noise, [rows, floats], each with the event of its last upload."""
        rows = min(self._chunk, max(1, PIECE_BYTES // self._noise_stride))
        shape = (rows, self._noise_stride // FLOAT_BYTES)
        return [
            (self._cuda.pinned(shape, np.float32, owner), self._cuda.event(owner)) for _ in range(2)
        ]

    def _capture(self, owner: ExitStack) -> None:
        """Capture every segment, or say in `note` why that failed: the recipe of trtexec."""
        cuda = self._cuda
        stream = self._space.stream
        # One plain run of each engine first: what it initialises must not be captured.
        for kind in self._contexts:
            self._enqueue(self._guided.index(kind), self._guided.index(kind) + 1)
        cuda.synchronize(stream)
        try:
            for context in self._contexts.values():
                if not context.capturable(stream):
                    raise CaptureError("the library says that its work cannot be captured")
            for first, end in self._segments:
                self._graphs.append(self._captured(first, end))
        # If one segment cannot be captured, none is kept: all rows run by plain enqueues.
        except CaptureError as error:
            self.note = str(error)
            while self._graphs:
                cuda.destroy(self._graphs.pop())
        for graph in self._graphs:
            owner.callback(cuda.destroy, graph)

    def _captured(self, first: int, end: int) -> Graph:
        try:
            return self._cuda.capture(lambda: self._enqueue(first, end), self._space.stream)
        except GpuError as error:
            raise CaptureError(f"{end - first} rows could not be captured: {error}") from error

    def _enqueue(self, first: int, end: int) -> None:
        """Put rows first … end - 1 on the stream, each bound to its own slices."""
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
        """The address of row k's noise. Programs without noise all read the same zeros."""
        if not self._halves:
            return self._space.silence
        half = self._halves[k // self._chunk % len(self._halves)]
        return half + k % self._chunk * self._noise_stride

    def _stage(self, rows: Rows) -> None:
        """Copy the batch and its program into pinned memory.

        The program of the padding is zero, so its state becomes zero and stays so.
        """
        K = len(self._guided)
        B = len(rows.x)
        bucket = self._space.bucket
        pinned = self._space.pinned
        pinned["state"][:] = 0
        pinned["state"][:B, 0] = rows.x
        for name, values in rows.conditions.items():
            pinned[name][:B] = values
            pinned[name][B:] = 0
        for name, values in (("call", rows.call), ("update", rows.update)):
            host = self._program[name][1]
            width = values[0, 0].size
            host[:, : B * width] = values.reshape(K, -1)
            host[:, B * width : bucket * width] = 0

    def _send_noise(self, rows: Rows, i: int, first: int, end: int) -> None:
        """Draw the noise of segment i and upload it, while the device runs the segment before."""
        if not self._halves:
            return
        cuda = self._cuda
        half = i % len(self._halves)
        # The segment that reads this half must have ended before it is written again.
        if i >= len(self._halves):
            cuda.wait(self._copying, self._read[half])
        size = len(self._pieces[0][0])
        B = len(rows.x)
        shape = self._space.pinned["noise"].shape
        for turn, begin in enumerate(range(first, end, size)):
            # The upload of this piece's earlier noise must have ended before it is drawn over.
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
        # The rows start only after their noise is there; the host does not wait for either.
        cuda.record(self._ready[half], self._copying)
        cuda.wait(self._space.stream, self._ready[half])


def chunk_rows(slice_: int, K: int) -> int:
    """Compute the rows of one graph: all, if their noise fits in NOISE_BYTES.

    Otherwise the largest even number whose noise half of that holds.
    """
    if K * slice_ <= NOISE_BYTES:
        return K
    return min(K, max(2, NOISE_BYTES // 2 // slice_ // 2 * 2))


def noise_plan(space: Space, K: int) -> tuple[int, int]:
    """Compute the bytes between the noise of two rows, and the rows of one graph."""
    slice_ = stride(space.pinned["noise"].size)
    return slice_, chunk_rows(slice_, K)
