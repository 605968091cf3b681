"""An average of the weights of any width, from the snapshots of a run that has been trained.

    python -m trainer.average RUN --width 0.07

writes RUN-ema-0.070, a run like any other: to be evaluated, sampled and exported.
"""

from __future__ import annotations

import argparse
import logging
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from runtime.errors.arguments import number
from runtime.files import to_json, write_text
from runtime.terminal.output import say
from runtime.terminal.verbs import program, run_verb

from .errors import CheckpointError
from .runs import checkpoint as checkpoints
from .runs.checkpoint import Tensors
from .runs.folder import EXAMPLES, read_run
from .training.averages import combination, exponent, misfit

log = logging.getLogger(__name__)

MISFIT = 0.2
"""Error of an average's profile above which the user is warned."""


def stored(run: Path) -> dict[tuple[int, float], Path]:
    """Return the snapshots of a run: (step, width) → file.

    Raises:
        CheckpointError: A file there has another name than a snapshot.
    """
    found = {}
    for path in sorted(run.glob("snapshots/step-*/power-*.safetensors")):
        step = path.parent.name.removeprefix("step-")
        try:
            width = number("width", float(path.stem.removeprefix("power-")), 1e-3, 0.28)
            found[int(step), width] = path
        except ValueError as error:
            raise CheckpointError(f"{path} is not named like a snapshot. Move it away.") from error
    return found


def post_hoc(run: Path, width: float, step: int) -> Tensors:
    """Return the average of this width after `step`, from the snapshots up to there.

    Raises:
        CheckpointError: There are none, or one is damaged.
    """
    found = {key: path for key, path in stored(run).items() if key[0] <= step}
    if not found:
        raise CheckpointError(
            f"{run} has no snapshots up to step {step}: train with --ema-power 0.05,0.1, which "
            f"keeps some in {run / 'snapshots'}."
        )
    profiles = [(s, exponent(w)) for s, w in found]
    weights = combination(profiles, step, exponent(width))
    if (error := misfit(profiles, weights, step, exponent(width))) > MISFIT:
        log.warning(
            "%s: the average of width %g after step %d is %.0f %% off, since snapshots are few. "
            "Choose a width nearer to those of --ema-power, train up to the next snapshot, or use "
            "a smaller --snapshot-every.",
            run,
            width,
            step,
            100 * error,
        )
    total: dict[str, Tensor] = {}
    for weight, path in zip(weights.tolist(), found.values(), strict=True):
        try:
            tensors = load_file(path)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(
                f"the snapshot {path} is damaged ({error}). Delete it."
            ) from error
        if total and {k: v.shape for k, v in tensors.items()} != {
            k: v.shape for k, v in total.items()
        }:
            raise CheckpointError(f"the snapshot {path} is of another network. Delete it.")
        # In float64: the weights of snapshots may be large and of both signs.
        for name, tensor in tensors.items():
            before = total.get(name, torch.zeros_like(tensor, dtype=torch.float64))
            total[name] = before + weight * tensor.double()
    return {name: tensor.float() for name, tensor in total.items()}


def write_run(run: Path, width: float) -> Path:
    """Write a run alongside `run` whose newest checkpoint's average has this width.

    Returns:
        Its folder.

    Raises:
        CheckpointError: There is no checkpoint, or no snapshots of the same network.
    """
    width = number("width", width, 1e-3, 0.28)
    checkpoint = checkpoints.required(
        run / "checkpoints", f"{run} has no checkpoint. Train it first: python -m trainer.fit."
    )
    run = run.resolve()  # "." has no name
    out = run.with_name(f"{run.name}-ema-{width:.3f}")
    config, rest = read_run(run)
    record = replace(config, name=out.name).to_json() | rest
    average = post_hoc(run, width, checkpoint.step)
    if {k: v.shape for k, v in average.items()} != {k: v.shape for k, v in checkpoint.ema.items()}:
        raise CheckpointError(f"the snapshots of {run} are of another network than its checkpoint.")
    checkpoints.write(out / "checkpoints", replace(checkpoint, ema=average), keep=1)
    if (run / EXAMPLES).is_file():
        shutil.copyfile(run / EXAMPLES, out / EXAMPLES)
    write_text(out / "config.json", to_json(record))
    return out


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog=program("trainer.average"), description=__doc__)
    parser.add_argument(
        "run", type=Path, metavar="RUN", help="a run that was trained with --ema-power"
    )
    parser.add_argument(
        "--width", type=float, default=0.1, help="of the profile, relative to the training [0.1]"
    )
    return run_verb(parser, _act, arguments)


def _act(given: argparse.Namespace) -> None:
    out = write_run(given.run, given.width)
    say(f"the average of width {given.width:g} (gamma {exponent(given.width):.2f}): {out}")


if __name__ == "__main__":
    sys.exit(main())
