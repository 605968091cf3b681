"""Train a noise predictor: python -m trainer.fit. The same command again goes on where the last one stopped."""

from __future__ import annotations

import argparse
import csv
import logging
import math
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from runtime.errors import status
from runtime.files import from_json, replacing, to_json, write_text
from runtime.noise import Stream, noise
from runtime.pictures import save, tile, to_uint8
from runtime.program import run
from runtime.progress import Progress, clock
from runtime.solvers import make_program

from . import checkpoint as checkpoints
from . import data
from .checkpoint import Checkpoint
from .config import Config, add_arguments, from_arguments
from .errors import CheckpointError, TrainingError
from .forward import ForwardProcess
from .network import UNet

log = logging.getLogger(__name__)


def make_network(config: Config, sample_shape: tuple[int, int, int], num_classes: int) -> UNet:
    """The network of this config, its first weights a function of config.seed."""
    torch.manual_seed(config.seed)
    return UNet(sample_shape, config.channels, config.blocks, config.attention, num_classes)


def batch_indices(seed: int, step: int, batch: int, count: int) -> np.ndarray:
    """Which pictures step `step` sees, [batch]: every epoch is a new permutation, drawn from (seed, epoch)."""
    positions = np.arange(step * batch, (step + 1) * batch)
    epochs = {
        e: np.random.Generator(np.random.Philox(key=[seed, e])).permutation(count)
        for e in np.unique(positions // count)
    }
    return np.array([epochs[p // count][p % count] for p in positions])


def learning_rate(config: Config, step: int) -> float:
    """Linear warm-up, then a half cosine down to 0 at the last step (Loshchilov & Hutter 2017)."""
    warm = min(1.0, (step + 1) / max(1, config.warmup))
    return config.learning_rate * warm * 0.5 * (1.0 + math.cos(math.pi * step / config.steps))


def ema_decay(config: Config, step: int) -> float:
    """Decay of one step's update: a half-life of ema_half_life pictures, at most a twentieth of those seen so far
    (the ramp-up of Karras et al. 2024)."""
    half_life = min(config.ema_half_life, (step + 1) * config.batch / 20)
    return 0.5 ** (config.batch / max(half_life, 1e-9))


class Trainer:
    """The state of a run and one optimizer step on it. All randomness of step k is drawn from (seed, k)."""

    def __init__(self, config: Config, pictures: data.Pictures) -> None:
        self.config = config
        self.device = torch.device(
            "cuda" if config.device == "auto" and torch.cuda.is_available() else config.device.replace("auto", "cpu")
        )
        bf16 = config.precision == "bf16" or (
            config.precision == "auto" and self.device.type == "cuda" and torch.cuda.is_bf16_supported()
        )
        self.autocast = torch.autocast(self.device.type, torch.bfloat16, enabled=bf16)
        self.images = torch.from_numpy(np.ascontiguousarray(pictures.images.transpose(0, 3, 1, 2)))
        self.labels = torch.from_numpy(pictures.labels)
        self.num_classes = len(pictures.classes)
        self.network = make_network(config, pictures.sample_shape, self.num_classes).to(
            self.device, memory_format=torch.channels_last
        )  # pyright: ignore[reportCallIssue]
        self.weights = dict(self.network.named_parameters())
        self.ema = {name: w.detach().clone() for name, w in self.weights.items()}
        self.optimizer = torch.optim.AdamW(
            self.network.parameters(), config.learning_rate, (0.9, 0.99), weight_decay=config.weight_decay
        )
        self.forward_process = ForwardProcess(config.make_schedule(), config.prediction, self.device)
        self.step, self.seconds = 0, 0.0

    def draw(self, step: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """What step `step` trains on: x0 [B, C, H, W] in -1 … 1, label [B], t [B], eps like x0.

        t is stratified: one draw from each of B equal stretches of the schedule, in random order, so that every batch covers it
        (Kingma et al. 2021, appendix I.1).
        """
        c = self.config
        index = torch.from_numpy(batch_indices(c.seed, step, c.batch, len(self.images)))
        generator = torch.Generator().manual_seed((c.seed * 1_000_003 + step) % 2**64)
        x0 = self.images[index].float() / 127.5 - 1
        label = torch.where(
            torch.rand(c.batch, generator=generator) < c.label_dropout, self.num_classes, self.labels[index]
        )
        stretch = (torch.randperm(c.batch, generator=generator) + torch.rand(c.batch, generator=generator)) / c.batch
        t = (stretch * c.T).long().clamp(max=c.T - 1)
        eps = torch.randn(x0.shape, generator=generator)
        return x0, label, t, eps

    def train_step(self) -> dict[str, float]:
        """One optimizer step. Raises TrainingError, before the weights are touched, where the loss or its gradient is not finite."""
        c, process = self.config, self.forward_process
        x0, label, t, eps = (v.to(self.device, non_blocking=True) for v in self.draw(self.step))
        x0, eps = (v.contiguous(memory_format=torch.channels_last) for v in (x0, eps))
        with self.autocast:
            answer = self.network(process.network_input(process.jump(x0, t, eps), t), process.time[t], label)
        loss = nn.functional.mse_loss(answer.float(), process.target(x0, t, eps))
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        grad_norm = nn.utils.clip_grad_norm_(self.network.parameters(), c.gradient_clip)
        rate = learning_rate(c, self.step)
        found = {"loss": loss.item(), "grad_norm": grad_norm.item(), "learning_rate": rate}
        if not (math.isfinite(found["loss"]) and math.isfinite(found["grad_norm"])):
            raise TrainingError(
                f"step {self.step}: the loss is {found['loss']} and its gradient {found['grad_norm']}, not finite. "
                f"No checkpoint holds it. Lower --learning-rate (now {c.learning_rate:g}) "
                f"or --gradient-clip (now {c.gradient_clip:g}) under another --name, or look at the data."
            )
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        with torch.no_grad():
            keep = ema_decay(c, self.step)
            for name, average in self.ema.items():
                average.lerp_(self.weights[name], 1 - keep)
        self.step += 1
        return found

    def to_checkpoint(self) -> Checkpoint:
        """What `resume` needs. Raises TrainingError where a weight is not finite: such a run can only go on from before."""
        for name, w in self.weights.items():
            if not torch.isfinite(w).all():
                raise TrainingError(
                    f"step {self.step}: {name} is not finite, so no checkpoint is written. "
                    f"Lower --learning-rate (now {self.config.learning_rate:g}) under another --name, or look at the data."
                )
        optimizer = checkpoints.optimizer_tensors(self.optimizer, list(self.weights))
        weights = {name: w.detach() for name, w in self.weights.items()}
        return Checkpoint(self.step, self.seconds, weights, self.ema, optimizer, checkpoints.environment(self.device))

    def resume(self, checkpoint: Checkpoint) -> None:
        """Take over a checkpoint. Raises CheckpointError where its tensors are not this network's."""
        for mine, found in ((self.weights, checkpoint.weights), (self.ema, checkpoint.ema)):
            if {n: w.shape for n, w in mine.items()} != {n: w.shape for n, w in found.items()}:
                raise CheckpointError("the checkpoint's weights are not those of this config's network.")
            with torch.no_grad():
                for name, tensor in found.items():
                    mine[name].copy_(tensor)
        checkpoints.restore_optimizer(self.optimizer, list(self.weights), checkpoint.optimizer)
        self.step, self.seconds = checkpoint.step, checkpoint.seconds

    @torch.no_grad()
    def sample(self, count: int, steps: int = 20, seed: int = 0) -> np.ndarray:
        """Pictures [count, H, W, C] uint8 of the averaged weights, a label after another, by the runtime's own DDIM program."""
        shape = tuple(self.images.shape[1:])
        program = make_program(
            self.config.make_schedule(), self.config.prediction, "ddim", min(steps, self.config.T), clip=1.0
        )

        def network(x: np.ndarray, t: np.ndarray, label: np.ndarray) -> np.ndarray:
            answer = torch.func.functional_call(
                self.network, self.ema, tuple(torch.from_numpy(a).to(self.device) for a in (x, t, label))
            )
            return answer.float().cpu().numpy()

        x = np.stack([noise(seed + i, Stream.INITIAL, 0, shape) for i in range(count)])
        return to_uint8(run(program, network, program.start * x, label=np.arange(count) % self.num_classes))


LOG_COLUMNS = ("step", "pictures", "loss", "grad_norm", "learning_rate", "pictures_per_s", "seconds")


class Log:
    """log.csv and TensorBoard events of a run. Rows after `step` are cut, so that a resumed run's log has no step twice."""

    def __init__(self, folder: Path, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        path = folder / "log.csv"
        rows: list[Any] = []
        if path.exists():
            with path.open(newline="") as file:
                rows = [row for row in csv.DictReader(file) if row["step"] and int(row["step"]) <= step]
        with replacing(path) as temporary, temporary.open("w", newline="") as file:
            writer = csv.DictWriter(file, LOG_COLUMNS, extrasaction="ignore", restval="")
            writer.writeheader()
            writer.writerows(rows)
        self._file = path.open("a", newline="")
        self._writer: Any = csv.DictWriter(self._file, LOG_COLUMNS)
        self._events: Any = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1)

    def row(self, values: dict[str, float]) -> None:
        self._writer.writerow({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in values.items()})
        self._file.flush()
        for name in LOG_COLUMNS[2:-1]:
            self._events.add_scalar(name, values[name], values["step"])

    def picture(self, sheet: np.ndarray, step: int) -> None:
        self._events.add_image("samples", sheet, step, dataformats="HWC")

    def close(self) -> None:
        self._file.close()
        self._events.close()


@contextmanager
def asked_to_stop() -> Iterator[Callable[[], bool]]:
    """Whether Ctrl-C or a termination signal has come; a second one ends the program at once."""
    asked = False

    def note(number: int, _: Any) -> None:
        nonlocal asked
        if asked:
            raise KeyboardInterrupt
        asked = True
        print("\nstopping after this step; once more to stop at once, without a checkpoint", file=sys.stderr)

    before = {s: signal.signal(s, note) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: asked
    finally:
        for s, handler in before.items():
            signal.signal(s, handler)


def open_run(folder: Path, config: Config, pictures: data.Pictures) -> None:
    """Write the run's config.json, or check that the one there is the same. Raises CheckpointError where it is not."""
    record = {
        **config.to_json(),
        "data_record": pictures.describe(),
        "sample_shape": list(pictures.sample_shape),
        "classes": list(pictures.classes),
    }
    path = folder / "config.json"
    if not path.exists():
        write_text(path, to_json(record))
        return
    try:
        old = dict(from_json(path.read_bytes()))
    except (ValueError, TypeError) as error:
        raise CheckpointError(
            f"{path} is not readable ({error}). Delete {folder} to start over, or choose another --name."
        ) from error
    changed = [
        f"{k} was {old.get(k)!r}, now {record.get(k)!r}" for k in dict(old, **record) if old.get(k) != record.get(k)
    ]
    if changed:
        raise CheckpointError(
            f"{folder} holds a run with another config: {'; '.join(changed)}. "
            "Give the same options to go on with it, choose another --name, or delete the folder to start over."
        )


def fit(config: Config, runs: Path = Path("runs")) -> bool:
    """Train, or go on training, into runs/NAME. Returns whether the run is finished (False: it was asked to stop, and a checkpoint is written)."""
    with asked_to_stop() as stop:
        return _fit(config, runs / config.name, stop)


def _fit(config: Config, folder: Path, stop: Callable[[], bool]) -> bool:
    pictures = data.load(config)
    trainer = Trainer(config, pictures)
    open_run(folder, config, pictures)
    here = checkpoints.environment(trainer.device)
    if checkpoint := checkpoints.newest(folder / "checkpoints"):
        trainer.resume(checkpoint)
        if differing := [
            f"{k} {checkpoint.environment.get(k)} → {v}" for k, v in here.items() if checkpoint.environment.get(k) != v
        ]:
            log.warning(
                "the checkpoint was written elsewhere (%s): the weights may differ in the last bits",
                ", ".join(differing),
            )
        print(f"going on after step {trainer.step} of {config.steps}")
    describe(config, trainer, pictures)

    log_book = Log(folder, trainer.step)
    since, before = trainer.step, trainer.seconds
    written = trainer.step if checkpoint else -1

    def save_checkpoint() -> None:
        nonlocal written
        if written != trainer.step:
            checkpoints.write(folder / "checkpoints", trainer.to_checkpoint(), config.keep)
            written = trainer.step

    try:
        with Progress("training", config.steps, trainer.step) as bar:
            while trainer.step < config.steps and not stop():
                begun = time.perf_counter()
                found = trainer.train_step()
                trainer.seconds += time.perf_counter() - begun
                step = trainer.step
                bar.advance(note=f"loss {found['loss']:.4f}")
                if step % config.log_every == 0 or step == config.steps:
                    speed = (step - since) * config.batch / (trainer.seconds - before)
                    log_book.row(
                        {
                            "step": step,
                            "pictures": step * config.batch,
                            **found,
                            "pictures_per_s": speed,
                            "seconds": trainer.seconds,
                        }
                    )
                    since, before = step, trainer.seconds
                if config.sample_every and (step % config.sample_every == 0 or step == config.steps):
                    sheet = tile(trainer.sample(2 * trainer.num_classes if trainer.num_classes <= 32 else 64))
                    save(folder / "samples" / f"step-{step:08d}.png", sheet, least=512)
                    log_book.picture(sheet, step)
                if step % config.checkpoint_every == 0:
                    save_checkpoint()
            save_checkpoint()
    finally:
        log_book.close()
    done = trainer.step >= config.steps
    print(
        f"{'done' if done else 'stopped'} after step {trainer.step} of {config.steps}, {clock(trainer.seconds)} of training: {folder}"
    )
    print(f"next: python -m export.build {folder}" if done else "the same command again goes on from here")
    return done


def describe(config: Config, trainer: Trainer, pictures: data.Pictures) -> None:
    parameters = sum(w.numel() for w in trainer.weights.values())
    print(to_json(config.to_json()), end="")
    print(
        f"{len(pictures.images)} pictures of {pictures.sample_shape}, {len(pictures.classes)} classes; "
        f"network of {parameters / 1e6:.2f} M parameters on {trainer.device}; {config.steps * config.batch / len(pictures.images):.0f} epochs",
        flush=True,
    )


def dry_run(config: Config) -> None:
    """Everything but the training: load the data, make the network, take three steps, say how long the whole would take; write nothing."""
    pictures = data.load(config)
    trainer = Trainer(config, pictures)
    describe(config, trainer, pictures)
    trainer.train_step()
    begun = time.perf_counter()
    losses = [trainer.train_step()["loss"] for _ in range(2)]
    each = (time.perf_counter() - begun) / 2
    print(
        f"dry run: loss {losses[-1]:.4f}, {config.batch / each:.0f} pictures/s, "
        f"{clock(each * config.steps)} for all {config.steps} steps; nothing was written"
    )


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m trainer.fit", description=__doc__)
    add_arguments(parser)
    parser.add_argument(
        "--runs", type=Path, default=Path("runs"), metavar="DIR", help="the folder that holds the runs [runs]"
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="take three steps, say what the run would be and take, and write nothing"
    )
    given = parser.parse_args(arguments)
    logging.basicConfig(format="%(levelname)s: %(message)s")

    def action() -> int:
        config = from_arguments(given)
        if given.dry_run:
            dry_run(config)
            return 0
        return 0 if fit(config, given.runs) else 130

    return status(action)


if __name__ == "__main__":
    sys.exit(main())
