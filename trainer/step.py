"""The state of a run, and one optimizer step on it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from runtime.diffusion.noise import Stream as NoiseStream
from runtime.diffusion.noise import noises
from runtime.diffusion.program import run
from runtime.errors import RequestError
from runtime.images import to_uint8

from .average import Averages
from .config import Config
from .data.dataset import Source
from .data.loader import Batches
from .errors import CheckpointError, TrainingError
from .forward import ForwardProcess
from .networks.cost import make_network
from .objectives.denoising import BUCKETS, buckets, draw_knots, loss_weights
from .processes import Processes, join
from .runs import checkpoint as checkpoints
from .runs.checkpoint import Checkpoint, Tensors
from .sharding import as_held, hollow, own, split, whole

MASK = 2**64 - 1


def mixed(seed: int, stream: int, number: int) -> int:
    """A seed of 64 bits for what is drawn apart (splitmix64's finalizer, Steele et al. 2014)."""
    z = (
        seed * 0x9E3779B97F4A7C15
        + stream * 0xD1B54A32D192ED03
        + number * 0x8CB92BA72F3D8DD7
        + 0x9E3779B97F4A7C15
    ) & MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
    return z ^ (z >> 31)


STEP, NOISE, DROPOUT = range(3)
"""What is drawn: by step; by picture; by step, part and process."""


def learning_rate(config: Config, step: int) -> float:
    """Linear warm-up, then constant, or a half cosine down to 0 at the last step (Loshchilov &
    Hutter 2017)."""
    warm = min(1.0, (step + 1) / max(1, config.warmup))
    falling = (
        0.5 * (1.0 + math.cos(math.pi * step / config.steps)) if config.decay == "cosine" else 1.0
    )
    return config.learning_rate * warm * falling


@dataclass(frozen=True)
class Draws:
    """What a process's share of a step is trained on: x0 [b, C, H, W] in -1 … 1, label [b], t [b]
    knots, eps like x0."""

    x0: Tensor
    label: Tensor
    t: Tensor
    eps: Tensor

    def __iter__(self) -> Any:
        return iter((self.x0, self.label, self.t, self.eps))

    def part(self, i: int, count: int) -> Draws:
        size = len(self.t) // count
        return Draws(*(v[i * size : (i + 1) * size] for v in self))


def precision_of(config: Config, device: torch.device) -> torch.dtype:
    """What the network computes in. auto on a GPU: bf16 where it has it. Raises RequestError for
    fp16 on a CPU."""
    if config.precision == "fp16" and device.type == "cpu":
        raise RequestError(
            "fp16 trains on a GPU alone, and there is none here: use --precision bf16 or fp32."
        )
    if config.precision != "auto":
        return {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[
            config.precision
        ]
    has_bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.bfloat16 if has_bf16 else torch.float32


@torch.no_grad()
def take(mine: Mapping[str, Tensor], found: Tensors) -> None:
    """Copy whole tensors into those of their names, split where these are."""
    for name, tensor in found.items():
        mine[name].copy_(as_held(tensor, mine[name]))


class Trainer:
    """The state of a run and one optimizer step on it. All randomness of step k is drawn from
    (seed, k)."""

    def __init__(self, config: Config, source: Source, processes: Processes | None = None) -> None:
        self.config, self.source = config, source
        self.processes = processes or join(config.device)
        self.device = self.processes.device
        share, odd = divmod(config.batch, self.processes.count * config.accumulate)
        if odd or not share:
            raise TrainingError(
                f"a batch of {config.batch} does not divide among {self.processes.count} processes"
                f"{f' in {config.accumulate} parts each' if config.accumulate > 1 else ''}: "
                f"choose another --batch."
            )
        if config.compile and self.processes.sharding:
            raise TrainingError(
                "--compile fails with FSDP in this version of PyTorch: leave one of them out."
            )
        self.precision = precision_of(config, self.device)
        self.autocast = torch.autocast(
            self.device.type, self.precision, enabled=self.precision != torch.float32
        )
        self.scaler = torch.amp.GradScaler(
            self.device.type, enabled=self.precision == torch.float16
        )  # pyright: ignore[reportPrivateImportUsage]
        self.num_classes = len(source.classes)
        self.layout = torch.channels_last if config.channels_last else torch.contiguous_format
        self.network = make_network(config, source.sample_shape, self.num_classes).to(self.device)
        self.plain = self.network  # the one that is sampled
        if self.processes.sharding:  # FSDP takes weights whose memory is in their own order alone
            self.plain = hollow(self.network)
            split(self.network, self.processes.sharding, self.device, self.processes.count)
        else:
            self.network.to(memory_format=self.layout)  # pyright: ignore[reportCallIssue]
        self.weights = dict(self.network.named_parameters())
        self.averages = Averages(config, self.weights)
        self.optimizer = torch.optim.AdamW(
            self.network.parameters(),
            config.learning_rate,
            (0.9, 0.99),
            weight_decay=config.weight_decay,
            fused=True,
        )
        self.schedule = config.make_schedule()
        self.forward_process = ForwardProcess(self.schedule, config.prediction, self.device)
        self.loss_weight = torch.as_tensor(
            loss_weights(config, self.schedule), dtype=torch.float32, device=self.device
        )
        self.batches = Batches(config, source, self.processes)
        self.step, self.seconds = 0, 0.0
        self.bad: set[int] = set()
        self.bucket_losses = torch.zeros(2, BUCKETS, dtype=torch.float64)
        self._answer: Any = None

    @property
    def ema(self) -> dict[str, Tensor]:
        """The average that is sampled."""
        return self.averages.of["ema"]

    @property
    def answer(self) -> Any:
        """The network as it is trained: compiled, and its gradients averaged over the processes."""
        if self._answer is None:
            network: Any = self.processes.wrapped(self.network)
            self._answer = torch.compile(network) if self.config.compile else network
            if self.processes.count > 1 and not self.processes.sharding:
                self._settle(network)
        return self._answer

    def _settle(self, network: nn.Module) -> None:
        """DDP lays its buckets out anew after the first backward pass, and sums depend on the
        layout in their last bits: so that a run that goes on has the layout of one that never
        stopped, one pass comes before the first step."""
        shape = (1, *self.source.sample_shape)
        zero = torch.zeros(1, dtype=torch.int64, device=self.device)
        with self.autocast:
            found = network(
                torch.zeros(shape, device=self.device), self.forward_process.time[:1], zero
            )
        found.float().sum().backward()
        self.optimizer.zero_grad(set_to_none=True)

    def draw(self, step: int) -> Draws:
        """This process's share of what step `step` trains on, on its device.

        Labels and knots are drawn for the whole batch from (seed, step), the noise of each picture
        from (seed, its place among all): so what is drawn does not depend on how many processes
        share it.
        """
        c, share = self.config, self.config.batch // self.processes.count
        begin = self.processes.index * share
        mine = slice(begin, begin + share)
        batch = self.batches.take(step)
        self.bad.update(batch.bad)
        generator = torch.Generator().manual_seed(mixed(c.seed, STEP, step))
        dropped = torch.rand(c.batch, generator=generator)[mine] < c.label_dropout
        t = draw_knots(c, self.schedule, generator)[mine]
        mirrored = (torch.rand(c.batch, generator=generator) < 0.5)[mine]
        x0 = batch.images.to(self.device, non_blocking=True).float().div_(127.5).sub_(1)
        if c.flips:
            x0 = torch.where(mirrored.to(self.device)[:, None, None, None], x0.flip(3), x0)
        label = torch.where(dropped, self.num_classes, batch.labels)
        eps = self._noise(step * c.batch + begin, x0)
        return Draws(x0, label.to(self.device), t.to(self.device), eps)

    def _noise(self, first: int, x0: Tensor) -> Tensor:
        eps = torch.empty_like(x0)
        generator = torch.Generator(self.device)
        for i in range(len(x0)):
            generator.manual_seed(mixed(self.config.seed, NOISE, first + i))
            eps[i].normal_(generator=generator)
        return eps

    def losses(self, draws: Draws) -> Tensor:
        """[b]: the mean squared error of each picture's answer."""
        x0, label, t, eps = draws
        process = self.forward_process
        x = process.network_input(process.jump(x0, t, eps), t).contiguous(memory_format=self.layout)
        with self.autocast:
            answer = self.answer(x, process.time[t], label)
        return (answer.float() - process.target(x0, t, eps)).square().flatten(1).mean(1)

    def train_step(self) -> dict[str, float]:
        """One optimizer step. Raises TrainingError, before the weights are touched, where the loss
        or its gradient is not finite."""
        c, draws, network = (
            self.config,
            self.draw(self.step),
            self.answer,
        )  # made now: what follows has its own seed
        mean = torch.zeros((), device=self.device)
        seen = torch.zeros(2, BUCKETS, dtype=torch.float64)
        for i in range(c.accumulate):
            part, last = draws.part(i, c.accumulate), i + 1 == c.accumulate
            if c.dropout:
                torch.manual_seed(
                    mixed(
                        c.seed,
                        DROPOUT,
                        (self.step * c.accumulate + i) * 4096 + self.processes.index,
                    )
                )
            with self.processes.alone(network, last):
                losses = self.losses(part)
                loss = (losses * self.loss_weight[part.t]).mean() / c.accumulate
                self.scaler.scale(loss).backward()
            mean += loss.detach()
            seen += buckets(part.t, losses, c.T)
        self.scaler.unscale_(self.optimizer)
        grad_norm = nn.utils.clip_grad_norm_(self.weights.values(), c.gradient_clip)
        found = self._reduced(mean, seen) | {
            "grad_norm": whole(grad_norm).item(),
            "learning_rate": learning_rate(c, self.step),
        }
        self._require_finite(found)
        for group in self.optimizer.param_groups:
            group["lr"] = found["learning_rate"]
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        self.averages.update(self.weights, self.step)
        self.step += 1
        return found

    def _reduced(self, mean: Tensor, seen: Tensor) -> dict[str, float]:
        """The loss over all processes; what was seen in each stretch of knots is added to
        `bucket_losses`."""
        whole = torch.cat([mean.double().cpu().reshape(1) / self.processes.count, seen.reshape(-1)])
        whole = self.processes.sum(whole)
        self.bucket_losses += whole[1:].reshape(2, BUCKETS)
        return {"loss": whole[0].item()}

    def _require_finite(self, found: dict[str, float]) -> None:
        skipped = (
            self.scaler.is_enabled() and self.scaler.get_scale() > 1e-3
        )  # fp16 finds its scale by overflowing
        if math.isfinite(found["loss"]) and (math.isfinite(found["grad_norm"]) or skipped):
            return
        self.optimizer.zero_grad(set_to_none=True)
        c = self.config
        raise TrainingError(
            f"step {self.step}: the loss is {found['loss']} and its gradient "
            f"{found['grad_norm']}, not finite. "
            f"No checkpoint holds it. Lower --learning-rate (now {c.learning_rate:g}) "
            f"or --gradient-clip (now {c.gradient_clip:g}) under another --name, or look at the "
            f"data."
        )

    def to_checkpoint(self) -> Checkpoint:
        """What `resume` needs; every process calls this, and the first one alone gets the tensors.
        Raises TrainingError where a weight is not
        finite: such a run can only go on from before."""
        bad = next(
            (name for name, w in self.weights.items() if not torch.isfinite(own(w)).all()), None
        )
        for name in filter(None, self.processes.gather(bad)):
            raise TrainingError(
                f"step {self.step}: {name} is not finite, so no checkpoint is written. "
                f"Lower --learning-rate (now {self.config.learning_rate:g}) under another --name, "
                f"or look at the data."
            )
        state = {"bad": sorted(self.all_bad()), "buckets": self.bucket_losses.tolist()}
        if self.scaler.is_enabled():
            state["scaler"] = self.scaler.state_dict()
        return Checkpoint(
            step=self.step,
            seconds=self.seconds,
            weights=self.whole({name: w.detach() for name, w in self.weights.items()}),
            ema=self.whole(self.ema),
            optimizer=self.whole(checkpoints.optimizer_tensors(self.optimizer, list(self.weights))),
            environment=self.environment,
            more={
                name: self.whole(tensors)
                for name, tensors in self.averages.of.items()
                if name != "ema"
            },
            state=state,
        )

    @property
    def environment(self) -> dict[str, Any]:
        """What decides the last bit of a step besides the config."""
        return checkpoints.environment(
            self.device, self.processes.count, bool(self.processes.sharding)
        )

    def whole(self, tensors: Tensors) -> Tensors:
        """These tensors in the first process, with the rows that others hold, on the CPU where
        there are such. Every process calls this."""
        if not self.processes.sharding:
            return tensors
        found = {}
        for name, tensor in sorted(
            tensors.items()
        ):  # in one order in all processes: safetensors reads in any
            full = whole(tensor)
            if self.processes.main:
                found[name] = full.cpu()
        return found

    def all_bad(self) -> set[int]:
        """Indices of the pictures that could not be read, in any process."""
        return set().union(*self.processes.gather(self.bad))

    def start_from(self, found: Tensors) -> None:
        """Take these weights, by name, in place of random ones, and as what every average begins
        with. The others stay as they are."""
        for mine in (self.weights, *self.averages.of.values()):
            take(mine, found)

    def resume(self, checkpoint: Checkpoint) -> None:
        """Take over a checkpoint. Raises CheckpointError where its tensors are not this network's."""
        pairs = [(self.weights, checkpoint.weights), (self.ema, checkpoint.ema)]
        for name, mine in self.averages.of.items():
            if name != "ema":
                pairs.append((mine, checkpoint.more.get(name, {})))
        for mine, found in pairs:
            if {n: w.shape for n, w in mine.items()} != {n: w.shape for n, w in found.items()}:
                raise CheckpointError(
                    "the checkpoint's weights are not those of this config's network."
                )
            take(mine, found)
        try:
            checkpoints.restore_optimizer(self.optimizer, list(self.weights), checkpoint.optimizer)
        except (KeyError, ValueError, RuntimeError) as error:
            raise CheckpointError(
                f"the checkpoint's optimizer state is not that of this config's network ({error})."
            ) from error
        self.step, self.seconds = checkpoint.step, checkpoint.seconds
        state = checkpoint.state
        self.bad = set(state.get("bad", ()))
        if "buckets" in state:
            self.bucket_losses = torch.tensor(state["buckets"], dtype=torch.float64)
        if self.scaler.is_enabled() and "scaler" in state:
            try:
                self.scaler.load_state_dict(state["scaler"])
            except (KeyError, TypeError, RuntimeError) as error:
                raise CheckpointError(
                    f"the checkpoint's loss scale is damaged ({error})."
                ) from error

    def take_bucket_losses(self) -> list[float]:
        """The mean loss in each stretch of knots since this was last asked; NaN where none was
        drawn."""
        total, count = self.bucket_losses
        self.bucket_losses = torch.zeros_like(self.bucket_losses)
        return (total / count).tolist()

    @torch.no_grad()
    def sample(
        self,
        count: int,
        steps: int | None = None,
        seed: int = 0,
        solver: str | None = None,
        label: Any = None,
        weights: Tensors | None = None,
    ) -> np.ndarray:
        """Pictures [count, H, W, C] uint8 by one of the runtime's own programs. label [count]: a
        label after another. weights: the average that is sampled, `whole` where it is split among
        processes."""
        c, shape = self.config, self.source.sample_shape
        program = c.sample_program(solver or "", steps or 0)

        def network(x: np.ndarray, t: np.ndarray, *rest: np.ndarray) -> np.ndarray:
            inputs = tuple(torch.from_numpy(a).to(self.device) for a in (x, t, *rest))
            answer = torch.func.functional_call(self.plain, average, inputs)
            return answer.float().cpu().numpy()

        average = {name: tensor.to(self.device) for name, tensor in (weights or self.ema).items()}
        seeds = [seed + i for i in range(count)]
        labels = (
            np.arange(count) % max(1, self.num_classes)
            if label is None
            else np.asarray(label, np.int64)
        )
        x = noises(seeds, NoiseStream.INITIAL, 0, shape) * np.float32(program.start)
        self.plain.eval()
        found = run(
            program,
            network,
            x,
            lambda k: noises(seeds, NoiseStream.STEP, k, shape),
            label=labels if self.num_classes else None,
        )
        self.plain.train()
        return to_uint8(found)
