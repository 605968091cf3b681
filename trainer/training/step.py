"""One optimizer step: what it is trained on, its loss and its gradient."""

from __future__ import annotations

import math
from pathlib import Path
from typing import cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from runtime.diffusion.schedule import Schedule

from ..config import Config
from ..data.dataset import Dataset
from ..data.tasks import task_of
from ..errors import TrainingError
from ..objectives.denoising import Denoising
from ..objectives.distillation import Consistency, Endpoint
from ..objectives.objective import Draws, Networks, Objective
from ..parallel.processes import Processes, join
from ..parallel.sharding import whole
from ..randomness import DROPOUT, dropout_counter
from ..runs.checkpoint import Tensors
from ..runs.log import BUCKETS
from .called import Called
from .draws import NoisedImages, Source, TeacherPaths
from .preview import Preview
from .state import TrainingState, buckets
from .teacher import Teacher
from .trajectories import Trajectories

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


class Trainer:
    """Takes the steps of a run, each a function of (seed, step) and the state before it.

    Attributes:
        state: What a checkpoint holds.
        objective: What is learned.
        teacher: What is distilled, see `learn_from`; None if nothing is.
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
        self.task = task_of(config, dataset) if config.conditioned else None
        self.conditions = self.task.conditions if self.task else ()
        self.state = TrainingState(
            config, dataset.sample_shape, self.num_classes, self.processes, self.conditions
        )
        self.schedule = config.make_schedule()
        self.objective = make_objective(config, self.schedule, self.device)
        self.teacher: Teacher | None = None
        self._source: Source | None = None
        self.preview = Preview(
            config,
            self.state.plain,
            self.device,
            dataset.sample_shape,
            self.num_classes,
            self.task,
        )
        precision = self.state.precision
        self.autocast = torch.autocast(
            self.device.type, precision, enabled=precision != torch.float32
        )
        self._networks: Networks | None = None

    @property
    def source(self) -> Source:
        """What steps are trained on; it is opened when it is first asked for."""
        if self._source is None:
            self._source = NoisedImages(
                self.config, self.dataset, self.processes, self.objective, self.task
            )
        return self._source

    def learn_from(self, teacher: Teacher, folder: Path) -> None:
        """Distil a teacher. Its paths, if the objective learns from these, are kept in a folder."""
        self.teacher = teacher
        assert self.config.distillation is not None
        if self.config.distillation.paths:
            paths = Trajectories(self.config, self.dataset, teacher, folder, self.task)
            self._source = TeacherPaths(self.config, self.processes, self.objective, paths)

    def draw(self, step: int) -> Draws:
        """Return this process's share of what a step is trained on, on its device."""
        draws = self.source.draw(step)
        self.state.bad |= self.source.bad
        return draws

    def prepare(self) -> Networks:
        """Return the networks as objectives call them; the first call wraps, compiles and settles.

        `train_step` calls this, after its images are drawn: that starts the workers, which are
        forked and must not inherit the threads of a backward pass.
        """
        if self._networks is None:
            wrapped = self.processes.wrapped(self.state.network)
            compiled = torch.compile(wrapped) if self.config.compile else wrapped
            if self.processes.count > 1 and not self.processes.sharding:
                self._settle(wrapped)

            def called(module: nn.Module, weights: Tensors | None = None) -> Called:
                return Called(module, self.autocast, self.state.layout, weights)

            state = self.state
            self._module = cast("nn.Module", compiled)
            learned = self.teacher
            teacher = called(learned.module) if learned else None
            self._networks = Networks(
                student=called(self._module),
                averages={name: called(state.plain, of) for name, of in state.averages.of.items()},
                teacher=learned.guided(teacher) if learned and teacher else None,
                features=teacher.features if teacher else None,
            )
        return self._networks

    def _settle(self, wrapped: nn.Module) -> None:
        """Have DDP lay its buckets out, by one backward pass before the first step.

        DDP changes their layout after its first backward pass, and sums depend on the layout in
        their last bits. With this pass, a resumed run has the layout of an uninterrupted one.
        """
        x = torch.zeros((1, *self.dataset.sample_shape), device=self.device)
        label = torch.zeros(1, dtype=torch.int64, device=self.device)
        time = torch.as_tensor(self.schedule.time[:1].copy(), dtype=torch.float32)
        with self.autocast:
            # DDP lays out only what takes part in the pass, so the conditions do.
            given = {c.name: torch.zeros(1, *c.shape, device=self.device) for c in self.conditions}
            F = wrapped(x, time.to(self.device), label, **given)
        F.float().sum().backward()
        self.state.optimizer.zero_grad(set_to_none=True)

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

    def _backward(self, draws: Draws, networks: Networks) -> tuple[Tensor, Tensor]:
        """Add up the gradients of all parts of the step.

        Returns:
            The mean weighted loss of this process, and its losses by stretch, see `buckets`.
        """
        c = self.config
        mean = torch.zeros((), device=self.device)
        sums = torch.zeros(2, BUCKETS, dtype=torch.float64)
        for i in range(c.accumulate):
            part = draws.part(i, c.accumulate)
            # Dropout draws from the global generator. Without dropout nothing does.
            if c.dropout:
                counter = dropout_counter(self.state.step, i, c.accumulate, self.processes.index)
                DROPOUT.reset_global(c.seed, counter)
            last = i + 1 == c.accumulate
            with self.processes.alone(self._module, last):
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


def make_objective(config: Config, schedule: Schedule, device: torch.device) -> Objective:
    """Return what a config's run learns."""
    if config.distillation is None:
        return Denoising(config, schedule, device)
    if config.distillation.method == "consistency":
        return Consistency(config, schedule, device)
    return Endpoint(config, schedule, device)


def require_shares(config: Config, processes: Processes) -> None:
    """Check that these processes can train this config together.

    Raises:
        TrainingError: The batch does not divide among them, or --compile or consistency
            distillation meets FSDP.
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
    if config.distillation and config.distillation.method == "consistency" and processes.sharding:
        raise TrainingError(
            "the method consistency calls the network with averaged weights, which FSDP splits: "
            "use --method endpoint, or launch without FSDP."
        )
