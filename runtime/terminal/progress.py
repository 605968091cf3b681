"""A progress bar on standard error: one row of a terminal, or a plain line now and then.

Neither tqdm nor rich prints plain lines if there is no terminal. tqdm also lets other messages end
on the bar's row, and starts a thread, which no process should have when it forks.
"""

from __future__ import annotations

import contextlib
import os
import sys
import time
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Sized
from threading import RLock
from typing import Protocol, TextIO, TypeVar, cast

T = TypeVar("T")

PLAIN_EVERY_S = 30.0
"""Seconds between the plain lines that are printed if there is no terminal."""
WIDTH = 24
"""Columns of the bar itself, if there is room."""


class Stream(Protocol):
    """A text stream whose `write` can be replaced."""

    write: Callable[[str], object]

    def flush(self) -> None: ...


class Progress:
    """A bar of `total` units. It appears after half a second and leaves one line at the end.

    On a terminal it redraws at most ten times a second, within the terminal's present width. It
    steps aside for everything that is printed or logged meanwhile. Elsewhere, and if TERM is
    "dumb", it prints a plain line every 30 seconds. Without a standard error it prints nothing.

    Args:
        title: what is counted.
        total: units in all; 0 if unknown.
        start: units that were done before, which say nothing about the speed.
    """

    def __init__(self, title: str, total: int, start: int = 0) -> None:
        self.title = title
        self.total = total
        self.done = start
        self._start = start
        self._terminal = is_terminal(sys.stderr)
        self._began = time.monotonic()
        self._next = self._began + (0.5 if self._terminal else PLAIN_EVERY_S)
        self._note = ""
        self._drawn = False

    def advance(self, units: int = 1, note: str = "") -> None:
        """Count `units` as done; `note` follows the bar until the next one."""
        self.done += units
        self._note = note or self._note
        now = time.monotonic()
        if now >= self._next:
            self._next = now + (0.1 if self._terminal else PLAIN_EVERY_S)
            self._draw(now)

    def line(self, now: float, columns: int | None = None, encoding: str = "utf-8") -> str:
        """The bar as text. It leaves out what `columns` do not hold; None is any width."""
        spent = now - self._began
        left = spent * (self.total - self.done) / max(1, self.done - self._start)
        count = f"{self.done}/{self.total}"
        times = f"{clock(spent)} spent, {clock(left)} left"
        short = f"{clock(left)} left"
        title = self.title
        # From the longest form to the shortest. The bar shrinks before words are left out.
        for bar, parts in (
            (WIDTH, (count, times, self._note)),
            (WIDTH // 2, (count, times, self._note)),
            (WIDTH // 2, (count, short, self._note)),
            (WIDTH // 4, (count, short, self._note)),
            (WIDTH // 4, (count, short)),
            (0, (count, short)),
            (0, (count,)),
        ):
            text = "  ".join(part for part in (title, self._bar(bar, encoding), *parts) if part)
            text = representable(text, encoding)
            if columns is None or width(text) <= columns:
                return text
        return cut(representable(f"{count}  {title}", encoding), columns or 0)

    def _bar(self, length: int, encoding: str) -> str:
        fraction = min(1.0, self.done / max(1, self.total))
        filled = round(fraction * length)
        full, empty = "█░" if representable("█░", encoding) == "█░" else "#-"
        return full * filled + empty * (length - filled)

    def _draw(self, now: float) -> None:
        stream = sys.stderr
        # The terminal may be gone, or the stream closed. The counted work must continue.
        with contextlib.suppress(OSError, ValueError, AttributeError):
            encoding = getattr(stream, "encoding", None) or "utf-8"
            if self._terminal and is_terminal(stream):
                Row.on(cast(Stream, stream)).draw(self.line(now, columns_of(stream) - 1, encoding))
            else:
                print(self.line(now, None, encoding), file=stream, flush=True)
            self._drawn = True

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        if self._drawn:
            self._draw(time.monotonic())
            if self._terminal:
                Row.leave()


class Row:
    """The row of the terminal on which bars are drawn, by turns if there are several.

    While it is drawn, everything else that this process writes to the terminal, by `print` or a
    logging handler, first erases it: the streams' `write` is wrapped until the bar is left.
    """

    _current: Row | None = None

    def __init__(self, stream: Stream) -> None:
        self._stream = stream
        self._lock = RLock()
        self._shown = 0  # columns that the drawn text takes
        self._midline = False  # whether other text on the terminal ends within a line
        self._write: Callable[[str], object] = stream.write
        self._wrapped = [stream]
        self._wrap(stream)
        # Both streams usually show the same terminal.
        other = cast(Stream, sys.stdout)
        if other is not stream and is_terminal(other):
            self._wrapped.append(other)
            self._wrap(other)

    @classmethod
    def on(cls, stream: Stream) -> Row:
        """Return the row of this stream's terminal, drawn or not."""
        if cls._current is None or cls._current._stream is not stream:
            cls.leave()
            cls._current = cls(stream)
        return cls._current

    @classmethod
    def leave(cls) -> None:
        """End the row, so that what comes next starts on a fresh one."""
        row = cls._current
        cls._current = None
        if row is not None:
            row._leave()

    def draw(self, text: str) -> None:
        """Replace what the row shows. Blanks cover the rest: some terminals know no escapes."""
        with self._lock:
            if self._midline:
                for stream in self._wrapped:
                    stream.flush()
                self._write("\n")
                self._midline = False
            room = max(columns_of(self._stream) - 1, 0)
            blanks = max(0, min(self._shown, room) - width(text))
            self._write(f"\r{text}{' ' * blanks}")
            self._stream.flush()
            self._shown = width(text)

    def _erase(self) -> None:
        if self._shown:
            room = max(columns_of(self._stream) - 1, 0)
            self._write(f"\r{' ' * min(self._shown, room)}\r")
            self._stream.flush()
            self._shown = 0

    def _wrap(self, stream: Stream) -> None:
        original = stream.write

        def write(text: str) -> object:
            with self._lock:
                self._erase()
                if text:
                    self._midline = not text.endswith("\n")
                return original(text)

        with contextlib.suppress(AttributeError):  # a stream of another kind may refuse: leave it
            stream.write = write

    def _leave(self) -> None:
        with self._lock:
            for stream in self._wrapped:
                with contextlib.suppress(AttributeError):
                    del stream.write  # the class's own method is found again
            if self._shown:
                with contextlib.suppress(OSError, ValueError):
                    self._stream.write("\n")
                    self._stream.flush()


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


def is_terminal(stream: object) -> bool:
    """Whether a stream is a terminal on which a row can be redrawn. None is not."""
    try:
        return bool(cast(TextIO, stream).isatty()) and os.environ.get("TERM") != "dumb"
    except (AttributeError, ValueError):  # no stream, or a closed one
        return False


def columns_of(stream: object) -> int:
    """Return the terminal's present width; 80 if the terminal does not say."""
    try:
        return os.get_terminal_size(cast(TextIO, stream).fileno()).columns or 80
    except (AttributeError, OSError, ValueError):
        return 80


def width(text: str) -> int:
    """Count a text's columns on a terminal: two for an East Asian wide character or an emoji."""
    return sum(
        0 if unicodedata.combining(c) else 2 if unicodedata.east_asian_width(c) in "WF" else 1
        for c in text
    )


def cut(text: str, columns: int) -> str:
    """Return the beginning of a text that fits."""
    while width(text) > columns:
        text = text[:-1]
    return text


def representable(text: str, encoding: str) -> str:
    """Put a text on one line, with ? for what the encoding lacks."""
    text = " ".join(text.split("\n")).replace("\r", " ").replace("\t", " ")
    try:
        return text.encode(encoding, "replace").decode(encoding)
    except LookupError:
        return text.encode("ascii", "replace").decode("ascii")
