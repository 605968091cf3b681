"""A bundle that came from a run of `trainer.fit` as a `Model` again.

This serves to export other precisions, or to fit a solver, when the run itself no longer exists.
"""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from runtime.bundle.bundle import Bundle
from runtime.bundle.format import MANIFEST, REQUIRED
from trainer.config import Config
from trainer.networks.cost import make_network
from trainer.runs.weights import as_like, weights_of

from ..errors import ExportError
from .torch_model import TorchModel


def is_bundle(folder: Path) -> bool:
    """Whether the folder holds a bundle.json."""
    return (folder / MANIFEST).is_file()


def from_bundle(folder: Path) -> TorchModel:
    """Return the model that was exported; its weights are read from the float32 graph by name.

    Raises:
        BundleError: The bundle is damaged.
        ExportError: The bundle did not come from a run of `trainer.fit`, so nothing says which
            network to build.
    """
    bundle = Bundle.load(folder)
    record = bundle.provenance.get("config")
    if not isinstance(record, dict) or "data" not in bundle.provenance:
        raise ExportError(
            f"{folder} did not come from a run of trainer.fit, so its network cannot be built "
            "again. Export it from its own source, a diffusers folder or --module."
        )
    # Samples of a trained bundle have three axes: the config's network refuses any others.
    config = Config.from_json(record)
    shape = bundle.sample_shape
    conditions = bundle.conditions
    network = make_network(config, shape, bundle.num_classes, conditions)  # type: ignore[arg-type]
    stored = weights_of(bundle)
    # The graph may hold a weight in another shape, so it is shaped as the module's own.
    state: dict[str, Tensor] = {}
    for name, value in network.named_parameters():
        weight = as_like(stored.get(name), value)
        if weight is None:
            raise ExportError(
                f"{folder / REQUIRED} does not hold the weights {name!r}, {tuple(value.shape)}, "
                "by their name."
            )
        state[name] = weight
    network.load_state_dict(state)
    return TorchModel(
        module=network.eval().requires_grad_(False),
        provenance={k: v for k, v in bundle.provenance.items() if k != "versions"},
        **bundle.spec_fields(),
    )
