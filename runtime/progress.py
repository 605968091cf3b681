"""A progress bar on standard error, drawn where a person can see it and silent elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator, Sized
from typing import TypeVar

T = TypeVar("T")


class Progress:
    """A bar of `total` units. It appears after half a second, redraws at most ten times a second, and leaves one line at the end.

    Where standard error is no terminal, it prints a plain line every 30 seconds instead.
    """

    WIDTH = 24

    def __init__(self, title: str, total: int, start: int = 0) -> None:
        self.title, self.total, self.done, self._start = title, total, start, start
        self._terminal = sys.stderr.isatty()
        self._began = time.monotonic()
        self._next = self._began + (0.5 if self._terminal else 30.0)
        self._note, self._drawn = "", False

    def advance(self, units: int = 1, note: str = "") -> None:
        """Count `units` as done; `note` stands behind the bar until the next one."""
        self.done, self._note = self.done + units, note or self._note
        now = time.monotonic()
        if now >= self._next:
            self._next = now + (0.1 if self._terminal else 30.0)
            self._draw(now)

    def _draw(self, now: float) -> None:
        fraction, spent = min(1.0, self.done / max(1, self.total)), now - self._began
        left = spent * (self.total - self.done) / max(1, self.done - self._start)
        filled = round(fraction * self.WIDTH)
        bar = "█" * filled + "░" * (self.WIDTH - filled)
        line = f"{self.title} {bar} {self.done}/{self.total}  {clock(spent)} spent, {clock(left)} left  {self._note}"
        print(
            f"\r\x1b[2K{line}" if self._terminal else line,
            end="" if self._terminal else "\n",
            file=sys.stderr,
            flush=True,
        )
        self._drawn = True

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        if self._drawn:
            self._draw(time.monotonic())
            if self._terminal:
                print(file=sys.stderr, flush=True)


def track(items: Iterable[T], title: str, total: int | None = None) -> Iterator[T]:
    """Iterate over `items` under a progress bar."""
    if total is None:
        total = len(items) if isinstance(items, Sized) else 0
    with Progress(title, total) as bar:
        for item in items:
            yield item
            bar.advance()


def clock(seconds: float) -> str:
    """12s, 3m05s, 2h07m."""
    s = round(seconds)
    if s < 60:
        return f"{s}s"
    return f"{s // 60}m{s % 60:02d}s" if s < 3600 else f"{s // 3600}h{s % 3600 // 60:02d}m"
