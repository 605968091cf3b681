"""Cuts a call into streams: parts of its samples that run at once, each on threads of its own.

Two threads in one call wait for each other at every operator, and two calls do not. The bytes are
the same only if a sample's bytes depend neither on its batch nor on the threads of a call, so
`engine.costs`, which chooses the cut, compares them first.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, TypeAlias

from ..bundle.bundle import Bundle
from .base import Backend, Buffers
from .forks import ForkGuard
from .host import Call, HostBuffers

if TYPE_CHECKING:  # importing it takes time, and a lone sample needs none
    from concurrent.futures import ThreadPoolExecutor

Cut: TypeAlias = Callable[[bool, int], int]
"""Into how many parts a call is cut, from whether it is guided and its number of samples."""


def whole(guided: bool, count: int) -> int:
    """Cut nothing."""
    return 1


def fixed(streams: int) -> Cut:
    """Cut every call into so many parts, if it has as many samples."""
    return lambda guided, count: streams


class Workers:
    """Threads that run the parts of a call.

    A bound call refers to them instead of the buffers. Buffers that nobody uses are then freed at
    once, with the models that they are bound to.
    """

    def __init__(self) -> None:
        self._pool: ThreadPoolExecutor | None = None
        self._room = 0  # threads

    def at_once(self, calls: Sequence[Callable[[], object]]) -> None:
        """Run calls at once. If some raise, the first error is raised when all have ended."""
        from concurrent.futures import ThreadPoolExecutor, wait

        if self._pool is None or self._room < len(calls) - 1:
            self._room = len(calls) - 1
            self._pool = ThreadPoolExecutor(self._room, "unnoise-stream")
        try:
            others = [self._pool.submit(call) for call in calls[1:]]
        except RuntimeError:  # the interpreter is ending, or the system allows no more threads
            # A call that was refused may lie in the queue all the same, and would run during a
            # later step. To run one twice changes nothing: none writes what another reads.
            self._pool.shutdown(cancel_futures=True)
            self._pool = None
            for call in calls:
                call()
            return
        try:
            calls[0]()
        finally:
            wait(others)
        for other in others:
            other.result()


class StreamBuffers(HostBuffers):
    """Buffers whose calls may be cut into streams.

    Attributes:
        cut: Into how many parts a call is cut.
    """

    def __init__(
        self,
        bundle: Bundle,
        guard: ForkGuard,
        batch: int,
        threads: int,
        streams: int | None,
        spare: int = 0,
    ) -> None:
        """Allocate memory.

        Args:
            threads: Of a whole call; the parts of a cut one share them.
            streams: Into how many parts every call is cut; None leaves it to who sets `cut`.
            spare: Samples of room beyond the batch.
        """
        super().__init__(bundle, guard, batch, spare)
        self.cut: Cut = fixed(streams) if streams else whole
        self._threads = threads
        self._asked = streams
        self._workers = Workers()

    def streams(self, guided: bool, count: int) -> int:
        """Return into how many parts a call is cut, none of them smaller than the least."""
        most = count // self._least(guided)
        # A call that cannot be cut asks nobody.
        return min(most, self.cut(guided, count)) if most > 1 else 1

    def choices(self, guided: bool, count: int) -> tuple[int, ...]:
        """List the cuts of a call that are worth a try, the whole call first."""
        most = max(1, count // self._least(guided))
        if self._asked:
            return tuple(sorted({1, min(most, self._asked)}))
        most = min(most, self._threads)
        # Half as many streams of two threads each suit cores that run two threads.
        return tuple(sorted({1, most, *([most // 2] if most > 3 else [])}))

    def threads_of(self, streams: int) -> int:
        """Return the threads of each part."""
        return max(1, self._threads // streams)

    def _least(self, guided: bool) -> int:
        """The samples of the smallest part."""
        return 1

    def _bind(self, call: Call) -> Callable[[], object]:
        calls: list[Callable[[], object]] = []
        for i in range(call.streams):
            start = call.count * i // call.streams
            end = call.count * (i + 1) // call.streams
            part = replace(call, first=call.first + start, count=end - start)
            calls.append(self._bind_part(part))
        return calls[0] if call.streams == 1 else partial(self._workers.at_once, calls)

    def _bind_part(self, part: Call) -> Callable[[], object]:
        """Return the function that runs a graph on one part of a call."""
        raise NotImplementedError


def bind(backend: Backend, batch: int, cut: Cut) -> Buffers:
    """Allocate memory for a batch whose calls are cut, if the backend cuts calls at all."""
    buffers = backend.bind(batch)
    if isinstance(buffers, StreamBuffers):
        buffers.cut = cut
    return buffers
