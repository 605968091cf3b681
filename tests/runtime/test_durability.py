"""A power cut leaves no name that leads to data which was never written to the disk."""

import os
from pathlib import Path

import pytest

from runtime.files import replacing, replacing_folder

MOVED = -1
"""Stands for a rename among the inodes that were flushed."""


@pytest.fixture
def order(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """What was flushed and renamed, in order."""
    found: list[int] = []
    fsync = os.fsync

    def flush(file: int) -> None:
        found.append(os.fstat(file).st_ino)
        fsync(file)

    monkeypatch.setattr(os, "fsync", flush)
    for name in ("rename", "replace"):
        move = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *to, move=move: found.append(MOVED) or move(*to))
    return found


def test_a_file_is_on_the_disk_before_it_has_its_name(tmp_path: Path, order: list[int]) -> None:
    with replacing(tmp_path / "a.txt") as temporary:
        temporary.write_text("new")
    assert order[:2] == [(tmp_path / "a.txt").stat().st_ino, MOVED]


def test_a_folder_is_on_the_disk_before_it_has_its_name(tmp_path: Path, order: list[int]) -> None:
    path = tmp_path / "bundle"
    with replacing_folder(path) as temporary:
        for name in ("fp32/step.onnx", "bundle.json"):
            (temporary / name).parent.mkdir(exist_ok=True)
            (temporary / name).write_bytes(name.encode())
    before = order[: order.index(MOVED)]
    after = order[order.index(MOVED) :]
    assert {file.stat().st_ino for file in path.rglob("*") if file.is_file()} <= {*before}
    # The new name is a change of the folder that holds it.
    assert tmp_path.stat().st_ino in after
