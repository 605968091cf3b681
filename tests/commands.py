"""Command lines with arbitrary words, run in this process."""

from __future__ import annotations

import io
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from typing import Any

from hypothesis import strategies as st

from runtime.errors.messages import shown

from .arbitrary import texts

Main = Callable[[list[str]], int]


class Command:
    """A command line to try."""

    def __init__(self, name: str, main: Main, words: list[str]) -> None:
        self.name = name
        self.main = main
        self.words = words

    def __repr__(self) -> str:
        return f"{self.name} {' '.join(map(shown, self.words))}"

    def fault(self) -> str | None:
        """How the command fails: with a status other than 0 and 2, or with a traceback.

        None if nothing is wrong.
        """
        buffers = [io.BytesIO(), io.BytesIO()]
        streams = [io.TextIOWrapper(buffer, "utf-8") for buffer in buffers]
        try:
            with redirect_stdout(streams[0]), redirect_stderr(streams[1]):
                code: Any = self.main(self.words)
        except SystemExit as ending:
            code = ending.code
        for stream in streams:
            stream.flush()
        error = buffers[1].getvalue().decode("utf-8", "replace")
        if code not in (0, 2) or "Traceback" in error:
            return f"status {code}: {error[-500:]}"
        if code == 2 and not error.strip():
            return "status 2 without a message"
        return None


@st.composite
def commands(
    draw: st.DrawFn,
    name: str,
    main: Main,
    positional: list[list[str]],
    options: dict[str, list[str]],
    flags: tuple[str, ...] = (),
    first: tuple[str, ...] = (),
) -> Command:
    """Command lines of which some words are arbitrary.

    positional, options: lists of valid values. first: words that stay as they are.
    """
    words = [*first]
    for good in positional:
        words.append(draw(st.sampled_from(good)) if draw(st.integers(0, 9)) else _word(draw))
    names = st.sampled_from(sorted(options) or ["-"])
    for option in draw(st.lists(names, max_size=min(4, len(options)), unique=True)):
        value = _word(draw) if draw(st.booleans()) else draw(st.sampled_from(options[option]))
        words.append(f"{option}={value}")
    if flags:
        words += draw(st.lists(st.sampled_from(flags), max_size=1))
    if not draw(st.integers(0, 9)):
        words.append(_word(draw))
    return Command(name, main, words)


def _word(draw: st.DrawFn) -> str:
    """Arbitrary text that is not a path out of the working folder."""
    return draw(texts).lstrip("/").replace("../", "")
