"""Weights outside of graphs: copies of a graph share them, and the files are the same."""

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from export.graph import weights
from export.graph.clean import clean
from export.graph.edit import copy_of
from export.graph.folding import fold_upsampling
from export.graph.rounding.convolutions import same_alone
from export.graph.weights import Weights, is_outside
from export.graph.write import write_all
from export.sources.run import from_run

from ...traces import Traces


@pytest.fixture
def step(tiny_run: Path, traces: Traces) -> onnx.ModelProto:
    from export.graph import fuse

    return fuse.steps(from_run(tiny_run, 2.0), traces.read())["step.onnx"]


@pytest.fixture
def every(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also smaller weights are taken out."""
    monkeypatch.setattr(weights, "LARGE", 2048)


def test_what_is_taken_out_can_be_put_back(step: onnx.ModelProto, every: None) -> None:
    outside = Weights()
    light = outside.take(copy_of(step))
    assert light.ByteSize() < step.ByteSize() / 2
    taken = [t for t in light.graph.initializer if is_outside(t)]
    assert taken
    # Passes over a graph look at names, types and shapes.
    before = {t.name: t for t in step.graph.initializer}
    for tensor in taken:
        assert list(tensor.dims) == list(before[tensor.name].dims)
        assert tensor.data_type == before[tensor.name].data_type
        values = numpy_helper.to_array(before[tensor.name])
        assert outside.values(tensor) == values.tobytes()
    # Copies, and changes of copies, keep the weights' names.
    changed = outside.put_back(same_alone(fold_upsampling(copy_of(light))))
    assert not any(is_outside(t) for t in changed.graph.initializer)
    expected = same_alone(fold_upsampling(step))
    for found, tensor in zip(changed.graph.initializer, expected.graph.initializer, strict=True):
        assert found.name == tensor.name
        np.testing.assert_array_equal(numpy_helper.to_array(found), numpy_helper.to_array(tensor))


def test_the_files_are_the_same(step: onnx.ModelProto, every: None, tmp_path: Path) -> None:
    outside = Weights()
    light = {"step.onnx": outside.take(copy_of(step))}
    write_all(light, (1, 8, 8), tmp_path / "light", outside=outside)
    write_all({"step.onnx": step}, (1, 8, 8), tmp_path / "whole")
    names = {path.name for path in (tmp_path / "whole").iterdir()}
    assert names == {"step.onnx", "sampler.onnx", "weights.bin"}
    for name in names:
        light_bytes = (tmp_path / "light" / name).read_bytes()
        assert light_bytes == (tmp_path / "whole" / name).read_bytes()


def test_equal_weights_are_kept_once(every: None) -> None:
    values = np.arange(1000, dtype=np.float32)
    model = onnx.ModelProto()
    for name in ("a", "b"):
        model.graph.initializer.append(numpy_helper.from_array(values, name))
    outside = Weights()
    outside.take(model)
    assert len(outside._values) == 1
    assert [outside.values(t) for t in model.graph.initializer] == 2 * [values.tobytes()]


def test_a_large_constant_may_be_repeated_for_every_sample(every: None) -> None:
    """Such as the positions of tokens: their values are outside when shapes are frozen."""
    value = onnx.helper.make_tensor_value_info
    positions = numpy_helper.from_array(np.zeros((1, 32, 32), np.float32), "positions")
    size = numpy_helper.from_array(np.array([2, 32, 32]), "size")
    graph = onnx.helper.make_graph(
        [
            onnx.helper.make_node("Expand", ["positions", "size"], ["p"]),
            onnx.helper.make_node("Add", ["x", "p"], ["y"]),
        ],
        "step",
        [value("x", onnx.TensorProto.FLOAT, ["batch", 32, 32])],
        [value("y", onnx.TensorProto.FLOAT, ["batch", 32, 32])],
        [positions, size],
    )
    opset = [onnx.helper.make_opsetid("", 20)]
    light = Weights().take(onnx.helper.make_model(graph, opset_imports=opset))
    assert is_outside(light.graph.initializer[0])
    assert [node.op_type for node in clean(light).graph.node] == ["Expand", "Add"]
