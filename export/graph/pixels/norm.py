"""Norms over groups of channels with pixels first: a scale and a shift of their input."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray
from onnx import NodeProto, TensorProto, numpy_helper

from .maps import Map, Writer


def is_plain_norm(node: NodeProto, constants: Mapping[str, TensorProto]) -> bool:
    """Whether a node is an InstanceNormalization without an affine part of its own."""
    if node.op_type != "InstanceNormalization" or not constants.keys() >= {*node.input[1:]}:
        return False
    scale, shift = (numpy_helper.to_array(constants[name]) for name in node.input[1:])
    return bool((scale == 1).all() and (shift == 0).all())


def normalized(writer: Writer, m: Map, groups: int) -> Map:
    """Return a map normalized over groups of its channels, which reads the same tensor.

    The writer's node is the norm.

    The variance is the mean of squares less the square of the mean, which is exact enough because
    values in networks are centred near zero.
    """
    emit = writer.emit
    epsilon = next((a.f for a in writer.node.attribute if a.name == "epsilon"), 1e-5)
    # The mean and the mean square of each channel of the tensor alone, [B, C].
    mean = emit("ReduceMean", m.tensor, writer.constant([0]), keepdims=0)
    squares = emit("Mul", m.tensor, m.tensor)
    square = emit("ReduceMean", squares, writer.constant([0]), keepdims=0)

    # From the tensor's to the map's: E(a·x) = a·E(x); E((x + b)²) = E(x²) + b·(2·E(x) + b).
    if m.scale:
        mean = emit("Mul", mean, m.scale)
        square = emit("Mul", square, emit("Mul", m.scale, m.scale))
    if m.shift:
        twice = emit("Add", emit("Add", mean, mean), m.shift)
        square = emit("Add", square, emit("Mul", m.shift, twice))
        mean = emit("Add", mean, m.shift)

    # From channels to groups: a product with a block matrix averages each group and repeats it.
    average = writer.constant(_averages(groups, m.channels), np.float32)
    mean = emit("MatMul", mean, average)
    square = emit("MatMul", square, average)

    # (scale·x + shift - mean) / deviation is again a scale and a shift of the tensor.
    variance = emit("Sub", square, emit("Mul", mean, mean))
    deviation = emit("Sqrt", emit("Add", variance, writer.constant(epsilon, np.float32)))
    inverse = emit("Reciprocal", deviation)
    scale = emit("Mul", m.scale, inverse) if m.scale else inverse
    centre = emit("Sub", m.shift, mean) if m.shift else emit("Neg", mean)
    return replace(m, scale=scale, shift=emit("Mul", centre, inverse))


def _averages(groups: int, channels: int) -> NDArray[np.float64]:
    """Return the matrix [channels, channels] that averages over each group of channels."""
    size = channels // groups
    block = np.full([size, size], groups / channels)
    return np.kron(np.eye(groups), block).astype(np.float64)
