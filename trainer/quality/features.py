"""What pictures are compared by: the features of a small classifier that is trained on the data, or
of an Inception network from a file."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

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
from ..data.dataset import Pictures, Source
from ..data.decode import UnreadablePicture
from ..errors import DataError
from ..networks.unet import norm
from ..runs.log import move_aside

Features = Callable[[NDArray[np.uint8]], NDArray[np.float32]]
"""Pictures [n, H, W, C] → [n, d]."""
STEPS = 400
BATCH = 64
RATE = 2e-3
WIDTH = 64


class Classifier(nn.Module):
    """x [B, C, H, W] in -1 … 1 → classes [B, n], by features [B, WIDTH]."""

    def __init__(self, channels: int, classes: int, halvings: int) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Conv2d(channels, 32, 3, padding=1)]
        for i in range(halvings):
            inputs = 32 if i == 0 else WIDTH
            layers += [norm(inputs), nn.SiLU(), nn.Conv2d(inputs, WIDTH, 3, stride=2, padding=1)]
        self.layers = nn.Sequential(*layers, norm(WIDTH if halvings else 32), nn.SiLU())
        self.place = nn.Linear(WIDTH if halvings else 32, WIDTH)
        self.out = nn.Linear(WIDTH, classes)

    def features(self, x: Tensor) -> Tensor:
        return self.place(self.layers(x).mean((2, 3)))

    def forward(self, x: Tensor) -> Tensor:
        return self.out(F.silu(self.features(x)))


def read_some(source: Source, indices: NDArray[np.int64]) -> NDArray[np.uint8]:
    """Pictures [n, H, W, C], those that cannot be read left out."""
    if isinstance(source, Pictures):
        return source.images[indices]
    found = []
    for i in indices.tolist():
        try:
            found.append(source.read(i))
        except UnreadablePicture:
            continue
    if not found:
        raise DataError(f"none of the {len(indices)} images to compare with can be read.")
    return np.stack(found)


def train_classifier(source: Source, device: torch.device) -> Classifier:
    """Told the data's classes; where there is one class, by how many quarters a picture was turned
    (Gidaris et al. 2018).

    Deterministic for a machine: it depends on the data alone.
    """
    turned = len(set(source.labels.tolist())) < 2 or len(source.classes) < 2
    C, H, W = source.sample_shape
    halvings = max(0, min(4, int(np.log2(min(H, W))) - 1))
    classes = 4 if turned else int(source.labels.max()) + 1
    random = np.random.Generator(np.random.Philox(key=[0, 0]))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = Classifier(C, classes, halvings).to(device)
    optimizer = torch.optim.AdamW(network.parameters(), RATE, weight_decay=0.05)
    kept = random.permutation(len(source.labels))[: STEPS * BATCH]
    for step in range(STEPS):
        at = kept[random.integers(len(kept), size=BATCH)]
        pictures, labels = _batch(source, at)
        x = _samples(pictures, device)
        if turned:
            labels = random.integers(4, size=len(x))
            x = (
                torch.stack(
                    [
                        torch.rot90(picture, int(k), (1, 2))
                        for picture, k in zip(x, labels, strict=True)
                    ]
                )
                if H == W
                else x
            )
            labels = labels if H == W else labels * 0
        loss = F.cross_entropy(network(x), torch.from_numpy(labels).to(device))
        for group in optimizer.param_groups:
            group["lr"] = RATE * (1 - step / STEPS)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return network.eval()


def _batch(source: Source, at: NDArray[np.int64]) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    if isinstance(source, Pictures):
        return source.images[at], source.labels[at]
    pairs = [(picture, source.labels[i]) for i in at.tolist() for picture in _readable(source, i)]
    return np.stack([picture for picture, _ in pairs]), np.array([label for _, label in pairs])


def _readable(source: Any, i: int) -> list[NDArray[np.uint8]]:
    try:
        return [source.read(i)]
    except UnreadablePicture:
        return []


def _samples(pictures: NDArray[np.uint8], device: torch.device) -> Tensor:
    return (
        torch.from_numpy(np.ascontiguousarray(pictures.transpose(0, 3, 1, 2))).to(device).float()
        / 127.5
        - 1
    )


def features_of(
    config: Config, source: Source, folder: Path | None, device: torch.device
) -> Features:
    """The features that this config's samples are judged by. The classifier is kept in `folder`,
    where there is one."""
    network = (
        _inception(config.features, device)
        if config.features
        else _classifier(source, folder, device)
    )

    @torch.no_grad()
    def features(pictures: NDArray[np.uint8]) -> NDArray[np.float32]:
        parts = [network(pictures[i : i + 100]) for i in range(0, len(pictures), 100)]
        return torch.cat(parts).float().cpu().numpy()

    return features


def _classifier(
    source: Source, folder: Path | None, device: torch.device
) -> Callable[[NDArray[np.uint8]], Tensor]:
    path = folder / f"features-{source.fingerprint[:16]}.safetensors" if folder else None
    network = _stored(path, source, device) if path is not None and os.path.lexists(path) else None
    if network is None:
        network = train_classifier(source, device)
        if path is not None:
            with replacing(path) as temporary:
                save_file(
                    {k: v.cpu().contiguous() for k, v in network.state_dict().items()}, temporary
                )
    return lambda pictures: network.features(_samples(pictures, device))


def _stored(path: Path, source: Source, device: torch.device) -> Classifier | None:
    """Return the classifier of a file. One that is damaged is moved aside, and None is returned."""
    C, H, W = source.sample_shape
    halvings = max(0, min(4, int(np.log2(min(H, W))) - 1))
    try:
        weights = load_file(path)
        network = Classifier(C, len(weights["out.bias"]), halvings).to(device).eval()
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
