"""A run as it trains: its steps, and the files written between them."""

from __future__ import annotations

import logging
import math
import shlex
import time
from collections.abc import Callable
from contextlib import ExitStack, nullcontext
from pathlib import Path

from runtime.files import replacing
from runtime.images import save
from runtime.terminal.progress import Progress, clock

from ..config import Config
from ..data.sources import load
from ..data.tasks import task_of
from ..data.unreadable import require_few
from ..networks.cost import cost, peak_flops
from ..parallel.processes import Processes
from ..quality.judge import Judge, require_comparable
from ..runs import checkpoint as checkpoints
from ..runs.checkpoint import Checkpoint
from ..runs.folder import claim, open_run, write_examples
from ..runs.log import BUCKET_COLUMNS, Log
from ..runs.starts import note_start
from .limits import require_memory
from .start import start, teach
from .step import Trainer
from .trial import describe

log = logging.getLogger(__name__)

STARVED = 0.1
"""Share of the time spent waiting for images above which the run warns."""
EXAMPLES = 16
"""Conditions of the data that a run keeps, for its bundle's proof and int8."""
PASSES = 3
"""A step in forward passes: the backward pass has twice the operations of the forward pass."""
GRID_PIXELS = 512
"""Width of a grid's file, at least."""


class Run:
    """One run: it opens or resumes its folder when made, and `train` takes the steps.

    Every process of a run makes one. The first process alone writes.

    Args:
        held: What must be closed when the run is left, such as the lock of its folder.
    """

    def __init__(self, config: Config, folder: Path, processes: Processes, held: ExitStack) -> None:
        self.config = config
        self.folder = folder
        self.processes = processes
        if not processes.main:
            logging.getLogger("trainer").setLevel(logging.ERROR)  # the first one warns for all
        is_old = folder.is_dir()
        if processes.main and is_old:
            held.enter_context(claim(folder))
        processes.wait()  # otherwise one could read a checkpoint that another does not see yet
        self.dataset = load(config)
        if config.quality_every:
            require_comparable(config, self.dataset, processes.device)
        task = task_of(config, self.dataset) if config.conditioned else None
        conditions = task.conditions if task else ()
        self.cost = cost(config, self.dataset.sample_shape, len(self.dataset.classes), conditions)
        require_memory(self.cost, processes)
        self.trainer = Trainer(config, self.dataset, processes)
        checkpoint = checkpoints.newest(folder / "checkpoints")
        # Before anything is written: what the run is to start from may be refused.
        self.started = start(self.trainer) if checkpoint is None else {}
        if processes.main:
            if not is_old:
                held.enter_context(claim(folder))
            open_run(folder, config, self.dataset, conditions)
            if task and checkpoint is None:
                write_examples(folder, task.shown(EXAMPLES)[2])
        processes.wait()  # until config.json is there, or this process is alone: it was refused
        self.started |= teach(self.trainer, folder, resumed=checkpoint is not None)
        self.written = self._resume(checkpoint)
        self.peak = peak_flops(self.trainer.device, self.trainer.state.precision)
        if processes.main:
            describe(config, self.trainer, self.cost)
        self.log = self._open_log() if processes.main else None
        self.since = (self.trainer.state.step, self.trainer.state.seconds)
        self.judge: Judge | None = None
        self.starved = False

    def _resume(self, checkpoint: Checkpoint | None) -> int:
        """Take over the newest checkpoint. Returns its step, -1 if there is none."""
        state = self.trainer.state
        if checkpoint is None:
            return -1
        state.resume(checkpoint)
        here = state.environment()
        there = checkpoint.environment
        differing = [
            f"{k} {there.get(k)} → {here.get(k)}"
            for k in {**there, **here}
            if there.get(k) != here.get(k)
        ]
        if differing and self.processes.main:
            log.warning(
                "the checkpoint was written elsewhere (%s): the weights may differ in the last "
                "bits",
                ", ".join(differing),
            )
        if self.processes.main:
            print(f"going on after step {state.step} of {self.config.steps}")
        return state.step

    def _open_log(self) -> Log:
        state = self.trainer.state
        spent = {
            "parameters": self.cost.parameters,
            "flops": self.cost.flops,
            "peak_flops": self.peak,
        }
        note_start(self.folder, state.step, state.environment(), spent | self.started)
        return Log(self.folder, state.step, self.config.to_json())

    def train(self, stop: Callable[[], bool]) -> bool:
        """Take the steps that are left, until `stop` says so in one process.

        Returns:
            Whether the run is finished.
        """
        config = self.config
        state = self.trainer.state
        try:
            ready = state.step < config.steps and self.trainer.source.prepare(stop)
            bar = Progress("training", config.steps, state.step) if self.processes.main else None
            with bar or nullcontext():
                while ready and state.step < config.steps and not self.processes.any(stop()):
                    begun = time.perf_counter()
                    row = self.trainer.train_step()
                    state.seconds += time.perf_counter() - begun
                    if bar is not None:
                        bar.advance(note=f"loss {row['loss']:.4f}")
                    self._after_step(row)
                self.save_checkpoint()
        finally:
            # Workers would keep the process alive.
            self.trainer.source.close()
            if self.log is not None:
                self.log.close()
        done = state.step >= config.steps
        if self.processes.main:
            print(
                f"{'done' if done else 'stopped'} after step {state.step} of {config.steps}, "
                f"{clock(state.seconds)} of training: {self.folder}"
            )
            build = shlex.join(["python", "-m", "export.build", str(self.folder)])
            print(f"next: {build}" if done else "re-run the same command to resume from here")
        return done

    def _after_step(self, row: dict[str, float]) -> None:
        config = self.config
        step = self.trainer.state.step

        def due(every: int, at_the_end: bool = True, of: int = 1) -> bool:
            """Return whether this step is the first to reach a multiple of `every`, if a step
            counts as `of`."""
            return bool(every) and (
                step * of // every > (step - 1) * of // every
                or (at_the_end and step == config.steps)
            )

        # The log comes first: it may end the run, and then nothing is spent on samples.
        if due(config.log_every):
            self.log_row(row)
        measured = due(config.quality_every, of=config.batch)
        if measured or due(config.sample_every):
            self.save_grid()
        if config.ema_power and due(config.snapshot_every):
            self.save_snapshots()
        if measured:
            self.measure()
        if due(config.checkpoint_every, at_the_end=False):
            self.save_checkpoint()

    def log_row(self, row: dict[str, float]) -> None:
        """Write the results of this step, and the sums since the row before.

        Raises:
            DataError: More than 1 % of the images cannot be read. It is raised in every process.
        """
        state = self.trainer.state
        source = self.trainer.source
        bad = state.all_bad()  # every process takes part in this
        losses = state.take_bucket_losses()
        steps = state.step - self.since[0]
        seconds = max(state.seconds - self.since[1], 1e-9)
        self.since = (state.step, state.seconds)
        waiting = source.waited / seconds
        source.waited = 0.0
        if self.log is not None:
            speed = steps * self.config.batch / seconds
            needed = PASSES * self.cost.flops * speed
            self.log.row(
                {
                    "step": state.step,
                    "pictures": state.step * self.config.batch,
                    **row,
                    "pictures_per_s": speed,
                    "seconds": state.seconds,
                    "waiting": waiting,
                    "of_peak": needed / (self.peak * self.processes.count),
                    "bad": len(bad),
                    **dict(zip(BUCKET_COLUMNS, losses, strict=True)),
                }
            )
            self._warn_of_waiting(waiting)
        self._name_bad(bad)

    def _warn_of_waiting(self, waiting: float) -> None:
        """Warn once. The first rows do not count: workers and caches start empty."""
        early = self.trainer.state.step <= 2 * self.config.log_every
        if waiting > STARVED and not early and not self.starved:
            self.starved = True
            log.warning(
                "%.0f %% of the time goes to waiting for pictures: more --workers?", 100 * waiting
            )

    def _name_bad(self, bad: set[int]) -> None:
        if not bad:
            return
        if self.processes.main:
            names = self.dataset.image_names(sorted(bad))
            with replacing(self.folder / "bad-pictures.txt") as temporary:
                temporary.write_text(
                    "\n".join(names) + "\n", encoding="utf-8", errors="surrogateescape"
                )
        require_few(self.dataset, bad)

    def save_grid(self) -> None:
        """Write a grid of samples of the average. Every process calls this."""
        state = self.trainer.state
        ema = state.whole(state.ema)
        if self.log is None:
            return
        sheet = self.trainer.preview.grid(ema)
        save(self.folder / "samples" / f"step-{state.step:08d}.png", sheet, least=GRID_PIXELS)
        self.log.picture(sheet, state.step)

    def save_snapshots(self) -> None:
        """Write the power-function averages, which trainer.average makes others from."""
        state = self.trainer.state
        for name in state.averages.widths:
            average = state.whole(state.averages.of[name])
            if not self.processes.main:
                continue
            path = self.folder / "snapshots" / f"step-{state.step:08d}" / f"{name}.safetensors"
            with replacing(path) as temporary:
                temporary.write_bytes(checkpoints.to_bytes(average))

    def measure(self) -> None:
        """Measure how far samples are from the data, and keep the best checkpoint under best/.

        The best one has the least Fréchet distance.
        """
        trainer = self.trainer
        state = trainer.state
        is_best = False
        ema = state.whole(state.ema)
        if self.log is not None and self.log.quality is not None:
            # Made at the first measurement: its classifier takes a while to train.
            self.judge = self.judge or Judge(self.config, self.dataset, self.folder, trainer.device)
            distances = self.judge(
                lambda n, seed, label: trainer.sample(n, seed=seed, label=label, weights=ema)
            )
            # From the table and not from memory, because the best one may be of an earlier start.
            before = [float(row["frechet"]) for row in self.log.quality.rows if row.get("frechet")]
            is_best = distances["frechet"] < min(before, default=math.inf)
            self.log.quality_row({"step": state.step, **distances})
        if self.processes.any(is_best):
            checkpoint = state.to_checkpoint()
            if self.processes.main:
                checkpoints.write(self.folder / "best", checkpoint, keep=1)

    def save_checkpoint(self) -> None:
        """Write a checkpoint of this step, unless it is there. Every process calls this."""
        state = self.trainer.state
        if self.written != state.step:
            checkpoint = state.to_checkpoint()
            if self.processes.main:
                checkpoints.write(self.folder / "checkpoints", checkpoint, self.config.keep)
            self.written = state.step
