"""Rewrites kernels whose last bits depend on the batch, so that a sample has the same bytes in any.

ONNX Runtime computes some functions 16 values at a time, and the values left over one by one, with
different rounding. Which values are left over depends on the size of the tensor, and so on the
batch. Kernels that several threads share are cut at arbitrary places as well. Three rewrites help:

    tile     each value is repeated 16 times, so that none is left over (Sin, Cos, …)
    compose  the function from operators that round every value alike (Softplus, Elu, …)
    multiply a sum of values in a row is a product with ones: ONNX Runtime
             sums a row in an order that depends on where in memory it begins

`tests/export/graph/rounding/test_rounding.py` tries every operator, one by one.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from onnx import ModelProto, NodeProto, numpy_helper

from ..dims import Dims
from ..edit import drop_unused
from .emitter import Emitter
from .functions import COMPOSED, LANES, log, power, tile
from .sums import instance_norm, reduce

TILED = frozenset({"Sin", "Cos", "Acos", "Asin", "Atan", "Log"})
"""Functions that a kernel rounds differently in its vector body and in its scalar tail."""
SUMS = frozenset({"ReduceSum", "ReduceMean", "InstanceNormalization"})
"""Operators that sum rows in an order that depends on where in memory a row begins."""
LARGEST_LOG = 64
"""Values a sample up to which Log is tiled. Of more, several threads may share one call."""


def same_in_any_batch(proto: ModelProto) -> ModelProto:
    """Rewrite, in place, the nodes of a step graph that round differently in another batch.

    Args:
        proto: A graph whose first input axis is the batch. Its float32 values are looked at.

    Returns:
        The same object. Graphs without such nodes stay as they are.
    """
    graph = proto.graph
    dims = Dims(proto)
    emit = Emitter(graph)
    for node in list(graph.node):
        rewrite = _rewrite_of(node, dims, emit)
        if rewrite is None:
            emit.nodes.append(node)
        else:
            emit.begin(node)
            rewrite()
    emit.replace_nodes()
    drop_unused(graph)
    return proto


def _rewrite_of(node: NodeProto, dims: Dims, emit: Emitter) -> Callable[[], object] | None:
    """Return what replaces a node, or None for a node that may stay."""
    if not node.input or not _depends_on_batch(shape := dims.but_for_the_batch(node.input[0])):
        return None
    # Whole numbers round nothing, and the rewrites' constants are of float32.
    if not dims.is_float32(node.input[0]):
        return None
    # A large Log may be shared by threads, which cut it anywhere: tiling is not enough then.
    if node.op_type == "Log" and (shape is None or _per_sample(shape) > LARGEST_LOG):
        return lambda: log(node, emit)
    if node.op_type in TILED and not _aligned(shape):
        return lambda: tile(node, emit)
    if node.op_type in COMPOSED:
        return lambda: COMPOSED[node.op_type](node, emit)
    if node.op_type == "Pow" and (exponent := _small_power(node, shape, emit)):
        return lambda: power(node, exponent, emit)
    if axes := _summed_axes(node, shape, emit):
        if node.op_type == "InstanceNormalization":
            return lambda: instance_norm(node, shape or [], emit)
        return lambda: reduce(node, shape or [], axes, emit)
    return None


def _depends_on_batch(shape: list[int] | None) -> bool:
    """Whether a value has the batch among its axes. One of unknown shape is assumed to."""
    return shape is None or -1 in shape


def _per_sample(shape: list[int]) -> int:
    """Return the number of values a sample has in a shape whose batch is -1."""
    return abs(math.prod(shape))


def _aligned(shape: list[int] | None) -> bool:
    """Whether each sample's values begin at a multiple of LANES, in every batch."""
    return shape is not None and math.prod(shape[shape.index(-1) + 1 :]) % LANES == 0


def _small_power(node: NodeProto, shape: list[int] | None, emit: Emitter) -> int:
    """Return the exponent, 2 or 3, of a Pow of one value a sample; 0 for any other Pow.

    ONNX Runtime computes a general power of a lone value, but x·x or x·x·x of several values.
    """
    exponent = emit.constants.get(node.input[1])
    if exponent is None or shape is None or _per_sample(shape) != 1:
        return 0
    values = numpy_helper.to_array(exponent)
    return int(values.item()) if values.size == 1 and values.item() in (2, 3) else 0


def _summed_axes(node: NodeProto, shape: list[int] | None, emit: Emitter) -> range:
    """Return the axes that a node sums over if they are in a row, and not all alike in any batch.

    They are if samples begin aligned and the axes are the last ones. Such nodes, and others, stay
    as they are: the range is empty.
    """
    none = range(0)
    if shape is None or node.op_type not in SUMS:
        return none
    aligned = _per_sample(shape) % LANES == 0
    if node.op_type == "InstanceNormalization":
        return none if aligned else range(2, len(shape))
    axes = emit.constants.get(node.input[1]) if len(node.input) > 1 else None
    if axes is None:
        return none
    summed = sorted(int(axis) % len(shape) for axis in numpy_helper.to_array(axes).ravel())
    block = range(summed[0], summed[-1] + 1) if summed else none
    # Sums over other axes, such as channels, are cut among threads by the size of the batch.
    if aligned and block.stop == len(shape):
        return none
    # A sum over the batch itself mixes samples, which no rewrite mends.
    return block if list(block) == summed and shape.index(-1) not in block else none
