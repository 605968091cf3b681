"""A batch that is stepped from the host on a TensorRT engine, for previews and inpainting."""

from __future__ import annotations

from collections.abc import Callable
from threading import RLock
from typing import Protocol

from ...bundle.bundle import Bundle
from ..forks import ForkGuard
from ..host import Call, HostBuffers
from ..ports import inputs_of
from .cuda import Cuda, Stream
from .device_space import Space
from .tensorrt_engine import Context


class SteppedEngine(Protocol):
    """What the buffers need of a TensorRT backend, see `TensorRt`."""

    bundle: Bundle
    guard: ForkGuard
    cuda: Cuda
    lock: RLock
    stream: Stream

    def alive(self) -> None: ...

    def bucket(self, batch: int) -> int: ...

    def space(self, bucket: int) -> Space: ...

    def step_context(self, bucket: int, guided: bool) -> Context: ...


class TensorRtBuffers(HostBuffers):
    """A batch that is stepped from the host, for previews and inpainting.

    Every step uploads the state and downloads it.
    """

    def __init__(self, backend: SteppedEngine, batch: int) -> None:
        backend.bucket(batch)  # refuses a batch that no engine takes, before memory is allocated
        super().__init__(backend.bundle, backend.guard, batch)
        self._backend = backend

    def _bind(self, call: Call) -> Callable[[], object]:
        backend = self._backend
        backend.alive()
        count = call.count
        bucket = backend.bucket(count)
        arrays = self._arrays(call)
        inputs = inputs_of(backend.bundle)

        def run() -> None:
            with backend.lock:
                backend.alive()
                context = backend.step_context(bucket, call.guided)
                space = backend.space(bucket)
                # Earlier batches' samples may pad the bucket: samples do not depend on each other.
                for name in inputs:
                    space.host(name)[:count] = arrays[name]
                space.upload(*inputs)
                context.bind(space.addresses)
                context.enqueue(backend.stream)
                space.download("next_state", "denoised")
                backend.cuda.synchronize(backend.stream)
                for name in ("next_state", "denoised"):
                    arrays[name][:] = space.host(name)[:count]

        return run
