"""The network inside a step graph in another precision, with float32 at its edges: float16, and
int8 as Q/DQ.

The network is what lies between its picture and its answer: nodes that come from the module
(`graph.clean` names them after it) and depend on the state. So the time embedding, the denoised
estimate and the update stay float32. ../docs/precisions.md.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, helper, numpy_helper

from trainer.runs.start import NETWORK

from .dims import Dims
from .edit import copy_of, drop_unused

# fmt: off
HALF = frozenset((
    "Conv", "ConvTranspose", "Gemm", "MatMul", "Add", "Sub", "Mul", "Neg", "Relu", "Sigmoid", "Tanh", "Erf", "Gelu",
    "Concat", "Split", "Slice", "Reshape", "Transpose", "Unsqueeze", "Squeeze", "Expand", "Identity", "Pad", "Resize",
    "DepthToSpace", "SpaceToDepth", "AveragePool", "MaxPool", "Gather",
))
# fmt: on
"""What is computed in float16; sums over many values (norms, softmax, means) and whatever is not
here stay float32."""
ONLY_FIRST = frozenset(
    ("Resize", "Reshape", "Slice", "Expand", "Unsqueeze", "Squeeze", "Split", "Pad", "Gather")
)
"""Whose other inputs are shapes, scales or indices."""
NORMS = frozenset(
    (
        "InstanceNormalization",
        "LayerNormalization",
        "GroupNormalization",
        "BatchNormalization",
        "ReduceMean",
    )
)
WEIGHTED = {"Conv": 0, "ConvTranspose": 1, "Gemm": None, "MatMul": -1}
"""Operators with weights that are quantized, and the axis of the weights' outputs; Gemm's depends
on transB."""


def scope(node: NodeProto) -> str:
    """The path of the module that a node came from."""
    return node.name.rpartition("/")[0]


def network_nodes(graph: GraphProto) -> list[NodeProto]:
    """The nodes of the network that depend on the state, in order."""
    reached = {"state"}
    found = []
    for node in graph.node:
        if reached.intersection(node.input):
            reached.update(node.output)
            if f"{scope(node)}.".startswith(NETWORK):
                found.append(node)
    return found


def to_float16(step: ModelProto) -> ModelProto:
    """The step graph with its network in float16; norms with their affine part, softmax and the
    time embedding stay float32.

    Weights beyond float16's range become infinite: the proof counts what is not finite.
    """
    proto = copy_of(step)
    graph = proto.graph
    types = _float_values(proto)
    inside = network_nodes(graph)
    norm_scopes = {scope(n) for n in inside if n.op_type in NORMS}
    half = {n.name for n in inside if n.op_type in HALF and scope(n) not in norm_scopes}
    constants = {t.name: t for t in graph.initializer}
    is_half: set[str] = set()
    casts: dict[tuple[str, bool], str] = {}
    nodes: list[NodeProto] = []

    def wanted(name: str, as_half: bool) -> str:
        """The value in the wanted type, converted once."""
        if (name in is_half) == as_half:
            return name
        key = (name, as_half)
        if key not in casts:
            casts[key] = f"{name}.{'half' if as_half else 'float'}"
            if name in constants:
                with np.errstate(over="ignore"):
                    value = numpy_helper.to_array(constants[name]).astype(np.float16)
                graph.initializer.append(numpy_helper.from_array(value, casts[key]))
            else:
                to = TensorProto.FLOAT16 if as_half else TensorProto.FLOAT
                nodes.append(
                    helper.make_node("Cast", [name], [casts[key]], to=to, name=f"{casts[key]}/Cast")
                )
        return casts[key]

    for node in graph.node:
        in_half = node.name in half
        for i, name in enumerate(node.input):
            if name in types and not (i and node.op_type in ONLY_FIRST):
                node.input[i] = wanted(name, in_half)
        nodes.append(node)
        if in_half:
            is_half.update(o for o in node.output if o in types)
    del graph.node[:]
    graph.node.extend(nodes)
    drop_unused(graph)
    return proto


def _float_values(proto: ModelProto) -> set[str]:
    """The names of all float32 values, constants among them."""
    inferred = onnx.shape_inference.infer_shapes(proto).graph
    values = [*inferred.value_info, *inferred.input, *inferred.output]
    found = {v.name for v in values if v.type.tensor_type.elem_type == TensorProto.FLOAT}
    return found | {t.name for t in proto.graph.initializer if t.data_type == TensorProto.FLOAT}


@dataclass(frozen=True)
class Layer:
    """A node with weights: the module it came from, the node, the value that goes in, its weights,
    and its multiply-adds a sample."""

    name: str
    node: str
    input: str
    weight: str
    multiply_adds: int


def layers(step: ModelProto) -> list[Layer]:
    """The network's layers that can be quantized, in order."""
    dims = Dims(step)
    constants = {t.name: t for t in step.graph.initializer}
    found = []
    for node in network_nodes(step.graph):
        if (
            node.op_type in WEIGHTED
            and node.input[1] in constants
            and node.input[0] not in constants
        ):
            weight = constants[node.input[1]]
            elements = math.prod(abs(d) for d in dims.but_for_the_batch(node.output[0]) or [0])
            fan_in = math.prod(weight.dims) // weight.dims[output_axis(node)]
            found.append(
                Layer(scope(node), node.name, node.input[0], weight.name, elements * fan_in)
            )
    return found


def output_axis(node: NodeProto) -> int:
    """The axis of the weights that counts the outputs."""
    axis = WEIGHTED[node.op_type]
    if axis is None:
        return 0 if any(a.name == "transB" and a.i for a in node.attribute) else 1
    return axis


@dataclass(frozen=True)
class Range:
    """The values that an activation is quantized over; what lies beyond is cut off."""

    low: float
    high: float

    def grid(self, signed: bool) -> tuple[np.float32, np.integer]:
        """(scale, zero point): real = scale · (q - zero point), q in 0 … 255, or signed with zero
        point 0."""
        low = min(self.low, 0.0)
        high = max(self.high, 0.0)
        if signed:
            return np.float32(max(-low, high, 1e-12) / 127), np.int8(0)
        scale = np.float32(max(high - low, 1e-12) / 255)
        return scale, np.uint8(np.clip(np.round(-low / scale), 0, 255))


def weight_scales(weight: NDArray[np.float32], axis: int) -> NDArray[np.float32]:
    """A scale for each output, symmetric: the largest of its weights at 127."""
    others = tuple(i for i in range(weight.ndim) if i != axis % weight.ndim)
    return np.maximum(np.abs(weight).max(axis=others), 1e-12).astype(np.float32) / np.float32(127)


class _Quantizer:
    """Adds Q/DQ pairs to a graph, one for each value and weight however often they are read."""

    def __init__(self, graph: GraphProto, ranges: Mapping[str, Range], signed: bool) -> None:
        self.graph = graph
        self.ranges = ranges
        self.signed = signed
        self.constants = {tensor.name: tensor for tensor in graph.initializer}
        self.nodes: list[NodeProto] = []
        self.made: dict[str, str] = {}

    def activation(self, name: str) -> str:
        """Return the name of a float32 value after rounding it to int8 and back."""
        if name not in self.made:
            scale, zero = self.ranges[name].grid(self.signed)
            grid = [
                self._constant(f"{name}.scale", scale),
                self._constant(f"{name}.zero", zero),
            ]
            self._add("QuantizeLinear", [name, *grid], f"{name}.q", f"{name}/Quantize")
            self._dequantize(name, grid)
        return self.made[name]

    def weights(self, name: str, axis: int) -> str:
        """Return the name of a weight that is stored in int8, with a scale an output."""
        if name not in self.made:
            value = numpy_helper.to_array(self.constants[name])
            axis %= value.ndim
            scale = weight_scales(value, axis)
            shape = [-1 if i == axis else 1 for i in range(value.ndim)]
            q = np.clip(np.round(value / scale.reshape(shape)), -127, 127).astype(np.int8)
            grid = [
                self._constant(f"{name}.scale", scale),
                self._constant(f"{name}.zero", np.zeros(len(scale), np.int8)),
            ]
            self._constant(f"{name}.q", q)
            self._dequantize(name, grid, axis)
        return self.made[name]

    def _constant(self, name: str, value: NDArray[np.generic] | np.generic) -> str:
        self.graph.initializer.append(numpy_helper.from_array(np.asarray(value), name))
        return name

    def _add(
        self, op: str, inputs: list[str], output: str, name: str, axis: int | None = None
    ) -> None:
        # The axis of a single scale has no meaning, and is left out.
        node = helper.make_node(op, inputs, [output], name=name)
        if axis is not None:
            node.attribute.append(helper.make_attribute("axis", axis))
        self.nodes.append(node)

    def _dequantize(self, name: str, grid: list[str], axis: int | None = None) -> None:
        output = f"{name}.dq"
        self._add("DequantizeLinear", [f"{name}.q", *grid], output, f"{name}/Dequantize", axis)
        self.made[name] = output


def quantize(
    step: ModelProto, ranges: Sequence[Range], keep: Collection[str], signed: bool
) -> ModelProto:
    """Return the step graph with its layers in int8 (Jacob et al. 2018, section 2).

    The input of a layer goes through Q/DQ. Its weights are int8 with a scale an output. Its bias
    stays float32.

    Args:
        step: The step graph in float32.
        ranges: Of the input of each of `layers(step)`.
        keep: Names of layers that stay float32.
        signed: Use zero point 0, as TensorRT asks. CPUs multiply unsigned activations fastest.
    """
    proto = copy_of(step)
    graph = proto.graph
    every = layers(step)
    chosen = {layer.node for layer in every if layer.name not in keep}
    range_of = {layer.input: range_ for layer, range_ in zip(every, ranges, strict=True)}
    quantizer = _Quantizer(graph, range_of, signed)
    for node in graph.node:
        if node.name in chosen:
            node.input[0] = quantizer.activation(node.input[0])
            node.input[1] = quantizer.weights(node.input[1], output_axis(node))
        quantizer.nodes.append(node)
    del graph.node[:]
    graph.node.extend(quantizer.nodes)
    drop_unused(graph)
    return proto


def tensors(step: ModelProto) -> Iterator[str]:
    """The network's float values that depend on the state, without those that only change their
    shape."""
    shapes = {"Reshape", "Transpose", "Unsqueeze", "Squeeze", "Identity", "Split", "Slice"}
    for node in network_nodes(step.graph):
        if node.op_type not in shapes:
            yield from node.output
