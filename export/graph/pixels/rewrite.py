"""The float32 computation in the form that suits CPUs: pixels first, and 3×3 convolutions by
Winograd's algorithm.

A map of C channels, [B, C, H, W] in the graph that was traced, becomes [H·W, B, C]. In that form a
convolution's taps are rows to gather, and a 1×1 convolution is one matrix product. Factors with one
number per channel (the result of a norm, its affine part, modulation, a bias) merge into one
multiplication and one addition. Often both disappear.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from onnx import ModelProto, TensorProto, helper

from ..clean import OUTSIDE
from ..dims import Dims
from ..edit import copy_of, drop_unused, read_inside, readers_of, with_inner
from ..folding import attributes, is_ordinary
from .convolution import by_winograd, multiply_first, one_by_one
from .maps import Map, Writer
from .norm import is_plain_norm, normalized

UNARY = frozenset(
    (
        *("Abs", "Elu", "Erf", "Exp", "Gelu", "HardSigmoid", "HardSwish", "LeakyRelu", "Neg"),
        *("Relu", "Sigmoid", "Softplus", "Sqrt", "Tanh"),
    )
)
"""Operators that compute each value of one map from that value alone."""
WIDE = 96
LARGE = 256
"""A convolution from and to at least WIDE channels, of at least LARGE pixels, gains from Winograd's
algorithm. Below that the transformations cost more than they save, or the 36/9 times larger
kernels take longer to read."""
MANY = 512 * 512
SPREAD = 1024
"""With at least MANY pairs of channels it takes SPREAD pixels: at 256 pixels such a layer saves a
fifth of its time, which is 1 % of a network of 256×256, for four times its weights in memory."""
FEW = 16
"""A 3×3 convolution to fewer channels than this multiplies first and gathers afterwards."""


def pixels_first(step: ModelProto) -> ModelProto | None:
    """Return the step graph with pixels first, or None if nothing in it is large enough to gain.

    Inputs, outputs and weights stay the same. Winograd's sums round a little more: by about 1e-6
    of a value, five times as much as the convolution that is multiplied out.
    """
    rewriter = _Rewriter(step)
    rewritten = rewriter.run()
    return rewritten if rewriter.gained else None


class _Rewriter:
    """Rewrites the nodes of a graph in one pass.

    Attributes:
        maps: The values that exist with pixels first, by name.
        old: The names in `maps` whose values exist in the old form too.
        grouped: Maps reshaped to the groups of a norm, and the number of groups, by name.
        gained: How many convolutions use Winograd's algorithm.
    """

    def __init__(self, step: ModelProto) -> None:
        self.proto = copy_of(step)
        self.graph = self.proto.graph
        self.dims = Dims(step)
        self.constants: dict[str, TensorProto] = {t.name: t for t in self.graph.initializer}
        self.made_by = {name: node for node in self.graph.node for name in node.output}
        self.readers = readers_of(self.graph)
        self.read_inside = read_inside(self.graph)
        self.writer = Writer(self.graph)
        self.maps: dict[str, Map] = {}
        self.old: set[str] = set()
        self.grouped: dict[str, tuple[Map, int]] = {}
        self.gained = 0
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
            self.writer.node = node
            # Only the network is rewritten: what surrounds it must stay the same bit for bit.
            inside = not node.name.startswith(f"{OUTSIDE}/")
            if not (inside and self.handlers.get(node.op_type, lambda: False)()):
                # The node stays as it is, and reads its inputs in the old form.
                for reader in with_inner(node):
                    for name in reader.input:
                        self.leave(name)
                self.writer.nodes.append(node)
        for output in self.graph.output:
            self.leave(output.name)
        del self.graph.node[:]
        self.graph.node.extend(self.writer.nodes)
        drop_unused(self.graph)
        return self.proto

    # ---- from one form to the other

    def map_of(self, name: str) -> Map | None:
        """Return a value [B, C, H, W] with pixels first; None for a value of another shape."""
        if name not in self.maps:
            shape = self.dims.but_for_the_batch(name) if name not in self.constants else None
            if shape is None or len(shape) != 4 or shape[0] != -1:
                return None
            C, H, W = shape[1:]
            flat = self.writer.reshaped(self._flat_source(name, C, H * W) or name, -1, C, H * W)
            tensor = self.writer.emit("Transpose", flat, perm=[2, 0, 1])
            self.maps[name] = Map(tensor, C, H, W)
            self.old.add(name)
        return self.maps[name]

    def _flat_source(self, name: str, channels: int, count: int) -> str | None:
        """Return the value [B, C, H·W] that a Reshape made the map from, if one did."""
        node = self.made_by.get(name)
        if node is None or node.op_type != "Reshape" or node.input[0] in self.maps:
            return None
        flat = self.dims.but_for_the_batch(node.input[0]) == [-1, channels, count]
        return node.input[0] if flat else None

    def leave(self, name: str) -> None:
        """Write a value in its old form and under its old name, unless it is there already."""
        if name not in self.maps or name in self.old:
            return
        reader = self.writer.node
        # The work belongs to the module that made the value, not to the one that reads it.
        self.writer.node = self.made_by[name]
        m = self.maps[name]
        flat = self.writer.emit("Transpose", self.writer.plain(m), perm=[1, 2, 0])
        shape = self.writer.constant((-1, *m.size))
        self.writer.emit("Reshape", flat, shape, output=name)
        self.writer.node = reader
        self.old.add(name)

    # ---- nodes, by their operator; each method returns whether it has rewritten the node

    def arithmetic(self) -> bool:
        node = self.writer.node
        op = node.op_type
        a, b = node.input
        if a not in self.maps and b not in self.maps:
            return False
        if self.dims.same(a, b):
            result = self._of_maps(op, a, b)
        elif a in self.maps:
            result = self._of_channels(op, self.maps[a], b)
        else:
            result = self._of_channels(op, self.maps[b], a) if op != "Sub" else None
        if result is None:
            return False
        self.maps[node.output[0]] = result
        return True

    def _of_maps(self, op: str, a: str, b: str) -> Map | None:
        """Combine two maps of one size."""
        x = self.map_of(a)
        y = self.map_of(b)
        if x is None or y is None:
            return None
        shift = None
        if op == "Add":
            # Shifts add up: one addition of [B, C] instead of two of whole maps, or none.
            shift = self.writer.both("Add", x.shift, y.shift)
            x = replace(x, shift=None)
            y = replace(y, shift=None)
        tensor = self.writer.emit(op, self.writer.plain(x), self.writer.plain(y))
        return Map(tensor, *x.size, shift=shift)

    def _of_channels(self, op: str, m: Map, other: str) -> Map | None:
        """Combine a map with numbers that are the same for all of its pixels."""
        writer = self.writer
        row = self._row(other, m.channels)
        if row is None:
            return None
        if op == "Mul":
            scale = writer.both("Mul", m.scale, row)
            return replace(m, scale=scale, shift=m.shift and writer.emit("Mul", m.shift, row))
        if op == "Sub":
            row = writer.emit("Neg", row)
        return replace(m, shift=writer.both("Add", m.shift, row))

    def _row(self, name: str, channels: int) -> str | None:
        """Return a value as [B or 1, C or 1]; None if it differs from pixel to pixel."""
        stored = self.constants.get(name)
        shape = self.dims.but_for_the_batch(name) if stored is None else list(stored.dims)
        if shape is None or len(shape) > 4:
            return None
        # Missing axes in front broadcast, as in numpy.
        batch, C, *pixel = [1] * (4 - len(shape)) + shape
        if pixel != [1, 1] or C not in (1, channels) or batch not in (1, -1):
            return None
        return self.writer.reshaped(name, batch, C)

    def unary(self) -> bool:
        node = self.writer.node
        m = self.maps.get(node.input[0])
        if m is None:
            return False
        given = {a.name: helper.get_attribute_value(a) for a in node.attribute}
        tensor = self.writer.emit(node.op_type, self.writer.plain(m), **given)
        self.maps[node.output[0]] = Map(tensor, *m.size)
        return True

    def concat(self) -> bool:
        node = self.writer.node
        if attributes(node)["axis"].i != 1 or not any(name in self.maps for name in node.input):
            return False
        parts = [self.map_of(name) for name in node.input]
        maps = [m for m in parts if m]
        if len(maps) < len(parts):
            return False
        tensor = self.writer.emit("Concat", *map(self.writer.plain, maps), axis=2)
        channels = sum(m.channels for m in maps)
        self.maps[node.output[0]] = Map(tensor, channels, *maps[0].size[1:])
        return True

    def reshape(self) -> bool:
        """The groups of a norm and back; and pixels in a row."""
        name = self.writer.node.input[0]
        out = self.writer.node.output[0]
        shape = self.dims.but_for_the_batch(out)
        if name in self.grouped and shape == [-1, *self.grouped[name][0].size]:
            self.maps[out] = self.grouped[name][0]
            return True
        m = self.maps.get(name)
        if m is None or shape is None or shape[0] != -1:
            return False
        if len(shape) == 3 and m.channels % shape[1] == 0 and self._is_norm(out, m):
            self.grouped[out] = m, shape[1]
            return True
        if shape == [-1, m.channels, m.pixels]:
            self.writer.emit("Transpose", self.writer.plain(m), output=out, perm=[1, 2, 0])
            return True
        return False

    def _is_norm(self, name: str, m: Map) -> bool:
        """Whether only a norm without an affine part of its own reads a value, whose result becomes
        a map of the size of `m` again."""
        norms = self.readers.get(name, [])
        if len(norms) != 1 or not is_plain_norm(norms[0], self.constants):
            return False
        result = norms[0].output[0]
        in_branches = self.read_inside.intersection((name, result))
        return not in_branches and all(
            n.op_type == "Reshape" and self.dims.but_for_the_batch(n.output[0]) == [-1, *m.size]
            for n in self.readers.get(result, [])
        )

    def normalize(self) -> bool:
        node = self.writer.node
        if node.input[0] not in self.grouped:
            return False
        m, groups = self.grouped[node.input[0]]
        self.grouped[node.output[0]] = normalized(self.writer, m, groups), groups
        return True

    def conv(self) -> bool:
        """Convolutions of maps, and large ones of any value. Others stay as they are."""
        node = self.writer.node
        weight = self.constants.get(node.input[1])
        if weight is None or list(weight.dims[2:]) not in ([1, 1], [3, 3]):
            return False
        outputs, inputs, side = weight.dims[:3]
        if not is_ordinary(node, side):
            return False
        large = side == 3 and min(outputs, inputs) >= WIDE and self._gains(outputs * inputs)
        m = self.map_of(node.input[0]) if large or node.input[0] in self.maps else None
        if m is None or (side == 3 and not large and outputs >= FEW):
            return False
        if side == 1:
            tensor = one_by_one(self.writer, m, outputs)
        elif large:
            tensor = by_winograd(self.writer, m, outputs)
            self.gained += 1
        else:
            tensor = multiply_first(self.writer, m, outputs)
        # The bias is a shift, which a norm or a sum after it may take over.
        bias = self.writer.reshaped(node.input[2], 1, outputs) if len(node.input) > 2 else None
        self.maps[node.output[0]] = Map(tensor, outputs, m.height, m.width, shift=bias)
        return True

    def _gains(self, pairs: int) -> bool:
        """Whether a 3×3 convolution of pairs of channels has enough pixels for the algorithm."""
        size = self.dims.but_for_the_batch(self.writer.node.output[0])
        least = SPREAD if pairs >= MANY else LARGE
        if size is None or size[2] * size[3] < least:
            return False
        # After an enlargement, `fold_upsampling` needs fewer multiplications still.
        before = self.made_by.get(self.writer.node.input[0])
        return before is None or before.op_type != "Resize"
