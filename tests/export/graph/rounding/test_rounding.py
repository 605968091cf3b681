"""export.graph.rounding: every operator gives a sample the same bytes in any batch, and the right
value."""

from collections.abc import Callable

import numpy as np
import onnxruntime
import pytest
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper
from scipy import special

from export.graph.rounding.batches import same_in_any_batch
from export.graph.rounding.convolutions import same_alone

SELU = (1.67326319217681884765625, 1.05070102214813232421875)


def elu(x: np.ndarray, alpha: float = 1.0, gamma: float = 1.0) -> np.ndarray:
    return gamma * np.where(x > 0, x, alpha * np.expm1(x))


def softplus(x: np.ndarray) -> np.ndarray:
    return np.logaddexp(0.0, x)


UNARY: dict[str, tuple[float, float, Callable[[np.ndarray], np.ndarray]]] = {
    "Abs": (-6, 6, np.abs),
    "Acos": (-1, 1, np.arccos),
    "Acosh": (1, 5, np.arccosh),
    "Asin": (-1, 1, np.arcsin),
    "Asinh": (-6, 6, np.arcsinh),
    "Atan": (-6, 6, np.arctan),
    "Atanh": (-0.99, 0.99, np.arctanh),
    "Celu": (-6, 6, elu),
    "Cos": (-50, 50, np.cos),
    "Cosh": (-6, 6, np.cosh),
    "Elu": (-6, 6, elu),
    "Erf": (-6, 6, special.erf),
    "Exp": (-6, 6, np.exp),
    "Gelu": (-6, 6, lambda x: x * special.ndtr(x)),
    "HardSigmoid": (-6, 6, lambda x: np.clip(0.2 * x + 0.5, 0, 1)),
    "HardSwish": (-6, 6, lambda x: x * np.clip(x / 6 + 0.5, 0, 1)),
    "LeakyRelu": (-6, 6, lambda x: np.where(x > 0, x, 0.01 * x)),
    "Log": (1e-3, 50, np.log),
    "Mish": (-30, 30, lambda x: x * np.tanh(softplus(x))),
    "Neg": (-6, 6, np.negative),
    "Reciprocal": (0.1, 6, np.reciprocal),
    "Relu": (-6, 6, lambda x: np.maximum(x, 0)),
    "Selu": (-6, 6, lambda x: elu(x, *SELU)),
    "Sigmoid": (-6, 6, special.expit),
    "Sin": (-50, 50, np.sin),
    "Sinh": (-6, 6, np.sinh),
    "Softplus": (-30, 30, softplus),
    "Softsign": (-6, 6, lambda x: x / (1 + np.abs(x))),
    "Sqrt": (0, 50, np.sqrt),
    "Tan": (-1.5, 1.5, np.tan),
    "Tanh": (-6, 6, np.tanh),
}
REDUCE: dict[str, Callable[..., np.ndarray]] = {
    "ReduceMean": np.mean,
    "ReduceSum": np.sum,
    "ReduceMax": np.max,
    "ReduceL2": lambda x, axis, keepdims: np.sqrt((x**2).sum(axis, keepdims=keepdims)),
    "ReduceSumSquare": lambda x, axis, keepdims: (x**2).sum(axis, keepdims=keepdims),
    "ReduceLogSumExp": special.logsumexp,
}
SHAPES = [(), (1,), (3,), (16,), (17,), (3, 5, 7), (16, 12, 12)]
BATCH = 31


def graph_of(
    op: str, dims: tuple[int, ...], extra: np.ndarray | None = None, **attributes
) -> ModelProto:
    constants = [] if extra is None else [numpy_helper.from_array(extra, "extra")]
    node = helper.make_node(
        op, ["x", *(t.name for t in constants)], ["y"], name="step/op", **attributes
    )
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", *dims])
    y = helper.make_empty_tensor_value_info("y")
    graph = helper.make_graph([node], "step", [x], [y], constants)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)


def runner(proto: ModelProto, threads: int) -> Callable[[np.ndarray], np.ndarray]:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = threads, 3
    session = onnxruntime.InferenceSession(
        proto.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    return lambda x: session.run(None, {"x": aligned(x)})[0]


def aligned(x: np.ndarray) -> np.ndarray:
    """A copy at a multiple of 64 bytes, as an inference library would align it."""
    memory = np.empty(x.nbytes + 64, np.uint8)
    first = -memory.ctypes.data % 64
    copy = memory[first : first + x.nbytes].view(x.dtype).reshape(x.shape)
    copy[...] = x
    return copy


def assert_same_in_any_batch(proto: ModelProto, x: np.ndarray, threads: int = 2) -> np.ndarray:
    """The graph's output for x, after checking that each sample alone gives the same."""
    run = runner(same_in_any_batch(proto), threads)
    alone = np.concatenate([run(x[i : i + 1]) for i in range(len(x))])
    for size in (2, 3, 5, 16, len(x)):
        for first in (0, len(x) - size):
            found = run(x[first : first + size])
            np.testing.assert_array_equal(found, alone[first : first + size], err_msg=f"{size=}")
    return alone


@pytest.mark.parametrize("op", UNARY)
def test_a_function_gives_the_same_bytes_in_any_batch_and_the_right_value(op: str) -> None:
    low, high, reference = UNARY[op]
    generator = np.random.Generator(np.random.Philox(key=1))
    for dims in SHAPES:
        x = generator.uniform(low, high, (BATCH, *dims)).astype(np.float32)
        found = assert_same_in_any_batch(graph_of(op, dims), x)
        # A few units in the last place of float32, of the value and of its summands.
        np.testing.assert_allclose(found, reference(x.astype(np.float64)), rtol=2e-6, atol=3e-7)


@pytest.mark.parametrize("op", ["Celu", "Elu", "Log", "Mish", "Selu", "Softplus"])
def test_a_large_tensor_is_the_same_however_many_threads_share_it(op: str) -> None:
    """Three or five threads split a tensor at places where no vector register begins."""
    low, high, _ = UNARY[op]
    x = np.random.Generator(np.random.Philox(key=2)).uniform(low, high, (16, 16, 32, 32))
    for threads in (3, 5):
        assert_same_in_any_batch(graph_of(op, (16, 32, 32)), x.astype(np.float32), threads)


@pytest.mark.parametrize("op", REDUCE)
@pytest.mark.parametrize("keepdims", [0, 1])
def test_a_sum_is_the_same_in_any_batch(op: str, keepdims: int) -> None:
    generator = np.random.Generator(np.random.Philox(key=3))
    for dims, axes in [
        ((3,), (1,)),
        ((9,), (-1,)),
        ((16,), (1,)),
        ((17,), (1,)),
        ((3, 5, 7), (1, 2, 3)),
        ((3, 5, 7), (3,)),
        ((3, 5, 7), (1,)),
        ((7, 8), (1,)),
        ((3, 5, 7), (2, 3)),
        ((3, 5, 7), (1, 3)),
        ((64, 8, 8), (1,)),
        ((32, 16), (1,)),
        ((12, 4, 8), (1, 2)),
    ]:
        x = generator.uniform(0, 3, (BATCH, *dims)).astype(np.float32)
        proto = graph_of(op, dims, np.array(axes), keepdims=keepdims)
        found = assert_same_in_any_batch(proto, x)
        expected = REDUCE[op](x.astype(np.float64), axis=axes, keepdims=bool(keepdims))
        np.testing.assert_allclose(found, expected, rtol=1e-6)


@pytest.mark.parametrize("dims", [(3, 5), (3, 5, 7), (16, 4, 4), (1, 9, 9)])
def test_a_norm_is_the_same_in_any_batch(dims: tuple[int, ...]) -> None:
    generator = np.random.Generator(np.random.Philox(key=5))
    x = generator.standard_normal((BATCH, *dims)).astype(np.float32)
    scale, shift = generator.standard_normal((2, dims[0])).astype(np.float32)
    proto = graph_of("InstanceNormalization", dims, scale, epsilon=1e-3)
    proto.graph.initializer.append(numpy_helper.from_array(shift, "shift"))
    proto.graph.node[0].input.append("shift")
    found = assert_same_in_any_batch(proto, x)
    axes = tuple(range(2, x.ndim))
    wide = x.astype(np.float64)
    centred = wide - wide.mean(axes, keepdims=True)
    normal = centred / np.sqrt((centred**2).mean(axes, keepdims=True) + 1e-3)
    columns = [-1, *[1] * len(axes)]
    expected = normal * scale.reshape(columns) + shift.reshape(columns)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("exponent", [0.5, 1.7, 2.0, 3.0])
def test_a_power_of_one_value_a_sample_is_the_same_in_any_batch(exponent: float) -> None:
    x = np.random.Generator(np.random.Philox(key=4)).uniform(0.1, 5, BATCH).astype(np.float32)
    found = assert_same_in_any_batch(graph_of("Pow", (), np.float32(exponent)[None]), x)
    np.testing.assert_allclose(found, x.astype(np.float64) ** exponent, rtol=1e-6)


def test_functions_keep_their_parameters() -> None:
    x = np.linspace(-5, 5, BATCH, dtype=np.float32)
    for op, options, expected in (
        ("Elu", {"alpha": 0.3}, elu(x, 0.3)),
        ("Selu", {"alpha": 1.5, "gamma": 0.7}, elu(x, 1.5, 0.7)),
        ("Celu", {"alpha": 2.0}, np.maximum(x, 0) + np.minimum(0, 2 * np.expm1(x / 2))),
    ):
        found = assert_same_in_any_batch(graph_of(op, (), **options), x)
        np.testing.assert_allclose(found, expected, rtol=2e-6, atol=1e-6)


def test_what_needs_no_rewrite_stays_as_it_is() -> None:
    for op, dims in (("Sin", (16,)), ("Cos", (4, 8)), ("Sigmoid", (3,)), ("Relu", ())):
        before = graph_of(op, dims)
        assert (
            same_in_any_batch(graph_of(op, dims)).SerializeToString() == before.SerializeToString()
        )


@pytest.mark.parametrize("kind", [TensorProto.INT64, TensorProto.DOUBLE])
def test_other_types_stay_as_they_are(kind: int) -> None:
    for op, extra in (("ReduceSum", np.array([1])), ("Log", None)):
        proto = graph_of(op, (7,), extra)
        proto.graph.input[0].type.tensor_type.elem_type = kind
        before = proto.SerializeToString()
        assert same_in_any_batch(proto).SerializeToString() == before


@pytest.mark.parametrize(
    ("inputs", "outputs", "size", "kernel"),
    [
        (128, 64, (64,), 3),
        (33, 17, (32,), 5),
        (3, 16, (50,), 3),
        (33, 17, (8, 8), 3),
        (33, 17, (16, 16), 3),
        (24, 8, (8, 8), 3),
        (64, 64, (8, 8), 3),
        (64, 3, (16, 16), 3),
        (12, 20, (4, 4, 4), 3),
        (64, 63, (4, 4, 4), 3),
        (3, 8, (4, 6, 5), 1),
    ],
)
def test_a_convolution_rounds_a_lone_sample_as_in_a_batch(
    inputs: int, outputs: int, size: tuple[int, ...], kernel: int
) -> None:
    generator = np.random.Generator(np.random.Philox(key=6))
    x = generator.standard_normal((16, inputs, *size)).astype(np.float32)
    shape = (outputs, inputs, *[kernel] * len(size))
    weight = (generator.standard_normal(shape) / np.sqrt(inputs)).astype(np.float32)
    pads = [kernel // 2] * 2 * len(size)
    proto = graph_of("Conv", (inputs, *size), weight, kernel_shape=shape[2:], pads=pads)
    bias = generator.standard_normal(outputs).astype(np.float32)
    proto.graph.initializer.append(numpy_helper.from_array(bias, "bias"))
    proto.graph.node[0].input.append("bias")
    expected = runner(proto, 1)(x)
    for threads in (2, 3):
        found = assert_same_in_any_batch(same_alone(proto), x, threads)
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


def model_of(
    nodes: list[NodeProto], dims: tuple[int, ...], constants: dict[str, np.ndarray]
) -> ModelProto:
    """A graph from x to y."""
    graph = helper.make_graph(
        nodes,
        "step",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", *dims])],
        [helper.make_empty_tensor_value_info("y")],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)


@pytest.mark.parametrize("op", ["ReduceMean", "ReduceSum"])
@pytest.mark.parametrize("keepdims", [0, 1])
def test_a_sum_over_an_axis_before_the_batch(op: str, keepdims: int) -> None:
    """As in networks of sequences that have the tokens first."""
    make = helper.make_node
    proto = model_of(
        [
            make("Transpose", ["x"], ["t"], name="step/t", perm=[1, 0, 2]),
            make(op, ["t", "axes"], ["s"], name="step/s", keepdims=keepdims),
            make("Reshape", ["s", "shape"], ["y"], name="step/y"),
        ],
        (5, 3),
        {"axes": np.array([0]), "shape": np.array([-1, 3])},
    )
    x = np.random.Generator(np.random.Philox(key=7)).uniform(0, 3, (BATCH, 5, 3))
    found = assert_same_in_any_batch(proto, x.astype(np.float32))
    np.testing.assert_allclose(found, REDUCE[op](x, axis=1, keepdims=False), rtol=1e-6)


def test_values_of_a_file_may_have_numbers_in_their_names() -> None:
    """As those of TorchScript: input, input.1, input.2."""
    make = helper.make_node
    proto = model_of(
        [
            make("Elu", ["x"], ["input"], name="step/elu"),
            make("Neg", ["input"], ["input.1"], name="step/neg"),
            make("Add", ["input.1", "x"], ["y"], name="step/add"),
        ],
        (3,),
        {},
    )
    x = np.random.Generator(np.random.Philox(key=8)).uniform(-3, 3, (BATCH, 3)).astype(np.float32)
    found = assert_same_in_any_batch(proto, x)
    names = [name for node in proto.graph.node for name in node.output]
    assert len(names) == len({*names})
    np.testing.assert_allclose(found, x - elu(x), rtol=0, atol=1e-6)


def test_a_convolution_with_computed_weights_rounds_a_lone_sample_as_in_a_batch() -> None:
    """As weights that are normalized."""
    generator = np.random.Generator(np.random.Philox(key=9))
    make = helper.make_node
    proto = model_of(
        [
            make("Mul", ["weight", "norm"], ["normal"], name="step/mul"),
            make("Conv", ["x", "normal"], ["y"], name="step/conv", pads=[1, 1, 1, 1]),
        ],
        (33, 16, 16),
        {
            "weight": generator.standard_normal((17, 33, 3, 3)).astype(np.float32),
            "norm": generator.uniform(0, 0.1, (17, 1, 1, 1)).astype(np.float32),
        },
    )
    x = generator.standard_normal((16, 33, 16, 16)).astype(np.float32)
    expected = runner(proto, 1)(x)
    for threads in (2, 3):
        found = assert_same_in_any_batch(same_alone(proto), x, threads)
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)
