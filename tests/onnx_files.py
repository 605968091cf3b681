"""Networks in ONNX files, in the forms that people have."""

from __future__ import annotations

import contextlib
import io
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from onnx import ModelProto, TensorProto, helper, numpy_helper
from torch import Tensor, nn

from trainer.networks.unet import UNet

SHAPE = (1, 8, 8)


def randomized(module: nn.Module) -> nn.Module:
    """The module with random weights: some layers begin at zero, which would hide faults."""
    generator = torch.Generator().manual_seed(0)
    for parameter in module.parameters():
        parameter.data = 0.15 * torch.randn(parameter.shape, generator=generator)
    return module.eval().requires_grad_(False)


class Network(nn.Module):
    """This project's own network, tiny, and what a file may have besides: see `write`.

    Args:
        second: Whether there is a second output of the same shape.
        fault: "time" to use one time for all samples.
    """

    def __init__(self, num_classes: int = 0, second: bool = False, fault: str = "") -> None:
        super().__init__()
        self.network = randomized(UNet(SHAPE, (8, 16), 1, (4,), num_classes))
        self.second = second
        self.fault = fault

    def forward(self, sample: Tensor, timestep: Tensor, *more: Tensor) -> Any:
        time = timestep.to(sample.dtype)
        time = time[None] if time.ndim == 0 else time
        if self.fault == "time":
            time = time[:1]
        low_res = [value for value in more if value.is_floating_point()]
        labels = [value for value in more if not value.is_floating_point()]
        for value in low_res:
            sample = sample + value
        found = self.network(sample, time.expand(sample.shape[0]), *labels)
        return (found, 2 * found) if self.second else found


def write(
    path: Path,
    timestep: Sequence[int] | int = (5, 6),
    network: nn.Module | None = None,
    more: dict[str, Tensor] | None = None,
    batch: int | None = None,
    opset: int = 17,
) -> Path:
    """Export a network(sample, timestep, …) with torch's older exporter, which is the faster one.

    Args:
        timestep: One for all samples, [] or [1], or a batch of two.
        more: Further inputs by name, in a batch of two.
        batch: A fixed one; None lets it vary.
    """
    x = torch.randn(batch or 2, *SHAPE)
    names = ["sample", "timestep", *(more or {})]
    moving = [name for name in names if name != "timestep" or len(torch.tensor(timestep).shape)]
    if isinstance(timestep, (tuple, list)) and len(timestep) == 1:
        moving.remove("timestep")
    nowhere = io.StringIO()
    with (
        warnings.catch_warnings(),
        contextlib.redirect_stdout(nowhere),
        contextlib.redirect_stderr(nowhere),
    ):
        warnings.simplefilter("ignore")
        torch.onnx.export(
            network or Network(),
            (x, torch.tensor(timestep), *(more or {}).values()),
            str(path),
            input_names=names,
            output_names=["out"],
            dynamic_axes=None if batch else {name: {0: "batch"} for name in [*moving, "out"]},
            opset_version=opset,
            dynamo=False,
        )
    return path


def halved(source: Path, path: Path, stored: bool) -> Path:
    """Write a file in float16: only as its weights are `stored`, or as it computes, too."""
    proto = onnx.load(str(source))
    (_store_half if stored else _compute_half)(proto)
    onnx.save(proto, str(path))
    return path


def _store_half(proto: ModelProto) -> None:
    graph = proto.graph
    casts = []
    for tensor in graph.initializer:
        if tensor.data_type == TensorProto.FLOAT:
            name = tensor.name
            half = numpy_helper.to_array(tensor).astype(np.float16)
            tensor.CopyFrom(numpy_helper.from_array(half, f"{name}.half"))
            casts.append(helper.make_node("Cast", [f"{name}.half"], [name], to=TensorProto.FLOAT))
    nodes = [*casts, *graph.node]
    del graph.node[:]
    graph.node.extend(nodes)


def _compute_half(proto: ModelProto) -> None:
    graph = proto.graph
    del graph.value_info[:]
    for value in (*graph.input, *graph.output):
        if value.type.tensor_type.elem_type == TensorProto.FLOAT:
            value.type.tensor_type.elem_type = TensorProto.FLOAT16
    tensors = {tensor.name: tensor for tensor in graph.initializer}
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.name == "to" and attribute.i == TensorProto.FLOAT:
                attribute.i = TensorProto.FLOAT16
            if attribute.name == "value":
                tensors[node.output[0]] = attribute.t
    for name, tensor in tensors.items():
        # The scales of a Resize stay float32, as ONNX asks.
        resize = any(n.op_type == "Resize" and name in n.input for n in graph.node)
        if tensor.data_type == TensorProto.FLOAT and not resize:
            half = numpy_helper.to_array(tensor).astype(np.float16)
            tensor.CopyFrom(numpy_helper.from_array(half, tensor.name))
