"""Large constants kept outside of graphs: a graph that is changed is copied, and weights need not
be."""

from __future__ import annotations

import hashlib

from onnx import ModelProto, TensorProto, numpy_helper

from .edit import copy_of

LARGE = 2**16
"""Bytes of a constant that is taken out. No change of a float32 graph reads the values of one."""
DATA = ("raw_data", "float_data", "int32_data", "int64_data", "double_data")
"""The fields of a tensor that may hold its values."""
_KEY = "sha256"


class Weights:
    """Values of constants by their hash. A constant whose values are here names the hash instead.

    A copy of a graph has the same names, so all versions of a graph share one copy of its weights.
    """

    def __init__(self) -> None:
        self._values: dict[str, bytes] = {}

    def take(self, model: ModelProto) -> ModelProto:
        """Move the large constants of a model here, and return the same model."""
        # Those of branches stay, as `write` leaves them there.
        for tensor in model.graph.initializer:
            if tensor.ByteSize() < LARGE:
                continue
            raw = numpy_helper.to_array(tensor).tobytes()
            key = hashlib.sha256(raw).hexdigest()
            self._values[key] = raw
            clear(tensor)
            tensor.data_location = TensorProto.EXTERNAL
            tensor.external_data.add(key=_KEY, value=key)
        return model

    def put_back(self, model: ModelProto) -> ModelProto:
        """Return a copy of a model with the constants inside."""
        copy = copy_of(model)
        for tensor in copy.graph.initializer:
            if is_outside(tensor):
                raw = self.values(tensor)
                clear(tensor)
                tensor.raw_data = raw
        return copy

    def values(self, tensor: TensorProto) -> bytes:
        """Return the values of a constant, inside a graph or here."""
        if is_outside(tensor):
            return self._values[tensor.external_data[0].value]
        return numpy_helper.to_array(tensor).tobytes()


def is_outside(tensor: TensorProto) -> bool:
    """Whether a constant's values were taken out of its graph."""
    return any(entry.key == _KEY for entry in tensor.external_data)


def clear(tensor: TensorProto) -> None:
    """Remove the values of a constant, and where they are."""
    for name in DATA:
        tensor.ClearField(name)
    tensor.ClearField("data_location")
    del tensor.external_data[:]
