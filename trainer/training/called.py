"""A network as objectives call it: in the run's precision and layout, with any weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from ..networks.dit import DiT
from ..networks.unet import UNet
from ..runs.checkpoint import Tensors


@dataclass(frozen=True)
class Called:
    """A network as an objective calls it (a `Network`).

    Attributes:
        module: The one in training is compiled, if that was asked for, and averages its gradients
            over the processes.
        autocast: Has the module compute in the run's precision.
        layout: How the memory of its input is laid out.
        weights: Other weights than the module's own, by name.
    """

    module: nn.Module
    autocast: torch.autocast
    layout: torch.memory_format
    weights: Tensors | None = None

    def __call__(self, x: Tensor, time: Tensor, label: Tensor, **given: Tensor) -> Tensor:
        """Return F(x [b, C, H, W], time [b], label [b], **conditions), [b, C, H, W] float32."""
        inputs = (x.contiguous(memory_format=self.layout), time, label)
        with self.autocast:
            if self.weights is None:
                return self.module(*inputs, **given).float()
            called = torch.func.functional_call(self.module, self.weights, inputs, given)
            return called.float()

    def features(self, x: Tensor, time: Tensor, label: Tensor, **given: Tensor) -> list[Tensor]:
        """Return what the module computes on the way to F, each [b, …] float32."""
        module = cast("UNet | DiT", self.module)
        with self.autocast:
            found = module.features(x.contiguous(memory_format=self.layout), time, label, **given)
        return [entry.float() for entry in found]
