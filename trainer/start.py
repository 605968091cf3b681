"""What a run starts from in place of random weights: those of another run, or of a bundle. For more training, or for other pictures."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from runtime.bundle import MANIFEST, Bundle

from . import checkpoint as checkpoints
from .errors import CheckpointError

STEP, WEIGHTS = "fp32/step.onnx", "fp32/weights.bin"
NETWORK = "network."
"""What stands before a weight's name in a bundle's graphs."""


def start_of(place: Path) -> dict[str, Tensor]:
    """Name → averaged weight (a run's `ema`), of the run at `place`, its newest checkpoint, or of the bundle there.

    Raises CheckpointError where there is neither, or onnx is missing, which a bundle is read with; BundleError where the bundle is damaged.
    """
    if (place / MANIFEST).is_file():
        found = weights_of(Bundle.load(place))
        return {name.removeprefix(NETWORK): torch.from_numpy(value) for name, value in found.items()}
    checkpoint = checkpoints.newest(place / "checkpoints")
    if checkpoint is None:
        raise CheckpointError(
            f"{place} is neither a run with a checkpoint nor a bundle: there is nothing to start from."
        )
    return checkpoint.ema


def weights_of(bundle: Bundle) -> dict[str, np.ndarray]:
    """Every float32 constant of the bundle's float32 step graph by name, its bytes checked against bundle.json."""
    try:
        import onnx
    except ImportError:
        raise CheckpointError("a bundle's weights are read with onnx: pip install 'unnoise[export]'.") from None
    graph = onnx.load_model_from_string(bundle.read(STEP)).graph
    blob = bundle.read(WEIGHTS)
    found = {}
    for tensor in graph.initializer:
        if tensor.data_type != onnx.TensorProto.FLOAT:
            continue
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            offset = next((int(entry.value) for entry in tensor.external_data if entry.key == "offset"), 0)
            array = np.frombuffer(blob, np.float32, math.prod(tensor.dims), offset)
        else:
            array = onnx.numpy_helper.to_array(tensor)
        found[tensor.name] = array.reshape(tuple(tensor.dims)).copy()
    return found


def digest(weights: Mapping[str, Tensor]) -> str:
    """sha256 over the weights' bytes, in the order of their names."""
    found = hashlib.sha256()
    for _, weight in sorted(weights.items()):
        found.update(weight.contiguous().numpy().tobytes())
    return found.hexdigest()


def fitting(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor], place: Path) -> dict[str, Tensor]:
    """Those of `found` that the network `wanted` is made of, in its shapes; the table of labels is left out where there are other classes.

    Raises CheckpointError where anything else is missing or of another shape.
    """
    taken = {}
    for name, weight in wanted.items():
        value = found.get(name)
        if value is not None and (value.squeeze().shape == weight.squeeze().shape):
            taken[name] = value.reshape(weight.shape)
        elif name != "label.weight":
            what = "is not there" if value is None else f"is {tuple(value.shape)} and not {tuple(weight.shape)}"
            raise CheckpointError(
                f"{place} has another network: its {name} {what}. Give the options of the network that it was trained with."
            )
    return taken
