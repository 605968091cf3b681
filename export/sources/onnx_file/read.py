"""An ONNX file as a graph in float32 with its weights inside."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import (
    AttributeProto,
    GraphProto,
    ModelProto,
    NodeProto,
    TensorProto,
    helper,
    inliner,
    numpy_helper,
    version_converter,
)

from runtime.errors.messages import described, printable

from ...errors import ExportError

OPSET = 20
"""Graphs of an earlier opset are converted to this one, which traced modules have too."""
IR_VERSION = 10
LARGEST = 2**31 - 2**20
"""Bytes of a graph with its weights inside, which protobuf and ONNX Runtime can take."""
STANDARD = ("", "ai.onnx")
UNSUPPORTED: dict[int, str] = {
    TensorProto.BFLOAT16: "bfloat16",
    TensorProto.DOUBLE: "float64",
    TensorProto.FLOAT8E4M3FN: "float8",
    TensorProto.FLOAT8E5M2: "float8",
}
"""Types that a network may not compute in: not all libraries do."""


@dataclass(frozen=True, eq=False)
class OnnxFile:
    """A file that was read.

    Attributes:
        path: Of the file.
        proto: The graph, with its weights inside, in float32.
        computes_half: Whether the file itself computes in float16. Otherwise it has float32 values
            alone, and perhaps stores some weights in float16.
        opset: The file's own.
    """

    path: Path
    proto: ModelProto
    computes_half: bool
    opset: int


def read(path: Path) -> OnnxFile:
    """Read a file, and the files of its weights.

    Raises:
        ExportError: It cannot be read, or holds what cannot be exported.
    """
    where = printable(path)
    proto = _loaded(path, where)
    opset = next((o.version for o in proto.opset_import if o.domain in STANDARD), 1)
    # Functions are inlined first: the converter of opsets does not look into them.
    if proto.functions:
        proto = inliner.inline_local_functions(proto)
    _require_standard(proto, where)
    _drop_absent(proto)
    proto = _in_new_opset(proto, opset, where)
    _constants_stored(proto.graph)
    _plain_group_norms(proto)
    computes_half = _computes_half(proto.graph)
    to_float32(proto)
    _require_float32(proto, where)
    proto.ir_version = IR_VERSION
    return OnnxFile(path, proto, computes_half, opset)


def graphs_of(graph: GraphProto) -> Iterator[GraphProto]:
    """Yield a graph and those inside its nodes, which are branches and loops."""
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.type == AttributeProto.GRAPH:
                yield from graphs_of(attribute.g)


def _loaded(path: Path, where: str) -> ModelProto:
    if not path.is_file():
        raise ExportError(
            f"{where}: there is no such file. --onnx takes the path of an .onnx file."
        )
    try:
        # In two steps, so that weights are looked for next to the file alone.
        light = onnx.load(str(path), load_external_data=False)
        onnx.load_external_data_for_model(light, str(path.parent))
    except Exception as error:  # protobuf and onnx raise errors of many kinds
        raise ExportError(
            f"{where} cannot be read as ONNX ({described(error)}). If its weights are in a file of "
            "their own, that file must lie where the graph expects it: next to it."
        ) from error
    # An empty or cut-off file may parse as a model without content.
    if not light.graph.node:
        raise ExportError(f"{where} cannot be read as ONNX: it has no operators. Copy it again.")
    size = sum(len(tensor.raw_data) for tensor in light.graph.initializer)
    if size > LARGEST:
        raise ExportError(
            f"{where} has {size / 1e9:.1f} GB of weights, at most 2 GB are supported. Export the "
            "PyTorch module itself, with --module."
        )
    return light


def _require_standard(proto: ModelProto, where: str) -> None:
    """Raises ExportError for operators that ONNX itself does not define."""
    for graph in graphs_of(proto.graph):
        for node in graph.node:
            if node.domain not in STANDARD:
                raise ExportError(
                    f"{where} uses {node.op_type} of {node.domain}, an operator of one library. "
                    "Export again without that library's optimizations or quantization."
                )


def _drop_absent(proto: ModelProto) -> None:
    """Remove the empty names of absent inputs at the end of nodes, which mean nothing."""
    for graph in graphs_of(proto.graph):
        for node in graph.node:
            while node.input and not node.input[-1]:
                del node.input[-1]


def _in_new_opset(proto: ModelProto, opset: int, where: str) -> ModelProto:
    if opset >= OPSET:
        return proto
    try:
        return version_converter.convert_version(proto, OPSET)
    except Exception as error:  # the converter raises what its C++ code throws
        raise ExportError(
            f"{where} has opset {opset}, and ONNX cannot convert it to {OPSET} "
            f"({described(error)}). Export it again with opset_version=18."
        ) from error


def _constants_stored(graph: GraphProto) -> None:
    """Turn Constant nodes into stored constants, which later changes of the graph look for."""
    kept = []
    for node in graph.node:
        value = next((a for a in node.attribute if a.name.startswith("value")), None)
        if node.op_type != "Constant" or value is None or value.name == "value_string":
            kept.append(node)
            continue
        if value.name == "value":
            tensor = TensorProto()
            tensor.CopyFrom(value.t)
        else:
            whole = value.name.startswith("value_int")
            numbers = helper.get_attribute_value(value)
            tensor = numpy_helper.from_array(np.array(numbers, np.int64 if whole else np.float32))
        tensor.name = node.output[0]
        graph.initializer.append(tensor)
    del graph.node[:]
    graph.node.extend(kept)


def _plain_group_norms(proto: ModelProto) -> None:
    """Write every GroupNormalization as PyTorch's exporter does up to opset 20.

    ONNX cannot infer the shape of its result, and rewrites need the shapes of all values.
    """
    graph = proto.graph
    # Its result has the shape of its input, as that of an Identity, which ONNX does infer.
    alike = ModelProto()
    alike.CopyFrom(proto)
    for node in alike.graph.node:
        if node.op_type == "GroupNormalization":
            node.op_type = "Identity"
            del node.input[1:], node.attribute[:]
    inferred = onnx.shape_inference.infer_shapes(alike).graph
    shapes = {
        value.name: [d.dim_value for d in value.type.tensor_type.shape.dim]
        for value in (*inferred.value_info, *inferred.input)
    }
    stored = {tensor.name: tensor for tensor in graph.initializer}
    nodes: list[NodeProto] = []
    for node in graph.node:
        shape = shapes.get(node.input[0], []) if node.op_type == "GroupNormalization" else []
        if len(shape) > 2 and shape[1] and {*node.input[1:]} <= stored.keys():
            nodes += _as_instance_norm(node, shape, graph, stored)
        else:
            nodes.append(node)
    del graph.node[:]
    graph.node.extend(nodes)


def _as_instance_norm(
    node: NodeProto, shape: list[int], graph: GraphProto, stored: dict[str, TensorProto]
) -> list[NodeProto]:
    """Return the nodes of a group norm of a value of this shape."""
    given = {a.name: helper.get_attribute_value(a) for a in node.attribute}
    groups = given["num_groups"]
    out = node.output[0]
    constants = {
        "rows": np.array([0, groups, -1], np.int64),
        "ones": np.ones(groups, np.float32),
        "zeros": np.zeros(groups, np.float32),
    }
    for name, source in zip(("scale", "shift"), node.input[1:], strict=True):
        value = numpy_helper.to_array(stored[source])
        # Before opset 21 there is one for each group.
        value = value.repeat(shape[1] // len(value))
        constants[name] = value.reshape(-1, *[1] * (len(shape) - 2))
    graph.initializer.extend(
        numpy_helper.from_array(value, f"{out}.{name}") for name, value in constants.items()
    )

    def made(kind: str, inputs: list[str], output: str, **attributes: Any) -> NodeProto:
        return helper.make_node(kind, inputs, [output], f"{output}/{kind}", **attributes)

    epsilon = given.get("epsilon", 1e-5)
    factors = [f"{out}.groups", f"{out}.ones", f"{out}.zeros"]
    return [
        made("Reshape", [node.input[0], f"{out}.rows"], f"{out}.groups"),
        made("InstanceNormalization", factors, f"{out}.normal", epsilon=epsilon),
        made("Shape", [node.input[0]], f"{out}.shape"),
        made("Reshape", [f"{out}.normal", f"{out}.shape"], f"{out}.back"),
        made("Mul", [f"{out}.back", f"{out}.scale"], f"{out}.scaled"),
        made("Add", [f"{out}.scaled", f"{out}.shift"], out),
    ]


def _computes_half(graph: GraphProto) -> bool:
    """Whether float16 is more than how weights are stored: anything but a Cast reads such."""
    for inner in graphs_of(graph):
        half = {t.name for t in inner.initializer if t.data_type == TensorProto.FLOAT16}
        for port in inner.input:
            if port.type.tensor_type.elem_type == TensorProto.FLOAT16:
                return True
        for node in inner.node:
            to = next((a.i for a in node.attribute if a.name == "to"), 0)
            if to == TensorProto.FLOAT16:
                return True
            if node.op_type != "Cast" and half.intersection(node.input):
                return True
    return False


def to_float32(proto: ModelProto) -> None:
    """Change a graph of float16 values, in place, into one of float32 values.

    Weights keep their values: every float16 number is a float32 number.
    """
    half = TensorProto.FLOAT16
    for graph in graphs_of(proto.graph):
        for tensor in graph.initializer:
            _widened(tensor)
        for value in (*graph.input, *graph.output, *graph.value_info):
            if value.type.tensor_type.elem_type == half:
                value.type.tensor_type.elem_type = TensorProto.FLOAT
        for node in graph.node:
            for attribute in node.attribute:
                if attribute.name in ("to", "dtype") and attribute.i == half:
                    attribute.i = TensorProto.FLOAT
                if attribute.type == AttributeProto.TENSOR:
                    _widened(attribute.t)


def _widened(tensor: TensorProto) -> None:
    if tensor.data_type == TensorProto.FLOAT16:
        array = numpy_helper.to_array(tensor).astype(np.float32)
        tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))


def _require_float32(proto: ModelProto, where: str) -> None:
    """Raises ExportError for a graph that computes in a type that not all libraries have."""
    remedy = "Export the network in float32: module.float()."
    for graph in graphs_of(proto.graph):
        for tensor in graph.initializer:
            if tensor.data_type in UNSUPPORTED:
                name = UNSUPPORTED[tensor.data_type]
                raise ExportError(f"{where}: {tensor.name} is {name}. {remedy}")
        for node in graph.node:
            to = next((a.i for a in node.attribute if a.name == "to"), 0)
            # float64 may be a step on the way: PyTorch computes some scales in it.
            if to in UNSUPPORTED and to != TensorProto.DOUBLE:
                name = UNSUPPORTED[to]
                raise ExportError(f"{where}: {node.name} converts to {name}. {remedy}")
