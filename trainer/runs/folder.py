"""The folder of a run: its config, and the lock against a second process."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from runtime.bundle.conditions import Condition
from runtime.bundle.shipped import shipped_folders
from runtime.errors import nearest
from runtime.files import from_json, is_temporary, lock, replacing, to_json, write_text

from ..config import Config
from ..config.options import FREE
from ..config.text import printable
from ..data.dataset import Dataset
from ..data.labels import listed
from ..errors import CheckpointError


def record_of(
    config: Config, dataset: Dataset, conditions: Sequence[Condition] = ()
) -> dict[str, Any]:
    """Return what config.json holds: the resolved config, and what the network must fit."""
    return {
        **config.to_json(),
        "data_record": dataset.describe().to_json(),
        "sample_shape": list(dataset.sample_shape),
        "classes": list(dataset.classes),
        # Runs without conditions keep the record that they always had.
        **({CONDITIONS: [c.to_json() for c in conditions]} if conditions else {}),
    }


CONDITIONS = "conditions"
EXAMPLES = "examples.npz"
"""Conditions of the data, for the exporter."""
OF_DATA = ("data_record", "sample_shape", "classes")


def read_run(folder: Path) -> tuple[Config, dict[str, Any]]:
    """Return a run's config, and what else its config.json holds.

    A run of an older version lacks some options: they have their defaults.

    Raises:
        CheckpointError: The folder is not a run, or its config.json is damaged.
    """
    path = folder / "config.json"
    try:
        record = from_json(path.read_bytes())
        if not isinstance(record, dict):
            raise ValueError("it is not a JSON object")
        rest = {key: record.pop(key) for key in OF_DATA}
        if CONDITIONS in record:
            rest[CONDITIONS] = record.pop(CONDITIONS)
        _check_rest(rest)
        return Config.from_json(record), rest
    except (FileNotFoundError, NotADirectoryError) as error:
        hint = nearest(folder.name[:60], list(shipped_folders()))
        raise CheckpointError(
            f"{folder} is not a run: it has no config.json.{hint} python -m trainer.fit makes runs."
        ) from error
    except KeyError as error:
        raise CheckpointError(f"{path} is damaged: it has no {error}. {_remedy(folder)}") from error
    except (OSError, ValueError, TypeError) as error:
        raise CheckpointError(f"{path} is damaged ({error}). {_remedy(folder)}") from error


def _remedy(folder: Path) -> str:
    return f"Delete {folder} to start over, or choose another --name."


def _check_rest(rest: Mapping[str, object]) -> None:
    """Raise ValueError unless these are the values that `record_of` writes."""
    data, shape, classes = (rest[key] for key in OF_DATA)
    if not isinstance(data, dict) or not {"name", "pictures", "fingerprint", "note"} <= set(data):
        raise ValueError("its data_record is not that of a data set")
    if (
        not isinstance(shape, list)
        or len(shape) != 3
        or not all(type(n) is int and n > 0 for n in shape)
    ):
        raise ValueError("its sample_shape is not three positive numbers")
    if not isinstance(classes, list) or not all(isinstance(name, str) for name in classes):
        raise ValueError("its classes are not a list of names")


def write_examples(folder: Path, examples: Mapping[str, NDArray[np.generic]]) -> None:
    """Write conditions of the data [m, …] by name, which the exporter compares graphs under."""
    # Kept with the run, because its data may not be on the machine that exports it.
    with replacing(folder / EXAMPLES) as temporary, temporary.open("wb") as file:
        np.savez(file, allow_pickle=False, **examples)


def open_run(
    folder: Path, config: Config, dataset: Dataset, conditions: Sequence[Condition] = ()
) -> None:
    """Write the run's config.json, or check that the one there is the same.

    What a kill left half-written is removed. A run that has no checkpoint yet starts over: it has
    learned nothing that another config could spoil.

    Raises:
        CheckpointError: A run with another config is there, or files that are not a run's.
    """
    record = record_of(config, dataset, conditions)
    path = folder / "config.json"
    if not path.exists():
        _require_empty(folder)
    changed = _changes(folder, record) if path.exists() else []
    if changed and any(any((folder / name).glob("step-*")) for name in KEPT):
        raise CheckpointError(
            f"{folder} holds a run with another config: {'; '.join(changed)}. "
            "Give the same options to resume it, choose another --name, or delete the folder to "
            "start over."
        )
    if changed:
        print(f"{folder} has no checkpoint: starting over with the new config")
        for left in LEFT:
            _remove(folder / left)
    if changed or not path.exists():
        write_text(path, to_json(record))
    for place in (folder, *(place for pattern in WRITTEN for place in folder.glob(pattern))):
        _sweep(place)


def _require_empty(folder: Path) -> None:
    """Raise CheckpointError if the folder holds anything: it is no run, which has a config.json."""
    found = sorted(
        path.name for path in folder.iterdir() if path.name != LOCK and not is_temporary(path)
    )
    if found:
        raise CheckpointError(
            f"{printable(str(folder))} is not a run, and not empty: it holds {listed(found, 3)}. "
            "Choose another --name or --runs."
        )


LOCK = "lock"
WRITTEN = ("samples", "snapshots", "snapshots/*", "best", "trajectories/*")
"""Folders in which a kill may leave a file half-written."""
KEPT = ("checkpoints", "best", "snapshots")
"""The entries of a run that hold its results."""
LEFT = (
    "log.csv",
    "quality.csv",
    "starts.json",
    "bad-pictures.txt",
    "samples",
    "tensorboard",
    "trajectories",
)
"""What a run that learned nothing may have left."""


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


@contextmanager
def claim(folder: Path) -> Iterator[None]:
    """Keep the run for this process, until the block ends or the process does, killed or not.

    A folder that holds nothing at the end is removed, so that a run that failed leaves no trace.

    Raises:
        CheckpointError: Another process has the run, or its folder cannot be made.
    """
    lock_file = folder / LOCK
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = _locked(lock_file)
    except BlockingIOError as error:
        raise CheckpointError(
            f"another process is training in {folder}. Wait for its end, or stop it and give the "
            "same command again; or choose another --name."
        ) from error
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"the run's folder {printable(str(folder))} cannot be used ({error}). Choose another "
            f"--name or --runs."
        ) from error
    try:
        yield
    finally:
        with suppress(OSError):
            lock_file.unlink()  # while it is locked: nobody else can have it
        file.close()
        with suppress(OSError):
            folder.rmdir()  # fails unless it is empty


def _locked(path: Path) -> IO[bytes]:
    """Lock the file at `path`."""
    # The process that had it may remove it between opening and locking. The lock is then on a file
    # that no other process can find, so the one that is there now must be the one that is locked.
    while True:
        file = lock(path)
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file.fileno()), path.stat()):
                return file
        file.close()
        path.parent.mkdir(parents=True, exist_ok=True)


def _changes(folder: Path, record: Mapping[str, Any]) -> list[str]:
    """Return what differs from the run's config, but for options that may change when it
    resumes."""
    config, rest = read_run(folder)
    old = {**config.to_json(), **rest}
    return [
        f"{k} was {old.get(k)!r}, now {record.get(k)!r}"
        for k in dict(old, **record)
        if old.get(k) != record.get(k) and k not in FREE
    ]


def _sweep(place: Path) -> None:
    """Remove what a kill left half-written, and nothing of the user's own."""
    for left in filter(is_temporary, place.glob(".*")):
        _remove(left)
