"""Files that are complete or absent: written to a temporary sibling, flushed, then renamed. And
locks between processes."""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Iterable, Iterator
from math import isinf
from pathlib import Path
from typing import IO, Any, NoReturn

_TEMPORARY = re.compile(r"\..+\.[0-9a-f]{12}(\.old)?", re.DOTALL)
_ESCAPED_HALF = re.compile(r"\\u[dD][89a-fA-F]")


@contextlib.contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """Yield the path of a temporary file, which replaces `path` when the block ends.

    If the block raises, the temporary file is removed and `path` is unchanged.
    """
    path = Path(path)
    temporary = _sibling(path)
    try:
        yield temporary
        # Renaming before the data is on the disk could leave an empty file after a power cut.
        flush(temporary)
        temporary.replace(path)
    except BaseException:  # Ctrl-C too must leave nothing behind
        temporary.unlink(missing_ok=True)
        raise


@contextlib.contextmanager
def replacing_folder(path: str | Path) -> Iterator[Path]:
    """Yield the path of a temporary folder, which replaces `path` when the block ends.

    If the block raises, the temporary folder is removed and `path` is unchanged. A folder cannot
    be replaced in one step: the old one is renamed first and removed last. If the process is killed
    between the two, the old folder remains under a hidden sibling name, never mixed with the new.
    """
    path = Path(path)
    temporary = _sibling(path)
    aside = temporary.with_name(temporary.name + ".old")
    temporary.mkdir()
    try:
        yield temporary
        for file in temporary.rglob("*"):
            if file.is_file():
                flush(file)
        if path.exists():
            path.rename(aside)
        temporary.rename(path)
        # The rename itself is on the disk only when the parent folder is.
        flush(path.parent)
        _remove_folder(aside)
    except BaseException:  # Ctrl-C too must leave the old folder in its place
        if aside.exists() and not path.exists():
            aside.rename(path)
        _remove_folder(temporary)
        raise


def is_temporary(path: Path) -> bool:
    """Whether a path has the hidden name of something that is being written, or was left by a
    kill."""
    return _TEMPORARY.fullmatch(path.name) is not None


def flush(path: Path) -> None:
    """Wait until a file, or the list of a folder's files, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def lock(path: Path, wait: bool = False) -> IO[bytes]:
    """Return a file that this process alone has until it closes it or ends, killed or not.

    File systems without locks, and Windows, let everybody in.

    Raises:
        BlockingIOError: Another process has it, and `wait` is false.
    """
    file = path.open("ab")
    try:
        import fcntl

        # Not flock: a loader's workers inherit such a lock, and may outlive this process with it.
        fcntl.lockf(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except (BlockingIOError, PermissionError) as error:
        file.close()
        raise BlockingIOError(f"another process has {path}") from error
    except (ImportError, OSError):
        pass
    return file


def to_json(value: object) -> str:
    """Return strict JSON: no NaN, no infinity, and numbers that read back bit-exactly."""
    return json.dumps(value, indent=2, allow_nan=False, ensure_ascii=False) + "\n"


def write_text(path: str | Path, text: str) -> None:
    """Write a complete file, or none if writing fails."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def from_json(text: str | bytes) -> Any:
    """Parse strict JSON.

    Raises:
        ValueError: The text is not JSON, holds NaN, an infinity, a number that overflows or half of
            a surrogate pair, or gives a name twice in one object.
    """
    try:
        # json.loads alone lets halves of surrogate pairs through, which no file can hold.
        if isinstance(text, bytes):
            text = text.decode(json.detect_encoding(text))
        else:
            text.encode()
        value = json.loads(
            text, parse_constant=_refuse, parse_float=_finite, object_pairs_hook=_unique
        )
        if _ESCAPED_HALF.search(text):
            json.dumps(value, ensure_ascii=False).encode()
        return value
    except UnicodeEncodeError:
        raise ValueError("a text holds half of a surrogate pair") from None
    except RecursionError:
        raise ValueError("nested too deeply") from None


def copy_others(old: Path, new: Path, own: Iterable[str]) -> None:
    """Copy a user's own files, such as .git, from a folder into the one that is to replace it.

    Args:
        old: It may be missing.
        new: What has a name of one of its entries is not copied.
        own: Further names of entries that are not the user's.
    """
    from shutil import copytree

    if not old.exists():
        return
    left = {*own, *(path.name for path in new.iterdir())}
    copytree(
        old,
        new,
        symlinks=True,
        ignore=lambda at, _: left if Path(at) == old else (),
        dirs_exist_ok=True,
    )


def _remove_folder(path: Path) -> None:
    # Here, because sampling never needs it, and importing it takes time.
    from shutil import rmtree

    if path.is_symlink() or path.is_file():
        path.unlink()
    rmtree(path, ignore_errors=True)


def _sibling(path: Path) -> Path:
    """Return an unused hidden name alongside `path`, and make its parent folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # In the same folder, because a rename across file systems would be a copy. Cut, because a name
    # of 255 bytes has no room for more, and a character may take four.
    return path.with_name(f".{path.name[:40]}.{os.urandom(6).hex()}")


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is not JSON")


def _finite(text: str) -> float:
    value = float(text)
    # Python reads 1e999 as infinity, which other JSON readers do not.
    if isinf(value):
        raise ValueError(f"{text} is too large for a number")
    return value


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    found = dict(pairs)
    # Readers differ on which of the two values holds.
    if len(found) != len(pairs):
        raise ValueError("a name is given twice in one object")
    return found
