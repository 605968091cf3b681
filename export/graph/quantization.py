"""The network inside a step graph in int8, as Q/DQ pairs around its layers."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from onnx import GraphProto, ModelProto, NodeProto, helper, numpy_helper

from .dims import Dims
from .edit import copy_of, drop_unused
from .precision import network_nodes, scope

WEIGHTED: dict[str, int | None] = {"Conv": 0, "ConvTranspose": 1, "Gemm": None, "MatMul": -1}
"""Operators with weights that are quantized, and the axis of the weights' outputs; Gemm's depends
on transB."""


@dataclass(frozen=True)
class Layer:
    """A node with weights.

    Attributes:
        name: The module that it came from.
        node: Its own name.
        input: The value that goes in.
        weight: The constant that it multiplies by.
        multiply_adds: Per sample.
    """

    name: str
    node: str
    input: str
    weight: str
    multiply_adds: int


def layers(step: ModelProto) -> list[Layer]:
    """Return the network's layers that can be quantized, in order."""
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
            # ONNX Runtime has no product of integers with a vector, or with a stack of matrices.
            if node.op_type == "MatMul" and len(weight.dims) != 2:
                continue
            # Each output element sums over all weights that lead to its channel.
            elements = math.prod(abs(d) for d in dims.but_for_the_batch(node.output[0]) or [0])
            fan_in = math.prod(weight.dims) // weight.dims[output_axis(node)]
            found.append(
                Layer(scope(node), node.name, node.input[0], weight.name, elements * fan_in)
            )
    return found


def output_axis(node: NodeProto) -> int:
    """Return the axis of the weights that counts the outputs."""
    axis = WEIGHTED[node.op_type]
    if axis is None:
        return 0 if any(a.name == "transB" and a.i for a in node.attribute) else 1
    return axis


@dataclass(frozen=True)
class Range:
    """The values that an activation is quantized over. Values outside are clipped."""

    low: float
    high: float

    def grid(self, signed: bool) -> tuple[np.float32, np.integer]:
        """Return (scale, zero point) of value = scale · (q - zero point).

        q is 0 … 255; signed, -127 … 127 with zero point 0.
        """
        # Zero must be exact: padding and ReLU make many of them.
        low = min(self.low, 0.0)
        high = max(self.high, 0.0)
        if signed:
            return np.float32(max(-low, high, 1e-12) / 127), np.int8(0)
        scale = np.float32(max(high - low, 1e-12) / 255)
        return scale, np.uint8(np.clip(np.round(-low / scale), 0, 255))


def weight_scales(weight: NDArray[np.float32], axis: int) -> NDArray[np.float32]:
    """Return the scale of each output [O] of weights [*, O, *]: the largest is 127."""
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
        """Return the name of a weight that is stored in int8, with one scale per output."""
        if name not in self.made:
            value = numpy_helper.to_array(self.constants[name])
            axis %= value.ndim
            # One scale per output costs nothing at run time, and one large output does not
            # coarsen the others.
            scale = weight_scales(value, axis)
            shape = [-1 if i == axis else 1 for i in range(value.ndim)]
            # Symmetric, -127 … 127: TensorRT requires zero point 0.
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

    The input of a layer goes through Q/DQ. Its weights are int8 with one scale per output. Its bias
    stays float32.

    Args:
        step: The step graph in float32.
        ranges: Of the input of each of `layers(step)`.
        keep: Names of layers that stay float32.
        signed: Use zero point 0, as TensorRT requires. CPUs multiply unsigned activations fastest.
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
