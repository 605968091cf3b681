"""The progress bar: one row in any terminal, plain lines elsewhere, and it never fails."""

import contextlib
import io
import logging
import os
import re
import sys
from functools import partial

import pytest

from runtime.terminal import progress
from runtime.terminal.progress import Progress, Row, clock, track, width

from ...root import ROOT

fcntl = pytest.importorskip("fcntl", reason="pseudo-terminals are POSIX's")
import pty  # noqa: E402
import struct  # noqa: E402
import termios  # noqa: E402
import tty  # noqa: E402


class Terminal:
    """A pseudo-terminal as standard output and error, and everything written to it."""

    def __init__(self, columns: int, encoding: str = "utf-8") -> None:
        self.reader, end = pty.openpty()
        tty.setraw(end)
        self.end = end
        self.resize(columns)
        opened = partial(
            open, end, "w", encoding=encoding, errors="backslashreplace", closefd=False
        )
        self.stderr = opened()
        self.stdout = opened(buffering=1)

    def resize(self, columns: int) -> None:
        self.columns = columns
        fcntl.ioctl(self.end, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))

    def attach(self) -> None:
        """Become standard output and error, inside the test, because pytest sets its own before."""
        sys.stderr = self.stderr
        sys.stdout = self.stdout

    def read(self) -> str:
        self.stderr.flush()
        self.stdout.flush()
        os.set_blocking(self.reader, False)
        parts = []
        while True:
            try:
                parts.append(os.read(self.reader, 65536))
            except BlockingIOError:
                return b"".join(parts).decode(self.stderr.encoding)

    def close(self) -> None:
        self.stderr.close()
        self.stdout.close()
        os.close(self.end)
        os.close(self.reader)


def rows(written: str) -> list[str]:
    """The rows as a terminal shows them that is wide enough: what \\r moves back over is
    overwritten."""
    shown = []
    for line in written.split("\n"):
        cells: list[str] = []
        for piece in line.split("\r"):
            cells[: len(piece)] = piece
        shown.append("".join(cells).rstrip())
    return shown


def redraws(written: str) -> list[str]:
    return [piece for piece in re.split(r"[\r\n]", written) if piece.strip()]


class Clock:
    """time.monotonic, one second later at every call."""

    def __init__(self) -> None:
        self.now = 0.0

    def monotonic(self) -> float:
        self.now += 1.0
        return self.now


@pytest.fixture(autouse=True)
def seconds(monkeypatch: pytest.MonkeyPatch) -> Clock:
    monkeypatch.setenv("TERM", "xterm")
    found = Clock()
    monkeypatch.setattr(progress, "time", found)
    return found


@pytest.fixture
def terminal(request: pytest.FixtureRequest):
    columns, encoding = getattr(request, "param", (80, "utf-8"))
    found = Terminal(columns, encoding)
    yield found
    Row.leave()
    found.close()


def training(steps: int = 40, of: int = 200_000, start: int = 100_000) -> None:
    with Progress("training", of, start) as bar:
        for _ in range(steps):
            bar.advance(note="loss 0.1234, and a note that has more to say")


@pytest.mark.parametrize(
    "terminal",
    [(columns, "utf-8") for columns in (200, 80, 60, 40, 20, 8, 2)]
    + [(60, "ascii"), (60, "cp1252")],
    indirect=True,
)
def test_no_row_is_wider_than_the_terminal(terminal: Terminal) -> None:
    terminal.attach()
    training()
    written = terminal.read()
    assert len(redraws(written)) >= (40 if terminal.columns > 2 else 0)
    assert max(map(width, redraws(written)), default=0) < terminal.columns
    assert written.count("\n") <= 1
    if terminal.columns >= 20:
        assert "100040/200000" in rows(written)[0]
    if terminal.columns >= 40:
        assert "training" in rows(written)[0]
        assert "left" in rows(written)[0]


@pytest.mark.parametrize("terminal", [(40, "utf-8")], indirect=True)
@pytest.mark.parametrize(
    "title",
    ["reading 写真のフォルダ" * 3, "emoji 🙂🙂🙂🙂🙂🙂🙂🙂🙂🙂🙂🙂🙂", "two\nlines\r\tand a tab"],
)
def test_wide_characters_and_control_characters_take_their_columns(
    terminal: Terminal, title: str
) -> None:
    terminal.attach()
    with Progress(title, 10) as bar:
        for _ in range(5):
            bar.advance()
    written = terminal.read()
    assert max(map(width, redraws(written))) < 40
    assert written.count("\n") == 1
    assert "\t" not in written


def test_a_terminal_that_is_resized_is_measured_again(terminal: Terminal) -> None:
    terminal.attach()
    with Progress("training", 1000) as bar:
        for columns in (80, 30, 120, 20, 61):
            terminal.read()
            terminal.resize(columns)
            for _ in range(3):
                bar.advance(note="loss 0.1234")
            assert max(map(width, redraws(terminal.read()))) < columns


def test_what_is_printed_or_logged_meanwhile_stands_on_lines_of_its_own(terminal: Terminal) -> None:
    terminal.attach()
    handler = logging.StreamHandler()  # holds today's sys.stderr, as after logging.basicConfig
    logger = logging.getLogger("unnoise-test-progress")
    logger.addHandler(handler)
    try:
        with Progress("training", 100) as bar:
            bar.advance()
            logger.warning("a warning")
            bar.advance()
            print("a print")
            bar.advance()
            print("unfinished", end="")
            bar.advance()
            print("an error", file=sys.stderr)
            bar.advance()
    finally:
        logger.removeHandler(handler)
    print("afterwards")
    shown = rows(terminal.read())
    assert shown[:4] == ["a warning", "a print", "unfinished", "an error"]
    assert shown[4].startswith("training")
    assert shown[5:] == ["afterwards", ""]
    assert "write" not in vars(sys.stderr)
    assert "write" not in vars(sys.stdout)


def test_a_bar_within_a_bar(terminal: Terminal) -> None:
    terminal.attach()
    with Progress("outer", 3) as outer:
        outer.advance()
        with Progress("inner", 2) as inner:
            inner.advance(2)
        outer.advance(2)
    shown = rows(terminal.read())
    assert [row.split()[0] for row in shown if row] == ["inner", "outer"]


def test_a_bar_that_an_error_leaves_ends_its_row(terminal: Terminal) -> None:
    terminal.attach()
    with contextlib.suppress(KeyError), Progress("training", 3) as bar:
        bar.advance()
        raise KeyError
    print("afterwards")
    assert rows(terminal.read())[1] == "afterwards"


def test_a_quick_bar_is_never_drawn(
    terminal: Terminal, seconds: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    terminal.attach()
    monkeypatch.setattr(seconds, "monotonic", lambda: 0.0)
    assert list(track(range(3), "quick")) == [0, 1, 2]
    assert terminal.read() == ""


@pytest.mark.parametrize("terminal", [(60, "utf-8")], indirect=True)
def test_a_dumb_terminal_gets_plain_lines(
    terminal: Terminal, monkeypatch: pytest.MonkeyPatch
) -> None:
    terminal.attach()
    monkeypatch.setenv("TERM", "dumb")
    training(steps=70)
    written = terminal.read()
    assert "\r" not in written
    assert 2 <= written.count("\n") <= 4


def test_without_a_terminal_a_plain_line_every_half_minute(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    training(steps=70)
    lines = sys.stderr.getvalue().splitlines()
    assert len(lines) == 3
    assert all(line.startswith("training") for line in lines)


def closed_stream() -> io.StringIO:
    stream = io.StringIO()
    stream.close()
    return stream


class Broken(io.StringIO):
    def write(self, _: str) -> int:
        raise OSError("the terminal is gone")


@pytest.mark.parametrize("stream", [lambda: None, closed_stream, Broken, object])
def test_a_missing_closed_or_broken_stream_stops_nothing(
    stream, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stderr", stream())
    training(steps=70)


def test_a_terminal_that_goes_away_stops_nothing(terminal: Terminal) -> None:
    terminal.attach()
    with Progress("training", 100) as bar:
        bar.advance()
        terminal.read()
        terminal.stderr.close()
        bar.advance()
        bar.advance()


def test_an_encoding_without_blocks_gets_ascii(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stderr", stream)
    with Progress("σ", 2) as bar:
        for _ in range(40):
            bar.advance()
    stream.flush()
    assert b"?  ########" in stream.buffer.getvalue()


def test_resumed_work_tells_its_own_speed() -> None:
    bar = Progress("training", 200, 100)
    bar.done = 150
    assert "50s spent, 50s left" in bar.line(bar._began + 50)


def test_the_words_of_a_duration() -> None:
    assert [clock(s) for s in (12, 185, 7620)] == ["12s", "3m05s", "2h07m"]


def test_importing_the_runtime_does_not_import_the_progress_bar() -> None:
    import subprocess

    code = "import sys, runtime; assert 'runtime.terminal.progress' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
