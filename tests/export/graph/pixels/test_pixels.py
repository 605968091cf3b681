"""Pixels first, with Winograd's convolutions: the same numbers for every sample of any batch, and
only if it is faster."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import nn
from torch.nn import functional as F

from export import build_bundle
from export.graph.convert import _for_cpus
from export.graph.folding import fold_upsampling
from export.graph.pixels.rewrite import pixels_first
from export.graph.pixels.winograd import TILE, winograd
from export.graph.rounding.convolutions import same_alone
from export.proof.plan import Plan
from export.sources.module import from_module
from runtime import Bundle, Sampler
from runtime.bundle.format import STEP, step_file
from trainer.networks.unet import UNet

from ....traces import answer, traced_step

DESCRIBED = {"prediction": "v", "schedule": "cosine", "clip": 1.0, "name": "wide"}
TINY_PLAN = Plan(
    batches=(1, 3),
    sizes=(2,),
    times=3,
    pictures=1,
    steps=3,
    samples=1,
    judged=1,
    ways=(("dpmpp_2m", 3),),
)


class Odd(nn.Module):
    """Sides that tiles do not divide, operations that only the old form supports, and constants of
    every shape combined with maps."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(2, 96, 3, padding=1), nn.Conv2d(96, 2, 3, padding=1)
        self.second, self.third = (
            nn.Conv2d(96, 100, 3, padding=1),
            nn.Conv2d(100, 96, 3, padding=1, bias=False),
        )
        self.norm, self.own = nn.GroupNorm(4, 100), nn.InstanceNorm2d(96, affine=True)
        self.row = nn.Parameter(torch.randn(1, 100, 1, 1))

    def forward(self, x: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
        h = torch.tanh(self.second(F.silu(self.first(x)))) - time[:, None, None, None] * 1e-3
        h = 2.0 - self.norm(h * self.row + 0.5) * self.norm(h)
        h = h / (1 + h.mean(dim=(2, 3), keepdim=True).abs())
        h = self.own(self.third(h)) - F.avg_pool2d(h, 3, 1, 1)[:, :96]
        return self.last(torch.relu(h)) + x * h.flatten(2).amax(2).amax(1)[:, None, None, None]


def wide() -> nn.Module:
    """A U-Net with every feature of ours; the layers that start at zero are filled."""
    network = UNet((3, 16, 16), channels=(96, 104), blocks=1, attention=(8,), num_classes=2)
    for p in network.parameters():
        if not p.any():
            nn.init.normal_(p, std=0.02)
    return network


def step_of(
    make: Callable[[], nn.Module], shape: tuple[int, ...], guided: bool = False, **more: object
) -> onnx.ModelProto:
    torch.manual_seed(0)
    return traced_step(from_module(make().eval(), sample_shape=shape, **DESCRIBED, **more), guided)


def test_winograds_matrices_convolve() -> None:
    """To rounding in float64; a wrong matrix is off by a tenth or more."""
    outputs, kernels, inputs = winograd()
    r = np.random.default_rng(0)
    g, d = r.normal(size=3), r.normal(size=TILE + 2)
    np.testing.assert_allclose(
        outputs @ ((kernels @ g) * (inputs @ d)), np.correlate(d, g, "valid"), rtol=0, atol=1e-13
    )


@pytest.mark.slow
@pytest.mark.parametrize("guided", [False, True])
def test_a_wide_network_answers_the_same_in_any_batch(guided: bool) -> None:
    step = step_of(wide, (3, 16, 16), guided, num_classes=2, null_label=2)
    made = pixels_first(step)
    assert made is not None
    onnx.checker.check_model(made, full_check=True)
    assert {t.name for t in step.graph.initializer if "conv1" in t.name} <= {
        t.name for t in made.graph.initializer
    }
    kinds = [
        n.op_type for n in made.graph.node if n.name.startswith("network.down.0.residual.conv1/")
    ]
    assert "Gather" in kinds
    assert "Conv" not in kinds
    expected, whole = answer(step, (3, 16, 16), 5), answer(made, (3, 16, 16), 5)
    # Values of about 1 after about ten convolutions, each with a rounding of 1e-6.
    np.testing.assert_allclose(whole, expected, rtol=0, atol=3e-5)
    for batch in (1, 2, 3):
        np.testing.assert_array_equal(answer(made, (3, 16, 16), batch), whole[:batch])


def test_odd_sides_and_unknown_operations() -> None:
    step = step_of(Odd, (2, 18, 17))
    made = pixels_first(step)
    assert made is not None
    onnx.checker.check_model(made, full_check=True)
    expected, whole = answer(step, (2, 18, 17), 5), answer(made, (2, 18, 17), 5)
    np.testing.assert_allclose(whole, expected, rtol=1e-5, atol=3e-5)
    np.testing.assert_array_equal(answer(made, (2, 18, 17), 1), whole[:1])


def test_what_is_small_stays_as_it_is() -> None:
    """The same network on 8×8 pixels: a convolution of 64 is not worth it."""
    assert pixels_first(step_of(Odd, (2, 8, 8))) is None


@pytest.mark.parametrize(("side", "channels", "gained"), [(16, 512, 0), (32, 512, 1), (16, 384, 1)])
def test_many_channels_need_more_pixels(side: int, channels: int, gained: int) -> None:
    """Their transformed kernels are four times the weights, and save little of a small map."""
    shape = ["batch", channels, side, side]
    weight = numpy_helper.from_array(np.zeros((channels, channels, 3, 3), np.float32), "w")
    node = helper.make_node("Conv", ["x", "w"], ["y"], name="network.a/Conv_0", pads=[1, 1, 1, 1])
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        [node],
        "step",
        [value("x", TensorProto.FLOAT, shape)],
        [value("y", TensorProto.FLOAT, shape)],
        [weight],
    )
    made = pixels_first(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)]))
    assert bool(made) == bool(gained)


def normed(rank: int = 4, groups: int = 96, **reader: object) -> onnx.ModelProto:
    """A large convolution, a norm without epsilon, and a reader of the norm's result."""
    generator = np.random.default_rng(0)
    weight = generator.normal(size=(96, 96, 3, 3), scale=0.03).astype(np.float32)
    constants = {
        "w": weight,
        "rows": np.array([0, groups, -1]),
        "map": np.array([0, 96, 16, 16]),
        "ones": np.ones(groups, np.float32),
        "zeros": np.zeros(groups, np.float32),
    }
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["h"], name="network.a/Conv_0", pads=[1, 1, 1, 1]),
        helper.make_node("Reshape", ["h", "rows"], ["r"], name="network.n/Reshape_1"),
        helper.make_node(
            "InstanceNormalization", ["r", "ones", "zeros"], ["n"], name="network.n/Norm_2"
        ),
        helper.make_node(outputs=["y"], name="network.b/Reader_3", **reader),
    ]
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        nodes,
        "step",
        [value("x", TensorProto.FLOAT, ["batch", 96, 16, 16])],
        [value("y", TensorProto.FLOAT, [None] * rank)],
        [numpy_helper.from_array(array, name) for name, array in constants.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


@pytest.mark.parametrize(
    "reader",
    [
        {"op_type": "Reshape", "inputs": ["n", "map"]},
        {"op_type": "Transpose", "inputs": ["n"], "perm": [0, 2, 1], "rank": 3},
        {"op_type": "Reshape", "inputs": ["n", "map"], "groups": 192},
    ],
    ids=["as a map", "as rows", "of halves of channels"],
)
def test_a_norms_result_may_be_read_in_any_form(reader: dict[str, object]) -> None:
    step = normed(**reader)
    made = pixels_first(step)
    assert made is not None
    onnx.checker.check_model(made)
    x = np.random.default_rng(1).normal(size=(2, 96, 16, 16)).astype(np.float32)
    found, expected = (
        onnxruntime.InferenceSession(proto.SerializeToString()).run(None, {"x": x})[0]
        for proto in (made, step)
    )
    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-5)


def test_a_branch_may_read_a_map() -> None:
    branch = helper.make_graph(
        [helper.make_node("Relu", ["h"], ["inside"])],
        "branch",
        [],
        [helper.make_tensor_value_info("inside", TensorProto.FLOAT, [None] * 4)],
    )
    step = normed(op_type="If", inputs=["yes"], then_branch=branch, else_branch=branch)
    step.graph.initializer.append(numpy_helper.from_array(np.array(True), "yes"))
    made = pixels_first(step)
    assert made is not None
    onnx.checker.check_model(made)
    x = np.random.default_rng(1).normal(size=(2, 96, 16, 16)).astype(np.float32)
    found, expected = (
        onnxruntime.InferenceSession(proto.SerializeToString()).run(None, {"x": x})[0]
        for proto in (made, step)
    )
    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-5)


@pytest.mark.slow
def test_a_bundle_has_both_forms_and_onnxruntime_runs_the_faster(tmp_path: Path) -> None:
    described = {**DESCRIBED, "sample_shape": (2, 18, 17)}
    torch.manual_seed(0)
    module, pictures = Odd().eval(), []
    for name, by_winograd in (("both", True), ("plain", False)):
        bundle = build_bundle(
            module, tmp_path / name, plan=TINY_PLAN, winograd=by_winograd, **described
        )
        assert ("fp32/step_pixels.onnx" in bundle.files) == by_winograd
        pictures.append(Sampler(Bundle.load(tmp_path / name)).sample(2, 0, steps=3))
    assert not np.array_equal(*pictures)
    np.testing.assert_allclose(*pictures, rtol=0, atol=1e-3)


class Mixed(nn.Module):
    """Large convolutions, and others of 97 channels, which are no whole blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(2, 97, 3, padding=1)
        self.large = nn.Conv2d(97, 97, 3, padding=1)
        self.down = nn.Conv2d(97, 97, 3, stride=2, padding=1)
        self.up = nn.Conv2d(97, 97, 3, padding=1)
        self.last = nn.Conv2d(97, 2, 1)

    def forward(self, x: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
        h = F.silu(self.large(F.silu(self.first(x) + time[:, None, None, None] / 1000)))
        low = F.silu(self.down(h))
        return self.last(h + self.up(F.interpolate(low, scale_factor=2)))


def test_convolutions_that_stay_round_a_lone_sample_as_in_a_batch() -> None:
    step = step_of(Mixed, (2, 32, 32))
    made = _for_cpus({STEP: step})[step_file(guided=False, pixels=True)]
    generator = np.random.default_rng(0)
    feeds = {
        "state": generator.standard_normal((3, 4, 2, 32, 32)).astype(np.float32),
        "noise": np.zeros((3, 2, 32, 32), np.float32),
        "call": np.tile(np.float32([3, 1, 0, 1, np.inf, 1]), (3, 1)),
        "update": np.zeros((3, 4, 6), np.float32),
    }
    first = {name: array[:1] for name, array in feeds.items()}
    options = onnxruntime.SessionOptions()
    # Two threads cut a sample in halves, which happen to round alike.
    options.intra_op_num_threads = 3
    for proto in (made, same_alone(fold_upsampling(step))):
        running = onnxruntime.InferenceSession(proto.SerializeToString(), options)
        whole = running.run(["denoised"], feeds)[0]
        np.testing.assert_array_equal(running.run(["denoised"], first)[0], whole[:1])


class Shifted(nn.Module):
    """A norm of maps far from zero."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(2, 96, 3, padding=1, bias=False)
        self.large = nn.Conv2d(96, 96, 3, padding=1)
        self.norm = nn.GroupNorm(8, 96)
        self.last = nn.Conv2d(96, 2, 3, padding=1)
        nn.init.constant_(self.large.bias, 100.0)

    def forward(self, x: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
        return self.last(self.norm(self.large(self.first(x))))


@pytest.mark.parametrize("scale", [0.0, 0.01, 1.0])
def test_a_norm_of_maps_far_from_zero_is_finite_and_right(scale: float) -> None:
    torch.manual_seed(0)
    described = {**DESCRIBED, "sample_shape": (2, 16, 16)}
    model = from_module(Shifted().eval().requires_grad_(False), **described)
    made = pixels_first(traced_step(model, False))
    assert made is not None
    x = scale * np.random.default_rng(0).standard_normal((2, 2, 16, 16)).astype(np.float32)
    state = np.zeros((2, 4, 2, 16, 16), np.float32)
    state[:, 0] = x
    feeds = {
        "state": state,
        "noise": np.zeros_like(x),
        "call": np.tile(np.float32([3, 1, 0, 1, np.inf, 1]), (2, 1)),
        "update": np.zeros((2, 4, 6), np.float32),
    }
    running = onnxruntime.InferenceSession(made.SerializeToString())
    found = running.run(["denoised"], feeds)[0]
    with torch.inference_mode():
        wide = torch.from_numpy(x.astype(np.float64))
        expected = model.module.double()(wide, torch.zeros(2).double()).numpy()
    # If all pixels are nearly alike, ONNX Runtime's own norm is off by 3e-3.
    np.testing.assert_allclose(found, expected, rtol=0, atol=3e-3)
