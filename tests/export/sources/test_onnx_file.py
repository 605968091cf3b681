"""Networks in ONNX files become bundles that compute what the file computes, or are refused."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch

from export import Condition, ExportError, build_bundle
from export.graph.calibrate import session
from export.graph.dims import Dims
from export.graph.fuse import batched
from export.proof.independence import require_independent, whole_inputs
from export.sources.onnx_file.model import OnnxModel, from_onnx
from export.sources.onnx_file.read import read
from runtime import Bundle, RequestError, Sampler, make_schedule
from runtime.files import from_json

from ...conditioned import PLAN
from ...onnx_files import SHAPE, Network, halved, write

KIND: dict[str, Any] = {"prediction": "epsilon", "schedule": "scaled_linear", "clip": 1.0}
ROUNDING = 2e-6
"""ONNX Runtime sums in another order in other batches; outputs are about 1."""
NO_TORCH = """
import sys
sys.modules["torch"] = None  # an import of it now fails
from export.build import main
code = main(sys.argv[1:])
assert not any(name.startswith("trainer.") for name in sys.modules)
sys.exit(code)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Files of many forms."""
    folder = tmp_path_factory.mktemp("files")
    write(folder / "batch.onnx")
    write(folder / "scalar.onnx", 5, opset=13)
    write(folder / "one.onnx", (5,))
    write(folder / "fixed.onnx", 5, batch=1)
    write(folder / "fixed_one.onnx", (5,), batch=1)
    halved(folder / "batch.onnx", folder / "stored_half.onnx", stored=True)
    halved(folder / "batch.onnx", folder / "half.onnx", stored=False)
    proto = onnx.load(str(folder / "batch.onnx"))
    onnx.save(
        proto,
        str(folder / "external.onnx"),
        save_as_external_data=True,
        size_threshold=0,
        location="external.bin",
    )
    return folder


def agree(model: OnnxModel) -> float:
    """The largest difference of a batch of three, each at its own time, from the file."""
    generator = np.random.Generator(np.random.Philox(key=1))
    x = generator.standard_normal((3, *SHAPE), np.float32)
    time = model.schedule.time[[20, 999, 500]].astype(np.float32)
    label = [np.arange(3) % model.num_labels] if model.labels else []
    given = model.draw_conditions(3)
    found = batched(model)(x, time, *label, **given)
    require_independent(model, whole_inputs(model, batched(model)), 1e-4)
    return float(np.abs(found - model.reference()(x, time, *label, **given)).max())


@pytest.mark.parametrize(
    "form",
    ["batch", "scalar", "one", "fixed", "fixed_one", "stored_half", "half", "external"],
)
def test_a_batch_computes_what_the_file_computes_of_each_sample(folder: Path, form: str) -> None:
    assert agree(from_onnx(folder / f"{form}.onnx", **KIND)) <= ROUNDING


def test_all_forms_are_the_same_network(folder: Path) -> None:
    """The forms were made from one network, so any adaptation that changes it shows."""
    x = np.ones((2, *SHAPE), np.float32)
    time = np.array([3, 700], np.float32)
    with torch.inference_mode():
        expected = Network()(torch.from_numpy(x), torch.from_numpy(time)).numpy()
    for form in ("batch", "scalar", "one", "fixed", "fixed_one", "external"):
        found = batched(from_onnx(folder / f"{form}.onnx", **KIND))(x, time)
        np.testing.assert_allclose(found, expected, atol=ROUNDING, err_msg=form)


def test_integer_timesteps_are_rounded(folder: Path) -> None:
    network = batched(from_onnx(folder / "batch.onnx", **KIND))
    x = np.ones((3, *SHAPE), np.float32)
    found = network(x, np.array([499.6, 500, 500.4], np.float32))
    np.testing.assert_array_equal(found[0], found[1])
    np.testing.assert_array_equal(found[1], found[2])


def test_a_bundle_is_made_without_torch(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "bundle"
    words = ["--onnx", str(folder / "scalar.onnx"), "--prediction", "epsilon"]
    words += ["--schedule", "scaled_linear", "--clip", "1", "--quick", "--out", str(out)]
    words += ["--proof-minutes", "0"]
    done = subprocess.run(
        [sys.executable, "-c", NO_TORCH, *words], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "agrees with the ONNX file" in done.stdout
    bundle = Bundle.load(out)
    assert bundle.sample_shape == SHAPE
    assert bundle.provenance["onnx_file"] == {"opset": 13}
    assert "torch" not in bundle.provenance["versions"]
    assert "Largest differences from the ONNX file" in (out / "README.md").read_text("utf-8")
    assert Sampler(bundle).sample(2, steps=2).shape == (2, *SHAPE)


def test_labels_conditions_and_the_output_are_chosen_by_name(tmp_path: Path) -> None:
    more = {"y": torch.tensor([1, 2]), "small image": torch.randn(2, *SHAPE)}
    path = write(tmp_path / "net.onnx", network=Network(3, second=True), more=more)
    proto = onnx.load(str(path))
    outputs = [o.name for o in proto.graph.output]
    low_res = Condition("low_res", SHAPE, range=(-1, 1), null=0)
    given: dict[str, Any] = {
        **KIND,
        "num_classes": 3,
        "null_label": 1,
        "inputs": {"low_res": "small image", "label": "y"},
        "conditions": [low_res],
    }
    with pytest.raises(ExportError, match=r"2 outputs have the shape of .*Name it: --output NAME"):
        from_onnx(path, **given)
    model = from_onnx(path, output=outputs[1], **given)
    assert model.conditions == (low_res,)
    assert model.order == (0, 2, 3, 1)
    assert agree(model) <= ROUNDING
    bundle = build_bundle(path, tmp_path / "out", output=outputs[1], plan=PLAN, **given)
    assert bundle.can_guide
    assert bundle.report["fp32"]["onnxruntime"]["missed"] == 0
    undeclared = from_onnx(path, output=outputs[0], **{**given, "conditions": ()})
    assert undeclared.conditions == (Condition("low_res", SHAPE),)


def test_a_file_that_uses_one_time_for_all_samples_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "net.onnx", network=Network(fault="time"))
    with pytest.raises(ExportError, match="depends on the times of other samples"):
        build_bundle(path, tmp_path / "out", plan=PLAN, **KIND)
    assert not (tmp_path / "out").exists()


def test_a_fixed_batch_of_two_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "net.onnx", batch=2)
    with pytest.raises(ExportError, match=r"has a fixed batch of 2\. Export it with a batch"):
        from_onnx(path, **KIND)


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"inputs": {"x": "none"}}, RequestError, "unknown input of the file 'none'"),
        ({"inputs": {"x": "sample", "time": "sample"}}, RequestError, "each input of the file on"),
        ({"inputs": ["x"]}, RequestError, "`inputs` must be a dict"),
        ({"output": "none"}, RequestError, "unknown output of the file 'none'"),
        ({"sample_shape": (1, 8, 9)}, RequestError, r"does not take \[B, 1, 8, 9\]"),
        ({"conditions": [Condition("a")]}, RequestError, "has no input for the condition 'a'"),
        ({"num_classes": 3}, ExportError, "which input is the class label is not clear"),
        ({"prediction": "eps"}, RequestError, "unknown prediction 'eps'"),
        ({"wrong": 1}, RequestError, "wrong"),
    ],
)
def test_wrong_settings_are_named(
    folder: Path, changed: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        from_onnx(folder / "batch.onnx", **{**KIND, **changed})


def test_what_a_network_is_must_be_said(folder: Path) -> None:
    with pytest.raises(RequestError, match="needs schedule, got none"):
        build_bundle(folder / "batch.onnx", prediction="v")
    with pytest.raises(RequestError, match="needs prediction, schedule, sample_shape, got none"):
        build_bundle(Network())


def test_files_that_are_no_networks_are_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="there is no such file"):
        from_onnx(tmp_path / "none.onnx", **KIND)
    (tmp_path / "text.onnx").write_text("text")
    with pytest.raises(ExportError, match="cannot be read as ONNX"):
        from_onnx(tmp_path / "text.onnx", **KIND)
    (tmp_path / "alone.onnx").write_bytes((folder / "external.onnx").read_bytes())
    with pytest.raises(ExportError, match="weights are in a file of their own"):
        from_onnx(tmp_path / "alone.onnx", **KIND)
    proto = onnx.load(str(folder / "batch.onnx"))
    proto.graph.node[3].domain = "com.microsoft"
    onnx.save(proto, str(tmp_path / "own.onnx"))
    with pytest.raises(ExportError, match="an operator of one library"):
        from_onnx(tmp_path / "own.onnx", **KIND)


def test_a_network_of_diffusers_is_read(tmp_path: Path) -> None:
    """As its users export it: a scalar timestep and a batch of one."""
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    network = (
        diffusers.UNet2DModel(
            8,
            1,
            1,
            block_out_channels=(8, 8),
            norm_num_groups=4,
            layers_per_block=1,
            down_block_types=("DownBlock2D", "AttnDownBlock2D"),
            up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        )
        .eval()
        .requires_grad_(False)
    )

    class Sample(torch.nn.Module):
        def forward(self, sample: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
            return network(sample, timestep, return_dict=False)[0]

    for name, batch in (("fixed", 1), ("varies", None)):
        path = write(tmp_path / f"{name}.onnx", 5, Sample(), batch=batch)
        assert agree(from_onnx(path, **KIND)) <= ROUNDING


@pytest.mark.parametrize("opset", [18, 21])
def test_a_group_norm_has_a_known_shape(tmp_path: Path, opset: int) -> None:
    """From opset 18 on it is one operator, from 21 on with an affine part for each channel."""
    generator = np.random.default_rng(0)
    factors = 8 if opset == 21 else 2
    constants = {
        name: generator.standard_normal(factors).astype(np.float32) for name in ("scale", "shift")
    }
    make = onnx.helper.make_node
    value = onnx.helper.make_tensor_value_info
    graph = onnx.helper.make_graph(
        [
            make("GroupNormalization", ["x", "scale", "shift"], ["n"], num_groups=2, epsilon=1e-3),
            make("Sigmoid", ["n"], ["y"]),
        ],
        "norm",
        [value("x", onnx.TensorProto.FLOAT, ["batch", 8, 3, 5])],
        [value("y", onnx.TensorProto.FLOAT, ["batch", 8, 3, 5])],
        [onnx.numpy_helper.from_array(array, name) for name, array in constants.items()],
    )
    opsets = [onnx.helper.make_opsetid("", opset)]
    file = onnx.helper.make_model(graph, opset_imports=opsets, ir_version=10)
    onnx.save(file, str(tmp_path / "norm.onnx"))
    proto = read(tmp_path / "norm.onnx").proto
    assert "GroupNormalization" not in [node.op_type for node in proto.graph.node]
    assert Dims(proto).but_for_the_batch("n") == [-1, 8, 3, 5]
    x = generator.standard_normal((2, 8, 3, 5)).astype(np.float32)
    groups = x.astype(np.float64).reshape(2, 2, -1)
    centred = groups - groups.mean(2, keepdims=True)
    normal = centred / np.sqrt((centred**2).mean(2, keepdims=True) + 1e-3)
    scale, shift = (array.repeat(8 // factors)[:, None, None] for array in constants.values())
    expected = 1 / (1 + np.exp(-(normal.reshape(x.shape) * scale + shift)))
    found = session(proto).run(["y"], {"x": x})[0]
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6)


def test_inputs_of_one_name_are_refused(tmp_path: Path) -> None:
    more = {"low.res": torch.randn(2, *SHAPE), "low/res": torch.randn(2, *SHAPE)}
    path = write(tmp_path / "net.onnx", more=more)
    with pytest.raises(ExportError, match=r"'low\.res' and 'low/res' would both be the condition"):
        from_onnx(path, **KIND)


make = onnx.helper.make_node
value = onnx.helper.make_tensor_value_info
FLOAT = onnx.TensorProto.FLOAT


def saved(
    path: Path,
    nodes: list[onnx.NodeProto],
    constants: dict[str, np.ndarray] | None = None,
    inputs: dict[str, list[Any] | None] | None = None,
    **more: Any,
) -> Path:
    """A file whose F is `y`, of x and t, which `nodes` may read as `h` too: x and the time."""
    named = {"x": ["batch", *SHAPE], "t": ["batch"], **(inputs or {})}
    column = {"axes": np.array([1, 2, 3]), "scale": np.float32(1e-3), **(constants or {})}
    graph = onnx.helper.make_graph(
        [
            make("Unsqueeze", ["t", "axes"], ["column"]),
            make("Mul", ["column", "scale"], ["time"]),
            make("Add", ["x", "time"], ["h"]),
            *nodes,
        ],
        "network",
        [value(name, FLOAT, shape) for name, shape in named.items()],
        [value("y", FLOAT, ["batch", *SHAPE])],
        [onnx.numpy_helper.from_array(array, name) for name, array in column.items()],
    )
    opsets = more.pop("opset_imports", [onnx.helper.make_opsetid("", 20)])
    model = onnx.helper.make_model(graph, opset_imports=opsets, ir_version=9, **more)
    onnx.save(model, str(path))
    return path


def branch(name: str, array: np.ndarray) -> onnx.GraphProto:
    """h and a constant of the branch's own."""
    return onnx.helper.make_graph(
        [make("Add", ["h", name], [f"{name}.sum"])],
        name,
        [],
        [value(f"{name}.sum", FLOAT, None)],
        [onnx.numpy_helper.from_array(array, name)],
    )


def test_branches_may_have_weights_of_their_own(tmp_path: Path) -> None:
    """No library reads them from another file."""
    array = np.random.default_rng(0).standard_normal((1, 300, *SHAPE[1:])).astype(np.float32)
    nodes = [
        make("Greater", ["scale", "zero"], ["yes"]),
        make("If", ["yes"], ["z"], then_branch=branch("a", array), else_branch=branch("b", -array)),
        make("ReduceMean", ["z", "one"], ["y"], keepdims=1),
    ]
    constants = {"zero": np.float32(0), "one": np.array([1])}
    path = saved(tmp_path / "net.onnx", nodes, constants)
    bundle = build_bundle(path, tmp_path / "out", plan=PLAN, steps=4, **KIND)
    assert bundle.report["fp32"]["onnxruntime"]["missed"] == 0
    graph = onnx.load(bundle.path / "fp32" / "step.onnx", load_external_data=False).graph
    assert sum(node.op_type == "If" for node in graph.node) == 1


def test_operators_inside_functions_are_looked_at(tmp_path: Path) -> None:
    own = onnx.helper.make_opsetid("com.microsoft", 1)
    imports = [onnx.helper.make_opsetid("", 20), onnx.helper.make_opsetid("local", 1), own]
    inner = [make("QuickGelu", ["a"], ["b"], domain="com.microsoft")]
    function = onnx.helper.make_function("local", "Act", ["a"], ["b"], inner, [imports[0], own])
    path = saved(
        tmp_path / "net.onnx",
        [make("Act", ["h"], ["y"], domain="local")],
        functions=[function],
        opset_imports=imports,
    )
    with pytest.raises(ExportError, match=r"QuickGelu of com\.microsoft, an operator of one"):
        from_onnx(path, **KIND)


def test_an_absent_input_may_have_an_empty_name(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    constants = {
        "first": generator.standard_normal((17, 1, 3, 3)).astype(np.float32),
        "last": 0.1 * generator.standard_normal((1, 17, 3, 3)).astype(np.float32),
    }
    nodes = [
        make("Conv", ["h", "first", ""], ["g"], pads=[1, 1, 1, 1]),
        make("Conv", ["g", "last", ""], ["y"], pads=[1, 1, 1, 1]),
    ]
    path = saved(tmp_path / "net.onnx", nodes, constants)
    bundle = build_bundle(path, tmp_path / "out", plan=PLAN, steps=4, **KIND)
    assert bundle.report["fp32"]["onnxruntime"]["missed"] == 0


@pytest.mark.parametrize(
    ("inputs", "given", "error", "message"),
    [
        (
            {"x": None},
            {"inputs": {"x": "x"}, "output": "y"},
            ExportError,
            r"x must be .*got x \[\]",
        ),
        ({"1": ["batch"]}, {}, ExportError, r"input '1' would be .*--input NAME=1"),
        ({"y2": ["batch"]}, {"inputs": {"label": "y2"}}, RequestError, "--num-classes N"),
    ],
)
def test_an_input_that_cannot_be_what_it_is_taken_for_is_named(
    tmp_path: Path,
    inputs: dict[str, Any],
    given: dict[str, Any],
    error: type[Exception],
    message: str,
) -> None:
    path = saved(tmp_path / "net.onnx", [make("Neg", ["h"], ["y"])], inputs=inputs)
    with pytest.raises(error, match=message):
        from_onnx(path, **{**KIND, **given, "inputs": {"time": "t", **given.get("inputs", {})}})


def test_a_grid_that_lacks_a_number_of_steps_has_fewer(tmp_path: Path) -> None:
    """Such as leading(1), which diffusers' configs have: it has no 20 steps on 20 knots."""
    path = saved(tmp_path / "net.onnx", [make("Neg", ["h"], ["y"])])
    schedule = make_schedule("linear_raw", T=20, beta_start=1e-3, beta_end=0.2)
    kind = {**KIND, "schedule": schedule, "grid": "leading(1)", "steps": 10}
    plan = dataclasses.replace(PLAN, steps=50)
    bundle = build_bundle(path, tmp_path / "out", plan=plan, **kind)
    report = from_json((bundle.path / "report.json").read_bytes())
    trajectories = report["precisions"]["fp32"]["onnxruntime"]["trajectories"]
    assert [t["trajectory"] for t in trajectories] == [
        "ddim, 19 steps, guidance 1",
        "ddpm, 19 steps, guidance 1",
    ]
