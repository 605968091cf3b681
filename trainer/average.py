"""Moving averages of the weights: by half-life while training, and of any width afterwards from
stored snapshots.

    python -m trainer.average RUN --width 0.07

writes RUN-ema-0.070, a run like any other: to be evaluated, sampled and exported.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from runtime.diffusion.schedule import Float64
from runtime.errors.arguments import number
from runtime.files import to_json, write_text
from runtime.terminal.output import say
from runtime.terminal.verbs import program, run_verb

from .config import Config
from .errors import CheckpointError
from .runs import checkpoint as checkpoints
from .runs.checkpoint import Tensors
from .runs.folder import read_run


def half_life_decay(batch: int, half_life: float, step: int) -> float:
    """Return the decay of one step's update of an average by half-life.

    The half-life counts images. It is at most a twentieth of the images seen so far, which
    discounts the first weights early (the ramp-up of Karras et al. 2024).
    """
    return 0.5 ** (batch / max(min(half_life, (step + 1) * batch / 20), 1e-9))


@lru_cache
def exponent(width: float) -> float:
    """Return gamma of the power-function average of this width.

    The width is the standard deviation of the average's profile, relative to the training's length.
    width² = (gamma + 1) / ((gamma + 2)² (gamma + 3)), 0 < width < 0.288 (Karras et al. 2024, eq.
    126, and Algorithm 2).
    """
    roots = np.roots([1, 7, 16 - width**-2, 12 - width**-2])
    return float(np.real(roots[np.isreal(roots)]).max())


def power_decay(width: float, step: int) -> float:
    """Return the decay of one step's update of a power-function average.

    It is (1 - 1/t)^(gamma + 1) at t = step + 1, which gives the profile tau^gamma (Karras et al.
    2024, eq. 2).
    """
    return (1 - 1 / (step + 1)) ** (exponent(width) + 1)


class Averages:
    """The averages of one run: "ema" and "ema-N" by half-life, "power-W" by width.

    Attributes:
        of: Name → tensors by the weights' names.
    """

    def __init__(self, config: Config, weights: Mapping[str, Tensor]) -> None:
        self.batch = config.batch
        first, *others = config.ema_half_life
        self.half_lives = {"ema": first, **{f"ema-{n}": n for n in others}}
        self.widths = {power_name(width): width for width in config.ema_power}
        self.of: dict[str, Tensors] = {
            name: {k: w.detach().clone() for k, w in weights.items()}
            for name in (*self.half_lives, *self.widths)
        }

    def decay(self, name: str, step: int) -> float:
        if name in self.widths:
            return power_decay(self.widths[name], step)
        return half_life_decay(self.batch, self.half_lives[name], step)

    @torch.no_grad()
    def update(self, weights: Mapping[str, Tensor], step: int) -> None:
        """Take in the weights after step `step`. Each has the shape of its average."""
        values = list(weights.values())
        # In one call for all tensors: for small ones a call costs more than its arithmetic.
        lerp = torch._foreach_lerp_  # pyright: ignore[reportPrivateImportUsage]
        for name, average in self.of.items():
            lerp(list(average.values()), values, 1 - self.decay(name, step))


def power_name(width: float) -> str:
    return f"power-{width:g}"


def inner_products(a: Sequence[tuple[float, float]], b: Sequence[tuple[float, float]]) -> Float64:
    """Return ∫ p_i p_j of power-function profiles, [len(a), len(b)].

    A profile (t, gamma) is p(tau) = (gamma+1)/t · (tau/t)^gamma up to t (Karras et al. 2024,
    Algorithm 3).
    """
    ta, ga = np.array(a, np.float64).T
    tb, gb = np.array(b, np.float64).T
    ta = ta[:, None]
    ga = ga[:, None]
    least = np.minimum(ta, tb)
    most = np.maximum(ta, tb)
    of_most = np.where(ta > tb, ga, gb)  # the exponent of the profile that is longer
    found = (ga + 1) * (gb + 1) / ((ga + gb + 1) * most) * (least / most) ** of_most
    return found.astype(np.float64)


def combination(snapshots: Sequence[tuple[float, float]], t: float, gamma: float) -> Float64:
    """Return what each snapshot weighs in the average (t, gamma), [len(snapshots)].

    The weights sum to 1, and the profiles so weighted are nearest to the average's, by least
    squares. The weights of the paper's solution may not sum to 1, in particular after few steps.
    All weights of the network are then too large or too small.
    """
    # Lagrange's system: the last row asks for the sum, and the last unknown is its multiplier.
    n = len(snapshots)
    A = np.ones((n + 1, n + 1))
    A[:n, :n] = inner_products(snapshots, snapshots)
    A[n, n] = 0
    b = np.append(inner_products(snapshots, [(t, gamma)]), 1)
    return np.linalg.lstsq(A, b, rcond=1e-12)[0][:n].astype(np.float64)


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
    weights = combination([(s, exponent(w)) for s, w in found], step, exponent(width))
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
    checkpoint = checkpoints.newest(run / "checkpoints")
    if checkpoint is None:
        raise CheckpointError(f"{run} has no checkpoint. Train it first: python -m trainer.fit.")
    out = run.with_name(f"{run.name}-ema-{width:.3f}")
    config, rest = read_run(run)
    record = replace(config, name=out.name).to_json() | rest
    average = post_hoc(run, width, checkpoint.step)
    if {k: v.shape for k, v in average.items()} != {k: v.shape for k, v in checkpoint.ema.items()}:
        raise CheckpointError(f"the snapshots of {run} are of another network than its checkpoint.")
    checkpoints.write(out / "checkpoints", replace(checkpoint, ema=average), keep=1)
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
