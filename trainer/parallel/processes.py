"""The processes that train one run together, started by `accelerate launch` or `torchrun`."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from runtime.errors import RequestError

from ..errors import TrainingError
from . import sharding

T = TypeVar("T")

LOST = (
    "Connection",
    "connection",
    "Broken pipe",
    "peer",
    "remote process",
    "Gloo",
    "gloo",
    "timed out",
    "Timed out",
    "socket",
)
"""Parts of what the libraries say when the process at the other end is gone."""
PATIENCE = timedelta(hours=6)
"""How long a process waits for another: the first one measures samples alone, which may take hours.
A process that is gone is noticed by its connection, not by this."""
COUNTS = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
"""Variables in which a launcher says how many processes it started: torch's, and those of mpirun by
Intel, Open MPI and MVAPICH, which accelerate uses on CPUs."""


@dataclass(frozen=True)
class Processes:
    """The processes that train one run together, seen from one of them.

    Attributes:
        index: Which one this is.
        count: How many there are.
        device: The device of this process.
        sharding: accelerate's plugin if weights are split among them (FSDP).
    """

    index: int
    count: int
    device: torch.device
    sharding: sharding.Plugin | None = None

    @property
    def main(self) -> bool:
        """Whether this is the one that writes and prints."""
        return self.index == 0

    def sum(self, values: Tensor) -> Tensor:
        """Add up values over all processes, with the same bits in each.

        Args:
            values: Of any shape, float64 on the CPU.
        """
        if self.count == 1:
            return values
        # NCCL adds tensors of the device alone.
        there = values.to(self.device)
        dist.all_reduce(there)
        return there.cpu()

    def any(self, value: bool) -> bool:
        """Return whether it is true in one of them."""
        if self.count == 1:
            return value
        return bool(self.sum(torch.tensor([float(value)], dtype=torch.float64)) > 0)

    def gather(self, value: T) -> list[T]:
        """Return the value of every process, by index."""
        if self.count == 1:
            return [value]
        gathered: list[T] = [value] * self.count
        dist.all_gather_object(gathered, value)
        return gathered

    def wait(self) -> None:
        """Wait until all processes are here."""
        if self.count > 1:
            self.sum(torch.zeros(1, dtype=torch.float64))

    def wrapped(self, network: nn.Module) -> nn.Module:
        """Return the network with its gradients averaged over the processes.

        A network that is split averages them itself.
        """
        if self.count == 1 or self.sharding:
            return network
        from torch.nn.parallel import DistributedDataParallel

        devices = [self.device.index] if self.device.type == "cuda" else None
        return DistributedDataParallel(
            network, devices, forward_sync_buffers=False, gradient_as_bucket_view=True
        )

    def alone(self, network: nn.Module, last: bool) -> AbstractContextManager[None]:
        """Return a context in which gradients are not averaged yet: for all parts of a step but the
        last.

        Split gradients are averaged in each part, since no process has memory for all of them.
        """
        if self.count == 1 or self.sharding or last:
            return nullcontext()
        paused = network.no_sync()  # pyright: ignore[reportCallIssue]
        return cast("AbstractContextManager[None]", paused)

    @contextmanager
    def together(self) -> Iterator[None]:
        """Turn a library's error about a lost process into a TrainingError that says so."""
        try:
            yield
        except RuntimeError as error:
            if self.count == 1 or not any(word in str(error) for word in LOST):
                raise
            raise TrainingError(
                f"process {self.index} of {self.count} ends: another process of this run is gone "
                f"({_told(error)}). "
                "Its own message says why, if it could leave one. "
                "Re-run the same command to resume from the last checkpoint."
            ) from error


def _told(error: BaseException) -> str:
    return " ".join(str(error).split())[:300]


def join(device: str) -> Processes:
    """Return the processes that this one was started with: itself alone without a launcher.

    Args:
        device: auto, cpu or cuda.

    Raises:
        RequestError: There is no such GPU, the launcher requests an unsupported setting, or its
            processes do not find each other.
    """
    cuda = device == "cuda" or (
        device == "auto" and torch.cuda.is_available() and not sharding.flag("ACCELERATE_USE_CPU")
    )
    if cuda and not torch.cuda.is_available():
        raise RequestError(
            "--device cuda: PyTorch sees no GPU here. Use --device cpu, or install PyTorch for "
            "this GPU."
        )
    if sharding.flag("ACCELERATE_USE_DEEPSPEED"):
        raise RequestError(
            "DeepSpeed is not supported. Launch without it; --use_fsdp --fsdp_version 2 saves as "
            "much memory."
        )
    try:
        plugin = sharding.asked()
        count = next(filter(None, map(_number_in, COUNTS)), 1)
        if count == 1:
            return Processes(0, 1, torch.device("cuda" if cuda else "cpu"))
        from accelerate import PartialState
    except ImportError as error:
        raise RequestError(
            "training in many processes needs accelerate: pip install 'unnoise[train]'."
        ) from error
    here = _number_in("LOCAL_WORLD_SIZE")
    if cuda and here > torch.cuda.device_count():
        raise RequestError(
            f"{here} processes on a machine with {torch.cuda.device_count()} GPUs: start one for "
            f"each."
        )
    try:
        state = PartialState(cpu=not cuda, timeout=PATIENCE)
    except (ValueError, RuntimeError) as error:
        raise RequestError(
            f"one of {count} processes that do not find each other: {_told(error)}"
        ) from error
    if state.num_processes != count:
        raise RequestError(
            f"one of {count} processes that accelerate does not join: start them with accelerate "
            f"launch --multi_gpu, or torchrun."
        )
    place = cast("torch.device", state.device)
    return Processes(state.process_index, state.num_processes, place, plugin)


def _number_in(variable: str) -> int:
    """Return the number in a launcher's variable, 0 if it is empty or not set.

    Raises:
        RequestError: It holds something else.
    """
    text = os.environ.get(variable, "").strip()
    if text and not re.fullmatch("[0-9]{1,9}", text):
        raise RequestError(
            f"{variable} must be a number of processes, got {text[:80]!r}. Unset it, or start with "
            "accelerate launch or torchrun."
        )
    return int(text or 0)


def leave() -> None:
    """End the group of processes, if there is one, at the end of a command."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()
