"""A network whose parameters lie split among the processes (FSDP2), as `accelerate launch
--use_fsdp --fsdp_version 2` asks for it.

Weights, gradients, averages and optimizer state are then DTensors of the same names and shapes, of
which each process holds its rows.
"""

from __future__ import annotations

import copy
import os
from typing import Any

import torch
from torch import Tensor, nn

from runtime.errors import RequestError

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
"""What accelerate's config may say, and what to do where it says something else."""


def asked() -> Any:
    """accelerate's plugin, which reads the environment that its launcher sets, or None where FSDP
    is not asked for. Raises RequestError for what is not supported, and ImportError without
    accelerate."""
    if not flag("ACCELERATE_USE_FSDP"):
        return None
    for name, (values, remedy) in SUPPORTED.items():
        found = os.environ.get(name, "1" if name == "FSDP_VERSION" else "")
        if found.lower() not in values:
            raise RequestError(f"{name} is {found!r}, which is not supported: {remedy}.")
    from accelerate import FullyShardedDataParallelPlugin

    return FullyShardedDataParallelPlugin()


def flag(name: str) -> bool:
    return os.environ.get(name, "").lower() in ("1", "true", "yes")


def split(network: nn.Module, plugin: Any, device: torch.device, count: int) -> None:
    """Split the parameters among `count` processes: a unit for each module that the plugin's policy
    names, and one for what is left.

    TRANSFORMER_BASED_WRAP takes the network's own blocks (`_no_split_modules`) where no class is
    named.
    """
    from accelerate.utils.fsdp_utils import fsdp2_prepare_auto_wrap_policy
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(device.type, (count,))
    policy = fsdp2_prepare_auto_wrap_policy(plugin, network) or (lambda module: False)
    for module in reversed([m for m in network.modules() if m is not network and policy(m)]):
        fully_shard(module, mesh=mesh, reshard_after_forward=plugin.reshard_after_forward)
    fully_shard(network, mesh=mesh)


def hollow(network: nn.Module) -> nn.Module:
    """The same network without the memory of its parameters, to be called with others by
    torch.func.functional_call."""
    found = copy.deepcopy(network)
    for parameter in found.parameters():
        parameter.data = parameter.data.new_empty(0)
    return found


def is_split(tensor: Any) -> bool:
    """Whether it is a DTensor: known by what it can do, since where nothing is split their module
    need not be imported, which takes long."""
    return hasattr(tensor, "full_tensor")


def whole(tensor: Any) -> Tensor:
    """The tensor with the rows of all processes; every process calls this."""
    return tensor.full_tensor() if is_split(tensor) else tensor


def own(tensor: Any) -> Tensor:
    """The rows that this process holds."""
    return tensor.to_local() if is_split(tensor) else tensor


def as_held(tensor: Tensor, of: Any) -> Tensor:
    """A whole tensor, which every process has, split as `of` is."""
    if not is_split(of):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(
        tensor.to(of.device), of.device_mesh, of.placements, src_data_rank=None
    )
