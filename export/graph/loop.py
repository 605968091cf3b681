"""The whole sampling loop in one ONNX graph."""

from __future__ import annotations

import numpy as np
from onnx import GraphProto, ModelProto, TensorProto, helper, numpy_helper

from runtime.diffusion.program import R

ROWS = ("noise", "call", "update")
"""Inputs of the step graph that have one entry per row of the program."""


def loop(step: ModelProto, sample_shape: tuple[int, ...]) -> ModelProto:
    """Return the whole sampling loop as one graph: an ONNX Loop whose body is the step graph.

    Inputs: x [B, *S] float32 (x_T), noise [K, B, *S], call [K, B, 6], update [K, B, R, R+2], and
    the step graph's label and conditions, [B, …]. Output: sample [B, *S]. K, the number of rows, is
    dynamic like B. The weights are initializers of the loop's body.
    """
    body = _body(step)

    S = list(sample_shape)
    # x fills register 0; the other registers start at zero.
    pads = [0] * (len(S) + 2) + [0, R - 1] + [0] * len(S)
    constants = {
        "one": np.array([1], np.int64),
        "zero": np.array(0, np.int64),
        "pads": np.array(pads, np.int64),
        "nothing": np.array(0, np.float32),
        "always": np.array(True),
        "scalar": np.array([], np.int64),
    }
    outer = [
        helper.make_node("Shape", ["call"], ["K_vector"], start=0, end=1),
        helper.make_node("Reshape", ["K_vector", "scalar"], ["K"]),
        helper.make_node("Unsqueeze", ["x", "one"], ["x_register"]),
        helper.make_node("Pad", ["x_register", "pads", "nothing"], ["start"]),
        helper.make_node("Loop", ["K", "always", "start"], ["end"], body=body),
        helper.make_node("Gather", ["end", "zero"], ["sample"], axis=1),
    ]
    value = helper.make_tensor_value_info
    inputs = [
        value("x", TensorProto.FLOAT, ["batch", *S]),
        value("noise", TensorProto.FLOAT, ["rows", "batch", *S]),
        value("call", TensorProto.FLOAT, ["rows", "batch", 6]),
        value("update", TensorProto.FLOAT, ["rows", "batch", R, R + 2]),
        *[i for i in step.graph.input if i.name not in ("state", *ROWS)],
    ]
    outputs = [value("sample", TensorProto.FLOAT, ["batch", *S])]
    graph = helper.make_graph(
        outer,
        "sampler",
        inputs,
        outputs,
        [numpy_helper.from_array(v, k) for k, v in constants.items()],
    )
    # Names for error messages and profiles of inference libraries.
    for i, node in enumerate(graph.node):
        node.name = f"{node.op_type}_{i}"
    return helper.make_model(
        graph, producer_name="unnoise", opset_imports=step.opset_import, ir_version=step.ir_version
    )


def _body(step: ModelProto) -> GraphProto:
    """Return the step graph as the body of a Loop: (k, more, state) → (go_on, next_state)."""
    body = GraphProto()
    body.CopyFrom(step.graph)
    # Each iteration reads its own row k of the program.
    for node in body.node:
        for i, name in enumerate(node.input):
            if name in ROWS:
                node.input[i] = f"{name}_row"
    gathers = [
        helper.make_node("Gather", [name, "k"], [f"{name}_row"], axis=0, name=f"row_{name}")
        for name in ROWS
    ]
    nodes = [*gathers, *body.node, helper.make_node("Identity", ["more"], ["go_on"], name="go_on")]
    del body.node[:]
    body.node.extend(nodes)
    state = next(i for i in step.graph.input if i.name == "state")
    next_state = next(o for o in step.graph.output if o.name == "next_state")
    del body.input[:]
    del body.output[:]
    body.input.extend(
        [
            helper.make_tensor_value_info("k", TensorProto.INT64, []),
            helper.make_tensor_value_info("more", TensorProto.BOOL, []),
            state,
        ]
    )
    body.output.extend([helper.make_tensor_value_info("go_on", TensorProto.BOOL, []), next_state])
    body.name = "row"
    return body
