"""The same float32 computation in fewer passes: two scales of a channel become one."""

from __future__ import annotations

from typing import NamedTuple

from onnx import ModelProto, NodeProto, helper

from .dims import Dims
from .edit import copy_of, read_inside, readers_of


class _Affine(NamedTuple):
    """x · scale + shift, in two nodes."""

    mul: NodeProto
    add: NodeProto
    x: str
    scale: str
    shift: str


def fold_scales(step: ModelProto) -> ModelProto:
    """Return the step graph with the scale and shift of a norm in those of the modulation after it.

    (x · g + b) · s + t, with constants g and b of the channels and with s and t of each sample, is
    x · (g · s) + (b · s + t): two passes over the image instead of four.
    """
    proto = copy_of(step)
    graph = proto.graph
    found = _Affines(proto)
    instead: dict[str, list[NodeProto]] = {}
    for node in graph.node:
        outer = found.affine(node)
        inner = found.affine(found.made.get(outer.x)) if outer else None
        if outer and inner and found.folds(inner, outer):
            # The last of the four stands where all that the new ones read is known.
            for old in (inner.mul, inner.add, outer.mul):
                instead[old.output[0]] = []
            instead[outer.add.output[0]] = _folded(inner, outer)
    nodes = [new for node in graph.node for new in instead.get(node.output[0], [node])]
    del graph.node[:]
    graph.node.extend(nodes)
    return proto


class _Affines:
    """What a graph scales and shifts, and who reads it."""

    def __init__(self, proto: ModelProto) -> None:
        graph = proto.graph
        self.made = {name: node for node in graph.node for name in node.output}
        self._constants = {t.name: list(t.dims) for t in graph.initializer}
        self._dims = Dims(proto)
        self._readers = readers_of(graph)
        self._needed = {output.name for output in graph.output} | read_inside(graph)

    def affine(self, node: NodeProto | None) -> _Affine | None:
        """Return x · scale + shift, if that is what an Add ends, with values smaller than x."""
        if node is None or node.op_type != "Add":
            return None
        for product, shift in (node.input, reversed(node.input)):
            mul = self.made.get(product)
            if mul is None or mul.op_type != "Mul":
                continue
            for x, scale in (mul.input, reversed(mul.input)):
                if self._shape(scale) == self._shape(shift) != self._shape(x):
                    return _Affine(mul, node, x, scale, shift)
        return None

    def folds(self, inner: _Affine, outer: _Affine) -> bool:
        """Whether the inner one has constants, for the same axis, and nothing else reads it."""
        constant = {inner.scale, inner.shift} <= self._constants.keys()
        computed = self._constants.keys().isdisjoint({outer.scale, outer.shift})
        shape = self._shape(inner.scale)
        between = (inner.mul, inner.add, outer.mul)
        return (
            constant
            and computed
            and shape is not None
            and shape == self._shape(outer.scale)
            and all(self._is_private(node.output[0]) for node in between)
        )

    def _shape(self, name: str) -> list[int] | None:
        """A sample's shape, from its first axis that is not 1 on; None if it is unknown."""
        shape = self._constants.get(name)
        if shape is None:
            known = self._dims.but_for_the_batch(name)
            if known is None or -1 not in known[:1]:
                return None
            shape = known[1:]
        while shape[:1] == [1]:
            shape = shape[1:]
        return shape

    def _is_private(self, name: str) -> bool:
        return len(self._readers.get(name, ())) == 1 and name not in self._needed


def _folded(inner: _Affine, outer: _Affine) -> list[NodeProto]:
    name = outer.add.output[0]
    scale, offset, shift, scaled = (
        f"{name}.{what}" for what in ("scale", "offset", "shift", "scaled")
    )
    at = f"{outer.add.name.rpartition('/')[0]}/"
    return [
        helper.make_node("Mul", [outer.scale, inner.scale], [scale], f"{at}Mul_scale_{name}"),
        helper.make_node("Mul", [outer.scale, inner.shift], [offset], f"{at}Mul_offset_{name}"),
        helper.make_node("Add", [offset, outer.shift], [shift], f"{at}Add_shift_{name}"),
        helper.make_node("Mul", [inner.x, scale], [scaled], outer.mul.name),
        helper.make_node("Add", [scaled, shift], [name], outer.add.name),
    ]
