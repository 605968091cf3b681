"""Who this process is among those that train one run together, started by `accelerate launch` or
`torchrun`."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import IO, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from runtime.errors import RequestError

from . import sharding
from .errors import TrainingError

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
"""What the libraries say, in one word or another, when a process at the other end is gone."""
PATIENCE = timedelta(hours=6)
"""The first process measures samples alone, and the others wait for it; one that is gone is noticed
by its connection, not by this."""
COUNTS = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
"""Where a launcher says how many processes it started: torch's; and the mpirun of Intel, Open MPI
and MVAPICH, which accelerate uses on CPUs."""


@dataclass(frozen=True)
class Processes:
    """index of count. device: where this one computes. sharding: accelerate's plugin, where the
    parameters are split among them (FSDP)."""

    index: int
    count: int
    device: torch.device
    sharding: Any = None

    @property
    def main(self) -> bool:
        """Whether this is the one that writes and prints."""
        return self.index == 0

    def sum(self, values: Tensor) -> Tensor:
        """[...] float64 on the CPU, added up over all processes; the same bits in each."""
        if self.count == 1:
            return values
        there = values.to(self.device)
        dist.all_reduce(there)
        return there.cpu()

    def any(self, value: bool) -> bool:
        """Whether it is true in one of them."""
        return (
            value
            if self.count == 1
            else bool(self.sum(torch.tensor([float(value)], dtype=torch.float64)) > 0)
        )

    def gather(self, value: Any) -> list[Any]:
        """`value` of every process, by index."""
        if self.count == 1:
            return [value]
        found: list[Any] = [None] * self.count
        dist.all_gather_object(found, value)
        return found

    def wait(self) -> None:
        """Until all are here."""
        if self.count > 1:
            self.sum(torch.zeros(1, dtype=torch.float64))

    def wrapped(self, network: nn.Module) -> nn.Module:
        """The network with its gradients averaged over the processes; one that is split does so
        itself."""
        if self.count == 1 or self.sharding:
            return network
        from torch.nn.parallel import DistributedDataParallel

        devices = [self.device.index] if self.device.type == "cuda" else None
        return DistributedDataParallel(
            network, devices, forward_sync_buffers=False, gradient_as_bucket_view=True
        )

    def alone(self, network: nn.Module, last: bool) -> Any:
        """A context in which gradients are kept back, for all parts of a step but the last; where
        they are split, none are: each part's sum is."""
        return nullcontext() if self.count == 1 or self.sharding or last else network.no_sync()  # pyright: ignore[reportCallIssue]

    @contextmanager
    def together(self) -> Iterator[None]:
        """Turn what a library raises when another process has gone into a TrainingError that says
        so."""
        try:
            yield
        except RuntimeError as error:
            if self.count == 1 or not any(word in str(error) for word in LOST):
                raise
            raise TrainingError(
                f"process {self.index} of {self.count} ends: another process of this run is gone "
                f"({_told(error)}). "
                "Its own message says why, if it could leave one. The same command again goes on "
                "from the last checkpoint."
            ) from error


def _told(error: BaseException) -> str:
    return " ".join(str(error).split())[:300]


def join(device: str) -> Processes:
    """The processes that this one was started with; alone where it was not started by a launcher.

    device: auto, cpu or cuda. Raises RequestError for what a launcher asks and is not supported, or
    a GPU that is not there; and where the processes that it started do not find each other.
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
        count = next((int(os.environ[name]) for name in COUNTS if name in os.environ), 1)
        if count == 1:
            return Processes(0, 1, torch.device("cuda" if cuda else "cpu"))
        from accelerate import PartialState
    except ImportError as error:
        raise RequestError(
            "training in many processes needs accelerate: pip install 'unnoise[train]'."
        ) from error
    here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if cuda and here > torch.cuda.device_count():
        raise RequestError(
            f"{here} processes on a machine with {torch.cuda.device_count()} GPUs: start one for "
            f"each."
        )
    try:
        state: Any = PartialState(cpu=not cuda, timeout=PATIENCE)
    except (ValueError, RuntimeError) as error:
        raise RequestError(
            f"one of {count} processes that do not find each other: {_told(error)}"
        ) from error
    if state.num_processes != count:
        raise RequestError(
            f"one of {count} processes that accelerate does not join: start them with accelerate "
            f"launch --multi_gpu, or torchrun."
        )
    return Processes(state.process_index, state.num_processes, state.device, plugin)


def lock(path: Path, wait: bool = False) -> IO[bytes]:
    """A file that this process alone has until it closes it or ends, killed or not. File systems
    without locks, and Windows, let everybody in.

    Raises BlockingIOError where another process has it, unless told to wait.
    """
    file = path.open("ab")
    try:
        import fcntl

        # not flock, which a loader's workers would inherit and outlive this process with
        fcntl.lockf(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except (BlockingIOError, PermissionError) as error:
        file.close()
        raise BlockingIOError(f"another process has {path}") from error
    except (ImportError, OSError):
        pass
    return file


def leave() -> None:
    """End the group of processes, where there is one. For the end of a command."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()
