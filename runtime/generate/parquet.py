"""A shard as a Parquet file, with columns that Hugging Face's `datasets` reads as images."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
from pyarrow import parquet

from .entries import Content, Entries, png
from .layout import sample_name

ROWS = 1024
ROW_BYTES = 64 << 20
"""A row group ends after so many rows, or so many bytes of images."""


class ParquetWriter:
    """Columns: image (struct of bytes and path), label (null for the null label), index, seed."""

    def __init__(self, path: Path, content: Content) -> None:
        self._content = content
        self._schema = _schema(content)
        self._rows: list[dict[str, object]] = []
        self._bytes = 0
        # PNG is compressed already. A codec would add a version that the bytes depend on.
        self._file = parquet.ParquetWriter(
            path, self._schema, compression="none", use_dictionary=False
        )

    def add(self, entries: Entries) -> None:
        for i, image in enumerate(self._content.images(entries.samples)):
            data = png(image)
            index = entries.first + i
            row: dict[str, object] = {
                "image": {"bytes": data, "path": f"{sample_name(index)}.png"},
                "index": index,
                "seed": entries.seeds[i],
            }
            if self._content.names:
                row["label"] = entries.labels[i]
            self._rows.append(row)
            self._bytes += len(data)
            # By rows and not by calls: how many samples come at once may not show in the file.
            if len(self._rows) == ROWS or self._bytes >= ROW_BYTES:
                self._write()

    def close(self) -> None:
        if self._rows:
            self._write()
        self._file.close()

    def _write(self) -> None:
        self._file.write_table(pa.Table.from_pylist(self._rows, self._schema))
        self._rows = []
        self._bytes = 0


def _schema(content: Content) -> pa.Schema:
    """Return the columns, with the metadata by which `datasets` knows images and labels."""
    columns = [
        ("image", pa.struct([("bytes", pa.binary()), ("path", pa.string())])),
        *([("label", pa.int64())] if content.names else []),
        ("index", pa.int64()),
        ("seed", pa.uint64()),
    ]
    features: dict[str, object] = {"image": {"_type": "Image"}}
    if content.names:
        features["label"] = {"names": list(content.names), "_type": "ClassLabel"}
    features["index"] = {"dtype": "int64", "_type": "Value"}
    features["seed"] = {"dtype": "uint64", "_type": "Value"}
    described = json.dumps({"info": {"features": features}})
    return pa.schema(columns, metadata={"huggingface": described})
