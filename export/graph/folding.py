"""The same float32 computation with fewer multiplications: a convolution of an enlarged image
reads each pixel once."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import AttributeProto, GraphProto, ModelProto, NodeProto, helper, numpy_helper

from .dims import Dims
from .edit import copy_of, drop_unused, read_inside, readers_of

PHASES = ((0, 0), (0, 1), (1, 0), (1, 1))
"""Of a pixel of the enlarged image: row and column within the four that came from one."""
TAPS = {0: ((0,), (1, 2)), 1: ((0, 1), (2,))}
"""For each phase along one side, which of a kernel's three taps fall on the earlier pixel and which
on the later one."""


def fold_upsampling(step: ModelProto) -> ModelProto:
    """Return the step graph with four 2×2 convolutions for each one after an enlargement.

    They replace a nearest enlargement by 2 and the 3×3 convolution after it. Taps that fall on the
    same pixel of the small image are added up beforehand, which leaves 4 of 9 multiplications. The
    four results are the pixels of even and odd rows and columns. The weights stay in the graph
    under their own names. Constant operations add them up, once, when a library loads the graph.
    """
    proto = copy_of(step)
    graph = proto.graph
    shapes = {t.name: tuple(t.dims) for t in graph.initializer}
    readers = readers_of(graph)
    needed = {output.name for output in graph.output} | read_inside(graph)
    # An enlarged map that something else reads too must be computed anyway.
    enlarged = {
        node.output[0]: node
        for node in graph.node
        if node.op_type == "Resize"
        and _by_two(node, graph)
        and [r.op_type for r in readers.get(node.output[0], ())] == ["Conv"]
        and node.output[0] not in needed
    }
    if not enlarged:
        return proto
    # Height and width before the enlargement, which the transposes need as constants.
    sizes: dict[str, list[int]] = {}
    dims = Dims(proto)
    for name, resize in enlarged.items():
        small = dims.but_for_the_batch(resize.input[0])
        if small and -1 not in small[1:] and _three_by_three(readers[name][0], shapes):
            sizes[name] = small[2:]
    if sizes:
        graph.initializer.append(numpy_helper.from_array(_sums(), "step.tap_sums"))
    nodes: list[NodeProto] = []
    summed: set[str] = set()
    for node in graph.node:
        if node.op_type == "Conv" and node.input[0] in sizes:
            shape = shapes[node.input[1]]
            # Several convolutions may share their weights.
            if node.input[1] not in summed:
                nodes += _kernels(node, shape, graph)
                summed.add(node.input[1])
            nodes += _four(node, enlarged[node.input[0]].input[0])
            nodes += _interleaved(node, shape[0], sizes[node.input[0]], graph)
        elif not sizes.keys() & node.output:
            nodes.append(node)
    del graph.node[:]
    graph.node.extend(nodes)
    drop_unused(graph)
    return proto


def attributes(node: NodeProto) -> dict[str, AttributeProto]:
    """Return the attributes of a node by name."""
    return {a.name: a for a in node.attribute}


def _by_two(node: NodeProto, graph: GraphProto) -> bool:
    """Whether a Resize repeats every pixel of an H×W map in both directions."""
    found = attributes(node)
    scales = next(
        (t for t in graph.initializer if len(node.input) > 2 and t.name == node.input[2]), None
    )
    # The modes that PyTorch's exporter writes for nearest, which copy pixel i to 2i and 2i + 1.
    floor = "nearest_mode" in found and found["nearest_mode"].s == b"floor"
    place = (
        found["coordinate_transformation_mode"].s
        if "coordinate_transformation_mode" in found
        else b"half_pixel"
    )
    repeats = floor and place == b"asymmetric"
    return (
        repeats
        and ("mode" not in found or found["mode"].s == b"nearest")
        and scales is not None
        and numpy_helper.to_array(scales).tolist() == [1.0, 1.0, 2.0, 2.0]
    )


def is_ordinary(conv: NodeProto, side: int) -> bool:
    """Whether a convolution has stride 1, one group, and a result of its input's size."""
    given = attributes(conv)
    ones = all(set(given[name].ints) == {1} for name in ("strides", "dilations") if name in given)
    pads = set(given["pads"].ints) if "pads" in given else {0}
    return ones and pads == {side // 2} and ("group" not in given or given["group"].i == 1)


def _three_by_three(node: NodeProto, shapes: dict[str, tuple[int, ...]]) -> bool:
    """Whether an ordinary Conv has constant 3×3 weights."""
    return is_ordinary(node, 3) and shapes.get(node.input[1], ())[2:] == (3, 3)


def _sums() -> NDArray[np.float32]:
    """Return [9, 16]: which of nine taps go into which of 2×2 taps, for each of four phases."""
    found = np.zeros((3, 3, 4, 2, 2), np.float32)
    for phase, (a, b) in enumerate(PHASES):
        for i, rows in enumerate(TAPS[a]):
            for j, columns in enumerate(TAPS[b]):
                found[np.ix_(rows, columns, [phase], [i], [j])] = 1
    return found.reshape(9, 16)


def _constant(graph: GraphProto, name: str, value: list[int] | int) -> str:
    """Return the name of a constant, stored once."""
    if all(t.name != name for t in graph.initializer):
        graph.initializer.append(numpy_helper.from_array(np.array(value, np.int64), name))
    return name


def _kernels(conv: NodeProto, shape: tuple[int, ...], graph: GraphProto) -> list[NodeProto]:
    """Return the nodes that make four 2×2 kernels of a convolution's weights of this shape."""
    weight = conv.input[1]
    outputs, inputs = shape[:2]
    # All phases in one product with the matrix of `_sums`.
    flat = _constant(graph, f"step.taps_{outputs}_{inputs}", [outputs, inputs, 9])
    square = _constant(graph, f"step.phases_{outputs}_{inputs}", [outputs, inputs, 4, 2, 2])
    nodes = [
        helper.make_node(
            "Reshape", [weight, flat], [f"{weight}.flat"], name=f"{conv.name}_Reshape_taps"
        ),
        helper.make_node(
            "MatMul",
            [f"{weight}.flat", "step.tap_sums"],
            [f"{weight}.sums"],
            name=f"{conv.name}_MatMul_taps",
        ),
        helper.make_node(
            "Reshape",
            [f"{weight}.sums", square],
            [f"{weight}.phases"],
            name=f"{conv.name}_Reshape_phases",
        ),
    ]
    for phase in range(len(PHASES)):
        inputs_ = [f"{weight}.phases", _constant(graph, f"step.phase_{phase}", phase)]
        kernel = [f"{weight}.phase{phase}"]
        nodes.append(
            helper.make_node("Gather", inputs_, kernel, axis=2, name=f"{conv.name}_Gather_{phase}")
        )
    return nodes


def _four(conv: NodeProto, small: str) -> list[NodeProto]:
    """Return the nodes of four convolutions of the small image, one for each phase."""
    nodes = []
    for phase, (a, b) in enumerate(PHASES):
        # An even row reads the pixel above it, an odd one the pixel below: padding on one side.
        pads: Any = {"kernel_shape": [2, 2], "pads": [1 - a, 1 - b, a, b]}
        nodes.append(
            helper.make_node(
                "Conv",
                [small, f"{conv.input[1]}.phase{phase}", *conv.input[2:]],
                [f"{conv.output[0]}.phase{phase}"],
                name=f"{conv.name}_{phase}",
                **pads,
            )
        )
    return nodes


def _interleaved(
    conv: NodeProto, channels: int, size: list[int], graph: GraphProto
) -> list[NodeProto]:
    """Return the nodes that make one image of the four phases of `_four`.

    They do what DepthToSpace does, which ONNX Runtime computes at half the speed: first they move
    single pixels, those of even and odd columns, and then whole rows. DepthToSpace is faster in
    OpenVINO, so `runtime.backends.openvino_phases` puts it back there.

    Args:
        size: Height and width of a phase.
    """
    name = conv.output[0]
    height, width = size
    phases = [f"{name}.phase{phase}" for phase in range(len(PHASES))]
    nodes = [
        helper.make_node("Concat", phases, [f"{name}.phases"], axis=1, name=f"{conv.name}_Concat")
    ]

    def add(kind: str, what: str, inputs: list[str], output: str, **attributes: Any) -> None:
        nodes.append(
            helper.make_node(kind, inputs, [output], f"{conv.name}_{kind}_{what}", **attributes)
        )

    def shaped(what: str, source: str, shape: list[int], output: str) -> None:
        constant = _constant(graph, "step.shape_" + "_".join(map(str, shape[1:])), shape)
        add("Reshape", what, [source, constant], output)

    # As rows: -1 holds the batch and the parity of rows, 2 that of columns.
    shaped("pixels", f"{name}.phases", [-1, 2, channels * height * width], f"{name}.flat")
    add("Transpose", "columns", [f"{name}.flat"], f"{name}.columns", perm=[0, 2, 1])
    shaped("columns", f"{name}.columns", [-1, 2, channels * height, 2 * width], f"{name}.wide")
    add("Transpose", "rows", [f"{name}.wide"], f"{name}.rows", perm=[0, 2, 1, 3])
    shaped("rows", f"{name}.rows", [-1, channels, 2 * height, 2 * width], name)
    return nodes
