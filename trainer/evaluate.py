"""Measure the quality of samples: python -m trainer.evaluate RUN_OR_BUNDLE.

Samples are compared with the data by features; see `trainer.quality.distances`. The numbers of a
run and of the bundle made from it may be compared, and those of runs on the same data. They are the
numbers of the literature only with Inception's features (--features).
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from runtime.bundle.bundle import MANIFEST
from runtime.bundle.shipped import named_folder
from runtime.errors import RequestError
from runtime.files import to_json, write_text
from runtime.terminal.output import say
from runtime.terminal.verbs import program, run_verb

from .config import Config
from .data.sources import load, require_same_data
from .data.tasks import task_of
from .parallel.processes import join
from .quality.judge import Judge
from .runs import checkpoint as checkpoints
from .runs.folder import read_run
from .training.step import Trainer


@dataclass(frozen=True)
class Changes:
    """Settings of a run that a measurement may change. None keeps the run's own."""

    quality_samples: int | None = None
    sample_solver: str | None = None
    sample_steps: int | None = None
    features: str | None = None

    def applied(self, config: Config) -> Config:
        given = {k: v for k, v in dataclasses.asdict(self).items() if v is not None}
        return dataclasses.replace(config, **given)


@dataclass(frozen=True)
class Evaluation:
    """The distances of one run or bundle.

    Attributes:
        of: Its folder.
        samples: How many samples were compared with as many images.
        distances: frechet, kernel, precision and recall.
        step: The checkpoint's; None for a bundle.
    """

    of: str
    samples: int
    distances: Mapping[str, float]
    step: int | None = None

    def to_json(self) -> dict[str, str | int | float]:
        step = {} if self.step is None else {"step": self.step}
        return {"of": self.of, **step, "samples": self.samples, **self.distances}


def of_run(run: Path, best: bool, device: str, changes: Changes | None = None) -> Evaluation:
    """Measure a run's newest checkpoint, or its best one.

    Raises:
        CheckpointError: `run` is not a run, or has no such checkpoint.
        DataError: The data has other classes now.
    """
    config, rest = read_run(run)
    # In float32 on any device, so that a run and its bundle give the same samples but for rounding.
    config = dataclasses.replace(config, device=device, precision="fp32")
    config = (changes or Changes()).applied(config)
    dataset = load(config)
    require_same_data(run, dataset, rest["data_record"], rest["classes"])
    trainer = Trainer(config, dataset)
    checkpoint = checkpoints.required(
        run / ("best" if best else "checkpoints"),
        f"{run} has no {'best ' if best else ''}checkpoint yet.",
    )
    trainer.state.resume(checkpoint)
    judge = Judge(config, dataset, run, trainer.device)
    distances = judge(lambda n, seed, label: trainer.sample(n, seed=seed, label=label))
    return Evaluation(str(run), len(judge.labels), distances, checkpoint.step)


def of_bundle(
    folder: Path, guidance: float | None, device: str, changes: Changes | None = None
) -> Evaluation:
    """Measure a bundle made from a run, whose data must be on this machine.

    Raises:
        RequestError: The bundle was not made from a run.
        DataError: The data has other classes now.
    """
    from runtime.sampler import Sampler  # needs an inference library, which training does not

    sampler = Sampler.load(folder)
    record = sampler.bundle.provenance.get("config")
    if not isinstance(record, Mapping):
        raise RequestError(
            f"{folder} did not come from a run of trainer.fit: its record names no data to "
            f"compare with."
        )
    config = (changes or Changes()).applied(Config.from_json(record))
    dataset = load(config)
    labels = sampler.bundle.labels
    require_same_data(
        folder, dataset, sampler.bundle.provenance.get("data"), labels.names if labels else ()
    )
    task = task_of(config, dataset) if config.conditioned else None

    def sample(n: int, seed: int, label: NDArray[np.int64]) -> NDArray[np.uint8]:
        conditions: Mapping[str, NDArray[np.float32]] = {}
        if task:
            # The label is that of the image whose conditions are given, as in a run's grids.
            _, label, conditions = task.shown(n, seed)
        # Without guidance the conditional network samples, as it does in a run's own measurements.
        return sampler.pictures(
            n,
            seed=seed,
            solver=config.sample_solver,
            steps=config.sample_steps,
            label=label.tolist() if sampler.bundle.num_classes else None,
            guidance=1.0 if guidance is None else guidance,
            conditions=conditions or None,
        )

    judge = Judge(config, dataset, None, join(device).device)
    return Evaluation(str(folder), len(judge.labels), judge(sample))


def evaluate(what: Path, best: bool, guidance: float | None, device: str, changes: Changes) -> str:
    """Measure a run or a bundle, and return the result as JSON. A run's is written into it.

    Raises:
        RequestError: Guidance was given for a run, or a bundle's best checkpoint was asked for.
    """
    folder = named_folder(what)
    if (folder / MANIFEST).is_file():
        if best:
            raise RequestError("--best is for runs: a bundle has one checkpoint's weights.")
        return to_json(of_bundle(folder, guidance, device, changes).to_json())
    if guidance is not None:
        raise RequestError("--guidance is for bundles: a run is sampled without.")
    result = to_json(of_run(what, best, device, changes).to_json())
    write_text(what / "evaluation.json", result)
    return result


def parser() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(prog=program("trainer.evaluate"), description=__doc__)
    found.add_argument("what", type=Path, metavar="RUN_OR_BUNDLE")
    found.add_argument(
        "--n",
        type=int,
        help="samples, and images of the data, which has fewer perhaps [the run's quality-samples]",
    )
    found.add_argument("--solver", help="[the run's sample-solver]")
    found.add_argument("--steps", type=int, help="[the run's sample-steps]")
    found.add_argument("--guidance", type=float, help="of a bundle [none]")
    found.add_argument(
        "--best", action="store_true", help="a run's best checkpoint instead of its newest"
    )
    found.add_argument("--features", help="a TorchScript file of Inception [the run's]")
    found.add_argument("--device", default="auto", help="auto, cpu or cuda [auto]")
    return found


def main(arguments: list[str] | None = None) -> int:
    """Run the command and return its exit status."""
    return run_verb(parser(), _act, arguments)


def _act(given: argparse.Namespace) -> None:
    changes = Changes(given.n, given.solver, given.steps, given.features)
    say(evaluate(given.what, given.best, given.guidance, given.device, changes).rstrip("\n"))


if __name__ == "__main__":
    sys.exit(main())
