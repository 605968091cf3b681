"""What can be exported: a PyTorch module, with everything a bundle must say of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from runtime.arguments import number
from runtime.bundle import Defaults, Labels
from runtime.diffusion.schedule import Schedule
from runtime.diffusion.tuned import Tuned
from runtime.files import from_json
from trainer.config import Config
from trainer.networks.cost import make_network
from trainer.runs import checkpoint as checkpoints
from trainer.runs.folder import commit

from ..errors import ExportError


@dataclass(frozen=True, eq=False)
class Model:
    """module(x [B, *S], time [B] float32[, label [B] int64]) → F [B, *S], in evaluation mode on the
    CPU; the rest as in a bundle."""

    name: str
    module: nn.Module
    sample_shape: tuple[int, ...]
    prediction: str
    schedule: Schedule
    clip: float | None
    labels: Labels | None
    defaults: Defaults
    provenance: Mapping[str, Any]
    sample_range: tuple[float, float] = (-1.0, 1.0)
    tuned: Mapping[int, Tuned] = field(default_factory=dict)

    @property
    def num_classes(self) -> int:
        return len(self.labels.names) if self.labels else 0


def newest_run(runs: Path) -> Path:
    """The run under `runs` with the newest checkpoint. Raises ExportError where there is none."""
    paths = [run for run in runs.glob("*") if checkpoints.found(run / "checkpoints")]
    if not paths:
        raise ExportError(
            f"no run in {runs}/ has a checkpoint. Make one: python -m trainer.fit, or in a "
            f"minute: python -m trainer.fit --data digits."
        )
    return max(paths, key=lambda run: checkpoints.found(run / "checkpoints")[-1].stat().st_mtime)


def from_run(run: Path, guidance: float, weights: str = "ema") -> Model:
    """The newest checkpoint of a run of our trainer; weights: "ema", the moving average, or
    "weights", the last step's own.

    Raises ExportError where `run` is no run, CheckpointError where its checkpoint is damaged.
    """
    guidance = number("guidance", guidance, -1e3, 1e3)
    try:
        record = from_json((run / "config.json").read_bytes())
        data, shape, classes = (
            record.pop(key) for key in ("data_record", "sample_shape", "classes")
        )
    except (FileNotFoundError, NotADirectoryError):
        raise ExportError(
            f"{run} is no run: it has no config.json. python -m trainer.fit makes runs under "
            f"runs/. "
            "(Nor is it a diffusers folder, which has a model_index.json or a UNet2DModel's "
            "config.json.)"
        ) from None
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise ExportError(
            f"{run / 'config.json'} is not a run's config ({type(error).__name__}: {error})."
        ) from error
    config = Config.from_json(record)
    checkpoint = checkpoints.newest(run / "checkpoints")
    if checkpoint is None:
        raise ExportError(
            f"{run} has no checkpoint yet. Run python -m trainer.fit with its options until it "
            f"writes one."
        )
    network = make_network(config, tuple(shape), len(classes))
    network.load_state_dict(getattr(checkpoint, weights))
    null_trained = config.label_dropout > 0 and bool(classes)
    return Model(
        name=config.name,
        module=network.eval().requires_grad_(False),
        sample_shape=tuple(shape),
        prediction=config.prediction,
        schedule=config.make_schedule(),
        clip=1.0,
        labels=Labels(tuple(classes), null_trained) if classes else None,
        defaults=Defaults(steps=min(50, config.T), guidance=guidance if null_trained else 1.0),
        provenance={
            "config": record,
            "data": data,
            "weights": weights,
            "step": checkpoint.step,
            "pictures_seen": checkpoint.step * config.batch,
            "training_seconds": round(checkpoint.seconds, 1),
            "environment": dict(checkpoint.environment),
            "commit": commit(),
        },
    )
