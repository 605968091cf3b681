"""Rewrites kernels whose last bits depend on the batch, so that a sample has the same bytes in any.

ONNX Runtime computes some functions 16 values at a time, and what is left over one by one, with
other rounding. Which values are left over depends on the size of the tensor, and so on the batch.
Kernels that several threads share are cut at arbitrary places as well. Three rewrites help:

    tile     a value stands 16 times in a row, so that none is ever left over (Sin, Cos, …)
    compose  the function from operators that round every value alike (Softplus, Elu, …)
    multiply a sum of values that lie in a row is a product with a column of ones: ONNX Runtime
             sums a row in an order that depends on where in memory it begins

`tests/export/test_rounding.py` tries every operator, one by one.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, helper, numpy_helper

from .dims import Dims
from .edit import copy_of, drop_unused

LANES = 16
"""float32 values in the widest vector register of a CPU (AVX-512)."""
TILED = frozenset({"Sin", "Cos", "Acos", "Asin", "Atan", "Log"})
"""Functions that a kernel rounds differently in its vector body and in its scalar tail."""
SUMS = frozenset({"ReduceSum", "ReduceMean", "InstanceNormalization"})
"""Operators that sum rows in an order that depends on where in memory a row begins."""
LARGEST_LOG = 64
"""Values a sample up to which Log is tiled. Of more, several threads may share one call."""
LOG1P_TERMS = 7
"""Of the series of log1p(y) = 2·atanh(y/(2+y)): at y = 1 the next term is 1e-8 of the sum."""


def same_in_any_batch(proto: ModelProto) -> ModelProto:
    """Rewrite, in place, the nodes of a step graph that round differently in another batch.

    Args:
        proto: a graph of float32 values whose first input axis is the batch.

    Returns:
        The same object. Graphs without such nodes stay as they are.
    """
    graph = proto.graph
    dims = Dims(proto)
    emitter = _Emitter(graph)
    for node in list(graph.node):
        rewrite = _rewrite_of(node, dims, emitter)
        if rewrite is None:
            emitter.nodes.append(node)
        else:
            emitter.begin(node)
            rewrite()
    del graph.node[:]
    graph.node.extend(emitter.nodes)
    drop_unused(graph)
    return proto


def _rewrite_of(node: NodeProto, dims: Dims, emit: _Emitter) -> Callable[[], object] | None:
    """What replaces a node, or None for a node that may stay."""
    if not node.input or not _depends_on_batch(shape := dims.but_for_the_batch(node.input[0])):
        return None
    if node.op_type == "Log" and (shape is None or _per_sample(shape) > LARGEST_LOG):
        return lambda: _log(node, emit)
    if node.op_type in TILED and not _aligned(shape):
        return lambda: _tile(node, emit)
    if node.op_type in COMPOSED:
        return lambda: COMPOSED[node.op_type](node, emit)
    if node.op_type == "Pow" and (exponent := _small_power(node, shape, emit)):
        return lambda: _power(node, exponent, emit)
    if axis := _sum_axis(node, shape, emit):
        if node.op_type == "InstanceNormalization":
            return lambda: _instance_norm(node, shape or [], emit)
        return lambda: _reduce(node, shape or [], axis, emit)
    return None


def _depends_on_batch(shape: list[int] | None) -> bool:
    """Whether a value has the batch among its axes. One of unknown shape is taken to."""
    return shape is None or -1 in shape


def _per_sample(shape: list[int]) -> int:
    """The number of values a sample has in a shape whose batch is -1."""
    return abs(math.prod(shape))


def _aligned(shape: list[int] | None) -> bool:
    """Whether each sample's values begin at a multiple of LANES, in every batch."""
    return shape is not None and math.prod(shape[shape.index(-1) + 1 :]) % LANES == 0


class _Emitter:
    """Collects nodes. Those of a rewrite keep the scope of the node that they replace."""

    def __init__(self, graph: GraphProto) -> None:
        self.graph = graph
        self.nodes: list[NodeProto] = []
        self.constants = {t.name: t for t in graph.initializer}
        self._name = self._value = ""

    def begin(self, replaced: NodeProto) -> None:
        self._name = replaced.name
        self._value = replaced.output[0]
        self._count = 0

    def __call__(self, op: str, *inputs: str, into: str = "", **attributes: Any) -> str:
        """Add a node, and return the name of its output; `into`: the name that it must have."""
        self._count += 1
        output = into or f"{self._value}.{self._count}"
        name = f"{self._name}.{self._count}"
        self.nodes.append(helper.make_node(op, [*inputs], [output], name=name, **attributes))
        return output

    def floats(self, value: float) -> str:
        """A scalar constant."""
        return self._constant(f"rounding.{value!r}", np.float32(value))

    def integers(self, *values: int) -> str:
        """A vector of integers."""
        name = "rounding.axes_" + "_".join(map(str, values))
        return self._constant(name, np.array(values, np.int64))

    def ones(self, count: int) -> str:
        """A column of ones, [count, 1]."""
        return self._constant(f"rounding.ones_{count}", np.ones((count, 1), np.float32))

    def index(self, value: int) -> str:
        """A scalar index."""
        return self._constant(f"rounding.index_{value}", np.array(value, np.int64))

    def _constant(self, name: str, value: np.generic | np.ndarray) -> str:
        if name not in self.constants:
            tensor: TensorProto = numpy_helper.from_array(np.asarray(value), name)
            self.constants[name] = tensor
            self.graph.initializer.append(tensor)
        return name


def _tile(node: NodeProto, emit: _Emitter) -> None:
    """f of every value LANES times in a row, of which the first is taken."""
    column = emit("Unsqueeze", node.input[0], emit.integers(-1))
    row = emit("Expand", column, emit.integers(LANES))
    values = emit(node.op_type, row)
    emit("Gather", values, emit.index(0), axis=-1, into=node.output[0])


def _log(node: NodeProto, emit: _Emitter) -> None:
    """log x = asinh((x - 1/x) / 2), the difference as (x - 1)·(x + 1)/(2x), exact near x = 1."""
    x = node.input[0]
    one = emit.floats(1.0)
    two = emit.floats(2.0)
    ratio = emit("Div", emit("Add", x, one), emit("Mul", x, two))
    emit("Asinh", emit("Mul", emit("Sub", x, one), ratio), into=node.output[0])


def _softplus(node: NodeProto, emit: _Emitter) -> None:
    """log(1 + e^x) = max(x, 0) + log1p(e^-|x|), with log1p(y) = 2·atanh(y/(2+y)) as a series."""
    x = node.input[0]
    y = emit("Exp", emit("Neg", emit("Abs", x)))
    s = emit("Div", y, emit("Add", y, emit.floats(2.0)))
    square = emit("Mul", s, s)
    series = emit.floats(1 / (2 * LOG1P_TERMS - 1))
    for k in reversed(range(LOG1P_TERMS - 1)):
        series = emit("Add", emit("Mul", series, square), emit.floats(1 / (2 * k + 1)))
    half = emit("Mul", s, series)
    emit(
        "Add",
        emit("Max", x, emit.floats(0.0)),
        emit("Mul", half, emit.floats(2.0)),
        into=node.output[0],
    )


def _mish(node: NodeProto, emit: _Emitter) -> None:
    """x·tanh(log(1 + e^x)) = x·n/(n + 2), n = e^x·(e^x + 2). Beyond x = 20 it is x."""
    x = node.input[0]
    two = emit.floats(2.0)
    e = emit("Exp", emit("Min", x, emit.floats(20.0)))
    n = emit("Mul", e, emit("Add", e, two))
    emit("Mul", x, emit("Div", n, emit("Add", n, two)), into=node.output[0])


def _elu(alpha: float, gamma: float = 1.0, scaled: bool = False) -> Callable[..., None]:
    """gamma·(max(x, 0) + alpha·(e^min(x, 0) - 1)); scaled: the exponent is divided by alpha."""

    def write(node: NodeProto, emit: _Emitter) -> None:
        given = {a.name: a.f for a in node.attribute}
        a = given.get("alpha", alpha)
        g = given.get("gamma", gamma)
        x = node.input[0]
        zero = emit.floats(0.0)
        low = emit("Min", x, zero)
        low = emit("Div", low, emit.floats(a)) if scaled and a != 1 else low
        low = emit("Sub", emit("Exp", low), emit.floats(1.0))
        low = emit("Mul", low, emit.floats(a)) if a != 1 else low
        high = emit("Max", x, zero)
        if g == 1:
            emit("Add", high, low, into=node.output[0])
        else:
            emit("Mul", emit("Add", high, low), emit.floats(g), into=node.output[0])

    return write


COMPOSED: dict[str, Callable[[NodeProto, _Emitter], None]] = {
    "Softplus": _softplus,
    "Mish": _mish,
    "Elu": _elu(1.0),
    "Celu": _elu(1.0, scaled=True),
    "Selu": _elu(1.67326319217681884765625, 1.05070102214813232421875),
}
"""Functions whose kernels several threads share, by what computes them from other operators."""


def _small_power(node: NodeProto, shape: list[int] | None, emit: _Emitter) -> int:
    """The exponent, 2 or 3, of a Pow of one value a sample; 0 for any other Pow.

    Of a lone value ONNX Runtime takes a general power, of several x·x or x·x·x.
    """
    exponent = emit.constants.get(node.input[1])
    if exponent is None or shape is None or _per_sample(shape) != 1:
        return 0
    values = numpy_helper.to_array(exponent)
    return int(values.item()) if values.size == 1 and values.item() in (2, 3) else 0


def _power(node: NodeProto, exponent: int, emit: _Emitter) -> None:
    x = node.input[0]
    factor = x if exponent == 2 else emit("Mul", x, x)
    emit("Mul", factor, x, into=node.output[0])


def _sum_axis(node: NodeProto, shape: list[int] | None, emit: _Emitter) -> int:
    """The first of the last axes that a node sums over, if samples begin unaligned; otherwise 0."""
    if shape is None or node.op_type not in SUMS or _per_sample(shape) % LANES == 0:
        return 0
    if node.op_type == "InstanceNormalization":
        return 2
    axes = emit.constants.get(node.input[1]) if len(node.input) > 1 else None
    if axes is None:
        return 0
    found = sorted(int(axis) % len(shape) for axis in numpy_helper.to_array(axes).ravel())
    last = list(range(len(shape) - len(found), len(shape)))
    return found[0] if found == last else 0


def _sum_of_rows(rows: str, count: int, emit: _Emitter) -> str:
    """[…, 1]: the sums of rows […, count], as a product with a column of ones."""
    return emit("MatMul", rows, emit.ones(count))


def _reduce(node: NodeProto, shape: list[int], axis: int, emit: _Emitter) -> None:
    count = math.prod(shape[axis:])
    rows = emit("Reshape", node.input[0], emit.integers(*shape[:axis], count))
    found = _sum_of_rows(rows, count, emit)
    if node.op_type == "ReduceMean":
        found = emit("Div", found, emit.floats(float(count)))
    keep = next((a.i for a in node.attribute if a.name == "keepdims"), 1)
    ones = [1] * (len(shape) - axis) if keep else []
    emit("Reshape", found, emit.integers(*shape[:axis], *ones), into=node.output[0])


def _instance_norm(node: NodeProto, shape: list[int], emit: _Emitter) -> None:
    """(x - mean)/sqrt(variance + epsilon)·scale + shift, of each map of each sample."""
    count = math.prod(shape[2:])
    size = emit.floats(float(count))
    epsilon = next((a.f for a in node.attribute if a.name == "epsilon"), 1e-5)
    rows = emit("Reshape", node.input[0], emit.integers(*shape[:2], count))
    centred = emit("Sub", rows, emit("Div", _sum_of_rows(rows, count, emit), size))
    squares = _sum_of_rows(emit("Mul", centred, centred), count, emit)
    variance = emit("Add", emit("Div", squares, size), emit.floats(epsilon))
    scale, shift = (emit("Unsqueeze", name, emit.integers(1)) for name in node.input[1:3])
    factor = emit("Div", scale, emit("Sqrt", variance))
    found = emit("Add", emit("Mul", centred, factor), shift)
    emit("Reshape", found, emit.integers(*shape), into=node.output[0])


BLOCK = 16
"""Channels of a block in ONNX Runtime's own layout, whose convolutions round every batch alike."""


def same_alone(step: ModelProto) -> ModelProto:
    """A float32 step graph whose convolutions round a lone sample as they do in a batch.

    ONNX Runtime cuts the convolution of a lone sample among its threads and sums in another order
    than in a batch, unless it uses its blocked layout, which takes two-dimensional convolutions of
    whole blocks of channels, or there are several groups. So a convolution along one axis becomes
    one of height 1, and where that is not enough, one of two groups that read the same input.
    """
    proto = copy_of(step)
    graph = proto.graph
    emit = _Emitter(graph)
    for node in list(graph.node):
        shape = _kernel(node, emit)
        if shape is None or (len(shape) == 4 and _in_blocks(shape)):
            emit.nodes.append(node)
        else:
            emit.begin(node)
            _convolve(node, shape, emit)
    del graph.node[:]
    graph.node.extend(emit.nodes)
    drop_unused(graph)
    return proto


def _kernel(node: NodeProto, emit: _Emitter) -> tuple[int, ...] | None:
    """The shape of a convolution's weights; None for other nodes, and for one of several groups."""
    if node.op_type != "Conv" or node.input[1] not in emit.constants:
        return None
    groups = next((a.i for a in node.attribute if a.name == "group"), 1)
    return tuple(emit.constants[node.input[1]].dims) if groups == 1 else None


def _in_blocks(shape: tuple[int, ...]) -> bool:
    return shape[1] < BLOCK or shape[1] % BLOCK == 0


def _convolve(node: NodeProto, shape: tuple[int, ...], emit: _Emitter) -> None:
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
        found = emit("Conv", x, weight, *bias, **given)
    else:
        found = _in_two_groups(x, weight, bias, shape[0], given, emit)
    if flat:
        emit("Squeeze", found, emit.integers(2), into=node.output[0])
    else:
        emit("Identity", found, into=node.output[0])


def _of_height_one(given: dict[str, Any]) -> dict[str, Any]:
    """The attributes of a convolution along one axis, for one of height 1."""
    found = dict(given)
    for name in ("kernel_shape", "strides", "dilations"):
        if name in given:
            found[name] = [1, *given[name]]
    if "pads" in given:
        before, after = given["pads"]
        found["pads"] = [0, before, 0, after]
    return found


def _in_two_groups(
    x: str, weight: str, bias: list[str], outputs: int, given: dict[str, Any], emit: _Emitter
) -> str:
    """The convolution as two groups, each of half the outputs. An odd output is made twice."""
    odd = outputs % 2
    first = emit.integers(0)
    if odd:
        weight = emit("Concat", weight, emit("Gather", weight, first, axis=0), axis=0)
        bias = [emit("Concat", b, emit("Gather", b, first, axis=0), axis=0) for b in bias]
    both = emit("Concat", x, x, axis=1)
    found = emit("Conv", both, weight, *bias, **{**given, "group": 2})
    if odd:
        found = emit("Slice", found, first, emit.integers(outputs), emit.integers(1))
    return found
