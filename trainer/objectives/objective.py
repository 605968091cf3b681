"""The interface between the objective and the training step.

The trainer draws what a step is trained on, and takes the step. An objective says at which noise
levels, what the error of the network is, and what it weighs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

Network = Callable[..., Tensor]
"""F(x [b, C, H, W], time [b], label [b], **conditions) → [b, C, H, W] float32."""
Features = Callable[..., list[Tensor]]
"""What a network computes on the way to F, from the same inputs: each [b, …] float32."""


def stratified(
    count: int, generator: torch.Generator, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Return one draw from each of `count` equal stretches of 0 … 1, in random order, [count]."""
    order = torch.randperm(count, generator=generator)
    return (order + torch.rand(count, generator=generator, dtype=dtype)) / count


@dataclass(frozen=True)
class Networks:
    """The networks that an objective may call.

    Attributes:
        student: The network in training. Gradients flow through it.
        averages: The network with averaged weights, by the average's name. With FSDP they cannot
            be called, since each process holds a part of the weights.
        teacher: The network that is distilled, with the guidance that is built in; None if there is
            none.
        features: Those of the teacher.
    """

    student: Network
    averages: Mapping[str, Network] = field(default_factory=dict)
    teacher: Network | None = None
    features: Features | None = None


@dataclass(frozen=True)
class Draws:
    """What a process's share of a step is trained on.

    Attributes:
        x0: The images, [b, C, H, W] in -1 … 1.
        label: [b] int64; the number of classes is the null label.
        t: Noise levels as indices of the schedule, [b] int64.
        eps: The noise, like x0.
        given: Further conditions by name, [b, …] each.
    """

    x0: Tensor
    label: Tensor
    t: Tensor
    eps: Tensor
    given: Mapping[str, Tensor] = field(default_factory=dict)

    def __iter__(self) -> Iterator[Tensor]:
        return iter((self.x0, self.label, self.t, self.eps))

    def part(self, i: int, count: int) -> Draws:
        """Return part i of `count` equal parts."""
        size = len(self.t) // count
        mine = slice(i * size, (i + 1) * size)
        given = {name: value[mine] for name, value in self.given.items()}
        return Draws(*(v[mine] for v in self), given=given)


class Objective(Protocol):
    """What is learned."""

    def draw_times(self, generator: torch.Generator) -> Tensor:
        """Return the noise level of each image of a whole batch, [batch] int64.

        All that is random about it comes from `generator`, a CPU generator.
        """
        ...

    def losses(self, networks: Networks, draws: Draws) -> Tensor:
        """Return the loss of each image before weighting, [b] float32."""
        ...

    def weights(self, t: Tensor) -> Tensor:
        """Return what the losses at noise levels t [b] weigh, [b] float32."""
        ...
