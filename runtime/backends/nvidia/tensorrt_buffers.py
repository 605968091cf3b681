"""A batch that is stepped from the host on a TensorRT engine, for previews and inpainting."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from ..base import HostBuffers

if TYPE_CHECKING:
    from .tensorrt import TensorRt


class TensorRtBuffers(HostBuffers):
    """A batch that is stepped from the host, for previews and inpainting.

    Every step uploads the state and downloads it.
    """

    def __init__(self, backend: TensorRt, batch: int) -> None:
        backend.bucket(batch)  # refuses a batch that no engine takes, before memory is allocated
        super().__init__(backend.bundle, backend.guard, batch)
        self._backend = backend

    def _bind(self, guided: bool, current: int, first: int, count: int) -> Callable[[], object]:
        backend = self._backend
        backend.alive()
        bucket = backend.bucket(count)
        arrays = self._arrays(current, first, count)

        def run() -> None:
            with backend.lock:
                backend.alive()
                context = backend.step_context(bucket, guided)
                space = backend.space(bucket)
                # Earlier batches' samples may pad the bucket: samples do not depend on each other.
                for name in ("state", "noise", "call", "update", "label"):
                    space.pinned[name][:count] = arrays[name]
                space.upload("state", "noise", "call", "update", "label")
                context.bind(space.addresses)
                context.enqueue(backend.stream)
                space.download("next_state", "denoised")
                backend.cuda.synchronize(backend.stream)
                for name in ("next_state", "denoised"):
                    arrays[name][:] = space.pinned[name][:count]

        return run
