"""One optimizer step: what it is trained on, its loss and its gradient."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ..config import Config
from ..data.dataset import Dataset
from ..data.loader import Batches, share_of
from ..errors import TrainingError
from ..objectives.denoising import BUCKETS, Denoising, buckets
from ..objectives.objective import Draws, Networks, Objective
from ..parallel.processes import Processes, join
from ..parallel.sharding import whole
from ..randomness import DROPOUT, NOISE, STEP, dropout_counter
from ..runs.checkpoint import Tensors
from .preview import Preview
from .state import TrainingState

SMALLEST_LOSS_SCALE = 1e-3
"""Below this scale, gradients that overflow in fp16 are not the scale's fault."""


def learning_rate(config: Config, step: int) -> float:
    """Return the learning rate of a step: linear warm-up, then constant or a half cosine.

    The cosine falls to 0 at the last step (Loshchilov & Hutter 2017).
    """
    warm = min(1.0, (step + 1) / max(1, config.warmup))
    half_cosine = 0.5 * (1.0 + math.cos(math.pi * step / config.steps))
    falling = half_cosine if config.decay == "cosine" else 1.0
    return config.learning_rate * warm * falling


@dataclass(frozen=True)
class Trained:
    """The network in training, as an objective calls it (a `Network`).

    Attributes:
        module: Compiled, if that was asked for, and with its gradients averaged over the processes.
        autocast: Has the module compute in the run's precision.
        layout: How the memory of its input is laid out.
    """

    module: nn.Module
    autocast: torch.autocast
    layout: torch.memory_format

    def __call__(self, x: Tensor, time: Tensor, label: Tensor) -> Tensor:
        """Return F(x [b, C, H, W], time [b], label [b]), [b, C, H, W] float32."""
        x = x.contiguous(memory_format=self.layout)
        with self.autocast:
            F = self.module(x, time, label)
        return F.float()


class Trainer:
    """Takes the steps of a run, each a function of (seed, step) and the state before it.

    Attributes:
        state: What a checkpoint holds.
        objective: What is learned.
        batches: The images of each step.
        preview: Samples from the state's averages.
    """

    def __init__(
        self, config: Config, dataset: Dataset, processes: Processes | None = None
    ) -> None:
        self.config = config
        self.dataset = dataset
        self.processes = processes or join(config.device)
        self.device = self.processes.device
        require_shares(config, self.processes)
        self.num_classes = len(dataset.classes)
        self.state = TrainingState(config, dataset.sample_shape, self.num_classes, self.processes)
        self.schedule = config.make_schedule()
        self.objective: Objective = Denoising(config, self.schedule, self.device)
        self.batches = Batches(config, dataset, self.processes)
        self.preview = Preview(
            config, self.state.plain, self.device, dataset.sample_shape, self.num_classes
        )
        precision = self.state.precision
        self.autocast = torch.autocast(
            self.device.type, precision, enabled=precision != torch.float32
        )
        self._trained: Trained | None = None

    def prepare(self) -> Trained:
        """Return the network as it is trained; the first call wraps, compiles and settles it.

        `train_step` calls this, after its images are drawn: that starts the workers, which are
        forked and must not inherit the threads of a backward pass.
        """
        if self._trained is None:
            wrapped = self.processes.wrapped(self.state.network)
            compiled = torch.compile(wrapped) if self.config.compile else wrapped
            if self.processes.count > 1 and not self.processes.sharding:
                self._settle(wrapped)
            self._trained = Trained(cast("nn.Module", compiled), self.autocast, self.state.layout)
        return self._trained

    def _settle(self, wrapped: nn.Module) -> None:
        """Have DDP lay its buckets out, by one backward pass before the first step.

        DDP changes their layout after its first backward pass, and sums depend on the layout in
        their last bits. With this pass, a resumed run has the layout of an uninterrupted one.
        """
        x = torch.zeros((1, *self.dataset.sample_shape), device=self.device)
        label = torch.zeros(1, dtype=torch.int64, device=self.device)
        time = torch.as_tensor(self.schedule.time[:1].copy(), dtype=torch.float32)
        with self.autocast:
            F = wrapped(x, time.to(self.device), label)
        F.float().sum().backward()
        self.state.optimizer.zero_grad(set_to_none=True)

    def draw(self, step: int) -> Draws:
        """Return this process's share of what a step is trained on, on its device.

        Labels and noise levels are drawn for the whole batch from (seed, step). The noise of an
        image is drawn from (seed, its place among all). So the draws do not depend on the number of
        processes.
        """
        c = self.config
        mine = share_of(c, self.processes)
        batch = self.batches.take(step)
        self.state.bad.update(batch.bad)
        # The order of these three draws decides their values.
        generator = STEP.generator(c.seed, step)
        dropped = torch.rand(c.batch, generator=generator)[mine] < c.label_dropout
        t = self.objective.draw_times(generator)[mine]
        mirrored = (torch.rand(c.batch, generator=generator) < 0.5)[mine]
        x0 = batch.images.to(self.device, non_blocking=True).float().div_(127.5).sub_(1)
        if c.flips:
            x0 = torch.where(mirrored.to(self.device)[:, None, None, None], x0.flip(3), x0)
        label = torch.where(dropped, self.num_classes, batch.labels)
        eps = self._noise(step * c.batch + mine.start, x0)
        return Draws(x0, label.to(self.device), t.to(self.device), eps)

    def _noise(self, first: int, x0: Tensor) -> Tensor:
        """Return standard normal noise like x0, whose first image has the place `first`."""
        eps = torch.empty_like(x0)
        # Image by image: a share of the batch then has the same noise as in the whole batch.
        generator = torch.Generator(self.device)
        for i in range(len(x0)):
            NOISE.reset(generator, self.config.seed, first + i)
            eps[i].normal_(generator=generator)
        return eps

    def train_step(self) -> dict[str, float]:
        """Take one optimizer step.

        Returns:
            loss, grad_norm (before clipping) and learning_rate, the same in every process.

        Raises:
            TrainingError: The loss or its gradient is not finite. The weights are as before.
        """
        c = self.config
        state = self.state
        draws = self.draw(state.step)
        mean, sums = self._backward(draws, self.prepare())
        # Before clipping, which compares the norm with a bound that does not know the scale.
        state.scaler.unscale_(state.optimizer)
        grad_norm = nn.utils.clip_grad_norm_(state.weights.values(), c.gradient_clip)
        row = {
            "loss": self._reduced(mean, sums),
            "grad_norm": whole(grad_norm).item(),
            "learning_rate": learning_rate(c, state.step),
        }
        # Here, while the weights and averages are still those of the step before.
        self._require_finite(row["loss"], row["grad_norm"])
        for group in state.optimizer.param_groups:
            group["lr"] = row["learning_rate"]
        state.scaler.step(state.optimizer)
        state.scaler.update()
        state.optimizer.zero_grad(set_to_none=True)
        state.averages.update(state.weights, state.step)
        state.step += 1
        return row

    def _backward(self, draws: Draws, trained: Trained) -> tuple[Tensor, Tensor]:
        """Add up the gradients of all parts of the step.

        Returns:
            The mean weighted loss of this process, and its losses by stretch, see `buckets`.
        """
        c = self.config
        networks = Networks(student=trained)
        mean = torch.zeros((), device=self.device)
        sums = torch.zeros(2, BUCKETS, dtype=torch.float64)
        for i in range(c.accumulate):
            part = draws.part(i, c.accumulate)
            # Dropout draws from the global generator. Without dropout nothing does.
            if c.dropout:
                counter = dropout_counter(self.state.step, i, c.accumulate, self.processes.index)
                DROPOUT.reset_global(c.seed, counter)
            last = i + 1 == c.accumulate
            with self.processes.alone(trained.module, last):
                losses = self.objective.losses(networks, part)
                loss = (losses * self.objective.weights(part.t)).mean() / c.accumulate
                self.state.scaler.scale(loss).backward()
            mean += loss.detach()
            sums += buckets(part.t, losses, c.T)
        return mean, sums

    def _reduced(self, mean: Tensor, sums: Tensor) -> float:
        """Return the loss over all processes, and count the losses by stretch in the state."""
        mine = mean.double().cpu().reshape(1) / self.processes.count
        # One message for both: each has to wait for all processes.
        total = self.processes.sum(torch.cat([mine, sums.reshape(-1)]))
        self.state.bucket_losses += total[1:].reshape(2, BUCKETS)
        return total[0].item()

    def _require_finite(self, loss: float, grad_norm: float) -> None:
        scaler = self.state.scaler
        # fp16 finds its loss scale by overflowing: the scaler skips such a step and halves the
        # scale.
        skipped = scaler.is_enabled() and scaler.get_scale() > SMALLEST_LOSS_SCALE
        if math.isfinite(loss) and (math.isfinite(grad_norm) or skipped):
            return
        self.state.optimizer.zero_grad(set_to_none=True)
        c = self.config
        raise TrainingError(
            f"step {self.state.step}: the loss is {loss} and its gradient {grad_norm}, not finite. "
            f"No checkpoint holds it. Lower --learning-rate (now {c.learning_rate:g}) "
            f"or --gradient-clip (now {c.gradient_clip:g}) under another --name, or look at the "
            f"data."
        )

    def sample(
        self,
        count: int,
        steps: int = 0,
        seed: int = 0,
        solver: str = "",
        label: NDArray[np.int64] | None = None,
        weights: Tensors | None = None,
    ) -> NDArray[np.uint8]:
        """Return samples [count, H, W, C]; see `Preview.sample`. weights: by default the state's
        `ema`, which must not be split."""
        return self.preview.sample(count, weights or self.state.ema, seed, label, solver, steps)


def require_shares(config: Config, processes: Processes) -> None:
    """Check that these processes can train this config together.

    Raises:
        TrainingError: The batch does not divide among them, or --compile meets FSDP.
    """
    share, odd = divmod(config.batch, processes.count * config.accumulate)
    if odd or not share:
        parts = f" in {config.accumulate} parts each" if config.accumulate > 1 else ""
        raise TrainingError(
            f"a batch of {config.batch} does not divide among {processes.count} processes{parts}: "
            f"choose another --batch."
        )
    if config.compile and processes.sharding:
        raise TrainingError(
            "--compile fails with FSDP in this version of PyTorch: leave one of them out."
        )
