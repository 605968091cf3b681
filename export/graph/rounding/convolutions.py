"""Convolutions that round a lone sample as they round it in a batch."""

from __future__ import annotations

from typing import Any

from onnx import ModelProto, NodeProto, helper

from ..dims import Dims
from ..edit import copy_of, drop_unused
from .emitter import Emitter

BLOCK = 16
"""Channels of a block in ONNX Runtime's own layout, whose convolutions round every batch alike."""


def same_alone(step: ModelProto) -> ModelProto:
    """Return a float32 step graph whose convolutions round a lone sample as they do in a batch.

    ONNX Runtime cuts the convolution of a lone sample among its threads and sums in another order
    than in a batch. It does not if it uses its blocked layout, which takes two-dimensional
    convolutions of whole blocks of channels, or if there are several groups. So a convolution along
    one axis becomes one of height 1. If that is not enough, it becomes one of two groups that read
    the same input.
    """
    proto = copy_of(step)
    graph = proto.graph
    emit = Emitter(graph)
    dims = Dims(proto)
    for node in list(graph.node):
        shape = _kernel(node, emit, dims)
        if shape is None or (len(shape) == 4 and _in_blocks(shape)):
            emit.nodes.append(node)
        else:
            emit.begin(node)
            _convolve(node, shape, emit)
    emit.replace_nodes()
    drop_unused(graph)
    return proto


def _kernel(node: NodeProto, emit: Emitter, dims: Dims) -> tuple[int, ...] | None:
    """Return the shape of a convolution's weights; None for other nodes and for several groups."""
    groups = next((a.i for a in node.attribute if a.name == "group"), 1)
    if node.op_type != "Conv" or groups != 1:
        return None
    if node.input[1] in emit.constants:
        return tuple(emit.constants[node.input[1]].dims)
    # Such as normalized ones, which libraries compute once.
    shape = dims.but_for_the_batch(node.input[1]) or [-1]
    return None if -1 in shape else tuple(shape)


def _in_blocks(shape: tuple[int, ...]) -> bool:
    """Whether ONNX Runtime uses its blocked layout, also from few channels in the plain one."""
    return shape[1] < BLOCK or shape[1] % BLOCK == 0


def _convolve(node: NodeProto, shape: tuple[int, ...], emit: Emitter) -> None:
    given = {a.name: helper.get_attribute_value(a) for a in node.attribute}
    x = node.input[0]
    weight = node.input[1]
    bias = list(node.input[2:])
    flat = len(shape) == 3
    if flat:  # [B, C, L] as [B, C, 1, L]
        axis = emit.integers(2)
        x = emit("Unsqueeze", x, axis)
        weight = emit("Unsqueeze", weight, axis)
        given = _of_height_one(given)
    if (flat or len(shape) == 4) and _in_blocks(shape):
        result = emit("Conv", x, weight, *bias, **given)
    else:
        result = _in_two_groups(x, weight, bias, shape[0], given, emit)
    # The last node takes the old name, so that readers need no change.
    if flat:
        emit("Squeeze", result, emit.integers(2), into=node.output[0])
    else:
        emit("Identity", result, into=node.output[0])


def _of_height_one(given: dict[str, Any]) -> dict[str, Any]:
    """Return the attributes of a convolution along one axis, for one of height 1."""
    attributes = dict(given)
    for name in ("kernel_shape", "strides", "dilations"):
        if name in given:
            attributes[name] = [1, *given[name]]
    if "pads" in given:
        before, after = given["pads"]
        attributes["pads"] = [0, before, 0, after]
    return attributes


def _in_two_groups(
    x: str, weight: str, bias: list[str], outputs: int, given: dict[str, Any], emit: Emitter
) -> str:
    """Write the convolution as two groups, each of half the outputs."""
    odd = outputs % 2
    first = emit.integers(0)
    if odd:
        # Groups must be of one size: the first output is made twice, and cut off below.
        weight = emit("Concat", weight, emit("Gather", weight, first, axis=0), axis=0)
        bias = [emit("Concat", b, emit("Gather", b, first, axis=0), axis=0) for b in bias]
    both = emit("Concat", x, x, axis=1)
    result = emit("Conv", both, weight, *bias, **{**given, "group": 2})
    if odd:
        result = emit("Slice", result, first, emit.integers(outputs), emit.integers(1))
    return result
