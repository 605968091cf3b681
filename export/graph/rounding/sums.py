"""Sums of rows that do not depend on where in memory a row begins: products with ones."""

from __future__ import annotations

import math

from onnx import NodeProto

from .emitter import Emitter


def _sum_of_rows(rows: str, count: int, emit: Emitter) -> str:
    """Return the sums […, 1] of rows […, count]."""
    return emit("MatMul", rows, emit.ones(count, 1))


def reduce(node: NodeProto, shape: list[int], axes: range, emit: Emitter) -> None:
    """ReduceSum or ReduceMean over successive axes, of a value of this shape."""
    count = math.prod(shape[axes.start : axes.stop])
    after = shape[axes.stop :]
    if after:
        # As rows [count, what follows], of which a row of ones makes one.
        rest = -1 if -1 in after else math.prod(after)
        size = (*shape[: axes.start], count, rest)
        rows = emit("Reshape", node.input[0], emit.integers(*size))
        total = emit("MatMul", emit.ones(1, count), rows)
    else:
        rows = emit("Reshape", node.input[0], emit.integers(*shape[: axes.start], count))
        total = _sum_of_rows(rows, count, emit)
    if node.op_type == "ReduceMean":
        total = emit("Div", total, emit.floats(float(count)))
    # The product leaves one axis of size 1; the node may keep several of them, or none.
    keep = next((a.i for a in node.attribute if a.name == "keepdims"), 1)
    ones = [1] * len(axes) if keep else []
    size = (*shape[: axes.start], *ones, *after)
    emit("Reshape", total, emit.integers(*size), into=node.output[0])


def instance_norm(node: NodeProto, shape: list[int], emit: Emitter) -> None:
    """(x - mean)/sqrt(variance + epsilon)·scale + shift, of each map of each sample."""
    count = math.prod(shape[2:])
    size = emit.floats(float(count))
    epsilon = next((a.f for a in node.attribute if a.name == "epsilon"), 1e-5)
    rows = emit("Reshape", node.input[0], emit.integers(*shape[:2], count))
    # The variance of centred values, because the mean of squares would cancel for large means.
    centred = emit("Sub", rows, emit("Div", _sum_of_rows(rows, count, emit), size))
    squares = _sum_of_rows(emit("Mul", centred, centred), count, emit)
    variance = emit("Add", emit("Div", squares, size), emit.floats(epsilon))
    # One factor per map: scale and deviation meet before they touch the pixels.
    scale, shift = (emit("Unsqueeze", name, emit.integers(1)) for name in node.input[1:3])
    factor = emit("Div", scale, emit("Sqrt", variance))
    normalized = emit("Add", emit("Mul", centred, factor), shift)
    emit("Reshape", normalized, emit.integers(*shape), into=node.output[0])
