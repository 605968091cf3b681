"""When and where a run was started: its starts.json, for reports."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from runtime.files import from_json, to_json, write_text

from ..errors import CheckpointError
from .checkpoint import Environment
from .log import move_aside

VERSIONED = ("torch", "numpy", "pillow", "safetensors", "accelerate", "datasets", "webdataset")


def commit() -> str | None:
    """Return the git commit of this checkout, with "+" if it has changes; None outside one."""
    here = Path(__file__).parent

    def git(*words: str) -> str:
        return subprocess.run(
            ["git", *words], cwd=here, capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        # Another repository may hold this folder, such as one with a virtual environment in it.
        git("ls-files", "--error-unmatch", Path(__file__).name)
        return git("rev-parse", "HEAD") + (
            "+" if git("status", "--porcelain", "--untracked-files=no") else ""
        )
    except (OSError, subprocess.CalledProcessError):
        return None


def versions() -> dict[str, str]:
    """Return the versions of the libraries that training uses, if they are installed."""
    found = {}
    for name in VERSIONED:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def read_starts(folder: Path) -> list[dict[str, Any]]:
    """Return when and where the run was started, none if nothing says so.

    Raises:
        CheckpointError: starts.json is damaged.
    """
    path = folder / "starts.json"
    if not os.path.lexists(path):
        return []
    try:
        starts = from_json(path.read_bytes())
        if not isinstance(starts, list):
            raise ValueError("it is not a list")
        for start in starts:
            if not isinstance(start, dict) or not {"time", "step"} <= set(start):
                raise ValueError("an entry has no time and step")
            if not all(isinstance(start.get(key, {}), dict) for key in ("versions", "environment")):
                raise ValueError("an entry's versions or environment are not by name")
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} is not a list of starts ({error}).") from error
    return starts


def note_start(
    folder: Path, step: int, environment: Environment, cost: Mapping[str, str | int | float]
) -> None:
    """Add a line to starts.json: when, from which step, with which versions and commit, on what
    machine.

    A damaged file is moved aside: a log must not keep a run from resuming.
    """
    path = folder / "starts.json"
    try:
        before = read_starts(folder)
    except CheckpointError as error:
        before = []
        move_aside(path, str(error))
    now = {
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "step": step,
        "commit": commit(),
        "versions": versions(),
        "environment": dict(environment),
        **cost,
    }
    write_text(path, to_json([*before, now]))
