"""Maps in pixels-first form, and the nodes that compute them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import GraphProto, NodeProto, helper, numpy_helper


@dataclass(frozen=True)
class Map:
    """The map scale · tensor + shift.

    Attributes:
        tensor: The name of a value [height·width, B, C].
        scale: The name of a value [B or 1, C]; None for 1.
        shift: The name of a value [B or 1, C]; None for 0.
    """

    tensor: str
    channels: int
    height: int
    width: int
    scale: str | None = None
    shift: str | None = None

    @property
    def size(self) -> tuple[int, int, int]:
        """Channels, height, width."""
        return self.channels, self.height, self.width

    @property
    def pixels(self) -> int:
        """Height times width."""
        return self.height * self.width

    def rows(self, low: int, high: int, wide: int) -> NDArray[np.int64]:
        """Return the row of the tensor for each pixel of a window [high, wide]; -1 is outside.

        The window begins `low` pixels outside the map.
        """
        rows = np.arange(self.pixels).reshape(self.height, self.width)
        border = [
            (low, max(0, size - low - have))
            for size, have in ((high, self.height), (wide, self.width))
        ]
        return np.pad(rows, border, constant_values=-1)[:high, :wide]


class Writer:
    """Appends nodes and constants, each once.

    Attributes:
        nodes: The nodes of the new graph so far.
        node: The node that is being rewritten. New nodes are named after its module.
    """

    def __init__(self, graph: GraphProto) -> None:
        self.nodes: list[NodeProto] = []
        self.node = NodeProto()
        self._graph = graph
        self._names: dict[tuple[Any, ...], str] = {}

    def emit(self, op: str, *inputs: str, output: str | None = None, **attributes: Any) -> str:
        """Append a node, unless there is an equal one, and return its output's name."""
        # Two readers of one value need the same reshapes and products of it.
        key = (op, *inputs, *((k, str(v)) for k, v in sorted(attributes.items())))
        if output is None and key in self._names:
            return self._names[key]
        name = output or f"pixels.{len(self.nodes)}"
        module = self.node.name.rpartition("/")[0]
        node = helper.make_node(op, inputs, [name], name=f"{module}/{op}_{name}", **attributes)
        self.nodes.append(node)
        self._names[key] = name
        return name

    def constant(self, value: Any, kind: type = np.int64) -> str:
        """Return the name of a constant."""
        array = np.ascontiguousarray(value, kind)
        key = ("constant", array.dtype.str, array.shape, array.tobytes())
        if key not in self._names:
            name = f"pixels.constant.{len(self._names)}"
            self._names[key] = name
            self._graph.initializer.append(numpy_helper.from_array(array, name))
        return self._names[key]

    def reshaped(self, name: str, *shape: int) -> str:
        """Return the name of a value in another shape."""
        return self.emit("Reshape", name, self.constant(shape))

    def both(self, op: str, a: str | None, b: str | None) -> str | None:
        """Return a op b, or the other one if either is None, the neutral element."""
        return self.emit(op, a, b) if a and b else a or b

    def plain(self, m: Map) -> str:
        """Return the name of a map's values [height·width, B, C], scaled and shifted."""
        scaled = self.emit("Mul", m.tensor, m.scale) if m.scale else m.tensor
        return self.emit("Add", scaled, m.shift) if m.shift else scaled
