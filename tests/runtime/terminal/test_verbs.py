"""The command unnoise, and what each package lists."""

import importlib
import subprocess
import sys
from pathlib import Path

import pytest

from runtime.terminal import verbs


def test_every_verb_is_a_main_of_its_module() -> None:
    for verb in verbs.VERBS.values():
        assert callable(importlib.import_module(verb.module).main)


def test_help_lists_every_verb(capsys: pytest.CaptureFixture) -> None:
    assert verbs.main(["--help"]) == 0
    listed = capsys.readouterr().out
    for name, verb in verbs.VERBS.items():
        assert f"  {name} " in listed
        assert verb.help in listed


def test_without_a_verb_they_are_listed_and_the_status_says_so(
    capsys: pytest.CaptureFixture,
) -> None:
    assert verbs.main([]) == verbs.USAGE
    assert "unnoise VERB" in capsys.readouterr().out


def test_a_misspelled_verb_gets_the_nearest(capsys: pytest.CaptureFixture) -> None:
    assert verbs.main(["smaple", "x"]) == verbs.USAGE
    assert "Did you mean 'sample'?" in capsys.readouterr().err


def test_a_verb_gets_the_rest_of_the_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(sys, "argv", ["/usr/bin/unnoise", "info"])
    with pytest.raises(SystemExit) as ending:
        verbs.main(["info", "--help"])
    assert ending.value.code == 0
    assert "usage: unnoise info" in capsys.readouterr().out


def test_what_a_verb_needs_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    def missing(name: str) -> None:
        raise ModuleNotFoundError("No module named 'torch'", name="torch")

    monkeypatch.setattr(importlib, "import_module", missing)
    assert verbs.main(["fit"]) == verbs.USAGE
    assert "pip install 'unnoise[train]'" in capsys.readouterr().err


@pytest.mark.parametrize("package", ["runtime", "trainer", "export"])
def test_a_package_lists_its_verbs(package: str, root: Path) -> None:
    command = [sys.executable, "-m", package, "--help"]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True)
    own = [verb for verb in verbs.VERBS.values() if verb.spelled.startswith(package)]
    assert own
    for verb in own:
        assert f"python -m {verb.spelled} " in done.stdout
    assert done.stdout.count("python -m ") == len(own) + 1


def test_a_reader_that_leaves_ends_the_command_quietly(root: Path) -> None:
    line = f"{sys.executable} -c 'from runtime.terminal.verbs import main; main()' sample bundles/emoji32"
    done = subprocess.run(
        ["bash", "-c", f"{line} --labels | head -1"], cwd=root, capture_output=True, text=True
    )
    assert done.stdout == "  0  noto/smileys-emotion\n"
    assert done.stderr == ""
