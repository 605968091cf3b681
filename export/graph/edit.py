"""Small edits that every change of a graph needs."""

from __future__ import annotations

from collections.abc import Iterator

from onnx import GraphProto, ModelProto, NodeProto


def copy_of(model: ModelProto) -> ModelProto:
    """Return a copy of a model, to change it."""
    copy = ModelProto()
    copy.CopyFrom(model)
    return copy


def with_inner(node: NodeProto) -> Iterator[NodeProto]:
    """Yield a node and the nodes inside it, if it is a branch or a loop.

    Inner nodes read the outer graph's values by name.
    """
    yield node
    for attribute in node.attribute:
        for inner in attribute.g.node:
            yield from with_inner(inner)


def readers_of(graph: GraphProto) -> dict[str, list[NodeProto]]:
    """Return the nodes that read each value, in order; those inside other nodes do not count."""
    readers: dict[str, list[NodeProto]] = {}
    for node in graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    return readers


def read_inside(graph: GraphProto) -> set[str]:
    """Return the values that nodes inside other nodes read, such as those of a branch."""
    return {
        name
        for node in graph.node
        for inner in with_inner(node)
        if inner is not node
        for name in inner.input
    }


def drop_unused(graph: GraphProto) -> None:
    """Remove the nodes and constants that no output needs."""
    # Backwards, because a node's readers come after it.
    needed = {output.name for output in graph.output}
    kept: list[NodeProto] = []
    for node in reversed(graph.node):
        if needed.intersection(node.output):
            kept.append(node)
            needed.update(name for reader in with_inner(node) for name in reader.input)
    del graph.node[:]
    graph.node.extend(reversed(kept))
    used = [tensor for tensor in graph.initializer if tensor.name in needed]
    del graph.initializer[:]
    graph.initializer.extend(used)
