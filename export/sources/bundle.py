"""A bundle that came from a run of our trainer, as a model again: for other precisions, or to fit a
solver to it, where the run is gone."""

from __future__ import annotations

from pathlib import Path

from runtime.bundle import MANIFEST, Bundle
from trainer.config import Config
from trainer.networks.cost import make_network
from trainer.runs.start import STEP, as_like, weights_of

from ..errors import ExportError
from .model import Model


def is_bundle(folder: Path) -> bool:
    return (folder / MANIFEST).is_file()


def from_bundle(folder: Path) -> Model:
    """The model that was exported, its weights read from the bundle's float32 graph by name.

    Raises BundleError where the bundle is damaged, ExportError where it did not come from a run of
    ours: nothing else says what to build.
    """
    bundle = Bundle.load(folder)
    record = bundle.provenance.get("config")
    if record is None or "data" not in bundle.provenance:
        raise ExportError(
            f"{folder} did not come from a run of trainer.fit, so its network cannot be built "
            f"again. "
            "Export it from its own source, a diffusers folder or --module."
        )
    network = make_network(Config.from_json(record), bundle.sample_shape, bundle.num_classes)  # type: ignore[arg-type]
    found, state = weights_of(bundle), {}
    for name, value in network.named_parameters():
        weight = as_like(found.get(name), value)
        if weight is None:
            raise ExportError(
                f"{folder / STEP} does not hold the weights {name!r}, {tuple(value.shape)}, by "
                f"their name."
            )
        state[name] = weight
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
