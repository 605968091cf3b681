"""The folder of a run: what it is, who wrote it when, and that nobody goes on with another config in it."""

from __future__ import annotations

import datetime
import importlib.metadata
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

from runtime.files import from_json, to_json, write_text

from .config import FREE, Config
from .data import Source
from .errors import CheckpointError
from .processes import lock

VERSIONED = ("torch", "numpy", "pillow", "safetensors", "accelerate", "datasets", "webdataset")


def commit() -> str | None:
    """The git commit of this checkout, with "+" where it has changes; None outside one."""
    here = Path(__file__).parent

    def git(*words: str) -> str:
        return subprocess.run(["git", *words], cwd=here, capture_output=True, text=True, check=True).stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("+" if git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def versions() -> dict[str, str]:
    """Of the libraries that training uses, where they are installed."""
    found = {}
    for name in VERSIONED:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def record_of(config: Config, source: Source) -> dict[str, Any]:
    """What config.json holds: the resolved config, and what the network must fit."""
    return {
        **config.to_json(),
        "data_record": source.describe(),
        "sample_shape": list(source.sample_shape),
        "classes": list(source.classes),
    }


OF_DATA = ("data_record", "sample_shape", "classes")


def read_run(folder: Path) -> tuple[Config, dict[str, Any]]:
    """The config of a run, and what else its config.json says. Raises CheckpointError where it is not readable.

    A run of an older version has not the options of this one: they are as their defaults.
    """
    path = folder / "config.json"
    try:
        record = dict(from_json(path.read_bytes()))
        rest = {key: record.pop(key) for key in OF_DATA}
    except FileNotFoundError as error:
        raise CheckpointError(
            f"{folder} is no run: it has no config.json. python -m trainer.fit makes runs."
        ) from error
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise CheckpointError(
            f"{path} is not readable ({error}). Delete {folder} to start over, or choose another --name."
        ) from error
    return Config.from_json(record), rest


def open_run(folder: Path, config: Config, source: Source) -> None:
    """Write the run's config.json, or check that the one there is the same. Raises CheckpointError where it is not.

    What a kill left half-written is removed.
    """
    record = record_of(config, source)
    if (folder / "config.json").exists():
        _require_same(folder, record)
        for place in (folder, *(folder / name for name in ("samples", "snapshots", "best"))):
            _sweep(place)
        return
    write_text(folder / "config.json", to_json(record))


def claim(folder: Path) -> IO[bytes]:
    """Keep the run for this process, until the file that is returned is closed or the process ends, killed or not.

    Raises CheckpointError where another process has it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    try:
        return lock(folder / "lock")
    except BlockingIOError as error:
        raise CheckpointError(
            f"another process is training in {folder}. Wait for its end, or stop it and give the same command again; or choose another --name."
        ) from error


def _require_same(folder: Path, record: Mapping[str, Any]) -> None:
    config, rest = read_run(folder)
    old = {**config.to_json(), **rest}
    changed = [
        f"{k} was {old.get(k)!r}, now {record.get(k)!r}"
        for k in dict(old, **record)
        if old.get(k) != record.get(k) and k not in FREE
    ]
    if changed:
        raise CheckpointError(
            f"{folder} holds a run with another config: {'; '.join(changed)}. "
            "Give the same options to go on with it, choose another --name, or delete the folder to start over."
        )


def _sweep(place: Path) -> None:
    for left in place.glob(".*"):
        if left.is_dir():
            shutil.rmtree(left)
        else:
            left.unlink()


def note_start(folder: Path, step: int, environment: Mapping[str, Any], cost: Mapping[str, Any]) -> None:
    """Add a line to starts.json: when, from which step, with which versions and commit, on what machine."""
    path = folder / "starts.json"
    try:
        before = list(from_json(path.read_bytes())) if path.exists() else []
    except (ValueError, TypeError):
        before = []
    now = {
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "step": step,
        "commit": commit(),
        "versions": versions(),
        "environment": dict(environment),
        **cost,
    }
    write_text(path, to_json([*before, now]))
