"""Functions of single values that round every value alike, in any number."""

from __future__ import annotations

from collections.abc import Callable

from onnx import NodeProto

from .emitter import Emitter

LANES = 16
"""float32 values in the widest vector register of a CPU (AVX-512)."""
LOG1P_TERMS = 7
"""Terms of log1p(y) = 2·atanh(y/(2+y)): at y = 1 the next term is 1e-8 of the sum."""


def tile(node: NodeProto, emit: Emitter) -> None:
    """f of every value LANES times in a row, of which the first is taken."""
    column = emit("Unsqueeze", node.input[0], emit.integers(-1))
    # Whole registers only: the kernel's scalar tail, which rounds differently, has no work left.
    row = emit("Expand", column, emit.integers(LANES))
    values = emit(node.op_type, row)
    emit("Gather", values, emit.index(0), axis=-1, into=node.output[0])


def log(node: NodeProto, emit: Emitter) -> None:
    """log x = asinh((x - 1/x) / 2), the difference as (x - 1)·(x + 1)/(2x), exact near x = 1."""
    x = node.input[0]
    one = emit.floats(1.0)
    two = emit.floats(2.0)
    ratio = emit("Div", emit("Add", x, one), emit("Mul", x, two))
    emit("Asinh", emit("Mul", emit("Sub", x, one), ratio), into=node.output[0])


def _softplus(node: NodeProto, emit: Emitter) -> None:
    """log(1 + e^x) = max(x, 0) + log1p(e^-|x|), with log1p(y) = 2·atanh(y/(2+y)) as a series."""
    x = node.input[0]
    # e^-|x| is at most 1, so it cannot overflow and the series converges.
    y = emit("Exp", emit("Neg", emit("Abs", x)))
    s = emit("Div", y, emit("Add", y, emit.floats(2.0)))
    # atanh(s) = s·(1 + s²/3 + s⁴/5 + …) by Horner's rule, from the last term.
    square = emit("Mul", s, s)
    series = emit.floats(1 / (2 * LOG1P_TERMS - 1))
    for k in reversed(range(LOG1P_TERMS - 1)):
        series = emit("Add", emit("Mul", series, square), emit.floats(1 / (2 * k + 1)))
    half = emit("Mul", s, series)
    positive = emit("Max", x, emit.floats(0.0))
    emit("Add", positive, emit("Mul", half, emit.floats(2.0)), into=node.output[0])


def _mish(node: NodeProto, emit: Emitter) -> None:
    """x·tanh(log(1 + e^x)) = x·n/(n + 2), n = e^x·(e^x + 2). Beyond x = 20 it is x."""
    x = node.input[0]
    two = emit.floats(2.0)
    # e^20·(e^20 + 2) is still finite in float32, and n/(n + 2) is already 1.
    e = emit("Exp", emit("Min", x, emit.floats(20.0)))
    n = emit("Mul", e, emit("Add", e, two))
    emit("Mul", x, emit("Div", n, emit("Add", n, two)), into=node.output[0])


def _elu(alpha: float, gamma: float = 1.0, scaled: bool = False) -> Callable[..., None]:
    """gamma·(max(x, 0) + alpha·(e^min(x, 0) - 1)); scaled: the exponent is divided by alpha."""

    def write(node: NodeProto, emit: Emitter) -> None:
        given = {a.name: a.f for a in node.attribute}
        a = given.get("alpha", alpha)
        g = given.get("gamma", gamma)
        x = node.input[0]
        zero = emit.floats(0.0)
        # Both branches are computed for every value: the other one is then exactly zero.
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


COMPOSED: dict[str, Callable[[NodeProto, Emitter], None]] = {
    "Softplus": _softplus,
    "Mish": _mish,
    "Elu": _elu(1.0),
    "Celu": _elu(1.0, scaled=True),
    "Selu": _elu(1.67326319217681884765625, 1.05070102214813232421875),
}
"""Functions whose kernels several threads share, and what composes them from other operators."""


def power(node: NodeProto, exponent: int, emit: Emitter) -> None:
    """x² or x³ as multiplications."""
    x = node.input[0]
    factor = x if exponent == 2 else emit("Mul", x, x)
    emit("Mul", factor, x, into=node.output[0])
