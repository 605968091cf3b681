"""Train a network: python -m trainer.fit. The same command again goes on where the last one
stopped, to the same weights.

In many processes: accelerate launch --num_processes 8 -m trainer.fit … with the same options.
"""

from __future__ import annotations

import argparse
import hashlib
import logging
import math
import os
import shlex
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np

from runtime.errors import status
from runtime.files import replacing, to_json
from runtime.images import save, tile
from runtime.progress import Progress, clock

from .config import Config, text
from .data import dataset as data
from .data.labels import unused
from .data.stream import Stream, too_many, too_many_error, vanished
from .errors import TrainingError
from .evaluate import Judge, require_comparable
from .networks.cost import Cost, cost, peak_flops
from .presets import add_arguments, from_arguments
from .processes import Processes, join, leave
from .runs import checkpoint as checkpoints
from .runs.checkpoint import Checkpoint
from .runs.folder import claim, note_start, open_run
from .runs.log import BUCKET_COLUMNS, Log
from .runs.start import fitting, start_of
from .step import Trainer

log = logging.getLogger(__name__)


@contextmanager
def asked_to_stop() -> Iterator[Callable[[], bool]]:
    """Whether Ctrl-C or a termination signal has come; Ctrl-C after it ends the program at once."""
    asked = False

    def note(number: int, _: Any) -> None:
        nonlocal asked
        if asked and number == signal.SIGINT:  # a launcher and its scheduler may each send SIGTERM
            raise KeyboardInterrupt
        asked = True
        print(
            "\nstopping after this step; once more to stop at once, without a checkpoint",
            file=sys.stderr,
        )

    before = {s: signal.signal(s, note) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: asked
    finally:
        for s, handler in before.items():
            signal.signal(s, handler)


def fit(config: Config, runs: Path = Path("runs")) -> bool:
    """Train, or go on training, into runs/NAME. Returns whether the run is finished (False: it was
    asked to stop, and a checkpoint is written).

    Every process of a run calls this; the first one alone writes. Raises TrainingError where
    another process is gone.
    """
    with asked_to_stop() as stop:
        processes = join(config.device)
        with processes.together(), enough_memory(config), ExitStack() as held:
            return Run(config, runs / config.name, processes, held).train(stop)


@contextmanager
def enough_memory(config: Config) -> Iterator[None]:
    """Turn what torch and numpy raise when memory runs out into a TrainingError with the remedy."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError) and not any(
            word in str(error) for word in OUT_OF_MEMORY
        ):
            raise
        raise TrainingError(
            f"memory ran out ({' '.join(str(error).split())[:200] or 'MemoryError'}). Use a "
            f"smaller "
            f"--batch (now {config.batch}), more --accumulate (now {config.accumulate}), a smaller "
            "network or --size, or --checkpointing."
        ) from error


def require_memory(spent: Cost, processes: Processes) -> None:
    """Check that weights, average and both moments of the optimizer fit in this machine's memory.

    Otherwise the system kills the process without a word.

    Raises:
        TrainingError: They do not fit.
    """
    if processes.device.type != "cpu" or processes.sharding or not hasattr(os, "sysconf"):
        return
    needed = spent.parameters * 4 * BYTES_OF_FLOAT
    there = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if needed > there:
        raise TrainingError(
            f"a network of {spent.parameters / 1e6:.0f} M parameters needs at least "
            f"{needed / 2**30:.0f} GiB "
            f"to train, and this machine has {there / 2**30:.0f} GiB. Use smaller --channels, "
            f"--width or --depth."
        )


BYTES_OF_FLOAT = 4
OUT_OF_MEMORY = (
    "out of memory",
    "not enough memory",
    "can't allocate memory",
    "Storage size calculation overflowed",
)


class Run:
    """A run as it trains: the trainer, and what it writes down."""

    def __init__(self, config: Config, folder: Path, processes: Processes, held: ExitStack) -> None:
        """held: to be closed when the run is left."""
        self.config = config
        self.folder = folder
        self.processes = processes
        old = folder.is_dir()
        if not processes.main:
            logging.getLogger("trainer").setLevel(logging.ERROR)  # the first one warns for all
        if processes.main and old:
            held.enter_context(claim(folder))
        processes.wait()  # or one might read a checkpoint that another does not see yet
        self.source = data.load(config)
        if config.quality_every:
            require_comparable(config, self.source)
        self.cost = cost(config, self.source.sample_shape, len(self.source.classes))
        require_memory(self.cost, processes)
        self.trainer = Trainer(config, self.source, processes)
        self.started: dict[str, str] = {}
        checkpoint = checkpoints.newest(folder / "checkpoints")
        if checkpoint is None:
            self.started = start(self.trainer)  # before anything is written: it may be refused
        if processes.main:
            if not old:
                held.enter_context(claim(folder))
            open_run(folder, config, self.source)
        processes.wait()  # until config.json is there, or this process is alone because it was refused
        self.written = self._resume(checkpoint)
        self.peak = peak_flops(self.trainer.device, self.trainer.precision)
        if processes.main:
            describe(config, self.trainer, self.cost)
        self.log = self._open_log() if processes.main else None
        self.since = (self.trainer.step, self.trainer.seconds)
        self.judge: Judge | None = None
        self.starved = False

    def _resume(self, checkpoint: Checkpoint | None) -> int:
        """Take over the newest checkpoint, if there is one, and say which step it is of; -1 for
        none."""
        trainer = self.trainer
        if checkpoint is None:
            return -1
        trainer.resume(checkpoint)
        here = trainer.environment
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
            print(f"going on after step {trainer.step} of {self.config.steps}")
        return trainer.step

    def _open_log(self) -> Log:
        spent = {
            "parameters": self.cost.parameters,
            "flops": self.cost.flops,
            "peak_flops": self.peak,
        }
        note_start(self.folder, self.trainer.step, self.trainer.environment, spent | self.started)
        return Log(self.folder, self.trainer.step, self.config.to_json())

    def train(self, stop: Callable[[], bool]) -> bool:
        config = self.config
        trainer = self.trainer
        try:
            with (
                Progress("training", config.steps, trainer.step)
                if self.processes.main
                else nullcontext() as bar
            ):
                while trainer.step < config.steps and not self.processes.any(stop()):
                    begun = time.perf_counter()
                    found = trainer.train_step()
                    trainer.seconds += time.perf_counter() - begun
                    if bar is not None:
                        bar.advance(note=f"loss {found['loss']:.4f}")
                    self._after_step(found)
                self.save_checkpoint()
        finally:
            trainer.batches.close()
            if self.log is not None:
                self.log.close()
        done = trainer.step >= config.steps
        if self.processes.main:
            print(
                f"{'done' if done else 'stopped'} after step {trainer.step} of {config.steps}, "
                f"{clock(trainer.seconds)} of training: {self.folder}"
            )
            build = shlex.join(["python", "-m", "export.build", str(self.folder)])
            print(f"next: {build}" if done else "the same command again goes on from here")
        return done

    def _after_step(self, found: dict[str, float]) -> None:
        config = self.config
        step = self.trainer.step

        def due(every: int, at_the_end: bool = True, of: int = 1) -> bool:
            """Whether this step is the first to reach a multiple of `every`, where a step counts as
            `of`."""
            return bool(every) and (
                step * of // every > (step - 1) * of // every
                or (at_the_end and step == config.steps)
            )

        if due(config.log_every):
            self.log_row(found)
        measured = due(config.quality_every, of=config.batch)
        if measured or due(config.sample_every):
            self.save_grid()
        if config.ema_power and due(config.snapshot_every):
            self.save_snapshots()
        if measured:
            self.measure()
        if due(config.checkpoint_every, at_the_end=False):
            self.save_checkpoint()

    def log_row(self, found: dict[str, float]) -> None:
        """A row of what this step found. Raises DataError, in every process, where more than 1 % of
        the pictures cannot be read."""
        trainer = self.trainer
        bad = self.trainer.all_bad()
        losses = trainer.take_bucket_losses()
        steps = trainer.step - self.since[0]
        seconds = max(trainer.seconds - self.since[1], 1e-9)
        self.since = (trainer.step, trainer.seconds)
        waited = trainer.batches.waited
        trainer.batches.waited = 0.0
        if self.log is not None:
            speed = steps * self.config.batch / seconds
            self.log.row(
                {
                    "step": trainer.step,
                    "pictures": trainer.step * self.config.batch,
                    **found,
                    "pictures_per_s": speed,
                    "seconds": trainer.seconds,
                    "waiting": waited / seconds,
                    "of_peak": 3 * self.cost.flops * speed / (self.peak * self.processes.count),
                    "bad": len(bad),
                    **dict(zip(BUCKET_COLUMNS, losses, strict=True)),
                }
            )
            if (
                waited > 0.1 * seconds
                and trainer.step > 2 * self.config.log_every
                and not self.starved
            ):
                self.starved = True
                log.warning(
                    "%.0f %% of the time goes to waiting for pictures: more --workers?",
                    100 * waited / seconds,
                )
        self._name_bad(bad)

    def _name_bad(self, bad: set[int]) -> None:
        if not bad or not isinstance(self.source, Stream):
            return
        names = [self.source.names[i] for i in sorted(bad)]
        if self.processes.main:
            with replacing(self.folder / "bad-pictures.txt") as temporary:
                temporary.write_text(
                    "\n".join(names) + "\n", encoding="utf-8", errors="surrogateescape"
                )
        if too_many(len(bad), len(self.source)):
            raise too_many_error(names, len(self.source))
        if self.source.classes and (gone := self._vanished(bad, self.source)):
            raise vanished(gone)

    @staticmethod
    def _vanished(bad: set[int], source: Stream) -> list[str]:
        """Return the classes that have images of which none can be read."""
        kept = np.ones(len(source), bool)
        kept[list(bad)] = False
        gone = set(unused(source.classes, source.labels[kept])) - set(
            unused(source.classes, source.labels)
        )
        return sorted(gone)

    def save_grid(self) -> None:
        trainer = self.trainer
        ema = trainer.whole(trainer.ema)
        if self.log is None:
            return
        count = 2 * trainer.num_classes if 1 < trainer.num_classes <= 32 else 64
        size = self.config.quality_batch
        seeds = np.split(np.arange(count), range(size, count, size))
        classes = max(1, trainer.num_classes)
        parts = [
            trainer.sample(len(s), seed=int(s[0]), label=s % classes, weights=ema) for s in seeds
        ]
        sheet = tile(np.concatenate(parts))
        save(self.folder / "samples" / f"step-{trainer.step:08d}.png", sheet, least=512)
        self.log.picture(sheet, trainer.step)

    def save_snapshots(self) -> None:
        """The power-function averages as they are now, which trainer.average makes others from."""
        for name in self.trainer.averages.widths:
            average = self.trainer.whole(self.trainer.averages.of[name])
            if not self.processes.main:
                continue
            path = (
                self.folder / "snapshots" / f"step-{self.trainer.step:08d}" / f"{name}.safetensors"
            )
            with replacing(path) as temporary:
                temporary.write_bytes(checkpoints.to_bytes(average))

    def measure(self) -> None:
        """How far samples are from the data; the checkpoint with the least Fréchet distance is kept
        under best/."""
        trainer = self.trainer
        better = False
        ema = trainer.whole(trainer.ema)
        if self.log is not None and self.log.quality is not None:
            self.judge = self.judge or Judge(self.config, self.source, self.folder, trainer.device)
            found = self.judge(
                lambda n, seed, label: trainer.sample(n, seed=seed, label=label, weights=ema)
            )
            before = [float(row["frechet"]) for row in self.log.quality.rows if row.get("frechet")]
            better = found["frechet"] < min(before, default=math.inf)
            self.log.quality_row({"step": trainer.step, **found})
        if self.processes.any(better):
            checkpoint = trainer.to_checkpoint()
            if self.processes.main:
                checkpoints.write(self.folder / "best", checkpoint, keep=1)

    def save_checkpoint(self) -> None:
        trainer = self.trainer
        if self.written != trainer.step:
            checkpoint = trainer.to_checkpoint()
            if self.processes.main:
                checkpoints.write(self.folder / "checkpoints", checkpoint, self.config.keep)
            self.written = trainer.step


def start(trainer: Trainer) -> dict[str, str]:
    """Where the config says so, begin with the weights of another run or a bundle, and say what
    begins anew.

    Returns what tells these weights from others under the same path, for starts.json.
    """
    if not trainer.config.start_from:
        return {}
    place = Path(trainer.config.start_from)
    weights, classes = start_of(place)
    found = fitting(
        weights, trainer.weights, place, same_classes=classes == tuple(trainer.source.classes)
    )
    trainer.start_from(found)
    if trainer.processes.main:
        anew = (
            "" if len(found) == len(trainer.weights) else ", but for the labels, which are others"
        )
        print(f"starting from the weights of {place}{anew}")
    return {"start_sha256": hashlib.sha256(checkpoints.to_bytes(found)).hexdigest()}


def describe(config: Config, trainer: Trainer, cost: Any) -> None:
    source = trainer.source
    processes = trainer.processes
    print(to_json(config.to_json()), end="")
    print(
        f"{len(source.labels)} pictures of {source.sample_shape}, {len(source.classes)} classes; "
        f"network of {cost.parameters / 1e6:.2f} M parameters, {cost.flops / 1e9:.3g} GFLOP a "
        f"picture, on {trainer.device}"
        f"{f' in {processes.count} processes' if processes.count > 1 else ''}; "
        f"{config.steps * config.batch / len(source.labels):.0f} epochs",
        flush=True,
    )


def dry_run(config: Config) -> None:
    """Everything but the training: load the data, make the network, take three steps, say how long
    the whole would take; write nothing."""
    with enough_memory(config):
        _dry_run(config)


def _dry_run(config: Config) -> None:
    source = data.load(config)
    if config.quality_every:
        require_comparable(config, source)
    spent = cost(config, source.sample_shape, len(source.classes))
    processes = join(config.device)
    require_memory(spent, processes)
    trainer = Trainer(config, source, processes)
    start(trainer)
    describe(config, trainer, spent)
    trainer.train_step()
    begun = time.perf_counter()
    losses = [trainer.train_step()["loss"] for _ in range(2)]
    each = (time.perf_counter() - begun) / 2
    trainer.batches.close()
    print(
        f"dry run: loss {losses[-1]:.4f}, {config.batch / each:.0f} pictures/s, "
        f"{clock(each * config.steps)} for all {config.steps} steps; nothing was written"
    )


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m trainer.fit", description=__doc__)
    add_arguments(parser)
    parser.add_argument(
        "--runs",
        type=Path,
        default=Path("runs"),
        metavar="DIR",
        help="the folder that holds the runs [runs]",
    )
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="take three steps, say what the run would be and take, and write nothing",
    )
    given = parser.parse_args(arguments)
    logging.basicConfig(format="%(levelname)s: %(message)s")

    def action() -> int:
        config = from_arguments(given)
        text("--runs", str(given.runs))
        if given.dry_run:
            dry_run(config)
            return 0
        return 0 if fit(config, given.runs) else 130

    try:
        return status(action)
    finally:
        leave()


if __name__ == "__main__":
    sys.exit(main())
