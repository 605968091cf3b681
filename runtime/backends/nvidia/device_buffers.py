"""A batch that is stepped from the host on a GPU, for previews and inpainting."""

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


class SteppedEngine(Protocol):
    """What the buffers need of their backend, see `DeviceBackend`."""

    bundle: Bundle
    guard: ForkGuard
    cuda: Cuda
    lock: RLock
    stream: Stream

    def alive(self) -> None: ...

    def bucket(self, batch: int) -> int: ...

    def step(self, bucket: int, guided: bool, fill: Callable[[Space], None]) -> Space: ...


class DeviceBuffers(HostBuffers):
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

        def fill(space: Space) -> None:
            # Earlier batches' samples may pad the bucket: samples do not depend on each other.
            for name in inputs:
                space.host(name)[:count] = arrays[name]
            space.upload(*inputs)

        def run() -> None:
            with backend.lock:
                backend.alive()
                space = backend.step(bucket, call.guided, fill)
                space.download("next_state", "denoised")
                backend.cuda.synchronize(backend.stream)
                for name in ("next_state", "denoised"):
                    arrays[name][:] = space.host(name)[:count]

        return run
