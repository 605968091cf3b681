"""The network in float16 and int8: what stays float32, what int8 costs, which layers it must not
change, and what fails a build."""

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, numpy_helper

from export.build import build
from export.errors import ExportError
from export.graph import fuse
from export.graph.calibrate import QUICK_CALIBRATION, Trajectories, best, ranges, session
from export.graph.headroom import headroom
from export.graph.precision import NORMS, network_nodes, scope, tensors, to_float16
from export.graph.quantization import Layer, Range, layers, quantize, weight_scales
from export.graph.sensitivity import Judge, choose, median_psnr
from export.proof.plan import QUICK, Bounds
from export.sources.module import from_module
from export.sources.run import from_run
from export.sources.torch_model import TorchModel
from runtime import Bundle, RequestError, Sampler
from runtime.backends.onnxruntime import OnnxRuntime
from runtime.diffusion.program import R
from runtime.files import from_json

from ...traces import Traces, traced_step


@pytest.fixture(scope="module")
def bundle(tiny_bundle: Path) -> Bundle:
    return Bundle.load(tiny_bundle)


@pytest.fixture(scope="module")
def steps(traces: Traces, tiny_run: Path) -> dict[str, onnx.ModelProto]:
    return fuse.steps(from_run(tiny_run, 2.0), traces.read())


@pytest.fixture(scope="module")
def step(steps: dict[str, onnx.ModelProto]) -> onnx.ModelProto:
    return steps["step.onnx"]


@pytest.fixture(scope="module")
def seen(step: onnx.ModelProto, bundle: Bundle) -> list[tuple[Range, Range]]:
    return ranges(step, bundle, QUICK_CALIBRATION)


def pictures(proto: onnx.ModelProto, bundle: Bundle, count: int = 8) -> np.ndarray:
    return Trajectories(bundle, count, 77).run(
        session(proto), bundle.program("dpmpp_2m", 12, guidance=1.0)
    )


def types(proto: onnx.ModelProto) -> dict[str, int]:
    inferred = onnx.shape_inference.infer_shapes(proto, strict_mode=True).graph
    return {
        v.name: v.type.tensor_type.elem_type
        for v in [*inferred.value_info, *inferred.input, *inferred.output]
    }


def test_float16_is_the_network_alone_and_its_norms_and_softmax_stay_float32(
    steps: dict[str, onnx.ModelProto],
) -> None:
    for proto in steps.values():
        half, inside = to_float16(proto), {n.name for n in network_nodes(proto.graph)}
        onnx.checker.check_model(half, full_check=True)
        found = types(half)
        assert all(
            found[i.name] != TensorProto.FLOAT16 for i in [*half.graph.input, *half.graph.output]
        )
        computed = {
            n.name: {found.get(o) for o in n.output} for n in half.graph.node if n.op_type != "Cast"
        }
        halves = {name for name, kinds in computed.items() if TensorProto.FLOAT16 in kinds}
        assert halves <= inside
        assert all(n.name in halves for n in half.graph.node if n.op_type == "Conv")
        norms = {scope(n) for n in half.graph.node if n.op_type in NORMS}
        for node in half.graph.node:
            if (
                node.op_type == "Softmax"
                or scope(node) in norms
                or scope(node).startswith("network.time")
            ):
                assert node.name not in halves, node.name


def test_float16_halves_the_weights_and_hardly_moves_the_pictures(
    step: onnx.ModelProto, bundle: Bundle
) -> None:
    half = to_float16(step)
    assert len(half.SerializeToString()) < 0.75 * len(step.SerializeToString())
    assert median_psnr(pictures(half, bundle), pictures(step, bundle), bundle.sample_range) > 45


@pytest.mark.parametrize("signed", [False, True])
def test_int8_is_q_dq_with_a_scale_an_output_and_float_biases(
    step: onnx.ModelProto, seen: list[tuple[Range, Range]], bundle: Bundle, signed: bool
) -> None:
    proto = quantize(step, [pair[signed] for pair in seen], (), signed)
    onnx.checker.check_model(proto, full_check=True)
    constants = {t.name: numpy_helper.to_array(t) for t in proto.graph.initializer}
    made = {o: n for n in proto.graph.node for o in n.output}
    names = {layer.node for layer in layers(step)}
    for node in (n for n in proto.graph.node if n.name in names):
        value, weight = made[node.input[0]], made[node.input[1]]
        assert value.op_type == weight.op_type == "DequantizeLinear"
        zero = constants[value.input[2]]
        assert zero.dtype == (np.int8 if signed else np.uint8)
        assert not (signed and zero.any())
        assert constants[weight.input[1]].shape == (len(constants[node.input[2]]),), (
            "a scale an output"
        )
        assert not constants[weight.input[2]].any()
        assert constants[node.input[2]].dtype == np.float32
    assert median_psnr(pictures(proto, bundle), pictures(step, bundle), bundle.sample_range) > 25


def test_weights_are_rounded_by_less_than_half_a_step_of_their_own_output() -> None:
    weight = (
        np.random.default_rng(0).normal(size=(5, 3, 3, 3)).astype(np.float32)
        * np.logspace(-3, 3, 5)[:, None, None, None]
    )
    scale = weight_scales(weight.astype(np.float32), 0)
    q = np.round(weight / scale[:, None, None, None])
    assert np.abs(q).max() == 127
    assert (
        np.abs(q * scale[:, None, None, None] - weight).max(axis=(1, 2, 3)) <= 0.5001 * scale
    ).all()


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize(
    ("low", "high"), [(-0.28, 6.0), (-3.0, 2.0), (0.0, 0.0), (1.0, 5.0), (-7.0, -2.0)]
)
def test_zero_has_a_number_of_its_own_and_the_range_fits(
    low: float, high: float, signed: bool
) -> None:
    scale, zero = Range(low, high).grid(signed)
    ends = (np.array([-127, 127]) if signed else np.array([0, 255])) * scale - int(zero) * scale
    assert scale > 0
    assert ends[0] <= min(low, 0) + scale
    assert ends[1] >= max(high, 0) - scale


def test_a_lone_outlier_is_cut_off() -> None:
    values = np.random.default_rng(0).normal(size=20000).astype(np.float32)
    values[0] = 12.0
    chosen = best(values, Range(float(values.min()), 12.0), signed=False)
    assert 3.5 < chosen.high < 12.0


class Net(torch.nn.Module):
    """Two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = torch.nn.Conv2d(3, 8, 3, padding=1), torch.nn.Conv2d(8, 3, 1, stride=1)

    def forward(self, x: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
        return self.b(torch.relu(self.a(x)) + time[:, None, None, None])


@pytest.fixture(scope="module")
def two_layers() -> tuple[TorchModel, onnx.ModelProto]:
    """The network, and its step graph."""
    torch.manual_seed(0)
    model = from_module(
        Net().eval(), sample_shape=(3, 8, 8), prediction="epsilon", schedule="linear", name="net"
    )
    return model, traced_step(model, False)


def small_step(
    nodes: list[onnx.NodeProto], constants: dict[str, np.ndarray], rank: int = 3
) -> onnx.ModelProto:
    """A step graph whose network has these nodes, from state [B, 4, 6] to y."""
    value = onnx.helper.make_tensor_value_info
    for i, node in enumerate(nodes):
        node.name = f"network.n{i}/{node.op_type}_{i}"
    graph = onnx.helper.make_graph(
        nodes,
        "step",
        [value("state", TensorProto.FLOAT, ["batch", 4, 6])],
        [value("y", TensorProto.FLOAT, [None] * rank)],
        [numpy_helper.from_array(array, name) for name, array in constants.items()],
    )
    opset = [onnx.helper.make_opsetid("", 20)]
    return onnx.helper.make_model(graph, opset_imports=opset, ir_version=10)


def test_float16_of_a_norm_a_transpose_and_a_product_runs() -> None:
    """ONNX Runtime crashes if the conversion stands before the Transpose."""
    generator = np.random.default_rng(0)
    constants = {
        "scale": np.ones(6, np.float32),
        "w": generator.standard_normal((6, 6)).astype(np.float32),
        "half": np.array(0.5, np.float32),
        "pads": np.array([0, 0, 0, 0, 0, 1]),
        "yes": np.array(True),
    }
    branch = onnx.helper.make_graph(
        [onnx.helper.make_node("Relu", ["h"], ["inside"])],
        "branch",
        [],
        [onnx.helper.make_tensor_value_info("inside", TensorProto.FLOAT, [None] * 3)],
    )
    make = onnx.helper.make_node
    step = small_step(
        [
            make("LayerNormalization", ["state", "scale"], ["normal"]),
            make("Transpose", ["normal"], ["turned"], perm=[1, 0, 2]),
            make("MatMul", ["turned", "w"], ["product"]),
            make("Pad", ["product", "pads", "half"], ["padded"]),
            make("Tanh", ["padded"], ["h"]),
            make("If", ["yes"], ["branch"], then_branch=branch, else_branch=branch),
            make("Abs", ["branch"], ["y"]),
        ],
        constants,
    )
    half = to_float16(step)
    types = {t.name: t.data_type for t in half.graph.initializer}
    assert types["w.half"] == types["half.half"] == TensorProto.FLOAT16
    x = generator.standard_normal((3, 4, 6)).astype(np.float32)
    found, expected = (session(proto).run(["y"], {"state": x})[0] for proto in (half, step))
    np.testing.assert_allclose(found, expected, atol=2e-2)
    assert not np.array_equal(found, expected)


def test_values_that_are_not_float32_are_not_observed() -> None:
    make = onnx.helper.make_node
    step = small_step(
        [
            make("Shape", ["state"], ["shape"]),
            make("Greater", ["state", "zero"], ["positive"]),
            make("Where", ["positive", "state", "zero"], ["w"]),
            make("Expand", ["w", "shape"], ["y"]),
        ],
        {"zero": np.array(0, np.float32)},
    )
    assert list(tensors(step)) == ["w", "y"]


def test_what_follows_a_branch_is_the_network_too() -> None:
    make = onnx.helper.make_node
    value = onnx.helper.make_tensor_value_info("inside", TensorProto.FLOAT, None)
    branch = onnx.helper.make_graph([make("Relu", ["state"], ["inside"])], "branch", [], [value])
    step = small_step(
        [
            make("If", ["yes"], ["a"], then_branch=branch, else_branch=branch),
            make("MatMul", ["a", "matrix"], ["y"]),
        ],
        {"yes": np.array(True), "matrix": np.zeros((6, 5), np.float32)},
        rank=2,
    )
    assert [layer.weight for layer in layers(step)] == ["matrix"]


def test_products_with_stacks_and_vectors_are_not_quantized() -> None:
    make = onnx.helper.make_node
    step = small_step(
        [
            make("MatMul", ["state", "matrix"], ["a"]),
            make("MatMul", ["a", "stack"], ["b"]),
            make("MatMul", ["b", "vector"], ["y"]),
        ],
        {
            "matrix": np.zeros((6, 5), np.float32),
            "stack": np.zeros((1, 5, 5), np.float32),
            "vector": np.zeros(5, np.float32),
        },
        rank=2,
    )
    assert [layer.weight for layer in layers(step)] == ["matrix"]


def test_multiply_adds_are_those_of_the_layers(
    two_layers: tuple[TorchModel, onnx.ModelProto],
) -> None:
    found = layers(two_layers[1])
    assert [(layer.name, layer.multiply_adds) for layer in found] == [
        ("network.a", 64 * 8 * 27),
        ("network.b", 64 * 3 * 8),
    ]
    assert isinstance(found[0], Layer)


def test_the_layer_that_does_the_damage_is_the_one_that_stays_float32(
    step: onnx.ModelProto, seen: list[tuple[Range, Range]], bundle: Bundle
) -> None:
    """If one layer's range is spoiled, that layer is ranked first and left out, and then the bound
    is met."""
    every, spoiled = layers(step), [pair[False] for pair in seen]
    victim = next(i for i, layer in enumerate(every) if layer.name == "network.last")
    spoiled[victim] = Range(-2000.0, 2000.0)
    chosen = choose(step, Judge(step, bundle, QUICK_CALIBRATION), spoiled, False, 35.0)
    assert chosen.keep == (every[victim].name,)
    assert min(chosen.damage, key=lambda name: chosen.damage[name]) == every[victim].name
    assert min(chosen.reached.values()) >= 35.0
    assert chosen.float_share == pytest.approx(
        every[victim].multiply_adds / sum(layer.multiply_adds for layer in every)
    )


def test_where_no_layer_may_be_int8_the_worst_are_named(
    two_layers: tuple[TorchModel, onnx.ModelProto],
) -> None:
    model, step = two_layers
    seen = ranges(step, model, QUICK_CALIBRATION)
    judge = Judge(step, model, QUICK_CALIBRATION)
    with pytest.raises(
        ExportError, match=r"int8 misses 150 dB with any layer in it. The worst: network\.\S+ alone"
    ):
        choose(step, judge, [pair[False] for pair in seen], False, 150.0)


def test_every_precision_is_written_proved_and_shown(precise: Path) -> None:
    bundle, report = Bundle.load(precise), from_json((precise / "report.json").read_bytes())
    assert bundle.precisions == ("fp32", "fp16", "int8", "int8-trt")
    assert set(report["precisions"]) >= set(bundle.precisions)
    for precision in ("fp16", "int8", "int8-trt"):
        entry = report["precisions"][precision]["onnxruntime"]
        assert entry["identity"]
        assert all(s["batch_invariant"] and s["not_finite"] == 0 for s in entry["steps"].values())
        assert min(entry["psnr_db"].values()) >= report["bounds"]["psnr"][precision]
        assert entry["ms_a_call"].keys() == {"1", "3"}
        assert bundle.report[precision]["onnxruntime"]["psnr_db"] == min(entry["psnr_db"].values())
    assert 0 < next(iter(report["headroom"]["nearest"].values())) < 1
    assert report["int8"].keys() == {"int8", "int8-trt"}
    sizes = {p: bundle.files[f"{p}/weights.bin"].size for p in bundle.precisions}
    assert sizes["int8"] < sizes["fp16"] < sizes["fp32"]
    assert "| int8 | onnxruntime |" in (precise / "README.md").read_text()


def test_int8_samples_and_what_is_for_a_gpu_is_refused_on_a_cpu(precise: Path) -> None:
    exact = Sampler.load(precise).sample(4, label=3, steps=8)
    rounded = Sampler.load(precise, precision="int8").sample(4, label=3, steps=8)
    assert 0 < np.abs(exact - rounded).max() < 0.7
    for precision in ("fp16", "int8-trt"):
        with pytest.raises(RequestError, match=precision):
            Sampler.load(precise, precision=precision)


@pytest.mark.parametrize("precision", ["fp16", "int8", "int8-trt"])
@pytest.mark.parametrize("guided", [False, True])
def test_an_identity_row_is_exact_in_every_precision(
    precise: Path, precision: str, guided: bool
) -> None:
    buffers = OnnxRuntime(Bundle.load(precise), precision, 1).bind(2)
    state = np.random.default_rng(0).normal(size=buffers.state.shape).astype(np.float32) * 1e4
    buffers.state[:], buffers.call[:], buffers.update[:] = (
        state,
        (999, 1, 0, 0, 1, 2),
        np.eye(R, R + 2),
    )
    buffers.step(guided)
    assert buffers.state.tobytes() == state.tobytes()


class Loud(torch.nn.Module):
    """A network whose intermediate values far exceed float16."""

    def __init__(self, gain: float) -> None:
        super().__init__()
        self.inner, self.outer, self.gain = torch.nn.Conv2d(1, 4, 1), torch.nn.Conv2d(4, 1, 1), gain

    def forward(self, x: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
        return self.outer(self.inner(x) * self.gain) / self.gain + 0 * time[:, None, None, None]


def test_what_float16_cannot_hold_fails_the_build_and_names_the_layer(tmp_path: Path) -> None:
    torch.manual_seed(0)
    described = {
        "sample_shape": (1, 4, 4),
        "prediction": "v",
        "schedule": "cosine",
        "clip": 1.0,
        "name": "loud",
    }
    model = from_module(Loud(3e5).eval(), **described)
    with pytest.raises(
        ExportError, match=r"fp16: network\S*/\S+ reaches .* of float16's largest value"
    ):
        build(model, tmp_path / "out", Bounds(), QUICK, ("fp16",), QUICK_CALIBRATION)
    assert list(tmp_path.iterdir()) == []
    quiet = from_module(Loud(3.0).eval(), **described)
    found = build(quiet, tmp_path / "out", Bounds(), QUICK, ("fp16",), QUICK_CALIBRATION)
    assert not headroom(traced_step(quiet, False), found, QUICK_CALIBRATION).beyond


def test_an_unknown_precision_is_refused_before_anything_is_done(
    tiny_run: Path, tmp_path: Path
) -> None:
    with pytest.raises(RequestError, match=r"unknown precision 'fp61'. Did you mean 'fp16'"):
        build(from_run(tiny_run, 2.0), tmp_path / "out", precisions=("fp61",))


def test_a_value_that_is_not_finite_is_never_near(bundle: Bundle) -> None:
    good = np.zeros((3, *bundle.sample_shape), np.float32)
    bad = good.copy()
    bad[:2, 0, 0, 0] = np.nan
    assert median_psnr(bad, good, bundle.sample_range) == -np.inf
    assert median_psnr(good, good, bundle.sample_range) == 200.0
