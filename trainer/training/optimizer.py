"""The state of an optimizer by the names of its weights, as a checkpoint holds it."""

from __future__ import annotations

import torch

from ..parallel.sharding import as_held
from ..runs.checkpoint import Tensors


def optimizer_tensors(optimizer: torch.optim.Optimizer, names: list[str]) -> Tensors:
    """Return the optimizer's state by "NAME:KEY". names: of its parameters, in their order."""
    state = optimizer.state_dict()["state"]
    return {
        f"{names[i]}:{key}": value for i, entry in state.items() for key, value in entry.items()
    }


def restore_optimizer(optimizer: torch.optim.Optimizer, names: list[str], tensors: Tensors) -> None:
    """Load what `optimizer_tensors` returned. Hyperparameters stay as they are.

    Raises:
        KeyError, ValueError, RuntimeError: The tensors are those of another network.
    """
    index = {name: i for i, name in enumerate(names)}
    state = {}
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for name, value in tensors.items():
        parameter, key = name.rsplit(":", 1)
        of = parameters[index[parameter]]
        # A fused optimizer expects all that belongs to a parameter to have the same layout in
        # memory.
        if value.shape == of.shape:
            value = torch.empty_like(of, requires_grad=False).copy_(as_held(value, of))
        state.setdefault(index[parameter], {})[key] = value
    optimizer.load_state_dict(
        {"state": state, "param_groups": optimizer.state_dict()["param_groups"]}
    )
