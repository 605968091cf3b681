"""The network of an ONNX file as every step graph needs it: in float32, for any batch, and with a
timestep for each sample."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Mapping

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, helper, numpy_helper

from runtime.bundle.format import NETWORK
from runtime.errors.messages import described

from ..errors import ExportError
from ..sources.onnx_file.model import OnnxModel
from ..sources.onnx_file.ports import Port
from ..sources.onnx_file.read import graphs_of
from .edit import copy_of, drop_unused, with_inner

IN = "in."
"""Before the names of the adapted network's inputs: x, time, and those of the step graph."""
F = "F"
"""Its output."""
SCOPES = "pkg.torch.onnx.name_scopes"
UNARY = frozenset({"Cast", "Identity", "Neg", "Abs", "Exp", "Log", "Sqrt", "Round", "Floor"})
"""Operators that keep the shape of a scalar timestep."""
MOST_AXES = 6
"""Constants of fewer values may be axes or shapes of a time."""


def adapted(model: OnnxModel) -> ModelProto:
    """Return the network of a file as F [B, *S] of in.x [B, *S], in.time [B] and further inputs.

    The file may take one time for all samples, or one sample: `require_independent` compares the
    result with each sample alone, and the proof compares it with the file.

    Raises:
        ExportError: The shapes inside the file contradict each other.
    """
    proto = copy_of(model.file.proto)
    graph = proto.graph
    # Shapes are known under the file's own names, so before these change.
    sizes = _sizes_at_one(proto, model) if model.ports.fixed_batch else {}
    _prefixed(graph)
    # They hold the file's batch, which becomes free.
    del graph.value_info[:]
    ports = _inputs(model)
    nodes: list[NodeProto] = []
    for name, (port, shape) in ports.items():
        nodes += _converted(name, port, shape, model)
    body = list(graph.node)
    if model.ports.one_time:
        time = model.ports.time
        body = _with_times(body, graph, f"{NETWORK}{time.name}", len(time.dims))
    if model.ports.fixed_batch:
        _free_reshapes(body, graph, sizes)
    last = helper.make_node(
        "Identity", [f"{NETWORK}{model.ports.output.name}"], [F], name=f"{NETWORK}out/Identity"
    )
    del graph.node[:]
    graph.node.extend([*nodes, *body, last])
    del graph.input[:]
    for name, (_, shape) in ports.items():
        dtype = TensorProto.INT64 if name in _integers(model) else TensorProto.FLOAT
        graph.input.append(helper.make_tensor_value_info(name, dtype, ["batch", *shape]))
    del graph.output[:]
    shape = ["batch", *model.sample_shape]
    graph.output.append(helper.make_tensor_value_info(F, TensorProto.FLOAT, shape))
    drop_unused(graph)
    return proto


def _inputs(model: OnnxModel) -> dict[str, tuple[Port, tuple[int, ...]]]:
    """Return the file's port and the shape without the batch of each input of the network."""
    ports = model.ports
    found: dict[str, tuple[Port, tuple[int, ...]]] = {
        f"{IN}x": (ports.x, model.sample_shape),
        f"{IN}time": (ports.time, ()),
    }
    for condition in model.inputs:
        port = ports.conditions.get(condition.name) or ports.label
        assert port is not None
        found[f"{IN}{condition.port}"] = (port, condition.shape)
    return found


def _integers(model: OnnxModel) -> set[str]:
    return {f"{IN}{c.port}" for c in model.inputs if c.dtype == "int64"}


def _converted(
    name: str, port: Port, shape: tuple[int, ...], model: OnnxModel
) -> Iterator[NodeProto]:
    """Yield the nodes that make a file's input of the network's."""
    where = f"{NETWORK}{port.name}"
    scope = f"{NETWORK}in"
    value = name
    is_time = port == model.ports.time
    if is_time and not port.is_float:
        # Solvers that evaluate between two timesteps get the nearest one.
        yield helper.make_node("Round", [value], [f"{name}.round"], name=f"{scope}/Round")
        value = f"{name}.round"
    if port == model.ports.label and model.order:
        order = f"{scope}.order"
        tensor = numpy_helper.from_array(np.array(model.order, np.int64), order)
        yield helper.make_node(
            "Constant", [], [order], value=tensor, name=f"{scope}/Constant_order"
        )
        yield helper.make_node("Gather", [order, value], [f"{name}.order"], name=f"{scope}/Gather")
        value = f"{name}.order"
    # A float16 input is float32 by now: the whole file was widened when it was read.
    to = TensorProto.FLOAT if port.is_float else port.dtype
    if is_time and len(port.dims) == 2:
        column = f"{scope}.column"
        tensor = numpy_helper.from_array(np.array([-1, 1], np.int64), column)
        yield helper.make_node(
            "Constant", [], [column], value=tensor, name=f"{scope}/Constant_column"
        )
        yield helper.make_node("Reshape", [value, column], [f"{name}.column"], name=f"{scope}/Col")
        value = f"{name}.column"
    yield helper.make_node("Cast", [value], [where], to=to, name=f"{scope}/Cast_{port.name}")


def _prefixed(graph: GraphProto) -> None:
    """Put "network." before the names of all values, and name nodes after their modules."""
    for number, node in enumerate(graph.node):
        scope = _module_of(node) or f"node{number}"
        for inner in with_inner(node):
            inner.name = f"{NETWORK}{scope}/{inner.op_type}_{number}"
    for inner in graphs_of(graph):
        for tensor in inner.initializer:
            tensor.name = f"{NETWORK}{tensor.name}"
        for value in (*inner.input, *inner.output):
            value.name = f"{NETWORK}{value.name}"
        for node in inner.node:
            for names in (node.input, node.output):
                for i, name in enumerate(names):
                    names[i] = f"{NETWORK}{name}" if name else ""


def _module_of(node: NodeProto) -> str:
    """Return the path of the module that a node came from, as torch's exporters note it."""
    noted = next((p.value for p in node.metadata_props if p.key == SCOPES), "")
    try:
        scopes = [str(scope) for scope in ast.literal_eval(noted)[:-1] if scope] if noted else []
    except (ValueError, SyntaxError):  # another exporter's note
        scopes = []
    # The older exporter writes the path into the name: /down.0/conv/Conv.
    path = scopes[-1] if scopes else node.name.rpartition("/")[0]
    return ".".join(re.findall(r"\w+", path))


def _with_times(body: list[NodeProto], graph: GraphProto, time: str, rank: int) -> list[NodeProto]:
    """Return the nodes of a network that takes one time, for a time of each sample [B].

    Args:
        time: The name of the time's value.
        rank: 0 for a file that takes [], 1 for [1].
    """
    small = {t.name: t for t in graph.initializer if len(t.dims) == 1 and t.dims[0] < MOST_AXES}
    # Values that are still one number a sample: the first operator that widens one ends the search.
    times = {time}
    changed = []
    for node in body:
        if not times.intersection(node.input[:1]):
            changed.append(node)
            continue
        if node.op_type in UNARY:
            times.update(node.output)
        axes = small.get(node.input[1]) if len(node.input) > 1 else None
        shape = None if axes is None else _lifted(node, numpy_helper.to_array(axes), rank)
        if shape is None:
            changed.append(node)
            continue
        # [B, 1, …] in place of [1, 1, …].
        name = f"{node.output[0]}.shape"
        graph.initializer.append(numpy_helper.from_array(np.array(shape, np.int64), name))
        changed.append(
            helper.make_node("Reshape", [node.input[0], name], node.output, name=node.name)
        )
        if len(shape) == 1:
            times.update(node.output)
    return changed


def _lifted(node: NodeProto, axes: NDArray[np.generic], rank: int) -> list[int] | None:
    """Return the shape that a time's new axes give it; None for a node that may stay."""
    ones = node.op_type == "Reshape" and set(axes.tolist()) <= {1, -1}
    # A scalar gets all its axes here: the first is now the batch.
    new = node.op_type == "Unsqueeze" and rank == 0
    return [-1, *[1] * (len(axes) - 1)] if ones or new else None


def _sizes_at_one(proto: ModelProto, model: OnnxModel) -> Mapping[str, list[int]]:
    """Return the shape of each value of a file with a fixed batch of one, as far as known."""
    copy = copy_of(proto)
    shapes = {port.name: shape for port, shape in _inputs(model).values()}
    for given in copy.graph.input:
        dims = given.type.tensor_type.shape.dim
        if given.name in shapes and given.name != model.ports.time.name:
            for dim, size in zip(dims, (1, *shapes[given.name]), strict=True):
                dim.dim_value = size
    try:
        inferred = onnx.shape_inference.infer_shapes(copy, data_prop=True).graph
    except Exception as error:  # onnx's own
        raise ExportError(
            f"{model.name}: the shapes in the file contradict each other ({described(error)})."
        ) from error
    return {
        f"{NETWORK}{v.name}": [d.dim_value for d in v.type.tensor_type.shape.dim]
        for v in (*inferred.value_info, *inferred.output)
    }


def _free_reshapes(
    body: list[NodeProto], graph: GraphProto, sizes: Mapping[str, list[int]]
) -> None:
    """Let every Reshape to a constant shape keep the batch, in place.

    At a batch of one the first axis is the batch, or the batch and heads.
    """
    stored = {t.name: t for t in graph.initializer}
    for node in body:
        if node.op_type != "Reshape" or node.input[0] in stored or node.input[1] not in stored:
            continue
        shape = numpy_helper.to_array(stored[node.input[1]]).tolist()
        known = sizes.get(node.output[0], [])
        # A shape that begins with -1 or 0 follows the batch already.
        if len(shape) < 2 or shape[0] <= 0 or len(known) != len(shape):
            continue
        # One axis may be left open, and that is now the first.
        rest = [size if size >= 0 else known[i] for i, size in enumerate(shape)][1:]
        if 0 in known[1:]:
            continue
        name = f"{node.output[0]}.shape"
        graph.initializer.append(numpy_helper.from_array(np.array([-1, *rest], np.int64), name))
        node.input[1] = name
