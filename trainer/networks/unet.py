"""A U-Net of residual blocks, conditioned on the time and, if the data has classes, on a label.

It is written for a clean export. Every shape but the batch is known when the network is made, the
batch is always written as -1, and upsampling is by a factor.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from runtime.bundle.conditions import Condition
from runtime.errors import RequestError


class TimeEmbedding(nn.Module):
    """time [B] → [B, width]: cosines and sines of frequencies from 1 down to 1e-4, then two layers
    (Ho et al. 2020, appendix B)."""

    def __init__(self, features: int, width: int) -> None:
        super().__init__()
        half = features // 2
        self.frequency: Tensor
        self.register_buffer(
            "frequency", torch.exp(-math.log(1e4) * torch.arange(half) / half), persistent=False
        )
        self.layers = nn.Sequential(nn.Linear(2 * half, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, time: Tensor) -> Tensor:
        angle = time[:, None] * self.frequency
        return self.layers(torch.cat([angle.cos(), angle.sin()], dim=1))


def norm(channels: int) -> nn.GroupNorm:
    """Return group norm over groups of 8 channels, or of more: 32 groups at most."""
    most = min(32, max(1, channels // 8))
    return nn.GroupNorm(next(g for g in range(most, 0, -1) if channels % g == 0), channels)


def zeroed(layer: nn.Conv2d) -> nn.Conv2d:
    """Set a layer's weights to zero, so that its branch adds nothing at first."""
    nn.init.zeros_(layer.weight)
    assert layer.bias is not None
    nn.init.zeros_(layer.bias)
    return layer


class ResidualBlock(nn.Module):
    """x + conv(act(scale·norm(conv(act(norm(x)))) + shift)), scale and shift from the embedding
    (Dhariwal & Nichol 2021, AdaGN)."""

    def __init__(self, inputs: int, outputs: int, embedding: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.dropout = dropout
        self.norm1 = norm(inputs)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, padding=1)
        self.modulation = nn.Linear(embedding, 2 * outputs)
        self.norm2 = norm(outputs)
        self.conv2 = zeroed(nn.Conv2d(outputs, outputs, 3, padding=1))
        self.skip = nn.Conv2d(inputs, outputs, 1) if inputs != outputs else nn.Identity()

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        """Map x [B, inputs, H, W] to [B, outputs, H, W]. embedding: [B, width]."""
        scale, shift = self.modulation(embedding)[:, :, None, None].chunk(2, dim=1)
        h = self.conv1(F.silu(self.norm1(x)))
        h = F.silu(self.norm2(h) * (1 + scale) + shift)
        if self.dropout:
            h = F.dropout(h, self.dropout, self.training)
        # Before the skip: nodes are exported in this order, by which ONNX Runtime fuses them.
        h = self.conv2(h)
        return self.skip(x) + h


class Attention(nn.Module):
    """Self-attention over the pixels of an H×W map, in heads of `head` channels (Vaswani et al.
    2017)."""

    def __init__(self, channels: int, pixels: int, head: int = 32) -> None:
        super().__init__()
        width = math.gcd(channels, head)
        self.shape = (3 * channels // width, width, pixels)
        self.scale = width**-0.5
        self.norm = norm(channels)
        self.qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.out = zeroed(nn.Conv2d(channels, channels, 1))

    def forward(self, x: Tensor) -> Tensor:
        """Return x + attention(x), [B, channels, H, W]."""
        # Each [B, heads, head, pixels].
        q, k, v = self.qkv(self.norm(x)).reshape(-1, *self.shape).chunk(3, dim=1)
        weight = torch.softmax(q.transpose(2, 3) @ k * self.scale, dim=-1)
        return x + self.out((v @ weight.transpose(2, 3)).reshape(-1, *x.shape[1:]))


class Level(nn.Module):
    """A residual block, and attention after it if this resolution has it."""

    def __init__(
        self, inputs: int, outputs: int, embedding: int, pixels: int | None, dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.residual = ResidualBlock(inputs, outputs, embedding, dropout)
        self.attention = nn.Identity() if pixels is None else Attention(outputs, pixels)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        """Map x [B, inputs, H, W] to [B, outputs, H, W]. embedding: [B, width]."""
        return self.attention(self.residual(x, embedding))


class Conditioned(nn.Module):
    """What the networks share: an embedding of time, label and vectors, and blocks that use it.

    Conditions that are images are concatenated to x, enlarged to its size.

    Attributes:
        time: Embeds the time.
        label: Embeds the label; None without labels.
        vectors: Embeds each condition that is a vector.
        images: The name of each condition that is an image, and how often x is larger.
        checkpointing: Whether activations are computed again in the backward pass.
    """

    time: nn.Module
    label: nn.Embedding | None
    vectors: nn.ModuleDict
    images: dict[str, float]
    checkpointing: bool

    def _take(
        self, conditions: Sequence[Condition], sample_shape: tuple[int, int, int], width: int
    ) -> int:
        """Make what the conditions need, and return how many channels they add to x."""
        self.vectors = nn.ModuleDict()
        self.images = {}
        channels = 0
        # Nothing is made without conditions: older checkpoints have no weights for it.
        for condition in conditions:
            if len(condition.shape) == 3:
                self.images[condition.name] = sample_shape[1] / condition.shape[1]
                channels += condition.shape[0]
            else:
                layers = (nn.Linear(condition.shape[0], width), nn.SiLU(), nn.Linear(width, width))
                self.vectors[condition.name] = nn.Sequential(*layers)
        return channels

    def _seen(self, x: Tensor, given: Mapping[str, Tensor]) -> Tensor:
        """Return x with the images that it is conditioned on, as further channels."""
        if not self.images:
            return x
        parts = [x]
        for name, factor in self.images.items():
            image = given[name]
            if factor != 1:
                image = F.interpolate(image, scale_factor=factor, mode="nearest")
            parts.append(image)
        return torch.cat(parts, dim=1)

    def _embed(self, time: Tensor, label: Tensor | None, given: Mapping[str, Tensor]) -> Tensor:
        embedding = self.time(time)
        if self.label is not None:
            embedding = embedding + self.label(label)
        for name, layers in self.vectors.items():
            embedding = embedding + layers(given[name])
        return F.silu(embedding)

    def _through(self, block: nn.Module, h: Tensor, embedding: Tensor) -> Tensor:
        if self.checkpointing and self.training:
            return checkpoint(block, h, embedding, use_reentrant=False)
        return block(h, embedding)


class UNet(Conditioned):
    """F(x, time, label, **conditions): x [B, C, H, W], time [B], label [B] → [B, C, H, W].

    It is the network of Ho et al. 2020 with the blocks of Dhariwal & Nichol 2021.

    Args:
        sample_shape: (C, H, W).
        channels: The width at each resolution, from H×W, halved each time.
        blocks: Residual blocks per resolution on the way down; there is one more on the way up.
        attention: Heights of the resolutions that have attention.
        num_classes: 0 for none. The label num_classes is the null label.
        dropout: The share of activations that are dropped in training.
        conditions: Images and vectors that it takes by name.

    Raises:
        RequestError: H or W cannot be halved often enough.
    """

    _no_split_modules = ("Level",)  # accelerate's name for the units of FSDP

    def __init__(
        self,
        sample_shape: tuple[int, int, int],
        channels: tuple[int, ...],
        blocks: int,
        attention: tuple[int, ...],
        num_classes: int = 0,
        dropout: float = 0.0,
        conditions: Sequence[Condition] = (),
    ) -> None:
        super().__init__()
        self.checkpointing = False
        C, H, W = sample_shape
        factor = 2 ** (len(channels) - 1)
        if H % factor or W % factor:
            raise RequestError(
                f"images of {H}x{W} cannot be halved {len(channels) - 1} times: use sides that "
                f"{factor} divides, or fewer channels."
            )
        embedding = 4 * channels[0]
        self.time = TimeEmbedding(channels[0], embedding)
        self.label = nn.Embedding(num_classes + 1, embedding) if num_classes else None
        seen = self._take(conditions, sample_shape, embedding)

        def level(inputs: int, outputs: int, depth: int, attend: bool | None = None) -> Level:
            height = H >> depth
            width = W >> depth
            attend = height in attention if attend is None else attend
            return Level(inputs, outputs, embedding, height * width if attend else None, dropout)

        self.first = nn.Conv2d(C + seen, channels[0], 3, padding=1)
        self.down = nn.ModuleList()
        self.downsample = nn.ModuleList()
        skips = [channels[0]]
        width = channels[0]
        for depth, outputs in enumerate(channels):
            for _ in range(blocks):
                self.down.append(level(width, outputs, depth))
                skips.append(width := outputs)
            if depth + 1 < len(channels):
                self.downsample.append(nn.Conv2d(width, width, 3, stride=2, padding=1))
                skips.append(width)
        # If there is one resolution only, the middle is as large as the image: no attention there.
        last = len(channels) - 1
        self.middle = nn.ModuleList(
            [level(width, width, last, attend=last > 0), level(width, width, last, attend=False)]
        )
        self.up = nn.ModuleList()
        self.upsample = nn.ModuleList()
        for depth, outputs in reversed(list(enumerate(channels))):
            for _ in range(blocks + 1):
                self.up.append(level(width + skips.pop(), outputs, depth))
                width = outputs
            if depth:
                self.upsample.append(nn.Conv2d(width, width, 3, padding=1))
        self.blocks = blocks
        self.last_norm = norm(width)
        self.last = zeroed(nn.Conv2d(width, C, 3, padding=1))

    def forward(
        self, x: Tensor, time: Tensor, label: Tensor | None = None, **given: Tensor
    ) -> Tensor:
        embedding = self._embed(time, label, given)
        # Every output on the way down is kept for the block of the same size on the way up.
        skips = self._down(self._seen(x, given), embedding)
        h = skips[-1]
        for block in self.middle:
            h = self._through(block, h, embedding)
        # Skips are taken in reverse order: each resolution takes those of its own.
        for i, block in enumerate(self.up):
            h = self._through(block, torch.cat([h, skips.pop()], dim=1), embedding)
            if (i + 1) % (self.blocks + 1) == 0 and i + 1 < len(self.up):
                h = self.upsample[i // (self.blocks + 1)](
                    F.interpolate(h, scale_factor=2.0, mode="nearest")
                )
        return self.last(F.silu(self.last_norm(h)))

    def features(
        self, x: Tensor, time: Tensor, label: Tensor | None = None, **given: Tensor
    ) -> list[Tensor]:
        """Return the maps on the way down, [B, channels, h, w] each, the largest first."""
        return self._down(self._seen(x, given), self._embed(time, label, given))

    def _down(self, x: Tensor, embedding: Tensor) -> list[Tensor]:
        maps = [h := self.first(x)]
        for i, block in enumerate(self.down):
            maps.append(h := self._through(block, h, embedding))
            if (i + 1) % self.blocks == 0 and i + 1 < len(self.down):
                maps.append(h := self.downsample[i // self.blocks](h))
        return maps
