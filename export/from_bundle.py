"""A bundle that came from a run of our trainer, as a model again: for other precisions, or to fit a solver to it, where the run is gone."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import onnx
import torch
from onnx import TensorProto

from runtime.bundle import MANIFEST, Bundle
from trainer.config import Config
from trainer.networks import make_network

from .errors import ExportError
from .graph import NETWORK, WEIGHTS
from .model import Model

STEP = "fp32/step.onnx"


def is_bundle(folder: Path) -> bool:
    return (folder / MANIFEST).is_file()


def from_bundle(folder: Path) -> Model:
    """The model that was exported, its weights read from the bundle's float32 graph by name.

    Raises BundleError where the bundle is damaged, ExportError where it did not come from a run of ours: nothing else says what to build.
    """
    bundle = Bundle.load(folder)
    record = bundle.provenance.get("config")
    if record is None or "data" not in bundle.provenance:
        raise ExportError(
            f"{folder} did not come from a run of trainer.fit, so its network cannot be built again. "
            "Export it from its own source, a diffusers folder or --module."
        )
    network = make_network(Config.from_json(record), bundle.sample_shape, bundle.num_classes)  # type: ignore[arg-type]
    found = weights(bundle)
    state = {}
    for name, value in network.named_parameters():
        array = found.get(f"{NETWORK}{name}")
        if array is None or array.size != value.numel():
            raise ExportError(
                f"{folder / STEP} does not hold the weights {name!r}, {tuple(value.shape)}, by their name."
            )
        state[name] = torch.from_numpy(array.reshape(tuple(value.shape)))
    network.load_state_dict(state)
    return Model(
        name=bundle.name,
        module=network.eval().requires_grad_(False),
        sample_shape=bundle.sample_shape,
        prediction=bundle.prediction,
        schedule=bundle.schedule,
        clip=bundle.clip,
        labels=bundle.labels,
        defaults=bundle.defaults,
        provenance={k: v for k, v in bundle.provenance.items() if k != "versions"},
        sample_range=bundle.sample_range,
        tuned=bundle.tuned,
    )


def weights(bundle: Bundle) -> dict[str, np.ndarray]:
    """Every float32 constant of the float32 step graph by name, its bytes checked against bundle.json."""
    graph = onnx.load_model_from_string(bundle.read(STEP)).graph
    blob = bundle.read(f"fp32/{WEIGHTS}")
    found = {}
    for tensor in graph.initializer:
        if tensor.data_type != TensorProto.FLOAT:
            continue
        if tensor.data_location == TensorProto.EXTERNAL:
            offset = next((int(entry.value) for entry in tensor.external_data if entry.key == "offset"), 0)
            array = np.frombuffer(blob, np.float32, math.prod(tensor.dims), offset)
        else:
            array = onnx.numpy_helper.to_array(tensor)
        found[tensor.name] = array.reshape(tuple(tensor.dims)).copy()
    return found
