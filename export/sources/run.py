"""A run of `trainer.fit` as a `Model`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from runtime.bundle.conditions import Condition
from runtime.bundle.distilled import Distilled
from runtime.bundle.spec import Defaults, Labels
from runtime.diffusion.arrays import Array
from runtime.errors.arguments import number
from runtime.files import from_json
from trainer.config import Config
from trainer.networks.cost import make_network
from trainer.runs import checkpoint as checkpoints
from trainer.runs.folder import EXAMPLES
from trainer.runs.starts import commit
from trainer.runs.weights import started_from

from ..errors import ExportError
from .torch_model import TorchModel


def newest_run(runs: Path) -> Path:
    """Return the run under `runs` with the newest checkpoint.

    Raises:
        ExportError: No run has a checkpoint.
    """
    paths = [run for run in runs.glob("*") if checkpoints.found(run / "checkpoints")]
    if not paths:
        raise ExportError(
            f"no run in {runs}/ has a checkpoint. Make one: python -m trainer.fit, or in a "
            "minute: python -m trainer.fit --data digits."
        )
    # By the checkpoint's time: a folder's own changes whenever something is written next to it.
    return max(paths, key=lambda run: checkpoints.found(run / "checkpoints")[-1].stat().st_mtime)


def from_run(run: Path, guidance: float, weights: str = "ema") -> TorchModel:
    """Return the newest checkpoint of a run as a model.

    Args:
        run: The run's folder.
        guidance: The default guidance scale, if the null label was trained.
        weights: "ema" for the moving average, "weights" for those of the last step.

    Raises:
        ExportError: `run` is not a run, or has no checkpoint.
        CheckpointError: Its checkpoint is damaged.
    """
    guidance = number("guidance", guidance, -1e3, 1e3)
    record = _record(run)
    data = record.pop("data_record")
    shape = record.pop("sample_shape")
    classes = record.pop("classes")
    conditions = record.pop("conditions")
    config = Config.from_json(record)
    checkpoint = checkpoints.newest(run / "checkpoints")
    if checkpoint is None:
        raise ExportError(
            f"{run} has no checkpoint yet. Run python -m trainer.fit with its options until it "
            "writes one."
        )
    network = make_network(config, shape, len(classes), conditions)
    network.load_state_dict(getattr(checkpoint, weights))
    # Labels are dropped in training to teach the null label; without dropout it was never seen.
    null_trained = config.label_dropout > 0 and bool(classes)
    return TorchModel(
        name=config.name,
        module=network.eval().requires_grad_(False),
        sample_shape=shape,
        prediction=config.prediction,
        schedule=config.make_schedule(),
        clip=1.0,
        labels=Labels(classes, null_trained) if classes else None,
        conditions=conditions,
        examples=_examples(run, conditions),
        defaults=_defaults(config, guidance if null_trained else 1.0),
        distilled=_distilled(run, config),
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


def _record(run: Path) -> dict[str, Any]:
    """Return a run's config.json, with its shape, classes and conditions as a `Model` has them.

    Raises:
        ExportError: `run` is not a run.
    """
    try:
        record = from_json((run / "config.json").read_bytes())
        return {
            **record,
            "data_record": record["data_record"],
            "sample_shape": tuple(record["sample_shape"]),
            "classes": tuple(record["classes"]),
            "conditions": tuple(map(Condition.from_json, record.get("conditions", []))),
        }
    except (FileNotFoundError, NotADirectoryError):
        raise ExportError(
            f"{run} is not a run: it has no config.json. python -m trainer.fit makes runs under "
            "runs/. (Nor is it a diffusers folder, which has a model_index.json or a UNet2DModel's "
            "config.json.)"
        ) from None
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise ExportError(
            f"{run / 'config.json'} is not a run's config ({type(error).__name__}: {error})."
        ) from error


def _examples(run: Path, conditions: Sequence[Condition]) -> dict[str, Array]:
    """Return the conditions of its data that a run keeps, [m, *shape] by name; {} if it has none.

    Raises:
        ExportError: They are damaged.
    """
    path = run / EXAMPLES
    if not conditions or not path.exists():
        return {}
    try:
        with np.load(path, allow_pickle=False) as file:
            found = {c.name: np.asarray(file[c.name], c.kind) for c in conditions}
        for condition in conditions:
            if found[condition.name].shape[1:] != condition.shape:
                raise ValueError(f"{condition.name} has another shape")
    except Exception as error:  # zipfile and numpy raise a dozen kinds for damaged files
        raise ExportError(f"{path} is damaged ({error}). Delete it to export without.") from error
    return found


def _defaults(config: Config, guidance: float) -> Defaults:
    """How the model is sampled unless the caller says otherwise."""
    if config.distillation:
        return Defaults("lcm", max(config.distillation.calls))
    return Defaults(steps=min(50, config.T), guidance=guidance)


def _distilled(run: Path, config: Config) -> Distilled | None:
    """What a bundle says of a distilled network; None for any other."""
    distillation = config.distillation
    if distillation is None:
        return None
    schedule = config.make_schedule()
    levels = {
        calls: tuple(schedule.time[list(distillation.knots(calls, config.T))].tolist())
        for calls in distillation.calls
    }
    starts = started_from(run)
    made = {
        "method": distillation.method,
        "guidance": distillation.guidance,
        "teacher": config.start_from,
        "teacher_sha256": starts[0] if starts else None,
    }
    return Distilled(levels, made)
