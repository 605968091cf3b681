"""The network inside a step graph, and the same in float16.

The network consists of the nodes that come from the module and depend on the state. `graph.clean`
names them after the module. So the time embedding, the denoised estimate and the update stay
float32. See docs/precisions.md.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import onnx
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, helper, numpy_helper

from runtime.bundle.format import NETWORK

from .edit import copy_of, drop_unused, read_inside, with_inner

HALF = frozenset(
    (
        *("Conv", "ConvTranspose", "Gemm", "MatMul", "Add", "Sub", "Mul", "Neg", "Relu", "Sigmoid"),
        *("Tanh", "Erf", "Gelu", "Concat", "Split", "Slice", "Reshape", "Transpose", "Unsqueeze"),
        *("Squeeze", "Expand", "Identity", "Pad", "Resize", "DepthToSpace", "SpaceToDepth"),
        *("AveragePool", "MaxPool", "Gather"),
    )
)
"""What is computed in float16. Sums over many values (norms, softmax, means) and all other
operators stay float32."""
ONLY_FIRST = frozenset(
    ("Resize", "Reshape", "Slice", "Expand", "Unsqueeze", "Squeeze", "Split", "Pad", "Gather")
)
"""Operators whose other inputs are shapes, scales or indices."""
VALUE_OF_PAD = 2
"""The input of Pad that is a value again."""
MOVES = frozenset(("Reshape", "Transpose", "Unsqueeze", "Squeeze", "Identity", "Split", "Slice"))
"""Operators that compute nothing: their outputs have the type of their input."""
NORMS = frozenset(
    (
        *("InstanceNormalization", "LayerNormalization", "GroupNormalization"),
        *("BatchNormalization", "ReduceMean"),
    )
)


def scope(node: NodeProto) -> str:
    """Return the path of the module that a node came from."""
    return node.name.rpartition("/")[0]


def network_nodes(graph: GraphProto) -> list[NodeProto]:
    """Return the nodes of the network that depend on the state, in order."""
    reached = {"state"}
    found = []
    for node in graph.node:
        # A branch reads values by their names, too.
        if any(reached.intersection(reader.input) for reader in with_inner(node)):
            reached.update(node.output)
            if f"{scope(node)}.".startswith(NETWORK):
                found.append(node)
    return found


def tensors(step: ModelProto) -> Iterator[str]:
    """Yield the names of the network's float32 values that depend on the state.

    Values that differ from another one only in shape are left out.
    """
    floats = _float_values(step)
    for node in network_nodes(step.graph):
        if node.op_type not in MOVES:
            yield from (name for name in node.output if name in floats)


def to_float16(step: ModelProto) -> ModelProto:
    """Return the step graph with its network in float16.

    Norms with their affine part, softmax and the time embedding stay float32. Weights beyond
    float16's range become infinite: the proof counts non-finite values.
    """
    proto = copy_of(step)
    graph = proto.graph
    types = _float_values(proto)
    inside = network_nodes(graph)
    # A norm's affine part has the scope of the norm, and a norm's sums may exceed 65504.
    norm_scopes = {scope(n) for n in inside if n.op_type in NORMS}
    half = {n.name for n in inside if n.op_type in HALF and scope(n) not in norm_scopes}
    # A branch reads values by their names, which are those of float32.
    seen_inside = read_inside(graph)
    constants = {t.name: t for t in graph.initializer}
    is_half: set[str] = set()
    casts: dict[tuple[str, bool], str] = {}
    nodes: list[NodeProto] = []

    def wanted(name: str, as_half: bool) -> str:
        """Return the value in the wanted type, converted once."""
        if (name in is_half) == as_half:
            return name
        key = (name, as_half)
        if key not in casts:
            casts[key] = f"{name}.{'half' if as_half else 'float'}"
            # Constants are converted here, so that float16 weights take half the disk and memory.
            if name in constants:
                with np.errstate(over="ignore"):
                    value = numpy_helper.to_array(constants[name]).astype(np.float16)
                graph.initializer.append(numpy_helper.from_array(value, casts[key]))
            else:
                to = TensorProto.FLOAT16 if as_half else TensorProto.FLOAT
                nodes.append(
                    helper.make_node("Cast", [name], [casts[key]], to=to, name=f"{casts[key]}/Cast")
                )
        return casts[key]

    for node in graph.node:
        in_half = node.name in half and not seen_inside.intersection(node.output)
        if node.op_type in MOVES:
            # ONNX Runtime 1.32 crashes when it loads a conversion, a Transpose and a product.
            in_half = in_half and node.input[0] in is_half
        for i, name in enumerate(node.input):
            is_value = not i or node.op_type not in ONLY_FIRST
            if name in types and (is_value or (node.op_type, i) == ("Pad", VALUE_OF_PAD)):
                node.input[i] = wanted(name, in_half)
        nodes.append(node)
        if in_half:
            is_half.update(o for o in node.output if o in types)
    del graph.node[:]
    graph.node.extend(nodes)
    drop_unused(graph)
    return proto


def _float_values(proto: ModelProto) -> set[str]:
    """Return the names of all float32 values, constants among them."""
    inferred = onnx.shape_inference.infer_shapes(proto).graph
    values = [*inferred.value_info, *inferred.input, *inferred.output]
    found = {v.name for v in values if v.type.tensor_type.elem_type == TensorProto.FLOAT}
    return found | {t.name for t in proto.graph.initializer if t.data_type == TensorProto.FLOAT}
