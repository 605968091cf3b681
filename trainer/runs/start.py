"""What a run starts from in place of random weights: those of another run, or of a bundle. For more
training, or for other pictures."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from runtime.bundle import MANIFEST, Bundle

from ..errors import CheckpointError
from . import checkpoint as checkpoints
from .folder import read_run

STEP = "fp32/step.onnx"
WEIGHTS = "fp32/weights.bin"
LABELS = "label.weight"
NETWORK = "network."
"""What stands before a weight's name in a bundle's graphs."""


def start_of(place: Path) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """Name → averaged weight (a run's `ema`), of the run at `place`, its newest checkpoint, or of
    the bundle there; and the names of its classes.

    Raises CheckpointError where there is neither, or onnx is missing, which a bundle is read with;
    BundleError where the bundle is damaged.
    """
    if (place / MANIFEST).is_file():
        bundle = Bundle.load(place)
        return weights_of(bundle), bundle.labels.names if bundle.labels else ()
    checkpoint = checkpoints.newest(place / "checkpoints")
    if checkpoint is None:
        raise CheckpointError(
            f"{place} is neither a run with a checkpoint nor a bundle: there is nothing to start "
            f"from."
        )
    return checkpoint.ema, tuple(read_run(place)[1]["classes"])


def weights_of(bundle: Bundle) -> dict[str, Tensor]:
    """Every float32 constant of the bundle's float32 step graph, the network's by their names in
    it; the bytes are checked against bundle.json.

    Raises CheckpointError where onnx is missing, BundleError where the bundle is damaged.
    """
    try:
        import onnx
    except ImportError:
        raise CheckpointError(
            "a bundle's weights are read with onnx: pip install 'unnoise[export]'."
        ) from None
    graph = onnx.load_model_from_string(bundle.read(STEP)).graph
    blob = bundle.read(WEIGHTS)
    found = {}
    for tensor in graph.initializer:
        if tensor.data_type != onnx.TensorProto.FLOAT:
            continue
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            offset = next(
                (int(entry.value) for entry in tensor.external_data if entry.key == "offset"), 0
            )
            array = np.frombuffer(blob, np.float32, math.prod(tensor.dims), offset)
        else:
            array = onnx.numpy_helper.to_array(tensor)
        found[tensor.name.removeprefix(NETWORK)] = torch.from_numpy(
            array.reshape(tuple(tensor.dims)).copy()
        )
    return found


def as_like(value: Tensor | None, like: Tensor) -> Tensor | None:
    """The value in the shape of `like`, which may differ by axes of 1; None where there is none or
    it is of another shape."""
    if value is None or [n for n in value.shape if n != 1] != [n for n in like.shape if n != 1]:
        return None
    return value.reshape(like.shape)


def fitting(
    found: Mapping[str, Tensor],
    wanted: Mapping[str, Tensor],
    place: Path,
    same_classes: bool = True,
) -> dict[str, Tensor]:
    """Those of `found` that the network `wanted` is made of, in its shapes; the table of labels is
    left out where there are other classes.

    Raises CheckpointError where anything else is missing or of another shape.
    """
    taken = {}
    for name, weight in wanted.items():
        value = found.get(name) if same_classes or name != LABELS else None
        if (fits := as_like(value, weight)) is not None:
            taken[name] = fits
        elif name != LABELS:
            what = (
                "is not there"
                if value is None
                else f"is {tuple(value.shape)} and not {tuple(weight.shape)}"
            )
            raise CheckpointError(
                f"{place} has another network: its {name} {what}. Give the options of the network "
                f"that it was trained with."
            )
    return taken
