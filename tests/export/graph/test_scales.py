"""The scale and shift of a norm, folded into the modulation after it: the same numbers in fewer
passes, and only if nothing else needs what lies between."""

from collections.abc import Callable

import numpy as np
import onnx
import pytest
import torch
from torch import nn

from export.graph.scales import fold_scales
from export.sources.module import from_module

from ...traces import answer, traced_step

SHAPE = (4, 6, 8)

Use = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


class Modulated(nn.Module):
    """A norm with its own scale and shift, and what `use` makes of it with those of the time."""

    def __init__(self, use: Use, channels: int = 8) -> None:
        super().__init__()
        self.use = use
        self.first = nn.Conv2d(4, channels, 1)
        self.norm = nn.GroupNorm(2, channels)
        self.of_time = nn.Linear(1, 2 * channels)
        self.last = nn.Conv2d(channels, 4, 1)
        nn.init.normal_(self.norm.weight)
        nn.init.normal_(self.norm.bias)

    def forward(self, x: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
        scale, shift = self.of_time(time[:, None])[:, :, None, None].chunk(2, dim=1)
        return self.last(self.use(self.norm(self.first(x)), scale, shift))


def step_of(use: Use) -> onnx.ModelProto:
    torch.manual_seed(0)
    described = {"prediction": "v", "schedule": "cosine", "clip": 1.0, "name": "modulated"}
    module = Modulated(use).eval()
    return traced_step(from_module(module, sample_shape=SHAPE, **described), False)


def passes(proto: onnx.ModelProto) -> int:
    """How many products and sums the network computes over whole images."""
    inferred = onnx.shape_inference.infer_shapes(proto).graph
    images = {
        v.name
        for v in inferred.value_info
        if [d.dim_value for d in v.type.tensor_type.shape.dim][1:] == [8, 6, 8]
    }
    nodes = [n for n in proto.graph.node if n.name.startswith("network")]
    return sum(n.op_type in ("Mul", "Add") and n.output[0] in images for n in nodes)


@pytest.mark.parametrize(
    "use",
    [
        lambda x, scale, shift: x * (1 + scale) + shift,
        lambda x, scale, shift: shift + scale * x,
    ],
    ids=["scale around 1", "the other way round"],
)
def test_two_scales_become_one(use: Use) -> None:
    step = step_of(use)
    folded = fold_scales(step)
    onnx.checker.check_model(folded, full_check=True)
    assert (passes(step), passes(folded)) == (4, 2)
    assert {"network.norm.weight", "network.norm.bias"} <= {
        t.name for t in folded.graph.initializer
    }
    for batch in (1, 3):
        np.testing.assert_allclose(
            answer(folded, SHAPE, batch), answer(step, SHAPE, batch), rtol=0, atol=1e-5
        )


@pytest.mark.parametrize(
    "use",
    [
        lambda x, scale, shift: (x * scale + shift) + x,
        lambda x, scale, shift: x * scale,
        lambda x, scale, shift: x * 2.0 + shift,
        lambda x, scale, shift: x * scale.mean(dim=1, keepdim=True) + shift,
        lambda x, scale, shift: torch.sigmoid(x) * scale + shift,
    ],
    ids=["read twice", "no shift", "a constant", "of another shape", "not at once"],
)
def test_anything_else_is_left_alone(use: Use) -> None:
    step = step_of(use)
    assert fold_scales(step).SerializeToString() == step.SerializeToString()


def test_what_a_branch_reads_stays() -> None:
    step = step_of(lambda x, scale, shift: x * (1 + scale) + shift)
    assert passes(fold_scales(step)) == 2
    normed = next(n for n in step.graph.node if n.op_type == "Add" and "network.norm" in n.name)
    value = onnx.helper.make_tensor_value_info
    branch = onnx.helper.make_graph(
        [onnx.helper.make_node("Identity", [normed.output[0]], ["inside"])],
        "branch",
        [],
        [value("inside", onnx.TensorProto.FLOAT, None)],
    )
    step.graph.initializer.append(onnx.numpy_helper.from_array(np.array(True), "step.true"))
    step.graph.node.append(
        onnx.helper.make_node(
            "If", ["step.true"], ["read"], then_branch=branch, else_branch=branch, name="step/If"
        )
    )
    step.graph.output.append(value("read", onnx.TensorProto.FLOAT, None))
    assert fold_scales(step).SerializeToString() == step.SerializeToString()
