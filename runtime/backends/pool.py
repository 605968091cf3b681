"""Lends buffers of a backend, and keeps them for the next borrower."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from threading import Lock

from .base import Backend, Buffers
from .streams import Cut, bind, whole


class BufferPool:
    """Lends buffers with room for a batch to one borrower at a time, and keeps them for the next.

    Buffers serve any smaller batch, so memory grows with the largest batch only.
    """

    def __init__(self, backend: Backend, cut: Cut = whole) -> None:
        """Make an empty pool.

        Args:
            backend: Whose buffers are lent.
            cut: Into how many parts their calls are cut.
        """
        self._backend = backend
        self._cut = cut
        self._lock = Lock()
        self._free: list[tuple[int, Buffers]] = []

    @contextmanager
    def lend(self, batch: int) -> Iterator[Buffers]:
        """Lend buffers of at least this many samples."""
        with self._lock:
            # The smallest that fits, so that a larger one stays free for a larger batch.
            fitting = [entry for entry in self._free if entry[0] >= batch]
            if fitting:
                room, buffers = min(fitting, key=lambda entry: entry[0])
                self._free = [entry for entry in self._free if entry[1] is not buffers]
            else:
                # Those that are too small are replaced by the new ones.
                self._free.clear()
                room = batch
                buffers = None
        buffers = buffers or bind(self._backend, batch, self._cut)
        try:
            yield buffers
        finally:
            with self._lock:
                self._free.append((room, buffers))

    def clear(self) -> None:
        """Drop the buffers that are not lent."""
        with self._lock:
            self._free.clear()
