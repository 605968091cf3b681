"""Files and folders that are written under a hidden name, and what a killed process left of them.

The hidden name holds the machine and the process. Several processes may therefore write the same
shard, and a later one knows which drafts nobody will finish.
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import shutil
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from ..files import flush

ABANDONED_S = 24 * 3600
"""A draft of another machine that was not written to for so long is abandoned."""
_NAME = re.compile(r"\..+\.(?P<host>[\w-]+)~(?P<process>\d+-\d+)~[0-9a-f]{12}")


@contextlib.contextmanager
def draft(path: Path) -> Iterator[Path]:
    """Yield a hidden name alongside `path`, for a file or a folder. It is removed at the end."""
    path.parent.mkdir(parents=True, exist_ok=True)
    process = os.getpid()
    # A later process may have the number of one that was killed, but not its start.
    name = f"{_host()}~{process}-{_start_of(process)}~{secrets.token_hex(6)}"
    temporary = path.with_name(f".{path.name}.{name}")
    try:
        yield temporary
    finally:
        remove(temporary)


def publish(temporary: Path, path: Path, is_same: Callable[[Path], bool]) -> None:
    """Rename a finished draft to `path`, and replace what is there.

    Args:
        is_same: Whether a folder has the content of the draft. Such a folder stays.
    """
    if temporary.is_dir():
        _publish_folder(temporary, path, is_same)
    else:
        temporary.replace(path)
    flush(path.parent)


def _publish_folder(temporary: Path, path: Path, is_same: Callable[[Path], bool]) -> None:
    # A folder cannot replace another in one step, so an equal one of another worker stays.
    if path.exists():
        if _is_same(path, is_same):
            return
        with draft(path) as aside, contextlib.suppress(FileNotFoundError):
            path.rename(aside)
    try:
        temporary.rename(path)
    except OSError:
        # Another worker was faster by a moment.
        if not _is_same(path, is_same):
            raise


def _is_same(path: Path, is_same: Callable[[Path], bool]) -> bool:
    try:
        return is_same(path)
    except FileNotFoundError:  # another worker replaces it at this moment
        return False


def flush_all(path: Path) -> None:
    """Wait until a file, or a folder and its files, are on the disk."""
    if path.is_dir():
        for file in sorted(path.iterdir()):
            flush(file)
    flush(path)


def remove(path: Path) -> None:
    """Remove a file or a folder, if it exists."""
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a complete file, or replace it."""
    with draft(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
        flush(temporary)
        temporary.replace(path)
    flush(path.parent)


def is_draft(path: Path) -> bool:
    """Whether a file or folder has the name of a draft."""
    return _NAME.fullmatch(path.name) is not None


def clean(folder: Path) -> None:
    """Remove the drafts that nobody will finish."""
    for path in [*folder.glob(".*")]:
        found = _NAME.fullmatch(path.name)
        if found and _abandoned(path, found["host"], found["process"]):
            remove(path)


def _abandoned(path: Path, host: str, process: str) -> bool:
    number, start = map(int, process.split("-"))
    if host == _host():
        return _start_of(number) != start
    # Whether the process runs is unknown, and the clocks of machines differ by little.
    with contextlib.suppress(FileNotFoundError):
        return time.time() - path.stat().st_mtime > ABANDONED_S
    return False


def _start_of(process: int) -> int | None:
    """Return when a process started, None if there is none; 0 if the system does not say."""
    stat = Path(f"/proc/{process}/stat")
    try:
        # The name, in parentheses, may hold blanks. The start is field 22, the name field 2.
        return int(stat.read_text(errors="replace").rpartition(")")[2].split()[19])
    except (OSError, ValueError, IndexError):
        return None if Path("/proc/self/stat").exists() else 0


def _host() -> str:
    return re.sub(r"[^\w-]", "-", socket.gethostname()) or "host"
