"""Distil a network into one of few calls: python -m trainer.distill RUN_OR_BUNDLE

The student has the teacher's data and network, or a smaller one, and starts from its averaged
weights. It is a run like any other: re-run the same command to resume it, then evaluate and export
it.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from runtime.diffusion.tuned import TUNED
from runtime.errors import RequestError
from runtime.terminal.verbs import program

from .config import Config
from .config.distillation import Distillation
from .config.options import Options
from .config.presets import add_fields, given_fields
from .fit import add_runs, train_verb
from .training.teacher import Origin, levels_of

TRAINING: Mapping[str, Any] = {
    "steps": 2000,
    "batch": 64,
    "learning_rate": 4e-4,
    "decay": "cosine",
    "warmup": 30,
    "weight_decay": 0.01,
    "gradient_clip": 1.0,
    "ema_half_life": (5000,),
    "ema_power": (),
    "dropout": 0.0,
    "label_dropout": 0.0,
    "condition_dropout": 0.0,
    "flips": False,
    "compile": False,
    "sample_solver": "lcm",
}
"""How a student is trained, in place of how its teacher was."""
TARGET_HALF_LIFE = 900
"""consistency: half-life in images of the average that gives the answers to learn."""
INHERITED = (
    "name",
    "accumulate",
    "seed",
    "device",
    "precision",
    "channels_last",
    "checkpointing",
    "checkpoint_every",
    "keep",
    "sample_every",
    "quality_every",
    "quality_samples",
    "quality_batch",
    "features",
    "log_every",
    "data",
    "workers",
    "network",
    "channels",
    "blocks",
    "attention",
    "patch",
    "width",
    "depth",
    "heads",
)
"""Options of the teacher's run that another value may be given for, besides those of TRAINING."""
OWN = (
    "steps",
    "batch",
    "learning_rate",
    "decay",
    "warmup",
    "weight_decay",
    "ema_half_life",
    "compile",
)
"""Options of TRAINING that another value may be given for."""


def student_of(place: str, distillation: Mapping[str, Any], options: Mapping[str, Any]) -> Config:
    """Return the config of a student.

    Args:
        place: The teacher: a run's or a bundle's folder, or a shipped bundle's name.
        distillation: Fields of `Distillation` that are given; the others fit the teacher.
        options: Fields of `Options` that are given.

    Raises:
        CheckpointError: There is no such teacher.
        RequestError: It cannot be distilled so.
    """
    teacher = Origin.of(Path(place))
    wanted = Distillation(**{**defaults_of(teacher, distillation), **distillation})
    rows = teacher.program(wanted)
    config = teacher.config
    given = {**TRAINING, **options}
    if wanted.method == "endpoint":
        wanted = replace(wanted, levels=levels_of(rows, config, wanted.calls))
    elif wanted.method == "data":
        if not config.conditioned:
            raise RequestError(
                f"--method data needs a network with conditions that say what the image is, and "
                f"{place} has none. Use --method endpoint."
            )
        given["flips"] = config.flips
    lives = given["ema_half_life"]
    if wanted.method == "consistency" and isinstance(lives, tuple) and len(lives) == 1:
        # Half of the only one, if that is as short: two equal averages would share a name.
        shorter = min(TARGET_HALF_LIFE, max(1, lives[0] // 2))
        given["ema_half_life"] = (*lives, shorter)
    return replace(
        config,
        **{"name": f"{config.name}-fast", **given},
        sample_steps=max(wanted.calls),
        start_from=place,
        distillation=wanted,
    )


def defaults_of(teacher: Origin, given: Mapping[str, Any]) -> dict[str, Any]:
    """Return what fits a teacher: the guidance and the solver that it samples with best.

    Args:
        teacher: What is distilled.
        given: Fields of `Distillation` that are given.
    """
    guided = teacher.can_guide and given.get("method") != "data"
    found: dict[str, Any] = {"guidance": teacher.guidance if guided else 1.0}
    # A tuned solver has numbers of calls of its own, which fit no other solver.
    if teacher.bundle and teacher.bundle.tuned and given.get("solver") in (None, TUNED):
        found |= {"solver": TUNED, "solver_steps": max(teacher.bundle.tuned)}
    return found


def parser() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(prog=program("trainer.distill"), description=__doc__)
    found.add_argument("teacher", metavar="RUN_OR_BUNDLE", help="the network to distil")
    shown = {f.name: f.default for f in fields(Distillation) if f.name != "levels"}
    shown |= {
        "guidance": "the bundle's",
        "solver": "tuned, if the bundle has it",
        "solver_steps": "",
    }
    add_fields(found, Distillation, shown)
    taught = {name: TRAINING[name] for name in OWN}
    add_fields(found, Options, {**taught, **dict.fromkeys(INHERITED, "the teacher's")})
    add_runs(found)
    return found


def main(arguments: list[str] | None = None) -> int:
    """Run the command and return its exit status."""
    return train_verb(parser(), _config, arguments)


def _config(given: argparse.Namespace) -> Config:
    return student_of(
        given.teacher, given_fields(given, Distillation), given_fields(given, Options)
    )


if __name__ == "__main__":
    sys.exit(main())
