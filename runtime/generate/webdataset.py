"""A shard as a tar file for the library webdataset."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

from .entries import Content, Entries, entry_json, png
from .layout import sample_name


class TarWriter:
    """Members of each sample, in order: INDEX.png, INDEX.cls (the label's number), INDEX.json.

    A sample of the null label has no .cls.
    """

    def __init__(self, path: Path, content: Content) -> None:
        self._content = content
        # USTAR has no extended headers, which would hold times of this machine.
        self._tar = tarfile.TarFile(path, "w", format=tarfile.USTAR_FORMAT)

    def add(self, entries: Entries) -> None:
        for i, image in enumerate(self._content.images(entries.samples)):
            name = sample_name(entries.first + i)
            label = entries.labels[i]
            self._member(f"{name}.png", png(image))
            if label is not None:
                self._member(f"{name}.cls", str(label).encode())
            described = entry_json(entries, i, self._content)
            self._member(f"{name}.json", json.dumps(described, ensure_ascii=False).encode())

    def close(self) -> None:
        self._tar.close()

    def _member(self, name: str, data: bytes) -> None:
        # Time, owner and group are 0, and the mode is 644: TarInfo's defaults.
        member = tarfile.TarInfo(name)
        member.size = len(data)
        self._tar.addfile(member, io.BytesIO(data))
        # tarfile keeps every member, for readers: half a kilobyte each.
        self._tar.members.clear()  # type: ignore[attr-defined]
