"""Images whose even and odd rows and columns are computed separately, joined by DepthToSpace.

The step graph moves pixels, then rows, by two transposes, see `export.graph.folding`. ONNX Runtime
is faster at that than at DepthToSpace. OpenVINO is slower: it would leave its blocked layout.
"""

from __future__ import annotations

from typing import cast

from .openvino_api import Model, Node, Operations, Port

PIXELS = [0, 2, 1]
ROWS = [0, 2, 1, 3]


def join_phases(model: Model) -> None:
    """Put a DepthToSpace for every two such transposes into a model."""
    from openvino import opset13

    operations = cast(Operations, opset13)
    for node in model.get_ordered_ops():
        phases = _phases(node)
        if phases is not None:
            joined = operations.depth_to_space(phases, "blocks_first", 2)
            for reader in list(node.output(0).get_target_inputs()):
                reader.replace_source_output(joined.output(0))


def _phases(node: Node) -> Port | None:
    """The four phases [B, 4·C, H, W] of which a node makes an image; None if it does not."""
    image = _constant(node, "Reshape")
    if len(image) != 4 or image[2] % 2 or image[3] % 2:
        return None
    channels, height, width = image[1], image[2] // 2, image[3] // 2
    steps = (
        ("Transpose", ROWS),
        ("Reshape", [-1, 2, channels * height, 2 * width]),
        ("Transpose", PIXELS),
        ("Reshape", [-1, 2, channels * height * width]),
    )
    for kind, constant in steps:
        node = _source(node).get_node()
        if _constant(node, kind) != constant:
            return None
    phases = _source(node)
    axes = list(phases.get_partial_shape())[1:]
    known = [axis.get_length() if axis.is_static else 0 for axis in axes]
    return phases if known == [4 * channels, height, width] else None


def _source(node: Node) -> Port:
    return node.inputs()[0].get_source_output()


def _constant(node: Node, kind: str) -> list[int]:
    """The shape or order that a Reshape or Transpose has as a constant; else []."""
    if node.get_type_name() != kind:
        return []
    constant = node.inputs()[1].get_source_output().get_node()
    return constant.get_data().tolist() if constant.get_type_name() == "Constant" else []
