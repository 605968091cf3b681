"""The float32 computation as a CPU likes it: pixels first, and 3×3 convolutions by Winograd's
algorithm.

A map of C channels, [B, C, H, W] in the graph that was traced, becomes [H·W, B, C]. In that form a
convolution's taps are rows to gather, a 1×1 convolution is one matrix product, and what is one
number a channel (the result of a norm, its affine part, modulation, a bias) gathers in one
multiplication and one addition, often in none.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto, helper, numpy_helper

from .clean import OUTSIDE
from .dims import Dims
from .edit import copy_of, drop_unused
from .folding import attributes

POINTS = (0.0, 0.75, -0.75, 1.5, -1.5)
"""Where Winograd's polynomials are evaluated, beside infinity: of the simple fractions those with
the least rounding."""
UNARY = frozenset(
    {
        "Abs",
        "Elu",
        "Erf",
        "Exp",
        "Gelu",
        "HardSigmoid",
        "HardSwish",
        "LeakyRelu",
        "Neg",
        "Relu",
        "Sigmoid",
        "Softplus",
    }
    | {"Sqrt", "Tanh"}
)
"""Of one map, each of its values alone."""
TILE = 4
"""Winograd's results at a time along a side: 36 multiplications for 16 results of 9 each."""
WIDE = 96
LARGE = 256
"""A convolution from and to so many channels, of so many pixels, gains by Winograd's algorithm;
below that the transformations cost more than they save, or the 36/9 times larger kernels take
longer to read."""
FEW = 16
"""A 3×3 convolution to fewer channels than this multiplies first and gathers afterwards."""


@dataclass(frozen=True)
class Map:
    """A map: scale · tensor + shift. tensor [height·width, B, C]; scale, shift [B or 1, C], None
    for 1 and 0."""

    tensor: str
    channels: int
    height: int
    width: int
    scale: str | None = None
    shift: str | None = None

    @property
    def size(self) -> tuple[int, int, int]:
        return self.channels, self.height, self.width

    def rows(self, low: int, high: int, wide: int) -> NDArray[np.int64]:
        """[high, wide]: the row of each pixel in the tensor, in a window that begins `low` pixels
        outside the map; -1 where there is none."""
        rows = np.arange(self.height * self.width).reshape(self.height, self.width)
        border = [
            (low, max(0, size - low - have))
            for size, have in ((high, self.height), (wide, self.width))
        ]
        return np.pad(rows, border, constant_values=-1)[:high, :wide]


class Winograd(NamedTuple):
    """outputs ((kernels g) ⊙ (inputs d)): TILE results of a 3-tap filter g on TILE + 2 neighbours
    d, with TILE + 2 multiplications.

    outputs [t, t + 2], kernels [t + 2, 3], inputs [t + 2, t + 2]. (Winograd 1980, by the
    construction of Toom and Cook; Lavin & Gray 2016.)
    """

    outputs: NDArray[np.float64]
    kernels: NDArray[np.float64]
    inputs: NDArray[np.float64]


def winograd() -> Winograd:
    """The transformations at POINTS."""
    points = np.array(POINTS)
    outputs, kernels, inputs = (
        np.zeros((rows, columns)) for rows, columns in ((TILE, 6), (6, 3), (6, 6))
    )
    for i, p in enumerate(points):
        others = np.delete(points, i)
        outputs[:, i] = p ** np.arange(TILE)
        kernels[i] = p ** np.arange(3) / np.prod(p - others)
        inputs[i, :-1] = np.poly(others)[::-1]
    outputs[-1, -1] = kernels[-1, -1] = 1
    inputs[-1] = np.poly(points)[::-1]
    return Winograd(outputs, kernels, inputs)


def pixels_first(step: ModelProto) -> ModelProto | None:
    """The step graph in that form, with the same inputs, outputs and weights; None where nothing in
    it is large enough to gain.

    Winograd's sums round a little more: some 1e-6 of a value, five times as much as the convolution
    that is multiplied out.
    """
    rewriter = _Rewriter(step)
    made = rewriter.run()
    return made if rewriter.faster else None


class _Rewriter:
    """Goes through the nodes once. `maps` holds the values that exist in the new form; of these
    `old` exist in the old one too."""

    def __init__(self, step: ModelProto) -> None:
        self.proto = copy_of(step)
        self.graph = self.proto.graph
        self.dims = Dims(step)
        self.constants = {t.name: t for t in self.graph.initializer}
        self.made = {name: node for node in self.graph.node for name in node.output}
        self.maps: dict[str, Map] = {}
        self.grouped: dict[str, tuple[Map, int]] = {}
        self.nodes: list[NodeProto] = []
        self.known: dict[tuple[Any, ...], str] = {}
        self.old: set[str] = set()
        self.faster = 0
        self.node = NodeProto()
        self.handlers: dict[str, Callable[[], bool]] = {
            "Add": self.arithmetic,
            "Concat": self.concat,
            "Conv": self.conv,
            "InstanceNormalization": self.normalize,
            "Mul": self.arithmetic,
            "Reshape": self.reshape,
            "Sub": self.arithmetic,
            **dict.fromkeys(UNARY, self.unary),
        }

    def run(self) -> ModelProto:
        for node in self.graph.node:
            self.node = node
            inside = not node.name.startswith(
                f"{OUTSIDE}/"
            )  # the network alone: what surrounds it stays to the bit
            if not (inside and self.handlers.get(node.op_type, lambda: False)()):
                for name in node.input:
                    self.leave(name)
                self.nodes.append(node)
        for output in self.graph.output:
            self.leave(output.name)
        del self.graph.node[:]
        self.graph.node.extend(self.nodes)
        drop_unused(self.graph)
        return self.proto

    # ---- what nodes are made of

    def emit(self, op: str, *inputs: str, output: str | None = None, **how: Any) -> str:
        """Append a node, unless the same is there already; its output's name."""
        key = (op, *inputs, *((k, str(v)) for k, v in sorted(how.items())))
        if output is None and key in self.known:
            return self.known[key]
        name = output or f"pixels.{len(self.nodes)}"
        where = self.node.name.rpartition("/")[0]
        self.nodes.append(helper.make_node(op, inputs, [name], name=f"{where}/{op}_{name}", **how))
        self.known[key] = name
        return name

    def constant(self, value: Any, kind: type = np.int64) -> str:
        """The name of a constant."""
        array = np.ascontiguousarray(value, kind)
        key = ("constant", array.dtype.str, array.shape, array.tobytes())
        if key not in self.known:
            name = self.known[key] = f"pixels.constant.{len(self.known)}"
            self.graph.initializer.append(numpy_helper.from_array(array, name))
        return self.known[key]

    def reshaped(self, name: str, *shape: int) -> str:
        return self.emit("Reshape", name, self.constant(shape))

    def both(self, op: str, a: str | None, b: str | None) -> str | None:
        """a op b, where None leaves the other as it is."""
        return self.emit(op, a, b) if a and b else a or b

    # ---- from one form to the other

    def map_of(self, name: str) -> Map | None:
        """A value [B, C, H, W] in the new form; None for a value of another shape."""
        if name not in self.maps:
            shape = self.dims.but_for_the_batch(name) if name not in self.constants else None
            if shape is None or len(shape) != 4 or shape[0] != -1:
                return None
            C, H, W = shape[1:]
            flat = self.reshaped(self._flat_source(name, C, H * W) or name, -1, C, H * W)
            self.maps[name] = Map(self.emit("Transpose", flat, perm=[2, 0, 1]), C, H, W)
            self.old.add(name)
        return self.maps[name]

    def _flat_source(self, name: str, channels: int, count: int) -> str | None:
        """What was [B, C, H·W] before a Reshape made the map of it."""
        node = self.made.get(name)
        if node is not None and node.op_type == "Reshape" and node.input[0] not in self.maps:
            return (
                node.input[0]
                if self.dims.but_for_the_batch(node.input[0]) == [-1, channels, count]
                else None
            )
        return None

    def leave(self, name: str) -> None:
        """Make a value in its old form and under its old name, if it is not there."""
        if name in self.maps and name not in self.old:
            reader = self.node
            self.node = self.made[name]  # it is work of the module that made it
            m = self.maps[name]
            flat = self.emit("Transpose", self.plain(m), perm=[1, 2, 0])
            self.emit("Reshape", flat, self.constant((-1, *m.size)), output=name)
            self.node = reader
            self.old.add(name)

    def plain(self, m: Map) -> str:
        """The tensor of a map with its scale and shift carried out."""
        scaled = self.emit("Mul", m.tensor, m.scale) if m.scale else m.tensor
        return self.emit("Add", scaled, m.shift) if m.shift else scaled

    # ---- nodes, by their operator; each tells whether it has dealt with the node

    def arithmetic(self) -> bool:
        a, b = self.node.input
        if a not in self.maps and b not in self.maps:
            return False
        op = self.node.op_type
        if self.dims.same(a, b):
            found = self._of_maps(op, a, b)
        elif a in self.maps:
            found = self._of_channels(op, self.maps[a], b)
        else:
            found = self._of_channels(op, self.maps[b], a) if op != "Sub" else None
        if found is None:
            return False
        self.maps[self.node.output[0]] = found
        return True

    def _of_maps(self, op: str, a: str, b: str) -> Map | None:
        """Two maps of one size. A sum leaves the shifts for later."""
        x = self.map_of(a)
        y = self.map_of(b)
        if x is None or y is None:
            return None
        shift = None
        if op == "Add":
            shift = self.both("Add", x.shift, y.shift)
            x = replace(x, shift=None)
            y = replace(y, shift=None)
        return Map(self.emit(op, self.plain(x), self.plain(y)), *x.size, shift=shift)

    def _of_channels(self, op: str, m: Map, other: str) -> Map | None:
        """A map and numbers that are the same for all of its pixels."""
        row = self._row(other, m.channels)
        if row is None:
            return None
        if op == "Mul":
            return replace(
                m,
                scale=self.both("Mul", m.scale, row),
                shift=m.shift and self.emit("Mul", m.shift, row),
            )
        if op == "Sub":
            row = self.emit("Neg", row)
        return replace(m, shift=self.both("Add", m.shift, row))

    def _row(self, name: str, channels: int) -> str | None:
        """A value as [B or 1, C or 1]; None where it differs from pixel to pixel."""
        stored = self.constants.get(name)
        shape = self.dims.but_for_the_batch(name) if stored is None else list(stored.dims)
        if shape is None or len(shape) > 4:
            return None
        batch, C, *pixel = [1] * (4 - len(shape)) + shape
        if pixel != [1, 1] or C not in (1, channels) or batch not in (1, -1):
            return None
        return self.reshaped(name, batch, C)

    def unary(self) -> bool:
        name = self.node.input[0]
        if name not in self.maps:
            return False
        m = self.maps[name]
        how = {a.name: helper.get_attribute_value(a) for a in self.node.attribute}
        self.maps[self.node.output[0]] = Map(
            self.emit(self.node.op_type, self.plain(m), **how), *m.size
        )
        return True

    def concat(self) -> bool:
        if attributes(self.node)["axis"].i != 1 or not any(
            name in self.maps for name in self.node.input
        ):
            return False
        parts = [self.map_of(name) for name in self.node.input]
        if any(m is None for m in parts):
            return False
        maps = [m for m in parts if m]
        tensor = self.emit("Concat", *map(self.plain, maps), axis=2)
        self.maps[self.node.output[0]] = Map(
            tensor, sum(m.channels for m in maps), *maps[0].size[1:]
        )
        return True

    def reshape(self) -> bool:
        """The groups of a norm and back; and pixels in a row."""
        name = self.node.input[0]
        out = self.node.output[0]
        shape = self.dims.but_for_the_batch(out)
        if name in self.grouped and shape == [-1, *self.grouped[name][0].size]:
            self.maps[out] = self.grouped[name][0]
            return True
        m = self.maps.get(name)
        if m is None or shape is None or shape[0] != -1:
            return False
        if len(shape) == 3 and self._is_norm(out):
            self.grouped[out] = m, shape[1]
            return True
        if shape == [-1, m.channels, m.height * m.width]:
            self.emit("Transpose", self.plain(m), output=out, perm=[1, 2, 0])
            return True
        return False

    def _is_norm(self, name: str) -> bool:
        """Whether a value is read by an InstanceNormalization without an affine part of its own,
        and by nothing else."""
        readers = [node for node in self.graph.node if name in node.input]
        return (
            len(readers) == 1
            and readers[0].op_type == "InstanceNormalization"
            and self._all(readers[0].input[1], 1)
            and self._all(readers[0].input[2], 0)
        )

    def normalize(self) -> bool:
        """A norm over groups of channels: its result is a scale and a shift of what it is given.

        The variance is the mean of squares less the square of the mean, of numbers that lie about
        zero in networks.
        """
        data = self.node.input[0]
        if data not in self.grouped:
            return False
        m, groups = self.grouped[data]
        mean = self.emit("ReduceMean", m.tensor, self.constant([0]), keepdims=0)
        square = self.emit(
            "ReduceMean", self.emit("Mul", m.tensor, m.tensor), self.constant([0]), keepdims=0
        )
        if m.scale:
            mean = self.emit("Mul", mean, m.scale)
            square = self.emit("Mul", square, self.emit("Mul", m.scale, m.scale))
        if m.shift:
            twice = self.emit("Add", self.emit("Add", mean, mean), m.shift)
            square = self.emit("Add", square, self.emit("Mul", m.shift, twice))
            mean = self.emit("Add", mean, m.shift)
        average = self.constant(
            np.kron(np.eye(groups), np.full([m.channels // groups] * 2, groups / m.channels)),
            np.float32,
        )
        mean = self.emit("MatMul", mean, average)
        square = self.emit("MatMul", square, average)
        variance = self.emit("Sub", square, self.emit("Mul", mean, mean))
        epsilon = self.constant(attributes(self.node)["epsilon"].f, np.float32)
        deviation = self.emit("Sqrt", self.emit("Add", variance, epsilon))
        inverse = self.emit("Reciprocal", deviation)
        scale = self.emit("Mul", m.scale, inverse) if m.scale else inverse
        shift = self.emit(
            "Mul", self.emit("Sub", m.shift, mean) if m.shift else self.emit("Neg", mean), inverse
        )
        self.grouped[self.node.output[0]] = replace(m, scale=scale, shift=shift), groups
        return True

    def _all(self, name: str, value: float) -> bool:
        return name in self.constants and bool(
            (numpy_helper.to_array(self.constants[name]) == value).all()
        )

    # ---- convolutions

    def conv(self) -> bool:
        """A convolution of pixels already here by products; a large one by Winograd, wherever its
        input is. Others stay as they are."""
        weight = self.constants.get(self.node.input[1])
        if (
            weight is None
            or list(weight.dims[2:]) not in ([1, 1], [3, 3])
            or not _ordinary(self.node, int(weight.dims[2]))
        ):
            return False
        outputs, inputs, side = weight.dims[:3]
        size = self.dims.but_for_the_batch(self.node.output[0])
        here = self.node.input[0] in self.maps
        before = self.made.get(self.node.input[0])
        large = (
            size is not None
            and side == 3
            and min(outputs, inputs) >= WIDE
            and size[2] * size[3] >= LARGE
        )
        large = large and (
            before is None or before.op_type != "Resize"
        )  # `fold_upsampling` needs fewer multiplications
        m = self.map_of(self.node.input[0]) if here or large else None
        if m is None or (side == 3 and not large and outputs >= FEW):
            return False
        if side == 1:
            tensor = self.emit("MatMul", self.plain(m), self.taps("oihw->ihwo", outputs))
        elif large:
            tensor = self.by_winograd(m, outputs)
            self.faster += 1
        else:
            tensor = self.multiply_first(m, outputs)
        bias = self.reshaped(self.node.input[2], 1, outputs) if len(self.node.input) > 2 else None
        self.maps[self.node.output[0]] = Map(tensor, outputs, m.height, m.width, shift=bias)
        return True

    def taps(self, order: str, *shape: int) -> str:
        """The convolution's weights [O, I, h, w] in another order and shape; all of it is computed
        when the graph is loaded."""
        old, new = order.split("->")
        moved = self.emit("Transpose", self.node.input[1], perm=[old.index(axis) for axis in new])
        return self.reshaped(moved, -1, *shape)

    def neighbours(self, tensor: str, count: int, places: NDArray[np.int64]) -> str:
        """Rows of a tensor [count, …] as [*places, …] flat behind the first axis; a place of -1 is
        zero."""
        padded = self.emit(
            "Pad",
            self.reshaped(tensor, count, -1),
            self.constant((0, 0, 1, 0)),
            self.constant(0, np.float32),
        )
        return self.emit(
            "Gather", padded, self.constant(np.where(places < 0, count, places)), axis=0
        )

    def by_winograd(self, m: Map, outputs: int) -> str:
        """Tiles of TILE² pixels, one matrix product for each of the (TILE + 2)² points."""
        of_outputs, of_kernels, of_inputs = (
            self.constant(np.kron(a, a), np.float32) for a in winograd()
        )
        points = (TILE + 2) ** 2
        side = TILE + 2
        high = -(-m.height // TILE)
        wide = -(-m.width // TILE)
        windows = sliding_window_view(m.rows(1, high * TILE + 2, wide * TILE + 2), (side, side))[
            ::TILE, ::TILE
        ]
        places = windows.transpose(2, 3, 0, 1).reshape(points, high * wide)
        near = self.reshaped(self.neighbours(self.plain(m), m.height * m.width, places), points, -1)
        near = self.reshaped(self.emit("MatMul", of_inputs, near), points, -1, m.channels)
        kernels = self.emit("MatMul", of_kernels, self.taps("oihw->hwio", m.channels * outputs))
        product = self.emit("MatMul", near, self.reshaped(kernels, points, m.channels, outputs))
        results = self.emit("MatMul", of_outputs, self.reshaped(product, points, -1))
        results = self.reshaped(results, TILE**2 * high * wide, -1, outputs)
        order = (
            np.arange(TILE**2 * high * wide).reshape(TILE, TILE, high, wide).transpose(2, 0, 3, 1)
        )
        order = order.reshape(high * TILE, wide * TILE)[: m.height, : m.width]
        return self.emit("Gather", results, self.constant(order.reshape(-1)), axis=0)

    def multiply_first(self, m: Map, outputs: int) -> str:
        """Every pixel times the whole kernel; each result adds up nine of the products."""
        count = m.height * m.width
        product = self.emit("MatMul", self.plain(m), self.taps("oihw->ihwo", 9 * outputs))
        product = self.emit(
            "Transpose", self.reshaped(product, count, -1, 9, outputs), perm=[0, 2, 1, 3]
        )
        windows = sliding_window_view(m.rows(1, m.height + 2, m.width + 2), (3, 3)).reshape(-1, 9)
        places = np.where(windows < 0, -1, windows * 9 + np.arange(9))
        total = self.emit(
            "ReduceSum", self.neighbours(product, 9 * count, places), self.constant([1]), keepdims=0
        )
        return self.reshaped(total, count, -1, outputs)


def _ordinary(conv: NodeProto, side: int) -> bool:
    """Whether a convolution has steps of one pixel, a result of its input's size, and nothing out
    of the ordinary."""
    found = attributes(conv)
    ones = all(set(found[name].ints) == {1} for name in ("strides", "dilations") if name in found)
    pads = set(found["pads"].ints) if "pads" in found else {0}
    return ones and pads == {side // 2} and ("group" not in found or found["group"].i == 1)
