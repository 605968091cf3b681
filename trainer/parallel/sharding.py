"""A network whose weights are split among the processes (FSDP2), as `accelerate launch --use_fsdp
--fsdp_version 2` asks for it.

Weights, gradients, averages and optimizer state are then DTensors of the same names and shapes, of
which each process holds its rows.
"""

from __future__ import annotations

import copy
import os
from typing import TYPE_CHECKING, Protocol, TypeGuard

import torch
from torch import Tensor, nn

from runtime.errors import RequestError

if TYPE_CHECKING:  # importing it takes long, and few runs are split
    from torch.distributed.tensor import DTensor


class Plugin(Protocol):
    """The part of accelerate's FullyShardedDataParallelPlugin that is used here."""

    reshard_after_forward: bool


OFF = ("", "0", "false", "no")
SUPPORTED = {
    "FSDP_VERSION": (
        ("2",),
        "launch with --fsdp_version 2, or fsdp_version: 2 in accelerate's config",
    ),
    "FSDP_AUTO_WRAP_POLICY": (
        ("", "no_wrap", "transformer_based_wrap"),
        "TRANSFORMER_BASED_WRAP takes the network's own blocks",
    ),
    "FSDP_OFFLOAD_PARAMS": (
        OFF,
        "parameters stay on their device: leave --fsdp_offload_params out",
    ),
    "FSDP_ACTIVATION_CHECKPOINTING": (
        OFF,
        "trainer.fit's own --checkpointing computes activations again",
    ),
    "FSDP_IGNORED_MODULES": (OFF, "every parameter is split: leave --fsdp_ignored_modules out"),
    "ACCELERATE_USE_PARALLELISM_CONFIG": (
        OFF,
        "all processes are one group: leave --use_parallelism_config out",
    ),
}
"""Variables that accelerate's launcher sets: the values that are supported, and the remedy."""


def asked() -> Plugin | None:
    """Return accelerate's plugin, which reads its launcher's environment; None without FSDP.

    Raises:
        RequestError: The launcher requests an unsupported setting.
        ImportError: accelerate is not installed.
    """
    if not flag("ACCELERATE_USE_FSDP"):
        return None
    for name, (values, remedy) in SUPPORTED.items():
        # Without a version accelerate means version 1, which is not supported either.
        value = os.environ.get(name, "1" if name == "FSDP_VERSION" else "")
        if value.lower() not in values:
            raise RequestError(f"{name} is {value!r}, which is not supported: {remedy}.")
    from accelerate import FullyShardedDataParallelPlugin

    return FullyShardedDataParallelPlugin()  # pyright: ignore[reportReturnType]


def flag(name: str) -> bool:
    """Return whether an environment variable is set to a word for yes."""
    return os.environ.get(name, "").lower() in ("1", "true", "yes")


def split(network: nn.Module, plugin: Plugin, device: torch.device, count: int) -> None:
    """Split the weights among `count` processes, in place.

    Each module that the plugin's policy names is a unit, and the rest is one. If the plugin names
    no class, TRANSFORMER_BASED_WRAP takes the network's own blocks (`_no_split_modules`).
    """
    from accelerate.utils.fsdp_utils import fsdp2_prepare_auto_wrap_policy
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(device.type, (count,))
    policy = fsdp2_prepare_auto_wrap_policy(plugin, network) or (lambda module: False)
    units = [m for m in network.modules() if m is not network and policy(m)]
    # Inner modules first: a unit takes the weights that no unit inside it has taken.
    for module in reversed(units):
        fully_shard(module, mesh=mesh, reshard_after_forward=plugin.reshard_after_forward)
    fully_shard(network, mesh=mesh)


def hollow(network: nn.Module) -> nn.Module:
    """Return the same network without the memory of its weights.

    torch.func.functional_call calls it with others.
    """
    found = copy.deepcopy(network)
    for parameter in found.parameters():
        parameter.data = parameter.data.new_empty(0)
    return found


def is_split(tensor: Tensor) -> TypeGuard[DTensor]:
    """Return whether a tensor of any shape is a DTensor.

    The check looks for a method, because importing the class takes long.
    """
    return hasattr(tensor, "full_tensor")


def whole(tensor: Tensor) -> Tensor:
    """Return the tensor [n, …] with the rows of all processes. Every process must call this."""
    return tensor.full_tensor() if is_split(tensor) else tensor


def own(tensor: Tensor) -> Tensor:
    """Return the rows of a tensor [n, …] that this process holds, [m, …] with m ≤ n."""
    return tensor.to_local() if is_split(tensor) else tensor


def as_held(tensor: Tensor, of: Tensor) -> Tensor:
    """Return a whole tensor, which every process has, split as `of` is. Both have one shape."""
    if not is_split(of):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    # No source rank: each process takes its rows from its own copy, and nothing is sent.
    return distribute_tensor(
        tensor.to(of.device), of.device_mesh, of.placements, src_data_rank=None
    )
