"""The network of a config, how large it is, and what it costs."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import nn

from runtime.bundle.conditions import Condition

from ..config import Config
from ..randomness import WEIGHTS
from .dit import DiT
from .unet import UNet


def make_network(
    config: Config,
    sample_shape: tuple[int, int, int],
    num_classes: int,
    conditions: Sequence[Condition] = (),
) -> nn.Module:
    """Return the network of this config. Its first weights are a function of config.seed."""
    WEIGHTS.reset_global(config.seed)
    if config.network == "dit":
        network = DiT(
            sample_shape,
            config.patch,
            config.width,
            config.depth,
            config.heads,
            num_classes,
            conditions,
        )
    else:
        network = UNet(
            sample_shape,
            config.channels,
            config.blocks,
            config.attention,
            num_classes,
            dropout=config.dropout,
            conditions=conditions,
        )
    network.checkpointing = config.checkpointing
    return network


class Cost(NamedTuple):
    """The size of a network.

    Attributes:
        parameters: Their number.
        flops: Floating-point operations of one image's forward pass: a multiplication and an
            addition are two.
    """

    parameters: int
    flops: int


def cost(
    config: Config,
    sample_shape: tuple[int, int, int],
    num_classes: int,
    conditions: Sequence[Condition] = (),
) -> Cost:
    """Return the size of a config's network. Convolutions and products of matrices are counted."""
    from torch.utils.flop_counter import FlopCounterMode

    # On tensors without memory, so that a network that does not fit is counted too.
    with torch.device("meta"):
        network = make_network(config, sample_shape, num_classes, conditions).to("meta").eval()
        given = {c.name: torch.empty(1, *c.shape) for c in conditions}
        inputs = (torch.empty(1, *sample_shape), torch.empty(1), torch.empty(1, dtype=torch.int64))
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        network(*inputs, **given)
    return Cost(sum(w.numel() for w in network.parameters()), counter.get_total_flops())


def peak_flops(device: torch.device, precision: torch.dtype, side: int = 512) -> float:
    """Measure the operations a second of this machine in products of matrices.

    Args:
        side: Of the matrices, on a CPU.
    """
    # A GPU needs larger ones: small products measure how long starting a kernel takes.
    side = 8192 if device.type == "cuda" else side
    a = torch.ones(side, side, dtype=precision, device=device)
    best = 1e-9
    # The best of three: other programs only make it slower.
    for _ in range(3):
        begun = time.perf_counter()
        total = a @ a
        float(total[0, 0])  # waits for the GPU
        best = max(best, 2 * side**3 / (time.perf_counter() - begun))
    return best
