"""What a student of few calls learns: two objectives, and the distance that both minimize.

D is the student's estimate of x_0 from one call; with it, `lcm` samples in 1 call or a few. The
teacher's guidance is part of what is learned, so the student is never guided.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from runtime.diffusion.schedule import Schedule

from ..config import Config
from ..config.distillation import wanted_knots
from .forward import ForwardProcess
from .objective import Draws, Features, Network, Networks, stratified

HUBER = 0.1
"""Root mean square of an image's error below which the loss is quadratic, and linear above."""
CONTRAST = 0.5
"""The weight of a difference in local contrast next to one in pixels."""
SEEN = 1.0
"""The weight of a difference in the teacher's features next to one in pixels."""
FAINT = 1e-3
"""Variance below which differences in contrast fade."""
FROM_NOISE = 0.4
"""endpoint, data: share of the images that start from pure noise, as every sample does."""
INTERVALS = 32
"""consistency: steps of the path that neighbouring answers are compared on."""


def distance(found: Tensor, wanted: Tensor) -> Tensor:
    """Return how far images are from those wanted, [b] float32.

    The root mean square of the pixels' differences, quadratic near 0 (pseudo-Huber), and that of
    the standard deviations in every 3×3 window. Without the second, the mean of all likely images,
    which is blurred, is nearest.

    Args:
        found: [b, C, H, W].
        wanted: [b, C, H, W].
    """
    pixels = mean_square(found - wanted)
    contrasts = mean_square(contrast(found) - contrast(wanted))
    # The small number keeps the root's slope finite where both are equal.
    return (pixels + HUBER**2).sqrt() - HUBER + CONTRAST * (contrasts + 1e-8).sqrt()


def mean_square(x: Tensor) -> Tensor:
    """Return the mean square of each of x [b, …], [b]."""
    return x.square().flatten(1).mean(1)


def contrast(x: Tensor) -> Tensor:
    """Return the standard deviation in every 3×3 window of x [b, C, H, W], [b, C, H - 2, W - 2]."""
    mean = functional.avg_pool2d(x, 3, 1)
    square = functional.avg_pool2d(x * x, 3, 1)
    return ((square - mean * mean).clamp_min(0) + FAINT).sqrt()


def perceived(
    process: ForwardProcess, features: Features, image: Tensor, draws: Draws
) -> list[Tensor]:
    """Return the teacher's features of images x_0 [b, C, H, W] at the lowest noise level."""
    t = torch.zeros_like(draws.t)
    x = process.jump(image, t, torch.zeros_like(image))
    return features(process.network_input(x, t), process.time[t], draws.label, **draws.given)


def perceptual_distance(
    process: ForwardProcess, features: Features, found: Tensor, wanted: Tensor, draws: Draws
) -> Tensor:
    """Return how differently the teacher sees images and those wanted, [b] float32.

    The root mean square of the differences in each feature, relative to the wanted one's root mean
    square, averaged over the features (as Zhang et al. 2018 compare images by a classifier's).

    Args:
        process: With the schedule and prediction of the teacher.
        features: Of the teacher.
        found: Estimates of x_0, [b, C, H, W].
        wanted: The same shape. No gradient flows to it.
        draws: Whose labels and conditions the images have.
    """
    with torch.no_grad():
        targets = perceived(process, features, wanted, draws)
    distances = [
        # The small numbers keep the root's slope finite where both are equal, and a feature of 0.
        (mean_square(f - g) / (mean_square(g) + 1e-8) + 1e-8).sqrt()
        for f, g in zip(perceived(process, features, found, draws), targets, strict=True)
    ]
    return torch.stack(distances).mean(0)


class Endpoint:
    """From a point x_t, learn the image x_0 that it belongs to (an `Objective`).

    endpoint: the points are those of the teacher's paths. The path from one noise is fixed, so its
    end is a function of every point on it (Luhman & Luhman 2021, from the noise alone; Zhou et al.
    2024, from all points). `Draws` holds a path's end as x0, and as eps the noise that makes x_t of
    it.

    data: the points are noised images of the data. Conditions, not the noise, determine the image.
    """

    def __init__(self, config: Config, schedule: Schedule, device: torch.device) -> None:
        assert config.distillation is not None
        self.batch = config.batch
        self.process = ForwardProcess(schedule, config.prediction, device)
        learned = config.distillation
        self.levels = torch.tensor(learned.levels or wanted_knots(learned.calls, config.T))
        count = len(self.levels)
        others = (1 - FROM_NOISE) / max(1, count - 1)
        shares = torch.tensor([1 - others * (count - 1), *[others] * (count - 1)])
        self._bounds = shares.double().cumsum(0)[:-1]

    def draw_times(self, generator: torch.Generator) -> Tensor:
        """Return the noise level of each image of a whole batch, [batch] int64."""
        # In float64, so that every batch has exactly each level's share.
        u = stratified(self.batch, generator, torch.float64)
        return self.levels[torch.searchsorted(self._bounds, u, right=True)]

    def losses(self, networks: Networks, draws: Draws) -> Tensor:
        """Return each image's distance from the one wanted, [b] float32."""
        x_t = self.process.jump(draws.x0, draws.t, draws.eps)
        D = estimate(self.process, networks.student, x_t, draws.t, draws)
        return loss(self.process, networks, D, draws.x0, draws)

    def weights(self, t: Tensor) -> Tensor:
        """Return 1 for each of the noise levels t [b], float32: the shares weigh them."""
        return torch.ones_like(t, dtype=torch.float32)


class Consistency:
    """Answer alike along a path of the teacher (an `Objective`).

    x_s follows from x_t, a noised image, by one DDIM step of the guided teacher. The average of the
    student's weights gives at x_s the answer that the student learns at x_t. At the clean end the
    teacher gives it (Song et al. 2023, Algorithm 2; guided as in Luo et al. 2023, Algorithm 1).
    """

    def __init__(self, config: Config, schedule: Schedule, device: torch.device) -> None:
        assert config.distillation is not None
        self.batch = config.batch
        self.target = f"ema-{config.ema_half_life[1]}"
        self.process = ForwardProcess(schedule, config.prediction, device)
        T = config.T
        # With the levels at which it will be called, which another number of calls may not share.
        known = wanted_knots((min(INTERVALS, T), *config.distillation.calls), T)
        self.levels = torch.tensor(known[::-1])
        # The level below each knot, -1 below the lowest, where the path has ended.
        below = torch.full((T,), -1)
        below[self.levels[1:]] = self.levels[:-1]
        self.below = below.to(device)

    def draw_times(self, generator: torch.Generator) -> Tensor:
        """Return the noise level of each image of a whole batch, [batch] int64."""
        u = stratified(self.batch, generator)
        return self.levels[(u * len(self.levels)).long().clamp(max=len(self.levels) - 1)]

    def losses(self, networks: Networks, draws: Draws) -> Tensor:
        """Return each image's distance from the answer one step on, [b] float32."""
        process = self.process
        x_t = process.jump(draws.x0, draws.t, draws.eps)
        with torch.no_grad():
            target = self._target(networks, x_t, draws)
        D = estimate(process, networks.student, x_t, draws.t, draws)
        return loss(process, networks, D, target, draws)

    def _target(self, networks: Networks, x_t: Tensor, draws: Draws) -> Tensor:
        """Return the answer that the student learns at x_t, [b, C, H, W]."""
        assert networks.teacher is not None
        process = self.process
        t = draws.t
        D = estimate(process, networks.teacher, x_t, t, draws).clamp(-1, 1)
        s = self.below[t]
        # At the clean end there is no level for the student: D replaces the answer at another one.
        inner = s.clamp_min(0)
        x_s = process.jump(D, inner, process.noise_of(x_t, t, D))
        found = estimate(process, networks.averages[self.target], x_s, inner, draws).clamp(-1, 1)
        return torch.where((s < 0)[:, None, None, None], D, found)

    def weights(self, t: Tensor) -> Tensor:
        """Return 1 for each of the noise levels t [b], float32."""
        return torch.ones_like(t, dtype=torch.float32)


def loss(
    process: ForwardProcess, networks: Networks, D: Tensor, wanted: Tensor, draws: Draws
) -> Tensor:
    """Return what both objectives minimize, [b] float32: how far D is from the images wanted."""
    assert networks.features is not None
    seen = perceptual_distance(process, networks.features, D, wanted, draws)
    return distance(D, wanted) + SEEN * seen


def estimate(
    process: ForwardProcess, network: Network, x_t: Tensor, t: Tensor, draws: Draws
) -> Tensor:
    """Return a network's estimate D of x_0 from x_t [b, C, H, W], like x_t.

    Args:
        t: The noise levels of x_t, [b] int64, which may be others than those drawn.
        draws: Whose labels and conditions the images have.
    """
    F = network(process.network_input(x_t, t), process.time[t], draws.label, **draws.given)
    return process.estimate(x_t, t, F)
