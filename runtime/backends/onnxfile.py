"""Put the weights inside an ONNX file, for libraries that would follow the paths in it.

OpenVINO (2026.4) opens any file that a tensor's `location` names. If the model came from memory,
the path is relative to the working directory; one special name is read as an address in this
process. The result of `with_weights` has no external data. It walks over protobuf's wire format,
because the runtime does not need protobuf otherwise.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TypeAlias

from ..bundle.format import WEIGHTS
from ..errors import BundleError

Chunks: TypeAlias = list[bytes | memoryview]

LIMIT = 2**31 - 1
"""Bytes of the largest protobuf message."""
DEPTH = 32
"""Of graphs within graphs; a step graph has one."""
_VARINT = 0
_FIXED64 = 1
_BYTES = 2
_FIXED32 = 5
# TensorProto: name, raw_data, external_data, data_location.
_NAME = 8
_RAW = 9
_EXTERNAL = 13
_WHERE = 14
# NodeProto: input, output, op_type.
_READS = 1
_MAKES = 2
_OPERATOR = 4
_SMALL = 32
"""Bytes of an attribute that has no room for a graph with a loop."""
_LOCATION = b"location"
"""The word that every tensor with external data has."""

# onnx.proto: for each message that may hold a tensor, the fields that may (_HOLDS) and the others
# (_PLAIN). A field in neither is of a newer format and might hold a tensor too, so it is refused.
_HOLDS: Mapping[str, Mapping[int, str]] = {
    "Model": {7: "Graph", 25: "Function"},
    "Graph": {1: "Node", 5: "Tensor", 15: "SparseTensor"},
    "Function": {7: "Node", 11: "Attribute"},
    "Node": {5: "Attribute"},
    "Attribute": {
        5: "Tensor",
        6: "Graph",
        10: "Tensor",
        11: "Graph",
        22: "SparseTensor",
        23: "SparseTensor",
    },
    "SparseTensor": {1: "Tensor", 2: "Tensor"},
}
_PLAIN: Mapping[str, frozenset[int]] = {
    "Model": frozenset({1, 2, 3, 4, 5, 6, 8, 14}),
    "Graph": frozenset({2, 10, 11, 12, 13, 14, 16}),
    "Function": frozenset({1, 4, 5, 6, 8, 9, 10, 12, 13, 14}),
    "Node": frozenset({1, 2, 3, 4, 6, 7, 8, 9}),
    "Attribute": frozenset({1, 2, 3, 4, 7, 8, 9, 13, 14, 15, 20, 21}),
    "SparseTensor": frozenset({3}),
}


def with_weights(model: bytes, weights: bytes, file: str = WEIGHTS) -> bytes:
    """Put every tensor of an ONNX model that is stored in `weights` inside the model.

    file: The name of `weights` in the model.

    Raises:
        BundleError: It is not an ONNX model, or has external data in another file or beyond the end
            of this one. Or the result would exceed 2 GiB, the limit of one ONNX file.
    """
    chunks = _Walk(memoryview(weights), file).message("Model", memoryview(model), 0)
    if (size := sum(map(len, chunks))) > LIMIT:
        raise BundleError(
            f"an ONNX file with its weights inside would have {size} bytes; {LIMIT} is the most."
        )
    return b"".join(chunks)


def check_graph(data: bytes | memoryview, kind: str = "Model", depth: int = 0) -> None:
    """Check that a library comes to an end with an ONNX model, and follows no path in it.

    Initializers of the main graph may be stored outside: libraries take these from memory.

    Raises:
        BundleError: It has a Loop or Scan, a node before another whose output it reads, or another
            tensor that is stored outside.
    """
    if depth > DEPTH:
        raise BundleError(f"no step graph: graphs are nested more than {DEPTH} deep.")
    nodes: list[tuple[set[bytes], set[bytes]]] = []
    for field, wire, _, value in _fields(memoryview(data)):
        inner = _HOLDS[kind].get(field)
        if wire == _BYTES and inner == "Node":
            nodes.append(_node(value, depth))
        elif wire == _BYTES and inner == "Tensor" and kind == "Graph" and depth == 1:
            continue
        elif wire == _BYTES and inner == "Tensor":
            _check_inside(value)
        elif wire == _BYTES and inner:
            check_graph(value, inner, depth + (inner == "Graph"))
    # Names that a later node in the list produces. The empty name means an absent input.
    later: set[bytes] = set().union(*(makes for _, makes in nodes)) - {b""}
    for reads, makes in nodes:
        if early := later & reads:
            name = min(early).decode(errors="replace")
            raise BundleError(
                f"no step graph: {name!r} is read before it is made, so its nodes cannot run in "
                f"their order."
            )
        later -= makes


def _node(data: memoryview, depth: int) -> tuple[set[bytes], set[bytes]]:
    """The names of what a NodeProto reads and makes. Raises BundleError if it may not end."""
    names: dict[int, set[bytes]] = {_READS: set(), _MAKES: set()}
    for field, wire, _, value in _fields(data):
        if field in names:
            names[field].add(bytes(value))
        elif field == _OPERATOR and bytes(value) in (b"Loop", b"Scan"):
            raise BundleError(
                f"no step graph: it has a {bytes(value).decode()}, which might not end."
            )
        elif wire != _BYTES or _HOLDS["Node"].get(field) != "Attribute":
            continue
        elif len(value) > _SMALL or _LOCATION in bytes(value):
            check_graph(value, "Attribute", depth)
    return names[_READS], names[_MAKES]


def _check_inside(tensor: memoryview) -> None:
    """Raise BundleError if a TensorProto is stored outside the model."""
    for field, _, _, value in _fields(tensor):
        if field == _EXTERNAL or (field == _WHERE and bytes(value) != b"\0"):
            raise BundleError(
                "no step graph: a tensor within it is stored in a file; initializers of the main "
                "graph alone may be."
            )


class _Walk:
    """Copies a model message by message. Slices of the input are passed on, never copied."""

    def __init__(self, weights: memoryview, file: str) -> None:
        self.weights = weights
        self.file = file

    def message(self, kind: str, data: memoryview, depth: int) -> Chunks:
        if depth > DEPTH:
            raise BundleError(f"no step graph: graphs are nested more than {DEPTH} deep.")
        if kind == "Tensor":
            return self.tensor(data)
        out: Chunks = []
        for field, wire, whole, value in _fields(data):
            inner = _HOLDS[kind].get(field)
            # A message that holds tensors has a new length, and so has every one around it.
            if inner and wire == _BYTES:
                chunks = self.message(inner, value, depth + (inner == "Graph"))
                out += [_varint(field << 3 | _BYTES), _varint(sum(map(len, chunks))), *chunks]
            elif field in _PLAIN[kind]:
                out.append(whole)
            else:
                raise BundleError(
                    f"no step graph: field {field} of its {kind} is none of ONNX's that a step "
                    f"graph has."
                )
        return out

    def tensor(self, data: memoryview) -> Chunks:
        """A TensorProto that contains its data."""
        out: Chunks = []
        where: dict[bytes, bytes] = {}
        name = b"?"
        external = False
        for field, wire, whole, value in _fields(data):
            if field == _EXTERNAL and wire == _BYTES:
                entry = {f: bytes(v) for f, w, _, v in _fields(value) if w == _BYTES}
                where[entry.get(1, b"")] = entry.get(2, b"")
            elif field == _WHERE:
                external = external or bytes(value) != b"\0"
            else:
                name = bytes(value) if field == _NAME else name
                out.append(whole)
        if external:
            raw = self.stored(name.decode(errors="replace"), where)
            out += [_varint(_RAW << 3 | _BYTES), _varint(len(raw)), raw]
        return out

    def stored(self, name: str, where: Mapping[bytes, bytes]) -> memoryview:
        """The tensor's bytes in the weights file."""
        location = where.get(b"location", b"").decode(errors="replace")
        if location != self.file:
            raise BundleError(
                f"tensor {name!r} is stored in the file {location!r}; a bundle's graphs keep "
                f"weights in {self.file!r} alone."
            )
        start, length = (_number(where.get(key, b"")) for key in (b"offset", b"length"))
        if start is None or length is None or start + length > len(self.weights):
            raise BundleError(
                f"tensor {name!r} has offset {start} and length {length} in "
                f"{self.file!r}, which has {len(self.weights)} bytes."
            )
        return self.weights[start : start + length]


def _fields(data: memoryview) -> Iterator[tuple[int, int, memoryview, memoryview]]:
    """(field, wire type, the whole field, its value without tag and length) of a message. Raises
    BundleError where it is none."""
    at = 0
    end = len(data)
    while at < end:
        begun = at
        tag, at = _read_varint(data, at)
        # Other readers cut a tag to 32 bits, and would see another field than this one.
        if tag >> 32:
            raise BundleError("no step graph: a field's number is too large.")
        field = tag >> 3
        wire = tag & 7
        start = at
        if wire == _VARINT:
            _, at = _read_varint(data, at)
        elif wire == _BYTES:
            length, start = _read_varint(data, at)
            at = start + length
        elif wire in (_FIXED64, _FIXED32):
            at += 8 if wire == _FIXED64 else 4
        else:
            at = end + 1
        if at > end or field == 0:
            raise BundleError("no step graph: it is not in ONNX's format, protobuf.")
        yield field, wire, data[begun:at], data[start:at]


def _read_varint(data: memoryview, at: int) -> tuple[int, int]:
    # Almost all are of one byte, and a graph has thousands.
    if at < len(data) and (value := data[at]) < 128:
        return value, at + 1
    value = 0
    for shift, byte in enumerate(data[at : at + 10]):
        value |= (byte & 127) << 7 * shift
        if byte < 128:
            return value, at + shift + 1
    raise BundleError("no step graph: it is not in ONNX's format, protobuf.")


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    out.append(value)
    return bytes(out)


def _number(text: bytes) -> int | None:
    """A count of bytes in decimal, or None."""
    return int(text) if text.isdigit() and len(text) < 20 else None
