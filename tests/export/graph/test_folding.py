"""Upsampling folded into the convolution: the same numbers with fewer multiplications, and only if
the whole pattern matches."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from export.graph.folding import fold_upsampling
from export.sources.module import from_module

from ...traces import answer, traced_step

SHAPE = (4, 6, 8)


class Up(nn.Module):
    """Enlarges, then convolves; with options that must, or must not, be folded."""

    def __init__(self, **options: int) -> None:
        super().__init__()
        self.inner = nn.Conv2d(4, 2, **{"kernel_size": 3, "padding": 1, **options})
        self.outer = nn.Conv2d(2, 4, 1)

    def forward(self, x: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
        h = self.inner(F.interpolate(x, scale_factor=2.0, mode="nearest"))
        return (
            F.interpolate(self.outer(h), size=x.shape[2:], mode="nearest")
            + time[:, None, None, None]
        )


def step_of(module: nn.Module) -> onnx.ModelProto:
    torch.manual_seed(0)
    described = {"prediction": "v", "schedule": "cosine", "clip": 1.0, "name": "up"}
    return traced_step(from_module(module.eval(), sample_shape=SHAPE, **described), False)


@pytest.fixture(scope="module")
def step() -> onnx.ModelProto:
    """A step with an upsampling to fold. Read it, do not write it."""
    return step_of(Up())


def test_the_folded_graph_computes_the_same_and_keeps_the_weights_names(
    step: onnx.ModelProto,
) -> None:
    folded = fold_upsampling(step)
    onnx.checker.check_model(folded, full_check=True)
    assert (
        sum(n.op_type == "Conv" for n in folded.graph.node)
        == sum(n.op_type == "Conv" for n in step.graph.node) + 3
    )
    assert (
        sum(n.op_type == "Resize" for n in folded.graph.node)
        == sum(n.op_type == "Resize" for n in step.graph.node) - 1
    )
    assert "network.inner.weight" in {t.name for t in folded.graph.initializer}
    for batch in (1, 3):
        np.testing.assert_allclose(
            answer(folded, SHAPE, batch), answer(step, SHAPE, batch), rtol=0, atol=2e-6
        )


def test_what_is_not_constant_is_little_work(step: onnx.ModelProto, tmp_path: Path) -> None:
    """ONNX Runtime computes the sums of weights once: none is left in the graph that it runs."""
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    proto = fold_upsampling(step)
    assert any(n.name.endswith("_taps") for n in proto.graph.node)
    onnxruntime.InferenceSession(
        proto.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    left = [
        n.name
        for n in onnx.load(tmp_path / "optimized.onnx").graph.node
        if n.name.endswith("_taps")
    ]
    assert left == []


LEFT_ALONE = (
    {"padding": 0},
    {"stride": 2},
    {"dilation": 2, "padding": 2},
    {"groups": 2},
    {"kernel_size": 5, "padding": 2},
)
"""Options of convolutions that do not fold."""


class Ups(nn.Module):
    """Several `Up`, traced as one network."""

    def __init__(self, options: Sequence[dict[str, int]]) -> None:
        super().__init__()
        self.all = nn.ModuleList(Up(**each) for each in options)

    def forward(self, x: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
        for up in self.all:
            x = up(x, time)
        return x


def test_another_convolution_is_left_alone() -> None:
    step = step_of(Ups(LEFT_ALONE))
    assert sum(node.op_type == "Conv" for node in step.graph.node) == 2 * len(LEFT_ALONE)
    assert fold_upsampling(step).SerializeToString() == step.SerializeToString()


class Shared(nn.Module):
    """Enlarges twice, and convolves with the same weights."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, x: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
        h = F.avg_pool2d(x, 2)
        for _ in range(2):
            h = self.inner(F.interpolate(h, scale_factor=2.0, mode="nearest"))
        return F.avg_pool2d(h, 2) + time[:, None, None, None]


def test_convolutions_may_share_their_weights() -> None:
    step = step_of(Shared())
    folded = fold_upsampling(step)
    onnx.checker.check_model(folded, full_check=True)
    names = [node.name for node in folded.graph.node]
    assert len(set(names)) == len(names)
    assert sum(node.op_type == "Resize" for node in folded.graph.node) == 0
    np.testing.assert_allclose(answer(folded, SHAPE, 3), answer(step, SHAPE, 3), rtol=0, atol=2e-6)


def test_an_enlargement_between_pixels_is_left_alone(step: onnx.ModelProto) -> None:
    linear = onnx.ModelProto()
    linear.CopyFrom(step)
    resize = next(node for node in linear.graph.node if node.op_type == "Resize")
    next(a for a in resize.attribute if a.name == "mode").s = b"linear"
    assert fold_upsampling(linear).SerializeToString() == linear.SerializeToString()
