"""The formats of a shard, by name. A writer writes one shard; its bytes hold no time and no user.

- webdataset: a tar file of PNG, JSON, and the label's number as `.cls`.
- parquet: a Parquet file that Hugging Face's `datasets` reads as images. It needs pyarrow.
- folder: a folder of PNG files and `metadata.jsonl`.
- npy: a folder of `samples.npy`, `labels.npy` and `seeds.npy`. The others hold images only.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import numpy as np

from ..errors import RequestError
from .entries import Content, Entries, Writer, encoder, entry_json, png
from .layout import sample_name


@dataclass(frozen=True)
class Format:
    """A format.

    Attributes:
        suffix: The ending of a shard's name; "" if it is a folder.
        images: Whether it holds images only.
        open: Opens a writer for one shard.
        versions: Of the libraries that its bytes depend on.
    """

    name: str
    suffix: str
    images: bool
    open: Callable[[Path, Content], Writer]
    versions: Callable[[], Mapping[str, str]]


class FolderWriter:
    """A folder of PNG files, and one line of JSON for each in `metadata.jsonl`."""

    def __init__(self, path: Path, content: Content) -> None:
        path.mkdir()
        self._path = path
        self._content = content
        self._lines = (path / "metadata.jsonl").open("w", encoding="utf-8", newline="\n")

    def add(self, entries: Entries) -> None:
        for i, image in enumerate(self._content.images(entries.samples)):
            name = f"{sample_name(entries.first + i)}.png"
            (self._path / name).write_bytes(png(image))
            line = {"file_name": name, **entry_json(entries, i, self._content)}
            self._lines.write(json.dumps(line, ensure_ascii=False) + "\n")

    def close(self) -> None:
        self._lines.close()


class NpyWriter:
    """A folder of arrays: samples float32 [n, *S], labels int64 [n], seeds uint64 [n].

    The null label is the number of classes.
    """

    def __init__(self, path: Path, content: Content) -> None:
        path.mkdir()
        self._path = path
        self._content = content
        self._labels: list[int] = []
        self._seeds: list[int] = []
        self._file = (path / "samples.npy").open("wb")
        # The header comes first, so that samples need not stay in memory.
        np.lib.format.write_array_header_1_0(
            self._file,
            {"descr": "<f4", "fortran_order": False, "shape": (content.count, *content.shape)},
        )

    def add(self, entries: Entries) -> None:
        self._file.write(np.ascontiguousarray(entries.samples, "<f4").tobytes())
        null = len(self._content.names)
        self._labels += [null if label is None else label for label in entries.labels]
        self._seeds += entries.seeds

    def close(self) -> None:
        self._file.close()
        np.save(self._path / "labels.npy", np.array(self._labels, "<i8"))
        np.save(self._path / "seeds.npy", np.array(self._seeds, "<u8"))


def _webdataset(path: Path, content: Content) -> Writer:
    from .webdataset import TarWriter

    return TarWriter(path, content)


def _parquet(path: Path, content: Content) -> Writer:
    from .parquet import ParquetWriter

    return ParquetWriter(path, content)


def _parquet_versions() -> Mapping[str, str]:
    try:
        return {**encoder(), "pyarrow": metadata.version("pyarrow")}
    except metadata.PackageNotFoundError:
        raise RequestError(
            "the format parquet needs pyarrow. Install it: pip install 'unnoise[parquet]'."
        ) from None


FORMATS: Mapping[str, Format] = {
    "webdataset": Format("webdataset", ".tar", True, _webdataset, encoder),
    "parquet": Format("parquet", ".parquet", True, _parquet, _parquet_versions),
    "npy": Format("npy", "", False, NpyWriter, dict),
    "folder": Format("folder", "", True, FolderWriter, encoder),
}
