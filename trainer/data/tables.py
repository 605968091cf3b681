"""Data sets of the `datasets` library: from the Hub, a folder that it saved, or parquet files.

Rows stay on disk. The library has no types: its tables and columns are `Any` here.
"""

from __future__ import annotations

import importlib
import logging
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from runtime.errors import RequestError, unknown

from ..config import Config
from ..errors import DataError
from .decode import UnreadablePicture
from .image_files import Names, open_images, stamp_of
from .labels import listed, named, numbered
from .stream import Stream
from .survey import SPLIT
from .unreadable import too_many
from .vectors import condition_name, vectors_of

log = logging.getLogger(__name__)

LABELS = ("label", "labels", "cls", "fine_label", "class")
"""Columns that hold the class where --label-column does not say."""
WHOLE = tuple(f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64))
TEXT = ("string", "large_string")
"""Types of columns, as `datasets` names them."""


def stream(place: str, config: Config) -> Stream:
    """Return the rows of a dataset's train split.

    Raises:
        DataError: The dataset cannot be opened, or a column does not hold images or labels.
        RequestError: There is no column of that name.
    """
    table = _opened(place)
    if not len(table):
        raise DataError(f"{place} has no rows.")
    column = _image_column(place, table, config.image_column)
    rows = _undecoded(table.select_columns([column]), column)
    classes = ("all",)
    labels = np.zeros(len(table), np.int64)
    if config.labels:
        classes, labels = _labels(place, table, config.label_column)

    def fetch(i: int) -> bytes | Path:
        try:
            value = rows[i][column]
        except Exception as error:  # pyarrow raises a dozen kinds for damaged files
            # Not one unreadable image: the table itself is damaged.
            raise DataError(
                f"{place} row {i} cannot be read ({type(error).__name__}: {error})."
            ) from error
        if value is None or (value["bytes"] is None and value["path"] is None):
            raise UnreadablePicture("the row has no image")
        return value["bytes"] if value["bytes"] is not None else Path(value["path"])

    sizes = _sizes(place, rows, column)
    _report_missing(place, column, sizes)
    names = Names(f"{place} row {i}" for i in range(len(table)))
    images = open_images(config, place, names, fetch)
    # The fingerprint of `datasets` names a version only for data from the Hub.
    stamped: tuple[list[str], list[int]] = ([""] * len(sizes), sizes)
    if _hub(place):
        stamped = ([table._fingerprint], [len(table)])
    return Stream(
        name=config.name,
        images=images,
        labels=labels,
        classes=classes,
        stamp=stamp_of(*stamped, labels, images.decoding, config.crop),
        licence=str(table.info.license or "not stated"),
        note=f"{len(table)} rows of {Path(place).name}",
        given=_vectors(place, table, config.condition_column),
    )


def _vectors(place: str, table: Any, column: str) -> dict[str, Any]:
    """Return the vectors of a column by its name; {} if none is asked for."""
    if not column:
        return {}
    if column not in table.features:
        raise unknown("condition column", column, table.features)
    values = _values(place, table, column)
    return {condition_name(column): vectors_of(values, f"{place}, column {column!r}")}


def _values(place: str, table: Any, column: str) -> list[Any]:
    """Return a column's values. Raises DataError if they cannot be read."""
    try:
        return list(table.select_columns([column])[:][column])
    except Exception as error:  # pyarrow raises a dozen kinds for damaged files
        raise DataError(
            f"{place}: the column {column!r} cannot be read ({type(error).__name__}: {error})."
        ) from error


def _sizes(place: str, rows: Any, column: str) -> list[int]:
    """Return how many bytes each row's image takes, -1 where a row has none.

    Raises:
        DataError: The table cannot be read.
    """
    found: list[int] = []
    try:
        # In blocks: a whole column of images may be larger than the memory.
        for start in range(0, len(rows), 1000):
            chunked = rows.with_format("arrow")[start : start + 1000][column]
            for chunk in chunked.chunks:  # the images themselves are not touched
                found += _sizes_of(chunk)
    except Exception as error:
        raise DataError(f"{place} cannot be read ({type(error).__name__}: {error}).") from error
    return found


def _sizes_of(chunk: Any) -> list[int]:
    compute: Any = importlib.import_module("pyarrow.compute")  # its functions are made at run time
    lengths, paths = (compute.struct_field(chunk, name) for name in ("bytes", "path"))
    # A column without any bytes has the type null, which has no lengths.
    known = (
        [None] * len(chunk)
        if lengths.null_count == len(chunk)
        else compute.binary_length(lengths).to_pylist()
    )
    found = []
    for size, path in zip(known, paths.to_pylist(), strict=True):
        if size is None and path is not None:
            size = Path(path).stat().st_size if Path(path).is_file() else 0
        found.append(-1 if size is None else size)
    return found


def _report_missing(place: str, column: str, sizes: Sequence[int]) -> None:
    """Count the rows without an image before training begins.

    Raises:
        DataError: There are more of them than a run may leave out.
    """
    names = [f"row {i}" for i, size in enumerate(sizes) if size < 0]
    if not names:
        return
    if len(names) == len(sizes) or too_many(len(names), len(sizes)):
        raise DataError(
            f"{place}: {len(names)} of {len(sizes)} rows have no image in the column {column!r}: "
            f"{listed(names)}. Remove these rows."
        )
    log.warning("%s: left out %d rows without an image: %s", place, len(names), listed(names))


def _hub(place: str) -> bool:
    """Return whether `datasets` would look for this on the Hub."""
    return not Path(place).exists()


def _opened(place: str) -> Any:
    try:
        import datasets
    except ImportError as error:
        raise RequestError("--data hf: needs datasets: pip install 'unnoise[data]'.") from error
    path = Path(place)
    try:
        if path.is_dir() and (path / "dataset_info.json").exists():
            # A format that was saved with it would turn labels into tensors, and hide columns.
            return datasets.load_from_disk(place).with_format(None)
        if path.is_file() or (path.is_dir() and any(path.glob("*.parquet"))):
            files = [str(path)] if path.is_file() else _train_files(path)
            return datasets.load_dataset("parquet", data_files=files, split="train")
        return datasets.load_dataset(place, split="train")
    except Exception as error:
        raise DataError(
            f"{place} cannot be opened as a dataset ({type(error).__name__}: {str(error)[:200]}). "
            "It is a name on the Hub, a folder of save_to_disk, a parquet file, or a folder of "
            "them."
        ) from error


def _train_files(folder: Path) -> list[str]:
    """Return the parquet files of the train split: all of them, if their names tell no splits.

    Raises:
        DataError: Their names tell splits, none of which is for training.
    """
    # The Hub writes "train-00000-of-00001.parquet".
    splits: dict[str, list[str]] = {}
    for path in sorted(folder.glob("*.parquet")):
        splits.setdefault(re.split(r"[-_.]", path.name)[0].lower(), []).append(str(path))
    if not any(SPLIT.fullmatch(split) for split in splits):
        return sorted(name for names in splits.values() for name in names)
    found = splits.get("train", []) + splits.get("training", [])
    if not found:
        raise DataError(
            f"{folder} has no parquet files of a train split, only {listed(list(splits))}. "
            "Name the one file to train on: --data hf:FILE."
        )
    if len(splits) > 1:
        others = listed([split for split in splits if not split.startswith("train")])
        log.warning("%s: training on the train split, without %s", folder, others)
    return found


def _image_column(place: str, table: Any, wanted: str) -> str:
    import datasets

    if wanted and wanted not in table.features:
        raise unknown("image column", wanted, table.features)
    images = [name for name, kind in table.features.items() if isinstance(kind, datasets.Image)]
    # Parquet files that another program wrote have the bytes, but not the library's type.
    images += [name for name, kind in table.features.items() if _is_file(kind)]
    if not images:
        raise DataError(
            f"{place} has no column of images, only {', '.join(map(repr, table.features))}. "
            "Images are stored as the feature datasets.Image, or as {bytes, path}."
        )
    if wanted and wanted not in images:
        raise DataError(
            f"{place}: the column {wanted!r} holds {table.features[wanted]}, not images. "
            f"Columns with images: {', '.join(map(repr, images))}."
        )
    return wanted or images[0]


def _is_file(kind: Any) -> bool:
    """Return whether a column's type is {bytes, path}."""
    if not isinstance(kind, dict) or not {"bytes", "path"} <= set(kind):
        return False
    dtypes = [getattr(kind[name], "dtype", "") for name in ("bytes", "path")]
    return dtypes[0] in ("binary", "large_binary", "null") and dtypes[1] in (*TEXT, "null")


def _undecoded(table: Any, column: str) -> Any:
    """Return the table with each image as {"bytes", "path"}.

    `Decoding` decodes them, as it does those of folders.
    """
    import datasets

    if isinstance(table.features[column], datasets.Image):
        return table.cast_column(column, datasets.Image(decode=False))
    return table


def _labels(place: str, table: Any, wanted: str) -> tuple[tuple[str, ...], np.ndarray]:
    import datasets

    if wanted and wanted not in table.features:
        raise unknown("label column", wanted, table.features)
    column = wanted or next((name for name in LABELS if name in table.features), "")
    if not column:
        return ("all",), np.zeros(len(table), np.int64)
    kind = table.features[column]
    if getattr(kind, "dtype", "") not in (*WHOLE, *TEXT, "bool", "null"):
        raise DataError(
            f"{place}: labels must be text or whole numbers, and the column {column!r} holds "
            f"{kind}. Name another one with --label-column, or use --no-labels."
        )
    values = _values(place, table, column)
    # A ClassLabel stores -1 for a row without a label.
    has_names = isinstance(kind, datasets.ClassLabel) and kind.names
    if without := [i for i, v in enumerate(values) if v is None or bool(has_names and v < 0)]:
        raise DataError(
            f"{place}: {len(without)} of {len(values)} rows have no label in the column "
            f"{column!r}: {listed([f'row {i}' for i in without])}. "
            "Leave these rows out, or use --no-labels."
        )
    if not has_names:
        return numbered(named(values, lambda i: f"{place} row {i}, column {column!r}"))
    if beyond := [i for i, v in enumerate(values) if v >= len(kind.names)]:
        raise DataError(
            f"{place} row {beyond[0]}: the label {values[beyond[0]]} in the column {column!r} is "
            f"beyond its {len(kind.names)} class names."
        )
    names = named(kind.names, lambda i: f"{place}, class name {i} of the column {column!r}")
    return tuple(names), np.array(values, np.int64)
