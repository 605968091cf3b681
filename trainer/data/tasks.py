"""What a network is conditioned on besides a class: made of each image, or given with the data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from runtime.bundle.conditions import Condition
from runtime.errors import RequestError

from ..config import Config
from ..errors import DataError
from ..randomness import MASKS
from .dataset import Dataset
from .labels import listed

LUMA = (0.299, 0.587, 0.114)
"""What red, green and blue count in a grey image (ITU-R BT.601)."""
HOLE = (0.25, 0.75)
"""The sides of the part that is to be filled in, as shares of the image's."""
STRIDES = (97, 101, 103, 107, 109, 113, 127)
"""Between the images that are shown, so that they differ: data is often sorted by class."""
Given = Mapping[str, Tensor]
"""Conditions [b, …] by name."""


@dataclass(frozen=True)
class Task:
    """The conditions of a run, and how they are made.

    Attributes:
        conditions: As the bundle will declare them; () for a run without.
    """

    config: Config
    dataset: Dataset
    conditions: tuple[Condition, ...]

    def of(
        self,
        x0: Tensor,
        indices: Sequence[int],
        places: Sequence[int],
        mirrored: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Return the conditions of images, by name.

        Args:
            x0: The images [b, C, H, W] in -1 … 1, as they are trained on.
            indices: Which of the data they are, [b].
            places: Their places among all that the run trains on, which decide what is random.
            mirrored: Whether an image was mirrored, [b]; its condition is then mirrored, too.
        """
        found = self._given(indices, mirrored, x0.device)
        kind = self.config.task
        if kind == "superres":
            # The mean of each square of pixels, which is what a smaller image shows.
            found["low_res"] = F.avg_pool2d(x0, self.config.factor)
        elif kind == "colorize":
            weights = torch.tensor(LUMA, device=x0.device).reshape(1, 3, 1, 1)
            found["grey"] = (x0 * weights).sum(1, keepdim=True).clamp(-1, 1)
        elif kind == "inpaint":
            # A hole of its own for each time an image is seen, or the network learns the holes.
            mask = self._masks(places, x0.shape[2:]).to(x0.device)
            found["mask"] = mask
            found["known"] = x0 * (1 - mask)
        return found

    def shown(
        self, count: int, seed: int = 0
    ) -> tuple[NDArray[np.uint8], NDArray[np.int64], dict[str, NDArray[np.float32]]]:
        """Return images of the data [n, H, W, C], their labels [n], and their conditions by name.

        Args:
            seed: Of the first; it selects the image.
        """
        places = np.arange(seed, seed + count)
        # A stride that divides the number of images would come back to the same few.
        stride = next((n for n in STRIDES if len(self.dataset) % n), 1)
        images, indices = self.dataset.gather(places * stride % len(self.dataset))
        # Images that cannot be read are left out: the others are taken again.
        turns = np.resize(np.arange(len(indices)), count)
        images = images[turns]
        indices = indices[turns]
        given = self._of_pixels(images, indices, places.tolist())
        return images, self.dataset.labels[indices], given

    def of_data(
        self, indices: NDArray[np.int64], places: Sequence[int]
    ) -> dict[str, NDArray[np.float32]]:
        """Return the conditions of the data's images, by name.

        Args:
            indices: [n], which images.
            places: Their places among all, see `of`.

        Raises:
            DataError: An image cannot be read.
        """
        images, found = self.dataset.gather(indices)
        if len(found) < len(indices):
            bad = sorted(set(indices.tolist()) - set(found.tolist()))
            names = listed(self.dataset.image_names(bad), 3)
            raise DataError(f"{len(bad)} images cannot be read: {names}. Remove them.")
        return self._of_pixels(images, indices, places)

    def _of_pixels(
        self, images: NDArray[np.uint8], indices: NDArray[np.int64], places: Sequence[int]
    ) -> dict[str, NDArray[np.float32]]:
        x0 = torch.from_numpy(images).permute(0, 3, 1, 2).float().div_(127.5).sub_(1)
        return {k: v.numpy() for k, v in self.of(x0, indices.tolist(), places).items()}

    def _given(
        self, indices: Sequence[int], mirrored: Tensor | None, device: torch.device
    ) -> dict[str, Tensor]:
        """Return what the data gives, by name: images in -1 … 1, and vectors."""
        found: dict[str, Tensor] = {}
        for name, array in self.dataset.given.items():
            values = torch.from_numpy(array[np.asarray(indices, np.int64)]).to(device)
            if array.ndim == 4:
                values = values.permute(0, 3, 1, 2).float().div_(127.5).sub_(1).contiguous()
                if mirrored is not None:
                    where = mirrored.to(device)[:, None, None, None]
                    values = torch.where(where, values.flip(3), values)
            found[name] = values
        return found

    def _masks(self, places: Sequence[int], size: Sequence[int]) -> Tensor:
        """Return a rectangle of ones for each image, [b, 1, H, W]: the part to fill in."""
        masks = torch.zeros(len(places), 1, *size)
        for mask, place in zip(masks, places, strict=True):
            generator = MASKS.generator(self.config.seed, int(place))
            # Two sides, and where each begins.
            draws = torch.rand(4, generator=generator).tolist()
            stretches = []
            for length, share, start in zip(size, draws[:2], draws[2:], strict=True):
                side = max(1, round(length * (HOLE[0] + (HOLE[1] - HOLE[0]) * share)))
                first = int(start * (length - side + 1))
                stretches.append(slice(first, first + side))
            mask[0, stretches[0], stretches[1]] = 1
        return masks

    def dropped(self, given: Given, drop: Tensor) -> dict[str, Tensor]:
        """Return conditions with the null value, 0, for the images that `drop` [b] selects."""
        return {
            name: value * (~drop).to(value).reshape(-1, *[1] * (value.ndim - 1))
            for name, value in given.items()
        }


def task_of(config: Config, dataset: Dataset) -> Task:
    """Return what a run's network is conditioned on besides a class.

    Raises:
        RequestError: The images do not suit the task.
        DataError: Images that are given cannot be enlarged to those that are wanted.
    """
    C, H, W = dataset.sample_shape
    # Without dropout the network never saw the null value, so nothing is declared.
    null = 0.0 if config.condition_dropout else None
    found: list[Condition] = []
    for name, array in dataset.given.items():
        found.append(_given_condition(name, array, (C, H, W), null))
    if config.task == "superres":
        f = config.factor
        if H % f or W % f:
            raise RequestError(
                f"--factor must divide the images' sides, {H} and {W}, got {f}. Pass another one."
            )
        meaning = f"the image at 1/{f} of its size"
        found.append(_image("low_res", (C, H // f, W // f), meaning, null))
    elif config.task == "colorize":
        if C != 3:
            raise RequestError(
                "--task colorize needs RGB images, and these are grey. Leave it out."
            )
        found.append(_image("grey", (1, H, W), "the image without its colours", null))
    elif config.task == "inpaint":
        found.append(Condition("mask", (1, H, W), "float32", (0, 1), "1 to fill in", null))
        found.append(_image("known", (C, H, W), "the image, 0 where the mask is 1", null))
    elif config.task == "restyle" and "source" not in dataset.given:
        raise RequestError(
            "--task restyle needs pairs of images: --data emoji, whose two styles are pairs, or "
            "--data pairs:PATH."
        )
    names = [condition.name for condition in found]
    if len(set(names)) < len(names):
        raise RequestError(
            f"--task {config.task} makes a condition {names[-1]!r}, and the data gives one of that "
            "name. Rename the data's."
        )
    return Task(config, dataset, tuple(found))


def _image(name: str, shape: tuple[int, ...], meaning: str, null: float | None) -> Condition:
    return Condition(name, shape, "float32", (-1, 1), meaning, null)


def _given_condition(
    name: str, array: NDArray[np.generic], sample_shape: tuple[int, ...], null: float | None
) -> Condition:
    if array.ndim == 2:
        meaning = "numbers that the data gives"
        return Condition(name, (array.shape[1],), meaning=meaning, null=null)
    _, h, w, c = array.shape
    _, H, W = sample_shape
    if H % h or W % w or H // h != W // w:
        raise DataError(
            f"the images given are {w}x{h}, and those wanted {W}x{H}: the sides of the wanted must "
            "be the same whole multiple of the given. Resize one or the other."
        )
    return _image(name, (c, h, w), "the image given", null)
