"""The shapes of a graph's values, known but for the batch."""

from __future__ import annotations

import math

import onnx
from onnx import ModelProto, TensorProto, ValueInfoProto, helper

SMALL = 1024
"""Constants of up to this many elements are kept for the inference: shapes are among them."""


class Dims:
    """Every value's shape, inferred at two sizes of the batch.

    An axis that differs between the two is the batch's. This needs no arithmetic on symbols.
    """

    # Two primes, which are unlikely to be another axis's size or a factor of one.
    SIZES = (7, 11)

    def __init__(self, proto: ModelProto) -> None:
        self.found: list[dict[str, list[int | None]]] = []
        self._types: dict[str, int] = {t.name: t.data_type for t in proto.graph.initializer}
        for size in self.SIZES:
            values = self._at(proto, size)
            self.found.append(
                {
                    v.name: [d.dim_value or None for d in v.type.tensor_type.shape.dim]
                    for v in values
                    if v.type.tensor_type.HasField("shape")
                }
            )
            self._types |= {v.name: v.type.tensor_type.elem_type for v in values}

    @staticmethod
    def _at(proto: ModelProto, batch: int) -> list[ValueInfoProto]:
        graph = proto.graph
        light = ModelProto(
            ir_version=proto.ir_version, opset_import=proto.opset_import, functions=proto.functions
        )
        light.graph.name = graph.name
        light.graph.node.extend(graph.node)
        light.graph.input.extend(graph.input)
        for given in light.graph.input:
            given.type.tensor_type.shape.dim[0].dim_value = batch
        # Of the weights only the shape matters here, and protobuf takes no message over 2 GB.
        for tensor in graph.initializer:
            if math.prod(tensor.dims) <= SMALL:
                light.graph.initializer.append(tensor)
            else:
                light.graph.input.append(
                    helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims)
                )
        light.graph.output.extend(helper.make_empty_tensor_value_info(o.name) for o in graph.output)
        inferred = onnx.shape_inference.infer_shapes(light, data_prop=True).graph
        return [*inferred.value_info, *inferred.input, *inferred.output]

    def but_for_the_batch(self, name: str) -> list[int] | None:
        """Return the shape with -1 for the axis that depends on the batch.

        None if the shape is unknown or several axes depend on the batch: a Reshape to it would not
        be defined.
        """
        first, second = (dims.get(name) for dims in self.found)
        if not first or not second or None in first or None in second:
            return None
        shape = [a if a == b else -1 for a, b in zip(first, second, strict=True)]
        return [d for d in shape if d is not None] if shape.count(-1) <= 1 else None

    def same(self, a: str, b: str) -> bool:
        """Whether both values have the same shape at every size of the batch."""
        return all(
            a in dims and dims[a] == dims.get(b) and None not in dims[a] for dims in self.found
        )

    def is_float32(self, name: str) -> bool:
        """Whether a value is of float32, or of an unknown type."""
        return self._types.get(name, 0) in (TensorProto.FLOAT, TensorProto.UNDEFINED)
