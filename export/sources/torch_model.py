"""A PyTorch module as a `Model`, and as a function of arrays."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from runtime.diffusion.program import Network

from .model import Model


@dataclass(frozen=True, eq=False, kw_only=True)
class TorchModel(Model):
    """A module(x [B, *S], time [B], label [B], **conditions) → F [B, *S] and its description.

    It takes a label only if there are classes.

    Attributes:
        module: In evaluation mode, on the CPU, in float32.
    """

    module: nn.Module

    def reference(self) -> Network:
        """Return the module as a network of `runtime.run`, see `Model.reference`."""
        return torch_network(self.module)


def torch_network(module: nn.Module) -> Network:
    """Return a module as a network of `runtime.run`, which takes and returns arrays."""

    def tensor(array: NDArray[Any]) -> torch.Tensor:
        # Contiguous and writable, as torch takes arrays.
        return torch.from_numpy(np.require(array, requirements=["C", "W"]))

    def network(*inputs: NDArray[Any], **conditions: NDArray[Any]) -> NDArray[np.float32]:
        with torch.inference_mode():
            named = {name: tensor(array) for name, array in conditions.items()}
            return module(*map(tensor, inputs), **named).numpy()

    return network
