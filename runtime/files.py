"""Files that are whole or not there: written to a sibling temporary name, flushed to the disk,
renamed."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sibling(path: Path) -> Path:
    """A hidden name beside `path` that nobody else uses, its parent folder made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    return path.with_name(f".{path.name}.{secrets.token_hex(6)}")


@contextlib.contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """A temporary file's path; the file takes the place of `path` when the block ends well, and is
    removed when it does not."""
    path = Path(path)
    temporary = _sibling(path)
    try:
        yield temporary
        _flush(temporary)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


@contextlib.contextmanager
def replacing_folder(path: str | Path) -> Iterator[Path]:
    """A temporary folder; it takes the place of the folder `path` when the block ends well, and is
    removed when it does not.

    A folder cannot be replaced in one step: an old one is moved aside first and removed last, so a
    kill between the two leaves the old one under a hidden sibling name, and never a mixture.
    """
    path = Path(path)
    temporary = _sibling(path)
    aside = temporary.with_name(temporary.name + ".old")
    temporary.mkdir()
    try:
        yield temporary
        for file in temporary.rglob("*"):
            if file.is_file():
                _flush(file)
        if path.exists():
            path.rename(aside)
        temporary.rename(path)
        _flush(path.parent)
        shutil.rmtree(aside, ignore_errors=True)
    except BaseException:
        if aside.exists() and not path.exists():
            aside.rename(path)
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def to_json(value: Any) -> str:
    """Strict JSON: no NaN, no infinity, numbers that read back to the bit."""
    return json.dumps(value, indent=2, allow_nan=False, ensure_ascii=False) + "\n"


def write_text(path: str | Path, text: str) -> None:
    """Write `path` whole or not at all."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def from_json(text: str | bytes) -> Any:
    """Parse strict JSON. Raises ValueError for NaN, infinities, numbers that overflow, a name given
    twice, and text that is no JSON."""

    def refuse(constant: str) -> Any:
        raise ValueError(f"{constant} is not JSON")

    def real(text: str) -> float:
        value = float(text)
        if value in (float("inf"), float("-inf")):
            raise ValueError(f"{text} is too large for a number")
        return value

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            raise ValueError("a name is given twice in one object")
        return found

    try:
        return json.loads(text, parse_constant=refuse, parse_float=real, object_pairs_hook=once)
    except RecursionError:
        raise ValueError("nested too deeply") from None
