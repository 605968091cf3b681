"""Graphs that are traced once: tracing the tiny network is most of the time that an export takes."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING
from unittest import mock

if TYPE_CHECKING:
    from onnx import ModelProto

    from export.sources.model import Model

DIGEST = "sha256.txt"


class Traces:
    """The step graphs of one model, in a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @staticmethod
    def write(model: Model, folder: Path) -> None:
        """Trace a model into a folder."""
        from export.graph import trace  # imports torch, which few tests need

        folder.mkdir(parents=True)
        for name, graph in trace.steps(model).items():
            (folder / name).write_bytes(graph.SerializeToString())
        (folder / DIGEST).write_text(_digest(model))

    def read(self) -> dict[str, ModelProto]:
        """Return the graphs by file name, as `export.graph.trace.steps` does."""
        from onnx import ModelProto

        files = sorted(self.folder.glob("*.onnx"))
        return {file.name: ModelProto.FromString(file.read_bytes()) for file in files}

    @contextlib.contextmanager
    def used(self) -> Iterator[None]:
        """Have exports take these graphs for this model. Any other model is traced."""
        from export.graph import trace

        steps = trace.steps
        digest = (self.folder / DIGEST).read_text()

        def read_or_trace(model: Model) -> dict[str, ModelProto]:
            return self.read() if _digest(model) == digest else steps(model)

        with mock.patch.object(trace, "steps", read_or_trace):
            yield


def _digest(model: Model) -> str:
    """Return the SHA-256 of the weights and of their names."""
    digest = hashlib.sha256()
    for name, weight in model.module.state_dict().items():
        digest.update(name.encode())
        digest.update(weight.detach().numpy().tobytes())
    return digest.hexdigest()
