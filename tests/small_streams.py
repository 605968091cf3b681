"""A backend in numpy whose calls may be cut into streams, on a clock of its own."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping

import numpy as np

from runtime import Bundle
from runtime.backends.forks import ForkGuard
from runtime.backends.host import Call
from runtime.backends.streams import StreamBuffers


class StreamedBackend:
    """The new state is half of the old one.

    Args:
        seconds: Of a part, by the streams that it is one of.
        unlike: The number of streams in which the bytes differ.
        least: Samples of the smallest part.
        growth: By how much each call takes longer than the last one that was cut alike.
        disturbed: How many of the first calls take a quarter longer, by their streams.
    """

    name = "onnxruntime"
    precision = "fp32"

    def __init__(
        self,
        bundle: Bundle,
        seconds: Mapping[int, float] | None = None,
        threads: int = 2,
        streams: int | None = None,
        unlike: int = 0,
        least: int = 1,
        growth: float = 1.0,
        disturbed: Mapping[int, int] | None = None,
    ) -> None:
        self.bundle = bundle
        self.seconds = seconds or {}
        self.threads = threads
        self.streams = streams
        self.unlike = unlike
        self.least = least
        self.growth = growth
        self.disturbed = disturbed or {}
        self.calls = Counter[int]()
        self.guard = ForkGuard(self.name, self)
        self.now = 0.0
        self.ran: list[tuple[int, int, int]] = []

    def clock(self) -> float:
        return self.now

    def bind(self, batch: int) -> StreamedBuffers:
        return StreamedBuffers(self, batch)


class StreamedBuffers(StreamBuffers):
    def __init__(self, backend: StreamedBackend, batch: int) -> None:
        super().__init__(backend.bundle, backend.guard, batch, backend.threads, backend.streams)
        self._backend = backend

    def _least(self, guided: bool) -> int:
        return self._backend.least

    def _bind_part(self, part: Call) -> Callable[[], object]:
        backend = self._backend
        arrays = self._arrays(part)

        def run() -> None:
            arrays["next_state"][:] = arrays["state"] / 2
            if part.streams == backend.unlike:
                arrays["next_state"][:] += np.float32(1e-6)
            # Parts run at once: one of them stands for all.
            if part.first == 0:
                called = backend.calls[part.streams]
                longer = backend.growth**called
                if called < backend.disturbed.get(part.streams, 0):
                    longer *= 1.25
                backend.now += backend.seconds.get(part.streams, 1.0) * longer
                backend.calls[part.streams] += 1
            backend.ran.append((part.first, part.count, part.streams))

        return run
