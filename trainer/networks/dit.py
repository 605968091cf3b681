"""A diffusion transformer: patches as tokens, blocks conditioned on time and label (Peebles & Xie
2023, adaLN-Zero).

Like `UNet`, it is written for a clean export: the batch is only ever written as -1, and every other
shape is known. Tokens are rows [B·N, width], so every layer is one product of matrices with a
weight that keeps its name.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from runtime.bundle.conditions import Condition
from runtime.errors import RequestError

from .unet import Conditioned, TimeEmbedding


def positions(rows: int, columns: int, width: int) -> Tensor:
    """Return sines and cosines of each patch's row and column, [rows·columns, width].

    They are those of the paper's code, after He et al. 2022.
    """
    frequency = 1e4 ** (-np.arange(width // 4) / (width // 4))
    row, column = (
        v.reshape(-1, 1) * frequency for v in np.mgrid[0:rows, 0:columns].astype(np.float64)
    )
    parts = [np.sin(column), np.cos(column), np.sin(row), np.cos(row)]
    return torch.from_numpy(np.concatenate(parts, axis=1).astype(np.float32))


class Block(nn.Module):
    """h + g1·attention(norm(h)·(1+a1) + b1), then the same with two layers instead of attention.

    a, b and g come from the embedding, and are 0 at first: a new block is the identity.
    """

    def __init__(self, tokens: int, width: int, heads: int) -> None:
        super().__init__()
        self.tokens = tokens
        self.width = width
        self.heads = heads
        self.modulation = nn.Linear(width, 6 * width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.wide = nn.Linear(width, 4 * width)
        self.narrow = nn.Linear(4 * width, width)

    def forward(self, h: Tensor, embedding: Tensor) -> Tensor:
        """Return the tokens h [B, N, width] after this block. embedding: [B, width]."""
        a1, b1, g1, a2, b2, g2 = (
            self.modulation(embedding).reshape(-1, 1, 6 * self.width).chunk(6, dim=2)
        )
        # Two residual branches, attention and then the MLP: each has its scale, shift and gate.
        h = h + g1 * self.attend(self._normed(h, a1, b1))
        rows = self._normed(h, a2, b2).reshape(-1, self.width)
        rows = self.narrow(F.gelu(self.wide(rows), approximate="tanh"))
        return h + g2 * rows.reshape(-1, self.tokens, self.width)

    def _normed(self, h: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        return F.layer_norm(h, (self.width,), eps=1e-6) * (1 + scale) + shift

    def attend(self, h: Tensor) -> Tensor:
        """Return self-attention over the tokens, [B, N, width] → [B, N, width]."""
        qkv = self.qkv(h.reshape(-1, self.width))
        qkv = qkv.reshape(-1, self.tokens, 3, self.heads, self.width // self.heads).permute(
            2, 0, 3, 1, 4
        )
        found = F.scaled_dot_product_attention(*qkv.unbind(0)).transpose(1, 2)
        return self.out(found.reshape(-1, self.width)).reshape(-1, self.tokens, self.width)


class DiT(Conditioned):
    """F(x, time, label): x [B, C, H, W], time [B] float, label [B] int64 → [B, C, H, W].

    Args:
        sample_shape: (C, H, W).
        patch: The side of a patch in pixels.
        width: Channels of a token.
        depth: Blocks.
        heads: Of attention.
        num_classes: 0 for none. The label num_classes is the null label.
        conditions: Images and vectors that it takes by name.

    Raises:
        RequestError: patch does not divide H and W.
    """

    _no_split_modules = ("Block",)  # accelerate's name for the units of FSDP

    def __init__(
        self,
        sample_shape: tuple[int, int, int],
        patch: int,
        width: int,
        depth: int,
        heads: int,
        num_classes: int = 0,
        conditions: Sequence[Condition] = (),
    ) -> None:
        super().__init__()
        C, H, W = sample_shape
        if H % patch or W % patch:
            raise RequestError(
                f"images of {H}x{W} are not made of patches of {patch}: use a --patch that "
                f"divides both."
            )
        self.grid = (H // patch, W // patch)
        self.patch = patch
        self.width = width
        self.channels = C
        tokens = self.grid[0] * self.grid[1]
        seen = self._take(conditions, sample_shape, width)
        self.seen = C + seen
        self.first = nn.Linear(self.seen * patch * patch, width)
        self.position: Tensor
        self.register_buffer("position", positions(*self.grid, width), persistent=False)
        self.time = TimeEmbedding(256, width)
        self.label = nn.Embedding(num_classes + 1, width) if num_classes else None
        self.blocks = nn.ModuleList([Block(tokens, width, heads) for _ in range(depth)])
        self.modulation = nn.Linear(width, 2 * width)
        self.last = nn.Linear(width, C * patch * patch)
        self.checkpointing = False
        self._begin()

    def _begin(self) -> None:
        """Set the first weights as the paper's code does.

        Products are Xavier's and embeddings have a deviation of 0.02. The modulations and the last
        layer are 0, so that a new network predicts 0.
        """
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        embeddings = [m.weight for m in self.time.modules() if isinstance(m, nn.Linear)]
        for weight in [*embeddings, *([self.label.weight] if self.label is not None else [])]:
            nn.init.normal_(weight, std=0.02)
        for module in self.modules():
            if isinstance(module, (Block, DiT)):
                nn.init.zeros_(module.modulation.weight)
        nn.init.zeros_(self.last.weight)

    def forward(
        self, x: Tensor, time: Tensor, label: Tensor | None = None, **given: Tensor
    ) -> Tensor:
        rows, columns = self.grid
        p = self.patch
        C = self.channels
        embedding = self._embed(time, label, given)
        h = self._tokens(self._seen(x, given))
        for block in self.blocks:
            h = self._through(block, h, embedding)
        scale, shift = self.modulation(embedding).reshape(-1, 1, 2 * self.width).chunk(2, dim=2)
        h = F.layer_norm(h, (self.width,), eps=1e-6) * (1 + scale) + shift
        patches = self.last(h.reshape(-1, self.width)).reshape(-1, rows, columns, C, p, p)
        # Back from [B, rows, columns, C, p, p] to an image.
        return patches.permute(0, 3, 1, 4, 2, 5).reshape(-1, C, rows * p, columns * p)

    def features(
        self, x: Tensor, time: Tensor, label: Tensor | None = None, **given: Tensor
    ) -> list[Tensor]:
        """Return the tokens after each block of the first half, [B, N, width] each."""
        embedding = self._embed(time, label, given)
        found = [self._tokens(self._seen(x, given))]
        for block in self.blocks[: len(self.blocks) // 2]:
            found.append(self._through(block, found[-1], embedding))
        return found

    def _tokens(self, x: Tensor) -> Tensor:
        rows, columns = self.grid
        p = self.patch
        C = self.seen
        # [B, C, H, W] → a row of C·p·p pixels for each patch.
        patches = (
            x.reshape(-1, C, rows, p, columns, p).permute(0, 2, 4, 1, 3, 5).reshape(-1, C * p * p)
        )
        return self.first(patches).reshape(-1, rows * columns, self.width) + self.position
