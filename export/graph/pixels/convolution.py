"""Convolutions of maps with pixels first: one matrix product, or one for each Winograd point.

Each function writes the convolution of the node that is being rewritten, without its bias, and
returns the name of its values [height·width, B, outputs].
"""

from __future__ import annotations

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

from .maps import Map, Writer
from .winograd import SIDE, TILE, Tiles, winograd


def one_by_one(writer: Writer, m: Map, outputs: int) -> str:
    """Write a 1×1 convolution: a product over the channels."""
    return writer.emit("MatMul", writer.plain(m), _taps(writer, "oihw->ihwo", outputs))


def by_winograd(writer: Writer, m: Map, outputs: int) -> str:
    """Write a 3×3 convolution as tiles of TILE² pixels and a product for each of SIDE² points."""
    emit = writer.emit
    reshaped = writer.reshaped
    # A transformation along both sides of a tile is one matrix over its flattened pixels.
    of_outputs, of_kernels, of_inputs = (
        writer.constant(np.kron(a, a), np.float32) for a in winograd()
    )
    tiles = Tiles(m)
    points = SIDE**2

    # The pixels of every tile, transformed.
    near = _gathered(writer, writer.plain(m), m.pixels, tiles.inputs())
    near = reshaped(near, points, -1)
    near = reshaped(emit("MatMul", of_inputs, near), points, -1, m.channels)

    # The kernels, transformed. Libraries compute this once, because it depends on weights only.
    kernels = emit("MatMul", of_kernels, _taps(writer, "oihw->hwio", m.channels * outputs))

    # One product for each point, and back to pixels.
    product = emit("MatMul", near, reshaped(kernels, points, m.channels, outputs))
    results = emit("MatMul", of_outputs, reshaped(product, points, -1))
    results = reshaped(results, TILE**2 * tiles.count, -1, outputs)
    return emit("Gather", results, writer.constant(tiles.outputs()), axis=0)


def multiply_first(writer: Writer, m: Map, outputs: int) -> str:
    """Write a 3×3 convolution as every pixel times all taps, and sums of nine of the products."""
    # With few outputs the products are smaller than nine copies of the pixels would be.
    product = writer.emit("MatMul", writer.plain(m), _taps(writer, "oihw->ihwo", 9 * outputs))
    product = writer.emit(
        "Transpose", writer.reshaped(product, m.pixels, -1, 9, outputs), perm=[0, 2, 1, 3]
    )
    windows = sliding_window_view(m.rows(1, m.height + 2, m.width + 2), (3, 3)).reshape(-1, 9)
    places = np.where(windows < 0, -1, windows * 9 + np.arange(9))
    near = _gathered(writer, product, 9 * m.pixels, places)
    total = writer.emit("ReduceSum", near, writer.constant([1]), keepdims=0)
    return writer.reshaped(total, m.pixels, -1, outputs)


def _taps(writer: Writer, order: str, *shape: int) -> str:
    """Return the node's weights [O, I, h, w] with their axes in another order, as [-1, *shape]."""
    old, new = order.split("->")
    perm = [old.index(axis) for axis in new]
    moved = writer.emit("Transpose", writer.node.input[1], perm=perm)
    return writer.reshaped(moved, -1, *shape)


def _gathered(writer: Writer, tensor: str, count: int, places: NDArray[np.int64]) -> str:
    """Return rows of a tensor [count, …] as [*places, …], flat behind the first axis."""
    # A row of zeros at the end represents places outside the map, which are -1.
    padded = writer.emit(
        "Pad",
        writer.reshaped(tensor, count, -1),
        writer.constant((0, 0, 1, 0)),
        writer.constant(0, np.float32),
    )
    rows = writer.constant(np.where(places < 0, count, places))
    return writer.emit("Gather", padded, rows, axis=0)
