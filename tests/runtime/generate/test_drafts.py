"""Drafts: nobody sees half a file, and those of killed processes are removed."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from runtime.generate import drafts
from runtime.generate.drafts import clean, draft, is_draft, publish


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_a_draft_is_hidden_and_removed(tmp_path: Path) -> None:
    with draft(tmp_path / "a" / "x.tar") as temporary:
        temporary.write_bytes(b"1")
        assert temporary.name.startswith(".x.tar.")
        assert is_draft(temporary)
    assert names(tmp_path / "a") == set()
    with draft(tmp_path / "folder") as temporary:
        temporary.mkdir()
        (temporary / "x").write_bytes(b"1")
    assert names(tmp_path) == {"a"}


def test_a_published_folder_replaces_another_but_not_its_equal(tmp_path: Path) -> None:
    path = tmp_path / "shard"
    for content, is_same in ((b"old", False), (b"new", False), (b"other", True)):
        with draft(path) as temporary:
            temporary.mkdir()
            (temporary / "x").write_bytes(content)
            publish(temporary, path, lambda _, answer=is_same: answer)
    assert (path / "x").read_bytes() == b"new"
    assert names(tmp_path) == {"shard"}


def test_the_drafts_of_this_process_and_of_running_ones_stay(tmp_path: Path) -> None:
    with draft(tmp_path / "x") as own:
        own.touch()
        clean(tmp_path)
        assert own.exists()


def test_the_drafts_of_dead_processes_go(tmp_path: Path) -> None:
    code = (
        "import os, sys; from pathlib import Path; from runtime.generate.drafts import draft\n"
        "with draft(Path(sys.argv[1])) as path: path.touch(); os._exit(0)"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "x")], check=True)
    (tmp_path / ".hidden").touch()
    assert len(names(tmp_path)) == 2
    clean(tmp_path)
    assert names(tmp_path) == {".hidden"}


def test_a_later_process_of_the_same_number_is_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with draft(tmp_path / "x") as own:
        own.touch()
        monkeypatch.setattr(drafts, "_start_of", lambda _: 1)
        clean(tmp_path)
        assert not own.exists()


def test_the_drafts_of_another_machine_go_after_a_day(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with draft(tmp_path / "x") as own:
        own.touch()
        monkeypatch.setattr(drafts, "_host", lambda: "elsewhere")
        clean(tmp_path)
        assert own.exists()
        os.utime(own, (0, 0))
        clean(tmp_path)
        assert not own.exists()


def test_a_folder_that_vanishes_while_it_is_compared_is_replaced(tmp_path: Path) -> None:
    """Another worker renames it at that moment."""
    path = tmp_path / "shard"
    path.mkdir()

    def vanish(folder: Path) -> bool:
        folder.rmdir()
        raise FileNotFoundError

    with draft(path) as temporary:
        temporary.mkdir()
        (temporary / "x").write_bytes(b"new")
        publish(temporary, path, vanish)
    assert (path / "x").read_bytes() == b"new"
    assert names(tmp_path) == {"shard"}
