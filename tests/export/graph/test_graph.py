"""The exported graphs: what they contain, what they omit, and that the loop in one graph equals the
loop of steps."""

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper

from export.graph import fuse
from export.graph.trace import OPSET, traced
from export.graph.write import write_all
from export.proof.trajectories import run_loop_graph
from export.sources.module import from_module
from export.sources.onnx_file.read import graphs_of
from export.sources.torch_model import TorchModel
from runtime import Bundle, Sampler, make_schedule
from runtime.bundle.spec import Defaults
from runtime.diffusion.noise import Stream, noise

from ...traces import traced_step

GRAPHS = ("step.onnx", "step_guided.onnx", "sampler.onnx", "sampler_guided.onnx")


def _nodes(proto: onnx.GraphProto):
    for node in proto.node:
        yield node
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.GRAPH:
                yield from _nodes(attribute.g)


def _constants(proto: onnx.GraphProto):
    for graph in graphs_of(proto):
        yield from graph.initializer


@pytest.mark.parametrize("name", GRAPHS)
def test_no_stack_trace_and_no_path_of_the_build_machine_is_shipped(
    tiny_bundle: Path, root: Path, name: str
) -> None:
    data = (tiny_bundle / "fp32" / name).read_bytes()
    for leak in (
        b".py",
        b"site-packages",
        b"stack_trace",
        str(root).encode(),
        str(Path.home()).encode() + b"/",
    ):
        assert leak not in data


@pytest.mark.parametrize("name", GRAPHS)
def test_shapes_that_are_known_but_for_the_batch_are_not_computed_at_run_time(
    tiny_bundle: Path, name: str
) -> None:
    model = onnx.load(tiny_bundle / "fp32" / name, load_external_data=False)
    shapes = [node for node in _nodes(model.graph) if node.op_type == "Shape"]
    assert len(shapes) == (1 if name.startswith("sampler") else 0), (
        "only the loop asks for its number of rows"
    )


@pytest.mark.parametrize(
    ("name", "inputs"),
    [
        (
            "step.onnx",
            {
                "state": ["batch", 4, 1, 8, 8],
                "noise": ["batch", 1, 8, 8],
                "call": ["batch", 6],
                "update": ["batch", 4, 6],
                "label": ["batch"],
            },
        ),
        (
            "sampler.onnx",
            {
                "x": ["batch", 1, 8, 8],
                "noise": ["rows", "batch", 1, 8, 8],
                "call": ["rows", "batch", 6],
                "update": ["rows", "batch", 4, 6],
                "label": ["batch"],
            },
        ),
    ],
)
def test_inputs_are_those_that_the_design_names(tiny_bundle: Path, name: str, inputs: dict) -> None:
    model = onnx.load(tiny_bundle / "fp32" / name, load_external_data=False)
    found = {
        i.name: [d.dim_param or d.dim_value for d in i.type.tensor_type.shape.dim]
        for i in model.graph.input
    }
    assert found == inputs
    assert model.opset_import[0].version == OPSET


def test_the_weights_lie_in_one_file_once(tiny_bundle: Path) -> None:
    """All four graphs refer to the same places in weights.bin. Together they use all of it except
    the padding."""
    places: dict[str, set[tuple[int, int]]] = {}
    for name in GRAPHS:
        model = onnx.load(tiny_bundle / "fp32" / name, load_external_data=False)
        for tensor in _constants(model.graph):
            entry = {e.key: e.value for e in tensor.external_data}
            if entry:
                assert entry["location"] == "weights.bin"
                places.setdefault(name, set()).add((int(entry["offset"]), int(entry["length"])))
    assert places["step.onnx"] == places["sampler.onnx"]
    assert places["step_guided.onnx"] == places["sampler_guided.onnx"]
    every = set.union(*places.values())
    assert (tiny_bundle / "fp32/weights.bin").stat().st_size == max(
        offset + length for offset, length in every
    )
    assert places["step.onnx"] & places["step_guided.onnx"] == places["step.onnx"]


def test_the_loops_weights_are_initializers_of_its_body(tiny_bundle: Path) -> None:
    model = onnx.load(tiny_bundle / "fp32" / "sampler.onnx", load_external_data=False)
    assert not any(t.data_location == onnx.TensorProto.EXTERNAL for t in model.graph.initializer)
    body = next(node for node in model.graph.node if node.op_type == "Loop").attribute[0].g
    assert any(t.data_location == onnx.TensorProto.EXTERNAL for t in body.initializer)


@pytest.mark.parametrize(("solver", "guidance"), [("ddim", 1.0), ("ddpm", 1.0), ("ddpm", 2.5)])
def test_the_loop_in_one_graph_gives_the_step_loops_bytes(
    tiny_bundle: Path, sampler: Sampler, solver: str, guidance: float
) -> None:
    bundle = Bundle.load(tiny_bundle)
    program, label = bundle.program(solver, 6, guidance=guidance), np.array([1, 7], np.int64)
    x = np.stack([noise(s, Stream.INITIAL, 0, (1, 8, 8)) for s in (20, 21)])
    looped = run_loop_graph(
        bundle,
        "fp32",
        program,
        x,
        lambda k: np.stack([noise(s, Stream.STEP, k, (1, 8, 8)) for s in (20, 21)]),
        label,
    )
    stepped = sampler.sample(2, 20, label=[1, 7], guidance=guidance, solver=solver, steps=6)
    assert looped.tobytes() == stepped.tobytes()


class Signal(torch.nn.Module):
    """A network of 1-D signals without labels."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Conv1d(2, 2, 3, padding=1)

    def forward(self, x: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
        return self.layer(x) + torch.sin(time)[:, None, None]


def test_samples_of_another_rank_without_labels_export_too(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = TorchModel(
        name="signal",
        module=Signal().eval(),
        sample_shape=(2, 16),
        prediction="epsilon",
        schedule=make_schedule("linear"),
        clip=None,
        labels=None,
        defaults=Defaults(),
        provenance={},
    )
    write_all(fuse.steps(model, traced(model)), model.sample_shape, tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == {"step.onnx", "sampler.onnx", "weights.bin"}
    proto = onnx.load(tmp_path / "step.onnx")
    assert [i.name for i in proto.graph.input] == ["state", "noise", "call", "update"]
    assert numpy_helper.to_array(
        next(t for t in proto.graph.initializer if t.name.endswith("layer.weight"))
    ).shape == (
        2,
        2,
        3,
    )


class Branching(torch.nn.Module):
    """A network with a branch, which is a graph inside its graph."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Conv1d(2, 2, 3, padding=1)

    def forward(self, x: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
        h = self.layer(x) + time[:, None, None] / 1000
        return torch.cond(x.max() > 3, lambda h: torch.sin(h), lambda h: h * 2, (h,))


def test_branches_reveal_nothing_of_the_build_machine_either() -> None:
    described = {"sample_shape": (2, 16), "prediction": "v", "schedule": "cosine"}
    step = traced_step(from_module(Branching().eval().requires_grad_(False), **described), False)
    assert "If" in [node.op_type for node in step.graph.node]
    data = step.SerializeToString()
    for leak in (b".py", b"stack_trace", b"name_scopes"):
        assert leak not in data
