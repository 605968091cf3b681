"""The state of a run: what a checkpoint holds, and nothing else.

Weights, averages, the optimizer and the loss scale; the step; and the counters for the log.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from runtime.bundle.conditions import Condition
from runtime.errors import RequestError

from ..config import Config
from ..errors import CheckpointError, TrainingError
from ..networks.cost import make_network
from ..parallel.processes import Processes
from ..parallel.sharding import as_held, hollow, own, split, whole
from ..runs.checkpoint import Checkpoint, Environment, Tensors, environment
from ..runs.log import BUCKETS
from .averages import Averages
from .optimizer import optimizer_tensors, restore_optimizer

BETAS = (0.9, 0.99)
"""AdamW's decay rates of the first and the second moment."""

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def precision_of(config: Config, device: torch.device) -> torch.dtype:
    """Return what the network computes in. `auto` is bf16 on a GPU that has it, else float32.

    Raises:
        RequestError: fp16 on a CPU.
    """
    if config.precision == "fp16" and device.type == "cpu":
        raise RequestError(
            "fp16 trains on a GPU alone, and there is none here: use --precision bf16 or fp32."
        )
    if config.precision != "auto":
        return PRECISIONS[config.precision]
    has_bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.bfloat16 if has_bf16 else torch.float32


@torch.no_grad()
def copy_into(held: Mapping[str, Tensor], tensors: Tensors) -> None:
    """Copy whole tensors into those of the same name and shape.

    Of a tensor in `held`, this process may have some rows only.
    """
    for name, tensor in tensors.items():
        held[name].copy_(as_held(tensor, held[name]))


def buckets(t: Tensor, losses: Tensor, T: int) -> Tensor:
    """Add up losses by stretch of the schedule.

    Args:
        t: Noise levels, [b] int64, 0 … T - 1.
        losses: [b].

    Returns:
        [2, BUCKETS] float64 on the CPU: the sum of the losses, and their number.
    """
    stretch = (t * BUCKETS // T).cpu()
    sums = torch.zeros(2, BUCKETS, dtype=torch.float64)
    sums[0].index_add_(0, stretch, losses.detach().double().cpu())
    sums[1].index_add_(0, stretch, torch.ones(len(stretch), dtype=torch.float64))
    return sums


class TrainingState:
    """What changes while a run trains.

    Attributes:
        network: The network in training. With FSDP its weights are split among the processes.
        plain: The network that samples; its weights are passed with each call.
        weights: The weights by name.
        averages: Moving averages of the weights.
        optimizer: AdamW over the weights.
        scaler: Scales the loss for fp16; without effect otherwise.
        step: Optimizer steps so far.
        seconds: Time spent in these steps.
        bad: Indices of images that this process could not read.
        bucket_losses: [2, BUCKETS] float64, see `buckets`; since `take_bucket_losses`.
    """

    def __init__(
        self,
        config: Config,
        sample_shape: tuple[int, int, int],
        num_classes: int,
        processes: Processes,
        conditions: Sequence[Condition] = (),
    ) -> None:
        self.config = config
        self.processes = processes
        device = processes.device
        self.precision = precision_of(config, device)
        self.scaler = torch.amp.GradScaler(  # pyright: ignore[reportPrivateImportUsage]
            device.type, enabled=self.precision == torch.float16
        )
        self.layout = torch.channels_last if config.channels_last else torch.contiguous_format
        self.network = make_network(config, sample_shape, num_classes, conditions)
        self.network.to(device)
        # The same network, unless its weights are split: FSDP's cannot be called with others.
        self.plain = self.network
        if processes.sharding:
            # FSDP splits weights by rows, and takes only those whose memory is in their own order:
            # no channels last here.
            self.plain = hollow(self.network)
            split(self.network, processes.sharding, device, processes.count)
        else:
            self.network.to(memory_format=self.layout)  # pyright: ignore[reportCallIssue]
        self.weights = dict(self.network.named_parameters())
        self.averages = Averages(config, self.weights)
        self.optimizer = torch.optim.AdamW(
            self.network.parameters(),
            config.learning_rate,
            BETAS,
            weight_decay=config.weight_decay,
            fused=True,
        )
        self.step = 0
        self.seconds = 0.0
        self.bad: set[int] = set()
        self.bucket_losses = torch.zeros(2, BUCKETS, dtype=torch.float64)

    @property
    def ema(self) -> Tensors:
        """The average that is sampled and exported."""
        return self.averages.of["ema"]

    def environment(self) -> Environment:
        """Return what decides the last bit of a step besides the config."""
        return environment(
            self.processes.device, self.processes.count, bool(self.processes.sharding)
        )

    def whole(self, tensors: Tensors) -> Tensors:
        """Return tensors with the rows that other processes hold, in the first process.

        The other processes get {}, if weights are split; every process must call this.
        """
        if not self.processes.sharding:
            return tensors
        gathered = {}
        # Gathering waits for all processes, so all need one order. Checkpoints have any order.
        for name, tensor in sorted(tensors.items()):
            full = whole(tensor)
            if self.processes.main:
                gathered[name] = full.cpu()
        return gathered

    def all_bad(self) -> set[int]:
        """Return the indices of images that could not be read, in any process."""
        return set().union(*self.processes.gather(self.bad))

    def take_bucket_losses(self) -> list[float]:
        """Return the mean loss in each stretch of noise levels since the last call.

        It is NaN where no level was drawn.
        """
        total, count = self.bucket_losses
        # A new tensor, and not zeros in place: `total` and `count` are views of the old one.
        self.bucket_losses = torch.zeros_like(self.bucket_losses)
        return (total / count).tolist()

    def start_from(self, tensors: Tensors) -> None:
        """Begin with these weights, and every average with them. Others stay as they are."""
        for held in (self.weights, *self.averages.of.values()):
            copy_into(held, tensors)

    def to_checkpoint(self) -> Checkpoint:
        """Return what `resume` needs.

        Every process must call this. If weights are split, only the first process gets tensors.

        Raises:
            TrainingError: A weight is not finite. Such a run can only resume from an earlier step.
        """
        self._require_finite_weights()
        # "ema" has a file of its own, which the exporter reads.
        more = {name: held for name, held in self.averages.of.items() if name != "ema"}
        state: dict[str, object] = {
            "bad": sorted(self.all_bad()),
            "buckets": self.bucket_losses.tolist(),
        }
        if self.scaler.is_enabled():
            state["scaler"] = self.scaler.state_dict()
        return Checkpoint(
            step=self.step,
            seconds=self.seconds,
            weights=self.whole({name: w.detach() for name, w in self.weights.items()}),
            ema=self.whole(self.ema),
            optimizer=self.whole(optimizer_tensors(self.optimizer, list(self.weights))),
            environment=self.environment(),
            more={name: self.whole(held) for name, held in more.items()},
            state=state,
        )

    def _require_finite_weights(self) -> None:
        finite = ((name, torch.isfinite(own(w)).all()) for name, w in self.weights.items())
        bad = next((name for name, is_finite in finite if not is_finite), None)
        # Each process looks at the rows that it holds; all of them must raise, or none.
        for name in filter(None, self.processes.gather(bad)):
            raise TrainingError(
                f"step {self.step}: {name} is not finite, so no checkpoint is written. "
                f"Lower --learning-rate (now {self.config.learning_rate:g}) under another --name, "
                f"or look at the data."
            )

    def resume(self, checkpoint: Checkpoint) -> None:
        """Take over a checkpoint.

        Raises:
            CheckpointError: Its tensors are not those of this network.
        """
        self._resume_weights(checkpoint)
        try:
            restore_optimizer(self.optimizer, list(self.weights), checkpoint.optimizer)
        except (KeyError, ValueError, RuntimeError) as error:
            raise CheckpointError(
                f"the checkpoint's optimizer state is not that of this config's network ({error})."
            ) from error
        self.step = checkpoint.step
        self.seconds = checkpoint.seconds
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

    def _resume_weights(self, checkpoint: Checkpoint) -> None:
        stored = {"ema": checkpoint.ema, **checkpoint.more}
        # An average that the checkpoint lacks has no weights, which is refused like other shapes.
        pairs = [(self.weights, checkpoint.weights)]
        pairs += [(held, stored.get(name, {})) for name, held in self.averages.of.items()]
        for held, tensors in pairs:
            if {n: w.shape for n, w in held.items()} != {n: w.shape for n, w in tensors.items()}:
                raise CheckpointError(
                    "the checkpoint's weights are not those of this config's network."
                )
            copy_into(held, tensors)
