"""A traced graph without traces of the build machine, and with constant shapes."""

from __future__ import annotations

import ast
from collections.abc import Callable

import numpy as np
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, numpy_helper

from runtime.bundle.format import NETWORK

from ..sources.onnx_file.read import graphs_of
from .dims import Dims
from .edit import drop_unused, with_inner
from .weights import is_outside

OUTSIDE = "step"
"""The first part of a node's name outside the network."""


def clean(
    proto: ModelProto, modules: Callable[[GraphProto], list[str]] | None = None
) -> ModelProto:
    """Change a traced graph in place: remove what reveals the build machine, freeze shapes.

    Stack traces and paths go. Shapes that are known except for the batch become constants. A node
    is named after the module that it came from, as in network.down.0.residual.conv1/Conv_12;
    nodes outside the network are named as in step/Add_3.

    Args:
        modules: The path of each node's module [as torch's exporter noted it].

    Returns:
        `proto`.
    """
    proto.doc_string = ""
    proto.producer_name = "unnoise"
    proto.producer_version = ""
    del proto.metadata_props[:]
    graph = proto.graph
    graph.name = "step"
    # Shapes first: what computed them is then unused and goes.
    _freeze_shapes(proto)
    drop_unused(graph)
    for i, (node, module) in enumerate(zip(graph.node, (modules or _modules)(graph), strict=True)):
        node.name = f"{module}/{node.op_type}_{i}"
    # Stack traces hold paths and source lines of the machine that traced the module.
    for part in graphs_of(graph):
        for item in [part, *part.node, *part.input, *part.output, *part.initializer]:
            item.doc_string = ""
            del item.metadata_props[:]
        # The shapes that the tracer noted name its symbols; libraries infer their own.
        del part.value_info[:]
    return proto


def _modules(graph: GraphProto) -> list[str]:
    """Return the path of the module that each node came from; "step" outside the network.

    torch's exporter notes the path in the node's metadata. For some nodes it notes nothing: if they
    are between two nodes of the network, they belong to the module before them.
    """
    found: list[str] = []
    for node in graph.node:
        noted = next(
            (p.value for p in node.metadata_props if p.key == "pkg.torch.onnx.name_scopes"), "[]"
        )
        inside = [
            scope
            for scope in ast.literal_eval(noted)[:-1]
            if scope and f"{scope}.".startswith(NETWORK)
        ]
        found.append(inside[-1] if inside else OUTSIDE)
    # Forwards: which module computed each value, or the values that a nameless node read.
    made: dict[str, str] = {}
    for node, module in zip(graph.node, found, strict=True):
        before = next((made[name] for name in node.input if name in made), None)
        if module != OUTSIDE or before:
            made.update(
                dict.fromkeys(node.output, before if module == OUTSIDE and before else module)
            )
    # Backwards: a nameless node whose output the network reads belongs to the network.
    wanted: set[str] = set()
    for i, node in reversed(list(enumerate(graph.node))):
        if found[i] != OUTSIDE or wanted.intersection(node.output):
            wanted.update(node.input)
            if found[i] == OUTSIDE and node.output[0] in made:
                found[i] = made[node.output[0]]
    return found


def _freeze_shapes(proto: ModelProto) -> None:
    """Turn computed shapes into constants, with -1 for the batch, and drop factors of ones."""
    graph = proto.graph
    dims = Dims(proto)
    stored = {t.name: t for t in graph.initializer}
    constants: dict[str, TensorProto] = {}
    # The tracer broadcasts by multiplying with ones of the batch's size.
    ones = {
        n.output[0]
        for n in graph.node
        if n.op_type == "Expand" and _all_ones(stored.get(n.input[0]))
    }
    instead: dict[str, str] = {}
    for node in graph.node:
        for reader in with_inner(node):
            for i, name in enumerate(reader.input):
                reader.input[i] = instead.get(name, name)
        if node.op_type == "Reshape" and node.input[1] not in stored and not _zero_is_zero(node):
            shape = dims.but_for_the_batch(node.output[0])
            if shape:
                name = "shape_" + "_".join("batch" if d == -1 else str(d) for d in shape)
                constants[name] = numpy_helper.from_array(np.array(shape, np.int64), name)
                node.input[1] = name
        elif node.op_type == "Mul":
            kept = [name for name in node.input if name not in ones]
            if len(kept) == 1 and dims.same(kept[0], node.output[0]):
                instead[node.output[0]] = kept[0]
    graph.initializer.extend(constants.values())


def _all_ones(tensor: TensorProto | None) -> bool:
    # Ones that the tracer wrote are few: none of them is stored outside.
    if tensor is None or is_outside(tensor):
        return False
    return bool((numpy_helper.to_array(tensor) == 1).all())


def _zero_is_zero(reshape: NodeProto) -> bool:
    return any(a.name == "allowzero" and a.i for a in reshape.attribute)
