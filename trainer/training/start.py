"""Starting a run from the weights of another run or of a bundle: to train on, or as its student."""

from __future__ import annotations

import hashlib
from pathlib import Path

from ..errors import CheckpointError
from ..runs import checkpoint as checkpoints
from ..runs.weights import SHA256, as_like, fitting, start_of, started_from, widened
from .step import Trainer
from .teacher import Teacher

PATHS = "trajectories"
"""The folder of a run that holds its teacher's paths."""


def start(trainer: Trainer) -> dict[str, str]:
    """Begin with the weights that the config's start_from names, if it does.

    A student of another network than its teacher's takes those that are alike in both.

    Returns:
        The identity of these weights, for starts.json; others may have the same path.

    Raises:
        CheckpointError: There are no such weights, or they are of another network, or of one with
            conditions that the run lacks.
    """
    if not trainer.config.start_from:
        return {}
    place = Path(trainer.config.start_from)
    other = start_of(place)
    wanted = trainer.state.weights
    same_classes = other.classes == tuple(trainer.dataset.classes)
    if trainer.config.distillation:
        alike = {name: as_like(other.weights.get(name), weight) for name, weight in wanted.items()}
        taken = {name: value for name, value in alike.items() if value is not None}
        without = f" where the networks agree, {len(taken)} of {len(wanted)}"
    else:
        channels = trainer.dataset.sample_shape[0]
        weights = widened(other, wanted, channels, trainer.conditions)
        taken = fitting(weights, wanted, place, same_classes)
        without = ", but for the labels, which are others"
    trainer.state.start_from(taken)
    if trainer.processes.main:
        print(f"starting from the weights of {place}{without * (len(taken) < len(wanted))}")
    return {SHA256: hashlib.sha256(checkpoints.to_bytes(taken)).hexdigest()}


def teach(trainer: Trainer, folder: Path, resumed: bool = False) -> dict[str, str]:
    """Give a distilled run its teacher; nothing for other runs.

    Args:
        trainer: Of the run.
        folder: The run's.
        resumed: Whether the run has learned something from its teacher.

    Returns:
        The identity of its weights, for starts.json.

    Raises:
        CheckpointError: It is not there, is another network, or is not the teacher that the run in
            this folder began with.
    """
    config = trainer.config
    if not config.distillation:
        return {}
    dataset = trainer.dataset
    teacher = Teacher(
        config, dataset.sample_shape, dataset.classes, trainer.device, trainer.conditions
    )
    known = started_from(folder) if resumed else []
    if known and teacher.sha256 not in known:
        raise CheckpointError(
            f"{config.start_from} is not the teacher that {folder} began with: its weights have "
            "changed. Put the old one back, or choose another --name."
        )
    trainer.learn_from(teacher, folder / PATHS)
    return {SHA256: teacher.sha256}
