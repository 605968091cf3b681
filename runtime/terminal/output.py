"""Printing that never fails for lack of a character, a stream or a reader."""

from __future__ import annotations

import codecs
import os
import re
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # which the library itself does not need
    import argparse
    from collections.abc import Sequence

BROKEN_PIPE = 141
"""Exit status of a command whose reader left early (`| head`): 128 + SIGPIPE, as in a shell."""
ESCAPES = "unnoise.escapes"
SPELLED = {
    "σ": "sigma",
    "α": "alpha",
    "η": "eta",
    "×": "x",
    "·": "*",
    "…": "...",
    "–": "-",
    "—": "-",
    "→": "->",
    "±": "+/-",
    "≤": "<=",
    "≥": ">=",
    "²": "^2",
    "√": "sqrt",
    "µ": "u",
}
"""How our own messages read in an encoding that lacks these characters."""

CONTROLS = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]|\r(?!\n)")
"""Characters that a terminal may take for commands; not tabs and the ends of lines."""


def escape(error: UnicodeError) -> tuple[str, int]:
    """Spell out the characters that an encoding lacks, as JSON would: \\u03b5. An error handler of
    `codecs`."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    parts: list[str] = []
    for character in error.object[error.start : error.end]:
        code = ord(character)
        # Characters beyond 16 bits are two escapes, a surrogate pair, as in JSON.
        if character in SPELLED:
            parts.append(SPELLED[character])
        elif code < 0x10000:
            parts.append(f"\\u{code:04x}")
        else:
            high, low = divmod(code - 0x10000, 0x400)
            parts.append(f"\\u{0xD800 + high:04x}\\u{0xDC00 + low:04x}")
    return "".join(parts), error.end


def be_robust() -> None:
    """Let standard output and error spell out what they cannot encode.

    A stream of another kind (`io.StringIO`) stays as it is. One that was closed becomes None, as
    Python itself does for a closed descriptor, so that printing to it does nothing.
    """
    codecs.register_error(ESCAPES, escape)
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if getattr(stream, "closed", False):
            setattr(sys, name, None)
        elif hasattr(stream, "reconfigure"):
            stream.reconfigure(errors=ESCAPES)


def parse(parser: argparse.ArgumentParser, arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parse a command line; `--help` and usage errors print on any stream.

    Raises SystemExit, as argparse does.
    """
    be_robust()
    try:
        return parser.parse_args(arguments)
    except SystemExit as ending:
        try:
            flush()
        except OSError as error:
            discard()
            ending.code = BROKEN_PIPE if isinstance(error, BrokenPipeError) else 2
        raise


def say(*parts: object, end: str = "\n", flush: bool = False, error: bool = False) -> None:
    """Print like `print`, on any stream: the print of functions that applications call, too.

    Args:
        parts: what to print, with spaces between.
        end: what follows.
        flush: whether to write it out at once.
        error: whether to print on standard error.

    Raises:
        OSError: if the stream cannot be written to, as with a full disk or a closed pipe.
    """
    stream = sys.stderr if error else sys.stdout
    # A process without a console has no streams, and an application may have closed one.
    if stream is None or getattr(stream, "closed", False):
        return
    text = " ".join(map(str, parts)) + end
    # A name in a bundle of somebody else may hold commands for the terminal.
    text = CONTROLS.sub(lambda found: f"\\u{ord(found[0]):04x}", text)
    # A stream that an application set up is not configured by `be_robust`.
    try:
        stream.write(text)
    except UnicodeEncodeError:
        encoding = getattr(stream, "encoding", None) or "ascii"
        codecs.register_error(ESCAPES, escape)
        stream.write(text.encode(encoding, ESCAPES).decode(encoding))
    if flush:
        stream.flush()


def columns(rows: list[list[str]]) -> list[str]:
    """Return the rows as lines, with their cells aligned."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]


def flush() -> None:
    """Write the buffered text. Raises OSError if that fails."""
    for stream in (sys.stdout, sys.stderr):
        if stream is not None and not getattr(stream, "closed", False):
            stream.flush()


def discard() -> None:
    """Drop what a broken standard output still buffers; Python would try to write it at exit."""
    for stream in (sys.stdout, sys.stderr):
        if stream is None or getattr(stream, "closed", False):
            continue
        try:
            stream.flush()
        # The stream itself stays: the buffered text goes to the null device at exit.
        except OSError:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, stream.fileno())
            os.close(nowhere)
