"""The loop over rows on ONNX Runtime: a CUDA graph a row, on a stream of ours, without waiting."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Protocol

from ...bundle.bundle import Bundle
from ..base import Float32, Rows
from ..onnxruntime_api import Binding, RunOptions, Session
from ..ports import dtype_of, inputs_of, shapes
from .cuda import Cuda
from .cuda_api import Stream
from .device_noise import Noise
from .device_program import Program
from .device_space import Space, port_bytes

RUN = {"disable_synchronize_execution_providers": "1"}
"""Entries of a run's configuration, besides its graph's number. The stream keeps the order."""


class Graphs(Protocol):
    """What a loop needs of its backend, see `OnnxRuntimeCuda`."""

    bundle: Bundle
    cuda: Cuda
    stream: Stream
    copying: Stream

    def session(self, guided: bool, bucket: int) -> Session: ...
    def options(self) -> RunOptions: ...
    def launch(
        self, session: Session, binding: Binding, options: RunOptions, captures: bool
    ) -> None: ...


class Loop:
    """Memory on the device for batches of one size, and the bindings of the graphs to it.

    Every row copies its part of the program to the one place that the graphs read. The two states
    are input and output in turn.

    Attributes:
        captured: The graphs so far.
    """

    def __init__(self, backend: Graphs, bucket: int) -> None:
        self._backend = backend
        self._cuda = backend.cuda
        self.bucket = bucket
        self.captured = 0
        self._bound: dict[tuple[bool, int], tuple[Session, Binding, RunOptions]] = {}
        self._noise: Noise | None = None
        self._noise_bytes = port_bytes(backend.bundle, bucket)["noise"]
        with ExitStack() as attempt:
            self.space = Space(backend.cuda, backend.bundle, bucket, backend.stream)
            attempt.callback(self.space.close)
            self._program = Program(backend.cuda, bucket, 1, backend.stream, attempt)
            self._start = backend.cuda.event(attempt, timed=True)
            self._end = backend.cuda.event(attempt, timed=True)
            attempt.callback(backend.cuda.synchronize, backend.stream)
            self._owner = attempt.pop_all()

    def close(self) -> None:
        """Drop what uses the memory, and free it."""
        self._bound.clear()
        self._owner.close()

    def step(self, guided: bool) -> None:
        """Run one row from the host's mirrors of the inputs, and wait for its outputs."""
        space = self.space
        inputs = inputs_of(self._backend.bundle)
        # These two lie in the program's window, where the graphs read them.
        window = self._program.addresses(0)
        for name in inputs:
            address = window.get(name, space.addresses[name])
            self._cuda.upload(address, space.host(name), space.stream)
        self._launch(guided, 0)
        space.download("next_state", "denoised")
        self._cuda.synchronize(space.stream)

    def prepare(self, rows: Rows) -> bool:
        """Allocate and capture what a program lacks; return whether a graph was captured.

        Raises:
            GpuMemoryError: The device's memory is full.
        """
        self._program.reserve(len(rows.call))
        if self._noise is None and rows.noisy.any():
            self._allocate_noise()
        known = self.captured
        # What a capture runs is of no use, so all are made before the batch is uploaded.
        for k, guided in enumerate(rows.guided):
            if (bool(guided), k % 2) not in self._bound:
                self._launch(bool(guided), k % 2)
        return self.captured > known

    def run(self, rows: Rows) -> tuple[Float32, float]:
        """Run a batch that `prepare` was called for; return x [B, *S], and the device's ms."""
        cuda = self._cuda
        space = self.space
        noise = self._noise if rows.noisy.any() else None
        space.start(rows)
        self._program.send(rows)
        cuda.clear(space.addresses["noise"], self._noise_bytes, space.stream)
        cuda.record(self._start, space.stream)
        piece = noise.rows if noise else len(rows.call)
        for first in range(0, len(rows.call), piece):
            count = min(piece, len(rows.call) - first)
            source = noise.send(rows, first, count) if noise else 0
            for row in range(count):
                self._program.move(first + row, 1)
                if noise:
                    drawn = source + row * noise.stride
                    cuda.copy(space.addresses["noise"], drawn, self._noise_bytes, space.stream)
                self._launch(bool(rows.guided[first + row]), (first + row) % 2)
            if noise:
                noise.taken()
        cuda.record(self._end, space.stream)
        x = space.finish(len(rows.call), len(rows.x))
        return x, cuda.milliseconds(self._start, self._end)

    def _allocate_noise(self) -> None:
        space = self.space
        with ExitStack() as attempt:
            copying = self._backend.copying
            self._noise = Noise(self._cuda, space.shape, space.stream, copying, attempt)
            attempt.callback(self._cuda.synchronize, space.stream)
            self._owner.enter_context(attempt.pop_all())

    def _launch(self, guided: bool, current: int) -> None:
        """Launch the graph of a row, or capture it first.

        current: 0 if `state` is the input, 1 if `next_state` is.
        """
        key = guided, current
        captures = key not in self._bound
        if captures:
            session = self._backend.session(guided, self.bucket)
            self._bound[key] = session, self._bind(session, current), self._backend.options()
        try:
            self._backend.launch(*self._bound[key], captures)
        except BaseException:
            # A graph that was not captured must not count as one.
            if captures:
                del self._bound[key]
            raise
        self.captured += captures

    def _bind(self, session: Session, current: int) -> Binding:
        bundle = self._backend.bundle
        addresses = self.space.addresses | self._program.addresses(0)
        if current:
            swapped = {"state": addresses["next_state"], "next_state": addresses["state"]}
            addresses |= swapped
        binding = session.io_binding()
        kinds = shapes(bundle, self.bucket)
        for bind, ports in (
            (binding.bind_input, session.get_inputs()),
            (binding.bind_output, session.get_outputs()),
        ):
            for port in ports:
                name = port.name
                kind = dtype_of(bundle, name)
                bind(name, "cuda", 0, kind, kinds[name], addresses[name])
        return binding
