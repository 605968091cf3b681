"""The features by which images are compared: those of a small classifier trained on the data, or of
an Inception network from a file.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from runtime.errors import RequestError
from runtime.files import replacing

from ..config import Config
from ..data.dataset import Dataset
from ..randomness import CLASSIFIER_BATCHES, CLASSIFIER_WEIGHTS
from ..runs.log import move_aside

Extractor = Callable[[NDArray[np.uint8]], NDArray[np.float32]]
"""Images [n, H, W, C] → [n, d]."""
STEPS = 400
BATCH = 64
RATE = 2e-3
WEIGHT_DECAY = 0.05
WIDTH = 64
FIRST_WIDTH = 32
MOST_HALVINGS = 4
NORM_CHANNELS = 8
"""The classifier's network and training: changing one makes the numbers of runs incomparable."""
AT_ONCE = 100
"""Images whose features are computed at once, to bound the memory."""


class Classifier(nn.Module):
    """x [B, C, H, W] in -1 … 1 → classes [B, n], by features [B, WIDTH]."""

    def __init__(self, channels: int, classes: int, halvings: int) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Conv2d(channels, FIRST_WIDTH, 3, padding=1)]
        for i in range(halvings):
            inputs = FIRST_WIDTH if i == 0 else WIDTH
            layers += [_norm(inputs), nn.SiLU(), nn.Conv2d(inputs, WIDTH, 3, stride=2, padding=1)]
        last = WIDTH if halvings else FIRST_WIDTH
        self.layers = nn.Sequential(*layers, _norm(last), nn.SiLU())
        self.place = nn.Linear(last, WIDTH)
        self.out = nn.Linear(WIDTH, classes)

    def features(self, x: Tensor) -> Tensor:
        """Return the features of x [B, C, H, W], [B, WIDTH]."""
        # The mean over positions, so that features say what is in an image and not where.
        return self.place(self.layers(x).mean((2, 3)))

    def forward(self, x: Tensor) -> Tensor:
        return self.out(F.silu(self.features(x)))


def _norm(channels: int) -> nn.GroupNorm:
    # Not that of the networks in training, which may change while this one may not.
    return nn.GroupNorm(channels // NORM_CHANNELS, channels)


@dataclass(frozen=True)
class Rotations:
    """The task of the classifier if the data has no classes: how an image was turned.

    Predicting rotations makes a network see shapes (Gidaris et al. 2018).

    Attributes:
        quarters: How many quarter turns each class is.
    """

    quarters: tuple[int, ...]

    def __call__(self, x: Tensor, random: np.random.Generator) -> tuple[Tensor, NDArray[np.int64]]:
        """Turn each image of x [n, C, H, W] at random. Returns the images, and the classes [n]."""
        labels = random.integers(len(self.quarters), size=len(x))
        turned = [
            torch.rot90(image, self.quarters[label], (1, 2))
            for image, label in zip(x, labels.tolist(), strict=True)
        ]
        return torch.stack(turned), labels


def rotations_of(height: int, width: int) -> Rotations:
    """Return the rotations that keep the shape of an image: without them there is no batch."""
    return Rotations((0, 1, 2, 3) if height == width else (0, 2))


def halvings_of(height: int, width: int) -> int:
    """Return how often the classifier halves an image: to 2 pixels or more, 4 times at most."""
    return max(0, min(MOST_HALVINGS, int(np.log2(min(height, width))) - 1))


def train_classifier(dataset: Dataset, device: torch.device) -> Classifier:
    """Train the classifier on the data's classes, or on rotations if there are fewer than two.

    On one machine the result depends on the data alone.
    """
    C, H, W = dataset.sample_shape
    one_class = len(set(dataset.labels.tolist())) < 2 or len(dataset.classes) < 2
    rotations = rotations_of(H, W) if one_class else None
    classes = len(rotations.quarters) if rotations else int(dataset.labels.max()) + 1
    random = CLASSIFIER_BATCHES.generator(0)
    # The layers draw from the global generator, whose state training must find as it left it.
    with torch.random.fork_rng(devices=[]):
        CLASSIFIER_WEIGHTS.reset_global(0)
        network = Classifier(C, classes, halvings_of(H, W)).to(device)
    optimizer = torch.optim.AdamW(network.parameters(), RATE, weight_decay=WEIGHT_DECAY)
    kept = random.permutation(len(dataset.labels))[: STEPS * BATCH]
    for step in range(STEPS):
        pictures, indices = dataset.gather(kept[random.integers(len(kept), size=BATCH)])
        x = _samples(pictures, device)
        labels = dataset.labels[indices]
        if rotations:
            x, labels = rotations(x, random)
        loss = F.cross_entropy(network(x), torch.from_numpy(labels).to(device))
        for group in optimizer.param_groups:
            group["lr"] = RATE * (1 - step / STEPS)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return network.eval()


def _samples(pictures: NDArray[np.uint8], device: torch.device) -> Tensor:
    """Images [n, H, W, C] → x [n, C, H, W] in -1 … 1."""
    x = torch.from_numpy(np.ascontiguousarray(pictures.transpose(0, 3, 1, 2)))
    return x.to(device).float() / 127.5 - 1


def features_of(
    config: Config, dataset: Dataset, folder: Path | None, device: torch.device
) -> Extractor:
    """Return what computes the features that samples are compared by.

    Args:
        folder: Keeps the classifier, if it is not None.
    """
    network = (
        _inception(config.features, device)
        if config.features
        else _classifier(dataset, folder, device)
    )

    @torch.no_grad()
    def features(pictures: NDArray[np.uint8]) -> NDArray[np.float32]:
        parts = [network(pictures[i : i + AT_ONCE]) for i in range(0, len(pictures), AT_ONCE)]
        return torch.cat(parts).float().cpu().numpy()

    return features


def _classifier(
    dataset: Dataset, folder: Path | None, device: torch.device
) -> Callable[[NDArray[np.uint8]], Tensor]:
    # By the data's fingerprint: a classifier of other data would measure something else.
    path = folder / f"features-{dataset.fingerprint()[:16]}.safetensors" if folder else None
    network = _stored(path, dataset, device) if path is not None and os.path.lexists(path) else None
    if network is None:
        network = train_classifier(dataset, device)
        if path is not None:
            with replacing(path) as temporary:
                save_file(
                    {k: v.cpu().contiguous() for k, v in network.state_dict().items()}, temporary
                )
    return lambda pictures: network.features(_samples(pictures, device))


def _stored(path: Path, dataset: Dataset, device: torch.device) -> Classifier | None:
    """Return the classifier of a file. One that is damaged is moved aside, and None is returned."""
    C, H, W = dataset.sample_shape
    try:
        weights = load_file(path)
        network = Classifier(C, len(weights["out.bias"]), halvings_of(H, W)).to(device).eval()
        network.load_state_dict(weights)
    except (SafetensorError, OSError, KeyError, TypeError, RuntimeError) as error:
        move_aside(path, f"{path} is not a classifier that was trained here ({str(error)[:200]}).")
        return None
    return network


def _inception(path: str, device: torch.device) -> Callable[[NDArray[np.uint8]], Tensor]:
    """A TorchScript file such as StyleGAN's inception-2015-12-05.pt: uint8 [B, 3, H, W] → [B,
    2048]."""
    if not Path(path).is_file():
        raise RequestError(f"--features {path}: there is no such file.")
    try:
        network = torch.jit.load(path, map_location=device).eval()
    except (RuntimeError, ValueError, OSError) as error:
        raise RequestError(
            f"--features {path} cannot be loaded as a TorchScript file ({str(error)[:200]})."
        ) from error

    def call(pictures: NDArray[np.uint8]) -> Tensor:
        x = torch.from_numpy(np.ascontiguousarray(pictures.transpose(0, 3, 1, 2))).to(device)
        try:
            found = network(x.expand(-1, 3, -1, -1), return_features=True)
        except Exception as error:  # a TorchScript program may raise anything
            raise RequestError(
                f"--features {path} cannot be called as Inception's file is, with uint8 [B, 3, H, "
                f"W] "
                f"and return_features=True ({str(error)[:200]})."
            ) from error
        if not isinstance(found, Tensor) or found.ndim != 2 or len(found) != len(pictures):
            raise RequestError(f"--features {path} must give features [B, d], a row per image.")
        return found

    return call
