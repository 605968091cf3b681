"""What a run would be: its description, and a trial of three steps that writes nothing."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

from runtime.files import to_json
from runtime.terminal.progress import clock

from ..config import Config
from ..data.sources import load
from ..data.tasks import task_of
from ..networks.cost import Cost, cost
from ..parallel.processes import join
from ..quality.judge import require_comparable
from .limits import require_memory
from .start import start, teach
from .step import Trainer

TIMED = 2
"""Steps of a trial whose time is taken, after the first one."""


def describe(config: Config, trainer: Trainer, spent: Cost) -> None:
    """Print the config, the data, the network's size, and how many epochs the run has."""
    dataset = trainer.dataset
    processes = trainer.processes
    print(to_json(config.to_json()), end="")
    print(
        f"{len(dataset)} pictures of {dataset.sample_shape}, {len(dataset.classes)} classes; "
        f"network of {spent.parameters / 1e6:.2f} M parameters, {spent.flops / 1e9:.3g} GFLOP a "
        f"picture, on {trainer.device}"
        f"{f' in {processes.count} processes' if processes.count > 1 else ''}; "
        f"{config.steps * config.batch / len(dataset):.0f} epochs",
        flush=True,
    )


def paths_of(config: Config) -> int:
    """Return how many of a teacher's paths a run makes before its first step."""
    return config.distillation.paths if config.distillation else 0


def few_paths(config: Config) -> Config:
    """Return the config with no more of a teacher's paths than a trial takes."""
    if not config.distillation:
        return config
    few = min(config.distillation.trajectories, config.batch)
    return replace(config, distillation=replace(config.distillation, trajectories=few))


def try_out(config: Config) -> None:
    """Do everything but train: load the data, make the network, take three steps, and print how
    long the run would take. Write nothing."""
    asked = config
    config = few_paths(config)
    # A stream ends with the last step of a run, and a trial takes a few in any case.
    config = replace(config, steps=max(config.steps, 1 + TIMED))
    dataset = load(config)
    processes = join(config.device)
    if config.quality_every:
        require_comparable(config, dataset, processes.device)
    conditions = task_of(config, dataset).conditions if config.conditioned else ()
    spent = cost(config, dataset.sample_shape, len(dataset.classes), conditions)
    require_memory(spent, processes)
    trainer = Trainer(config, dataset, processes)
    start(trainer)
    with TemporaryDirectory() as folder:
        # One folder for all processes, which share the paths out among them.
        teach(trainer, Path(processes.gather(folder)[0]))
        if processes.main:
            describe(asked, trainer, spent)
        begun = time.perf_counter()
        trainer.source.prepare(lambda: False)
        made = paths_of(config)
        paths_s = (time.perf_counter() - begun) * paths_of(asked) / max(1, made)
        trainer.train_step()  # not timed: the first step starts workers and may compile
        begun = time.perf_counter()
        losses = [trainer.train_step()["loss"] for _ in range(TIMED)]
        step_s = (time.perf_counter() - begun) / TIMED
        trainer.source.close()
    if not processes.main:
        return
    print(
        f"dry run: loss {losses[-1]:.4f}, {config.batch / step_s:.0f} pictures/s, "
        f"{clock(step_s * asked.steps)} for all {asked.steps} steps"
        f"{f' after {clock(paths_s)} for the paths of the teacher' if made else ''}; "
        "nothing was written"
    )
