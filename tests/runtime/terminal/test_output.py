"""Output works with every encoding, missing streams, full disks and readers that exit early."""

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from runtime import info
from runtime.errors import RequestError
from runtime.terminal import output
from runtime.terminal.verbs import status

from ...root import ROOT

ENCODINGS = ["ascii", "cp1252", "latin-1", "utf-16", "utf-8"]
TEXT = "σ × … – → ± é 写 🙂 \udcff"
full = pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")


def run(*arguments: str, shell: str = "", **environment: str) -> subprocess.CompletedProcess[bytes]:
    """Run Python with the arguments; `shell` is appended to the command line."""
    command = [sys.executable, *arguments]
    given = {k: v for k, v in os.environ.items() if k not in ("PYTHONUTF8", "PYTHONUNBUFFERED")}
    given |= environment
    if shell:
        command = ["bash", "-c", f'"$@" {shell}', "bash", *command]
    return subprocess.run(command, cwd=ROOT, env=given, capture_output=True, check=False)


@pytest.mark.parametrize("encoding", ["ascii", "cp1252"])
@pytest.mark.parametrize(
    "arguments", [["bundles/emoji32"], ["bundles/emoji32", "--json"], ["--help"], ["σ🙂"]]
)
def test_a_command_prints_in_every_encoding(arguments: list[str], encoding: str) -> None:
    done = run("-m", "runtime.info", *arguments, PYTHONIOENCODING=encoding)
    assert done.returncode == (2 if arguments == ["σ🙂"] else 0)
    assert b"Traceback" not in done.stderr
    text = done.stdout.decode(encoding)
    if "--json" in arguments:
        assert json.loads(text)["bundle"]["name"] == "emoji32"
    if arguments == ["bundles/emoji32"]:
        assert ("3x32x32" if encoding == "ascii" else "3×32×32") in text


def test_the_c_locale_without_the_utf_8_mode(tmp_path: Path) -> None:
    settings = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    for arguments in (["bundles/emoji32"], ["--help"], [str(tmp_path / "σ")]):
        done = run("-m", "runtime.info", *arguments, **settings)
        assert b"Traceback" not in done.stderr
        assert done.stdout or b"is not a folder" in done.stderr


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_status_and_say_spell_out_what_an_encoding_lacks(
    encoding: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for prints in (lambda: print(TEXT), lambda: output.say(TEXT)):
        stream = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
        monkeypatch.setattr(sys, "stdout", stream)
        assert status(lambda prints=prints: prints() or 0) == 0
        written = stream.buffer.getvalue().decode(encoding)
        if encoding == "ascii":
            assert written.strip() == r"sigma x ... - -> +/- \u00e9 \u5199 \ud83d\ude42 \udcff"
        else:
            assert r"\udcff" in written


def test_a_library_call_prints_without_being_a_command(monkeypatch: pytest.MonkeyPatch) -> None:
    """`say` alone, as functions of export and trainer use it, does not change the application's
    streams."""
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", stream)
    output.say("σ", TEXT, end="", flush=True)
    assert stream.buffer.getvalue().startswith(b"sigma sigma x ...")
    assert stream.errors == "strict"


def test_json_stays_json(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", stream)
    output.say(json.dumps({"label": "é写🙂"}, ensure_ascii=False), flush=True)
    assert json.loads(stream.buffer.getvalue()) == {"label": "é写🙂"}


def closed_stream() -> io.TextIOWrapper:
    stream = io.TextIOWrapper(io.BytesIO(), encoding="utf-8")
    stream.close()
    return stream


@pytest.mark.parametrize("stream", [lambda: None, io.StringIO, closed_stream])
@pytest.mark.parametrize("name", ["stdout", "stderr"])
def test_streams_that_are_missing_closed_or_replaced(
    name: str, stream, monkeypatch: pytest.MonkeyPatch
) -> None:
    replaced = stream()
    monkeypatch.setattr(sys, name, replaced)

    def fails() -> int:
        raise RequestError(TEXT)

    assert status(lambda: output.say(TEXT) or 0) == 0
    assert status(fails) == 2
    assert status(lambda: info.main(["nowhere"])) == 2
    with pytest.raises(SystemExit) as ending:
        info.main(["--help"])
    assert ending.value.code == 0
    if isinstance(replaced, io.StringIO):
        assert "σ" in replaced.getvalue()


def test_errors_do_not_go_to_standard_output_if_standard_error_is_missing() -> None:
    done = run("-m", "runtime.info", "nowhere", shell="2>&-")
    assert (done.returncode, done.stdout) == (2, b"")


@pytest.mark.parametrize("shell", [">&-", "<&- >&- 2>&-"])
@pytest.mark.parametrize("arguments", [["bundles/emoji32"], ["--help"]])
def test_closed_descriptors(shell: str, arguments: list[str]) -> None:
    done = run("-m", "runtime.info", *arguments, shell=shell)
    assert done.returncode == 0
    assert b"Traceback" not in done.stderr


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("arguments", [["bundles/emoji32"], ["--help"]])
def test_a_reader_that_left_ends_the_command_quietly(arguments: list[str], unbuffered: str) -> None:
    """The reader exits before anything is written."""
    code = (
        "import os, sys\n"
        "reader, writer = os.pipe()\n"
        "os.close(reader)\n"
        "os.dup2(writer, 1)\n"
        "from runtime.info import main\n"
        f"sys.exit(main({arguments!r}))"
    )
    done = run("-c", code, PYTHONUNBUFFERED=unbuffered)
    assert done.stderr == b""
    # argparse itself ignores output that it cannot write; buffered output fails when it is flushed.
    assert done.returncode == (0 if unbuffered and arguments == ["--help"] else output.BROKEN_PIPE)


@full
def test_a_full_disk_is_one_line() -> None:
    done = run("-m", "runtime.info", shell="> /dev/full")
    assert done.returncode == 2
    assert done.stderr.startswith(b"error: [Errno 28]")
    assert done.stderr.count(b"\n") == 1
    assert run("-m", "runtime.info", "--help", shell="> /dev/full").stderr == b""
    assert run("-m", "runtime.info", shell="> /dev/full 2> /dev/full").returncode == 2


def test_ctrl_c_is_130(capsys: pytest.CaptureFixture) -> None:
    def interrupted() -> int:
        raise KeyboardInterrupt

    assert status(interrupted) == 130
    assert capsys.readouterr().err == "interrupted\n"


def test_a_name_cannot_command_the_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stdout", stream)
    output.say("a\x1b]0;title\x07\x9b2J\rb\tc\r\nσ")
    assert stream.getvalue() == "a\\u001b]0;title\\u0007\\u009b2J\\u000db\tc\r\nσ\n"
