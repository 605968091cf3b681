"""The nodes and constants that a rewrite adds to a graph."""

from __future__ import annotations

from typing import Any

import numpy as np
from onnx import GraphProto, NodeProto, TensorProto, helper, numpy_helper

from ..edit import with_inner


class Emitter:
    """Collects nodes. Those of a rewrite are named after the node that they replace."""

    def __init__(self, graph: GraphProto) -> None:
        self.graph = graph
        self.nodes: list[NodeProto] = []
        self.constants: dict[str, TensorProto] = {t.name: t for t in graph.initializer}
        self._name = ""
        self._value = ""
        self._count = 0
        # The names of a file may have the form of new ones.
        self._taken = {
            *(value.name for value in graph.input),
            *(name for node in graph.node for inner in with_inner(node) for name in inner.output),
        }

    def begin(self, replaced: NodeProto) -> None:
        """Start the rewrite of a node."""
        self._name = replaced.name
        self._value = replaced.output[0]
        self._count = 0

    def __call__(self, op: str, *inputs: str, into: str = "", **attributes: Any) -> str:
        """Add a node, and return the name of its output; `into`: the name that it must have."""
        self._count += 1
        while f"{self._value}.{self._count}" in self._taken:
            self._count += 1
        output = into or f"{self._value}.{self._count}"
        name = f"{self._name}.{self._count}"
        self.nodes.append(helper.make_node(op, [*inputs], [output], name=name, **attributes))
        return output

    def floats(self, value: float) -> str:
        """Return a scalar constant."""
        return self._constant(f"rounding.{value!r}", np.float32(value))

    def integers(self, *values: int) -> str:
        """Return a vector of integers."""
        name = "rounding.axes_" + "_".join(map(str, values))
        return self._constant(name, np.array(values, np.int64))

    def ones(self, rows: int, columns: int) -> str:
        """Return a matrix of ones."""
        return self._constant(
            f"rounding.ones_{rows}_{columns}", np.ones((rows, columns), np.float32)
        )

    def index(self, value: int) -> str:
        """Return a scalar index."""
        return self._constant(f"rounding.index_{value}", np.array(value, np.int64))

    def _constant(self, name: str, value: np.generic | np.ndarray) -> str:
        if name not in self.constants:
            tensor = numpy_helper.from_array(np.asarray(value), name)
            self.constants[name] = tensor
            self.graph.initializer.append(tensor)
        return name

    def replace_nodes(self) -> None:
        """Make the collected nodes the graph's."""
        del self.graph.node[:]
        self.graph.node.extend(self.nodes)
