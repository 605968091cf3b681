"""Networks that are traced once: tracing the tiny one is most of the time that an export takes."""

from __future__ import annotations

import contextlib
import functools
import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING
from unittest import mock

import numpy as np

if TYPE_CHECKING:
    from onnx import ModelProto

    from export.sources.torch_model import TorchModel

DIGEST = "sha256.txt"
NETWORK = "network.onnx"


@contextlib.contextmanager
def operators_once() -> Iterator[None]:
    """Have torch's exporter build its tables of operators once, not for every graph.

    The tables depend on the opset alone. Building them is most of what a small network needs.
    """
    from torch._export import utils  # imports torch, which few tests need
    from torch.onnx._internal.exporter import _decomp
    from torch.onnx._internal.exporter._registration import ONNXRegistry

    registry = functools.cache(ONNXRegistry.from_torchlib)
    implemented = functools.cache(
        lambda: frozenset(_decomp.get_onnx_implemented_overloads(registry()))
    )
    make_table = _decomp.create_onnx_friendly_decomposition_table
    table = functools.cache(lambda: make_table(implemented()))

    def table_for(operators: set[object]) -> dict[object, object]:
        # The caller may change its table.
        return dict(table()) if operators == implemented() else make_table(operators)

    listed = functools.cache(utils._materialize_cpp_cia_ops)
    with (
        mock.patch.object(ONNXRegistry, "from_torchlib", staticmethod(registry)),
        mock.patch.object(_decomp, "create_onnx_friendly_decomposition_table", table_for),
        mock.patch.object(utils, "_materialize_cpp_cia_ops", listed),
    ):
        yield


class Traces:
    """The network of one model, in a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @staticmethod
    def write(model: TorchModel, folder: Path) -> None:
        """Trace a model into a folder."""
        from export.graph import trace  # imports torch, which few tests need

        folder.mkdir(parents=True)
        with operators_once():
            network = trace.traced(model)
        (folder / NETWORK).write_bytes(network.SerializeToString())
        (folder / DIGEST).write_text(_digest(model))

    def read(self) -> ModelProto:
        """Return the network, as `export.graph.trace.traced` does."""
        from onnx import ModelProto

        return ModelProto.FromString((self.folder / NETWORK).read_bytes())

    @contextlib.contextmanager
    def used(self) -> Iterator[None]:
        """Have exports take this network for this model. Any other model is traced."""
        from export.graph import trace

        traced = trace.traced
        digest = (self.folder / DIGEST).read_text()

        def read_or_trace(model: TorchModel) -> ModelProto:
            return self.read() if _digest(model) == digest else traced(model)

        with mock.patch.object(trace, "traced", read_or_trace):
            yield


def traced_step(model: TorchModel, guided: bool) -> ModelProto:
    """Return one step graph of a model."""
    from export.graph.fuse import fused
    from export.graph.trace import traced

    return fused(model, traced(model), guided)


def answer(step: ModelProto, shape: tuple[int, ...], batch: int) -> np.ndarray:
    """Return F [batch, *shape] of up to 5 samples at different times, by reading it as D."""
    import onnxruntime

    session = onnxruntime.InferenceSession(
        step.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    r = np.random.default_rng(0)
    sizes = {"state": (5, 4, *shape), "noise": (5, *shape), "update": (5, 4, 6)}
    feeds = {name: r.normal(size=size).astype(np.float32)[:batch] for name, size in sizes.items()}
    feeds["call"] = np.tile(np.array([3, 1, 0, 1, np.inf, 3], np.float32), (batch, 1))
    feeds["call"][:, 0] += np.arange(batch)
    if any(i.name == "label" for i in step.graph.input):
        feeds["label"] = np.arange(batch) % 2
    return session.run(["denoised"], feeds)[0]


def _digest(model: TorchModel) -> str:
    """Return the SHA-256 of the weights and of their names."""
    digest = hashlib.sha256()
    for name, weight in model.module.state_dict().items():
        digest.update(name.encode())
        digest.update(weight.detach().numpy().tobytes())
    return digest.hexdigest()
