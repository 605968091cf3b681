"""An ONNX network → ONNX: the step graphs around it, each one row of any program."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, helper, numpy_helper

from runtime.bundle.conditions import Condition
from runtime.bundle.format import step_file
from runtime.diffusion.program import C_IN, C_OUT, C_SKIP, CLIP, GUIDANCE, TIME, Network, R
from runtime.errors.messages import described

from ..errors import ExportError
from ..sources.model import Model
from ..sources.onnx_file.model import OnnxModel
from .adapt import IN, F, adapted
from .calibrate import session
from .clean import clean
from .edit import with_inner

REMEDY = (
    "Export it again with a batch that may vary, and a timestep for each sample: "
    "torch.onnx.export(..., dynamic_axes={'sample': {0: 'batch'}, 'timestep': {0: 'batch'}})."
)
STEP = "step."
"""Before the names of values outside the network."""


class _Nodes:
    """Nodes in order, and their constants."""

    def __init__(self) -> None:
        self.nodes: list[NodeProto] = []
        self.constants: dict[str, TensorProto] = {}

    def constant(self, name: str, value: object, dtype: type[np.generic] = np.int64) -> str:
        """Return the name of a constant, stored once."""
        name = f"{STEP}{name}"
        self.constants[name] = numpy_helper.from_array(np.array(value, dtype), name)
        return name

    def add(self, kind: str, inputs: list[str], name: str, **attributes: Any) -> str:
        """Add a node; return the name of its value."""
        self.nodes.append(helper.make_node(kind, inputs, [name], **attributes))
        return name


def steps(model: Model, network: ModelProto) -> dict[str, ModelProto]:
    """Return the step graphs by file name: the plain one, and the guided one if there is one.

    A model has a guided graph if its null label was trained, or a condition has a null value.

    Args:
        network: F [B, *S] of in.x [B, *S], in.time [B] and the model's further inputs.
    """
    kinds = (False, True) if model.can_guide else (False,)
    return {step_file(guided): fused(model, network, guided) for guided in kinds}


def batched(model: OnnxModel) -> Network:
    """Return the adapted network, run on whole batches, as a network of `runtime.run`."""
    proto = adapted(model)
    try:
        running = session(proto)
    except Exception as error:  # ONNX Runtime has errors of its own
        raise ExportError(
            f"{model.name}: the network cannot take a batch ({described(error)}). {REMEDY}"
        ) from error
    inputs = [IN + name for name in ("x", "time", *(["label"] if model.labels else []))]
    named = {c.name: IN + c.port for c in model.conditions}
    # A network may leave an input unused, but the graph keeps it.
    known = {port.name for port in proto.graph.input}

    def network(*given: np.ndarray, **conditions: np.ndarray) -> np.ndarray:
        feeds = dict(zip(inputs, given, strict=True))
        feeds |= {named[name]: array for name, array in conditions.items()}
        try:
            return running.run([F], {k: v for k, v in feeds.items() if k in known})[0]
        except Exception as error:  # ONNX Runtime has errors of its own
            raise ExportError(
                f"{model.name}: the network fails on a batch of {len(given[0])} "
                f"({described(error)}). {REMEDY}"
            ) from error

    return network


def fused(model: Model, network: ModelProto, guided: bool) -> ModelProto:
    """Return the step graph around a network, with every weight inside.

    It is `runtime.diffusion.program`'s denoise and advance. A guided step also computes the network
    under the null values. See docs/bundle-format.md, the step graph.
    """
    nodes = _Nodes()
    shape = list(model.sample_shape)
    x = nodes.add("Gather", ["state", nodes.constant("zero", 0)], f"{STEP}x", axis=1)

    def column(i: int) -> str:
        return _column(nodes, i, len(shape))

    # The network's inputs.
    scaled = nodes.add("Mul", [column(C_IN), x], f"{STEP}x_in")
    time = nodes.add("Gather", ["call", nodes.constant("time", TIME)], f"{STEP}time_of", axis=1)
    given = {"x": (scaled, scaled), "time": (time, time)}
    for condition in model.inputs:
        null = _null(nodes, condition, model) if guided else ""
        given[condition.port] = (condition.port, null)
    instead = {f"{IN}{name}": pair[0] for name, pair in given.items()}
    if guided:
        for name, pair in given.items():
            nodes.add("Concat", list(pair), f"{IN}{name}", axis=0)
        instead = {}
    nodes.nodes += _network(network.graph, instead)
    # F under guidance, D, and the registers after the row.
    answer = _guided(nodes, shape, column(GUIDANCE)) if guided else F
    skipped = nodes.add("Mul", [column(C_SKIP), x], f"{STEP}skipped")
    scaled_f = nodes.add("Mul", [column(C_OUT), answer], f"{STEP}scaled_f")
    open_d = nodes.add("Add", [skipped, scaled_f], f"{STEP}unclipped")
    bound = column(CLIP)
    below = nodes.add("Min", [open_d, bound], f"{STEP}below")
    nodes.add("Max", [below, nodes.add("Neg", [bound], f"{STEP}lowest")], "denoised")
    _advance(nodes, shape)
    return _model(model, network, nodes)


def _column(nodes: _Nodes, i: int, rank: int) -> str:
    """Return column i of the call [B, 6] as [B, 1, …]."""
    axis = nodes.constant("axis", [1])
    ends = [nodes.constant(f"at_{i}", [i]), nodes.constant(f"at_{i + 1}", [i + 1]), axis]
    part = nodes.add("Slice", ["call", *ends], f"{STEP}part_{i}")
    shape = nodes.constant("column", [-1, *[1] * rank])
    return nodes.add("Reshape", [part, shape], f"{STEP}column_{i}")


def _null(nodes: _Nodes, condition: Condition, model: Model) -> str:
    """Return the null value of an input [B, …], or the input itself if it has none."""
    port = condition.port
    if condition.null is None:
        return port
    value = model.null_of(condition)
    zero = nodes.constant(f"nothing_{condition.dtype}", 0, condition.kind)
    # Computed from the input, so that the graph takes its size from the batch.
    zeros = nodes.add("Mul", [port, zero], f"{STEP}zeros_{port}")
    null = nodes.constant(f"null_{port}", value, condition.kind)
    return nodes.add("Add", [zeros, null], f"{STEP}nulls_{port}")


def _guided(nodes: _Nodes, shape: list[int], scale: str) -> str:
    """Return F under guidance of F [2B, *S], which is that of the inputs and of the nulls."""
    halves = nodes.constant("halves", [2, -1, *shape])
    both = nodes.add("Reshape", [F, halves], f"{STEP}both")
    own = nodes.add("Gather", [both, nodes.constant("zero", 0)], f"{STEP}own", axis=0)
    null = nodes.add("Gather", [both, nodes.constant("second", 1)], f"{STEP}null", axis=0)
    less = nodes.add("Sub", [scale, nodes.constant("one", 1, np.float32)], f"{STEP}beyond")
    contrast = nodes.add("Sub", [own, null], f"{STEP}contrast")
    more = nodes.add("Mul", [less, contrast], f"{STEP}more")
    return nodes.add("Add", [own, more], f"{STEP}guided")


def _advance(nodes: _Nodes, shape: list[int]) -> None:
    """Add next_state [B, R, *S]: one batched product [R, R+2] @ [R+2, size] for all registers."""
    size = math.prod(shape)
    one = nodes.constant("flat", [-1, 1, size])
    known = [
        nodes.add("Reshape", ["state", nodes.constant("rows", [-1, R, size])], f"{STEP}registers"),
        nodes.add("Reshape", ["denoised", one], f"{STEP}flat_d"),
        nodes.add("Reshape", ["noise", one], f"{STEP}flat_z"),
    ]
    together = nodes.add("Concat", known, f"{STEP}known", axis=1)
    product = nodes.add("MatMul", ["update", together], f"{STEP}product")
    nodes.add("Reshape", [product, nodes.constant("next_rows", [-1, R, *shape])], "next_state")


def _network(graph: GraphProto, instead: dict[str, str]) -> list[NodeProto]:
    """Return the network's nodes, which read other values in place of their inputs."""
    copied = GraphProto()
    copied.CopyFrom(graph)
    for node in copied.node:
        for reader in with_inner(node):
            for i, name in enumerate(reader.input):
                reader.input[i] = instead.get(name, name)
    return list(copied.node)


def _model(model: Model, network: ModelProto, nodes: _Nodes) -> ModelProto:
    value = helper.make_tensor_value_info
    shape = model.sample_shape
    inputs = [
        value("state", TensorProto.FLOAT, ["batch", R, *shape]),
        value("noise", TensorProto.FLOAT, ["batch", *shape]),
        value("call", TensorProto.FLOAT, ["batch", 6]),
        value("update", TensorProto.FLOAT, ["batch", R, R + 2]),
    ]
    for condition in model.inputs:
        dtype = TensorProto.INT64 if condition.dtype == "int64" else TensorProto.FLOAT
        inputs.append(value(condition.port, dtype, ["batch", *condition.shape]))
    outputs = [
        value("next_state", TensorProto.FLOAT, ["batch", R, *shape]),
        value("denoised", TensorProto.FLOAT, ["batch", *shape]),
    ]
    constants = [*network.graph.initializer, *nodes.constants.values()]
    graph = helper.make_graph(nodes.nodes, "step", inputs, outputs, constants)
    proto = helper.make_model(
        graph, opset_imports=network.opset_import, ir_version=network.ir_version
    )
    return clean(proto, _scopes)


def _scopes(graph: GraphProto) -> list[str]:
    """Return the module of each node, which `adapt` put into the network's names."""
    return [node.name.rpartition("/")[0] or "step" for node in graph.node]
