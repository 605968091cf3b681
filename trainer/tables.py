"""Datasets of the `datasets` library: from the Hub, from a folder that it saved, or from parquet files. Rows stay on disk."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from runtime.errors import RequestError, unknown

from .config import Config
from .decode import Decoding, UnreadablePicture
from .errors import DataError
from .folder import numbered
from .streams import Names, Stream, probe, streamed

LABELS = ("label", "labels", "cls", "fine_label", "class")
"""Columns that hold the class where --label-column does not say."""


def stream(place: str, config: Config) -> Stream:
    """The rows of a dataset's train split. Raises DataError where it holds no pictures, RequestError for a column that is not there."""
    table = _opened(place)
    column = _image_column(table, config.image_column)
    classes, labels = (
        _labels(table, config.label_column) if config.labels else (("all",), np.zeros(len(table), np.int64))
    )
    rows = _undecoded(table.select_columns([column]), column)

    def fetch(i: int) -> bytes | Path:
        value = rows[i][column]
        if value is None:
            raise UnreadablePicture("the row has no picture")
        return value["bytes"] if value["bytes"] is not None else Path(value["path"])

    names = Names(f"{place} row {i}" for i in range(len(table)))
    decoding = Decoding(config.size, config.mode)
    return streamed(
        config,
        decoding,
        probe(place, names, fetch, decoding),
        ([table._fingerprint if _hub(place) else ""], [len(table)]),
        name=config.name,
        names=names,
        fetch=fetch,
        labels=labels,
        classes=classes,
        licence=str(table.info.license or "not stated"),
        note=f"{len(table)} rows of {Path(place).name}",
    )


def _hub(place: str) -> bool:
    return not Path(place).exists()


def _opened(place: str) -> Any:
    try:
        import datasets
    except ImportError as error:
        raise RequestError("--data hf: needs datasets: pip install 'unnoise[data]'.") from error
    path = Path(place)
    try:
        if path.is_dir() and (path / "dataset_info.json").exists():
            return datasets.load_from_disk(place)
        if path.is_file() or (path.is_dir() and any(path.glob("*.parquet"))):
            files = [str(path)] if path.is_file() else sorted(map(str, path.glob("*.parquet")))
            return datasets.load_dataset("parquet", data_files=files, split="train")
        return datasets.load_dataset(place, split="train")
    except Exception as error:
        raise DataError(
            f"{place} cannot be opened as a dataset ({type(error).__name__}: {str(error)[:200]}). "
            "It is a name on the Hub, a folder of save_to_disk, a parquet file, or a folder of them."
        ) from error


def _image_column(table: Any, wanted: str) -> str:
    import datasets

    if wanted and wanted not in table.features:
        raise unknown("image column", wanted, table.features)
    found = [name for name, kind in table.features.items() if isinstance(kind, datasets.Image)]
    found += [n for n, kind in table.features.items() if isinstance(kind, dict) and {"bytes", "path"} <= set(kind)]
    if not wanted and not found:
        raise DataError(f"no column holds pictures, of {', '.join(table.features)}: say which with --image-column.")
    return wanted or found[0]


def _undecoded(table: Any, column: str) -> Any:
    """The same column with each picture as {"bytes", "path"}."""
    import datasets

    if isinstance(table.features[column], datasets.Image):
        return table.cast_column(column, datasets.Image(decode=False))
    return table


def _labels(table: Any, wanted: str) -> tuple[tuple[str, ...], np.ndarray]:
    import datasets

    if wanted and wanted not in table.features:
        raise unknown("label column", wanted, table.features)
    column = wanted or next((name for name in LABELS if name in table.features), "")
    if not column:
        return ("all",), np.zeros(len(table), np.int64)
    values = list(table.select_columns([column])[:][column])
    kind = table.features[column]
    named = isinstance(kind, datasets.ClassLabel) and kind.names
    if without := sum(v is None or bool(named and v < 0) for v in values):
        raise DataError(
            f"{without} of {len(values)} rows have no label in the column {column!r}: leave these rows out, or use --no-labels."
        )
    if named:
        return tuple(kind.names), np.array(values, np.int64)
    return numbered(values)
