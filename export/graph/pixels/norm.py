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

    The variance of a channel is the mean of its squares less the square of its mean. That is exact
    enough, because a convolution without its bias is centred near zero.
    """
    emit = writer.emit
    epsilon = next((a.f for a in writer.node.attribute if a.name == "epsilon"), 1e-5)
    # The mean and the variance of each channel of the tensor alone, [B, C].
    mean = emit("ReduceMean", m.tensor, writer.constant([0]), keepdims=0)
    squares = emit("Mul", m.tensor, m.tensor)
    square = emit("ReduceMean", squares, writer.constant([0]), keepdims=0)
    spread = emit("Sub", square, emit("Mul", mean, mean))
    # Rounding may leave less than nothing of a channel whose pixels are all alike.
    spread = emit("Max", spread, writer.constant(0, np.float32))

    # From the tensor's to the map's.
    if m.scale:
        mean = emit("Mul", mean, m.scale)
        spread = emit("Mul", spread, emit("Mul", m.scale, m.scale))
    shifted = emit("Add", mean, m.shift) if m.shift else mean

    # From channels to groups: a product with a block matrix averages each group and repeats it.
    # A shift that all channels of a group share cancels before anything is squared; twice, because
    # the average of large equal numbers is a little off.
    average = writer.constant(_averages(groups, m.channels), np.float32)
    off = emit("Sub", shifted, emit("MatMul", shifted, average))
    off = emit("Sub", off, emit("MatMul", off, average))
    variance = emit("MatMul", emit("Add", spread, emit("Mul", off, off)), average)

    # (scale·x + shift - mean) / deviation is again a scale and a shift of the tensor.
    deviation = emit("Sqrt", emit("Add", variance, writer.constant(epsilon, np.float32)))
    inverse = emit("Reciprocal", deviation)
    scale = emit("Mul", m.scale, inverse) if m.scale else inverse
    return replace(m, scale=scale, shift=emit("Mul", emit("Sub", off, mean), inverse))


def _averages(groups: int, channels: int) -> NDArray[np.float64]:
    """Return the matrix [channels, channels] that averages over each group of channels."""
    size = channels // groups
    block = np.full([size, size], groups / channels)
    return np.kron(np.eye(groups), block).astype(np.float64)
