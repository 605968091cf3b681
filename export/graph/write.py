"""Graphs as files: every precision's graphs share one file of weights."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from pathlib import Path

import onnx
from onnx import GraphProto, ModelProto, TensorProto

from runtime.bundle.format import STEP, STEP_GUIDED, WEIGHTS, sampler_file

from ..errors import ExportError
from .edit import copy_of
from .loop import loop
from .weights import Weights, clear

INLINE = 1024
"""Constants of fewer bytes stay in the graph."""
ALIGNMENT = 4096
"""Bytes: each tensor starts on a page of the weights file, so that a runtime may map it."""
SAMPLERS = {STEP: sampler_file(False), STEP_GUIDED: sampler_file(True)}
"""The file of the loop around each step graph."""


def write_all(
    steps: Mapping[str, ModelProto],
    sample_shape: tuple[int, ...],
    folder: Path,
    beside: Mapping[str, ModelProto] | None = None,
    outside: Weights | None = None,
) -> None:
    """Write each step graph, the loop around it, and the models `beside`, with shared weights.

    Args:
        steps: The step graphs by file name.
        sample_shape: *S.
        folder: The precision's folder in a bundle.
        beside: Further graphs by file name, without a loop.
        outside: The constants that were taken out of the graphs.
    """
    models = dict(beside or {})
    for name, step in steps.items():
        models[name] = step
        models[SAMPLERS[name]] = loop(step, sample_shape)
    write(models, folder, outside or Weights())


def write(models: Mapping[str, ModelProto], folder: Path, outside: Weights) -> None:
    """Write models by file name; large constants go into one weights file.

    A constant that several graphs hold is stored once. The models given are not changed.

    Raises:
        ExportError: ONNX's own checker refuses a model.
    """
    folder.mkdir(parents=True, exist_ok=True)
    copies = {name: copy_of(model) for name, model in models.items()}
    offsets: dict[bytes, int] = {}
    end = 0
    with (folder / WEIGHTS).open("wb") as weights:
        for model in copies.values():
            for tensor in _movable(model.graph):
                # The graphs share nearly all weights: one copy on disk, and in the page cache.
                raw = outside.values(tensor)
                if len(raw) < INLINE:
                    continue
                key = hashlib.sha256(raw).digest()
                if key not in offsets:
                    offsets[key] = -(-end // ALIGNMENT) * ALIGNMENT
                    weights.write(b"\0" * (offsets[key] - end))
                    weights.write(raw)
                    end = offsets[key] + len(raw)
                _make_external(tensor, offsets[key], len(raw))
    for name, model in copies.items():
        path = folder / name
        # Checked by path, as it will be read: only then are the external weights looked at.
        path.write_bytes(model.SerializeToString(deterministic=True))
        try:
            onnx.checker.check_model(str(path))
        except onnx.checker.ValidationError as error:
            raise ExportError(f"{name} is not valid ONNX: {error}") from error


def _movable(graph: GraphProto) -> Iterator[TensorProto]:
    """Yield the constants that libraries can read from another file: not those of branches."""
    yield from graph.initializer
    for node in graph.node:
        # Of a sampler, whose body is a step graph.
        if node.op_type == "Loop":
            yield from node.attribute[0].g.initializer


def _make_external(tensor: TensorProto, offset: int, length: int) -> None:
    clear(tensor)
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in (("location", WEIGHTS), ("offset", offset), ("length", length)):
        tensor.external_data.add(key=key, value=str(value))
