"""Judges of a translated emoji: two small networks, trained here on the training emoji alone.

`style` distinguishes Noto's style from Twemoji's. `content` maps every image to a place, the same
for both styles of an emoji and different for different emoji. It is trained contrastively: the
other style of each emoji in the batch is the one right answer (InfoNCE: van den Oord et al. 2018).
Both networks see shifted, mirrored, blurred and noisy images, so that they do not rely on what a
sampler does to edges. Training is deterministic for a given number of threads.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from runtime.images import from_uint8
from runtime.terminal.progress import track
from trainer.data.builtin import EMOJI, held_out

Images = NDArray[np.uint8]
Bools = NDArray[np.bool_]
Made = Images
"""[2, n, 32, 32, 3]: first the results of Noto's images, then of Twemoji's."""
OUT = Path("out/translate")
Net = TypeVar("Net", bound=nn.Module)
STYLE_EPOCHS, CONTENT_EPOCHS = 40, 80
STYLE_BATCH, CONTENT_BATCH = 64, 256
RATE, DECAY, TEMPERATURE = 2e-3, 0.05, 0.1


class Emoji(NamedTuple):
    """images [n, 2, 32, 32, 3], an image in each of the STYLES; category [n], of `categories`."""

    images: Images
    category: NDArray[np.int64]
    categories: tuple[str, ...]


def emoji() -> tuple[Emoji, Emoji]:
    """Those that train, and those held out; of the latter only those never seen in either style."""
    with np.load(EMOJI, allow_pickle=False) as file:
        images, category, categories = (
            file["images"],
            file["category"].astype(np.int64),
            tuple(file["categories"]),
        )
    held = held_out(len(images))
    seen = {picture.tobytes() for pair in images[~held] for picture in pair}
    new = held & [not any(picture.tobytes() in seen for picture in pair) for pair in images]
    return Emoji(images[~held], category[~held], categories), Emoji(
        images[new], category[new], categories
    )


def block(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, padding=1, bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU(inplace=True),
    )


class Style(nn.Module):
    """x [B, 3, 32, 32] in -1 … 1 → [B]: above 0 where it is Twemoji's. What it sees is local: it
    does not know positions.
    """

    def __init__(self, width: int = 24) -> None:
        super().__init__()
        self.features = nn.Sequential(
            *(block(3, width), block(width, width), nn.MaxPool2d(2)),
            *(block(width, 2 * width), block(2 * width, 2 * width), nn.MaxPool2d(2)),
            *(block(2 * width, 4 * width), nn.Dropout2d(0.2)),
        )
        self.out = nn.Linear(8 * width, 1)

    def forward(self, x: Tensor) -> Tensor:
        f = self.features(x)
        return self.out(torch.cat([f.mean((2, 3)), f.amax((2, 3))], 1))[:, 0]


class Content(nn.Module):
    """x [B, 3, 32, 32] in -1 … 1 → [B, 128] of length 1."""

    def __init__(self, width: int = 32, places: int = 128) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            *(block(3, width), nn.MaxPool2d(2), block(width, 2 * width), nn.MaxPool2d(2)),
            *(block(2 * width, 4 * width), block(4 * width, 4 * width), nn.MaxPool2d(2)),
            *(nn.Flatten(), nn.Dropout(0.3), nn.Linear(4 * width * 16, places)),
        )

    def forward(self, x: Tensor) -> Tensor:
        return F.normalize(self.layers(x), dim=1)


class Scores(NamedTuple):
    """Each [2, n], by direction and emoji."""

    rms: NDArray[np.float64]
    style: Bools
    first: Bools
    five: Bools
    hit: Bools


class Judges:
    """The two judges, trained or taken from out/translate, and what they have to compare with."""

    def __init__(self, train: Emoji, held: Emoji) -> None:
        self.style = _kept("style", Style(), train_style, train)
        self.content = _kept("content", Content(), train_content, train)
        self.held = held
        self.places = [
            judge(self.style, self.content, held.images[:, style]).place for style in (0, 1)
        ]

    def __call__(self, made: Made) -> Scores:
        """Noto's images are compared with Twemoji's counterparts, and the other way round."""
        return Scores(
            *(np.stack(v) for v in zip(*(self._one(made[s], 1 - s) for s in (0, 1)), strict=True))
        )

    def _one(self, made: Images, target: int) -> tuple[NDArray[Any], ...]:
        apart = from_uint8(made).astype(np.float64) - from_uint8(self.held.images[:, target])
        found = judge(self.style, self.content, made)
        near = found.place @ self.places[target].T
        rank = (near > near.diagonal()[:, None]).sum(1)
        style, five = found.twemoji == bool(target), rank < 5
        return np.sqrt((apart**2).mean((1, 2, 3))), style, rank < 1, five, style & five


def _kept(name: str, net: Any, train: Callable[[Images], Any], emoji: Emoji) -> Any:
    """The judge that the same code trained before on the same images and version of torch, or one
    trained now.
    """
    source = Path(__file__).with_name("judges.py").read_bytes()
    key = hashlib.sha256(source + emoji.images.tobytes() + torch.__version__.encode()).hexdigest()[
        :16
    ]
    path = OUT / f"judge-{name}-{key}.pt"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save(train(emoji.images).state_dict(), path)
    net.load_state_dict(torch.load(path, weights_only=True))
    return net


class Verdict(NamedTuple):
    """Of images: twemoji [n], whether each looks like Twemoji's; place [n, 128], its place by
    content.
    """

    twemoji: NDArray[np.bool_]
    place: NDArray[np.float32]


def judge(style: Style, content: Content, images: Images) -> Verdict:
    """images [n, 32, 32, 3]."""
    x = torch.from_numpy(from_uint8(images))
    with torch.no_grad():
        return Verdict((style.eval()(x) > 0).numpy(), content.eval()(x).numpy())


def train_style(pairs: Images) -> Style:
    """pairs [n, 2, 32, 32, 3]: Noto's and Twemoji's."""

    def loss(net: nn.Module, x: Tensor, draw: torch.Generator) -> Tensor:
        answer = torch.tensor([0.0, 1.0]).repeat(len(x))
        return F.binary_cross_entropy_with_logits(
            net(_worn(_shifted(x.flatten(0, 1), draw), draw, 0.05)), answer
        )

    torch.manual_seed(0)
    return _fit(Style(), loss, pairs, STYLE_BATCH, STYLE_EPOCHS)


def train_content(pairs: Images) -> Content:
    """pairs [n, 2, 32, 32, 3]: Noto's and Twemoji's."""

    def loss(net: nn.Module, x: Tensor, draw: torch.Generator) -> Tensor:
        noto, twemoji = (net(_worn(_bent(x[:, style], draw), draw, 0.1)) for style in (0, 1))
        near, right = noto @ twemoji.T / TEMPERATURE, torch.arange(len(x))
        return (F.cross_entropy(near, right) + F.cross_entropy(near.T, right)) / 2

    torch.manual_seed(0)
    return _fit(Content(), loss, pairs, CONTENT_BATCH, CONTENT_EPOCHS)


def _fit(net: Net, loss: Callable[..., Tensor], pairs: Images, size: int, epochs: int) -> Net:
    """net, trained on batches of `size` pairs, both styles of which are mirrored together or not at
    all."""
    draw = torch.Generator().manual_seed(0)
    x = torch.from_numpy(from_uint8(pairs.reshape(-1, *pairs.shape[2:]))).unflatten(
        0, pairs.shape[:2]
    )
    batches = [
        b
        for _ in range(epochs)
        for b in torch.randperm(len(x), generator=draw).split(size)
        if len(b) == size
    ]
    optimizer = torch.optim.AdamW(net.parameters(), RATE, weight_decay=DECAY)
    rate = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, len(batches))
    net.train()
    for batch in track(batches, f"training the judge of {type(net).__name__.lower()}"):
        mirrored = torch.rand(size, 1, 1, 1, 1, generator=draw) < 0.5
        optimizer.zero_grad()
        loss(net, torch.where(mirrored, x[batch].flip(-1), x[batch]), draw).backward()
        optimizer.step()
        rate.step()
    return net


def _shifted(x: Tensor, draw: torch.Generator) -> Tensor:
    """All by up to two pixels, on white."""
    dy, dx = torch.randint(5, (2,), generator=draw).tolist()
    return F.pad(x, (2, 2, 2, 2), value=1.0)[..., dy : dy + x.shape[-2], dx : dx + x.shape[-1]]


def _bent(x: Tensor, draw: torch.Generator) -> Tensor:
    """Each turned, moved and made larger or smaller, on white, and its colours made stronger or
    weaker."""

    def between(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(len(x), *shape, generator=draw)

    turn, size, way = between(-0.15, 0.15), between(-0.15, 0.15).exp(), between(-0.12, 0.12, 2)
    cos, sin = size * turn.cos(), size * turn.sin()
    affine = torch.stack(
        [torch.stack([cos, -sin, way[:, 0]], 1), torch.stack([sin, cos, way[:, 1]], 1)], 1
    )
    grid = F.affine_grid(affine, list(x.shape), align_corners=False)
    return F.grid_sample(x - 1, grid, align_corners=False) * between(0.8, 1.2, 3, 1, 1) + 1


def _worn(x: Tensor, draw: torch.Generator, most: float) -> Tensor:
    """Every other one blurred to some degree, and all with noise of a deviation of up to `most`."""
    amount = torch.rand(3, len(x), 1, 1, 1, generator=draw)
    blurred = F.avg_pool2d(F.pad(x, (1, 1, 1, 1), mode="replicate"), 3, 1)
    x = x + 0.8 * amount[0] * (amount[1] < 0.5) * (blurred - x)
    return x + most * amount[2] * torch.randn(x.shape, generator=draw)
