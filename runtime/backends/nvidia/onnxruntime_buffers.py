"""A batch that is stepped from the host on ONNX Runtime's CUDA provider."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from ...bundle.bundle import Bundle
from ..forks import ForkGuard
from ..host import Call, HostBuffers
from ..ports import inputs_of
from .onnxruntime_loop import Loop


class SteppedSessions(Protocol):
    """What the buffers need of their backend, see `OnnxRuntimeCuda`."""

    bundle: Bundle
    guard: ForkGuard

    def work(self, function: Callable[[], None]) -> None: ...
    def step(self, guided: bool, count: int, fill: Callable[[Loop], object]) -> Loop: ...


class CudaBuffers(HostBuffers):
    """A batch stepped from the host, for previews and inpainting: the state goes up and down."""

    def __init__(self, backend: SteppedSessions, batch: int) -> None:
        super().__init__(backend.bundle, backend.guard, batch)
        self._backend = backend

    def _bind(self, call: Call) -> Callable[[], object]:
        backend = self._backend
        count = call.count
        arrays = self._arrays(call)
        inputs = inputs_of(backend.bundle)

        def fill(loop: Loop) -> None:
            # Earlier batches' samples may pad the bucket: samples do not depend on each other.
            for name in inputs:
                loop.space.host(name)[:count] = arrays[name]

        def run() -> None:
            loop = backend.step(call.guided, count, fill)
            for name in ("next_state", "denoised"):
                arrays[name][:] = loop.space.host(name)[:count]

        return lambda: backend.work(run)
