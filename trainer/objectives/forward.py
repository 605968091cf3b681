"""The forward process: how an image turns into noise, one step at a time or in one jump."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from runtime.diffusion.program import precondition
from runtime.diffusion.schedule import Schedule


class ForwardProcess:
    """q of Ho et al. 2020, on the runtime's own arrays, as tensors on `device`.

    In all methods x, x0 and eps are [b, *S], and t is [b] int64, indices of the schedule's noise
    levels.

    Attributes:
        time: What the network is conditioned on at each noise level, [T] float32.
    """

    def __init__(
        self,
        schedule: Schedule,
        prediction: str,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        def column(values: ArrayLike) -> Tensor:
            return torch.as_tensor(np.asarray(values), dtype=dtype, device=device)

        # Copies: the schedule's arrays are read-only, which torch does not know.
        self.time = torch.as_tensor(np.array(schedule.time), dtype=torch.float32, device=device)
        self.alpha = column(schedule.alpha.copy())
        self.sigma = column(schedule.sigma.copy())
        self.step_scale = column(schedule.alpha / np.r_[1.0, schedule.alpha[:-1]])
        self.step_noise = column(np.sqrt(schedule.beta))
        # The same function tells the sampler how to read F, so target and reading cannot disagree.
        c, perfect = precondition(
            prediction, schedule.alpha, schedule.sigma, schedule.parameters.get("sigma_data", 0.5)
        )
        self.c_in = column(c[:, 0])
        self.c_skip = column(c[:, 1])
        self.c_out = column(c[:, 2])
        self.of_clean = column(perfect[:, 0])
        self.of_noise = column(perfect[:, 1])

    @staticmethod
    def _at(values: Tensor, t: Tensor, x: Tensor) -> Tensor:
        """Return values[t] in a shape that multiplies x: [b, 1, …]."""
        return values[t].reshape(-1, *[1] * (x.ndim - 1))

    def jump(self, x0: Tensor, t: Tensor, eps: Tensor) -> Tensor:
        """Return x_t = alpha_t · x_0 + sigma_t · eps ~ q(x_t | x_0) (Ho et al. 2020, eq. 4)."""
        return self._at(self.alpha, t, x0) * x0 + self._at(self.sigma, t, x0) * eps

    def step(self, x: Tensor, t: Tensor, eps: Tensor) -> Tensor:
        """Return √(1 - β_t) · x_{t-1} + √β_t · eps ~ q(x_t | x_{t-1}) (Ho et al. 2020, eq. 2).

        Args:
            x: x_{t-1}; x_0 for t = 0.
        """
        return self._at(self.step_scale, t, x) * x + self._at(self.step_noise, t, x) * eps

    def target(self, x0: Tensor, t: Tensor, eps: Tensor) -> Tensor:
        """Return what a perfect network predicts at x_t: a mixture of x_0 and eps.

        The prediction fixes the mixture; see `runtime.diffusion.program.precondition`.
        """
        return self._at(self.of_clean, t, x0) * x0 + self._at(self.of_noise, t, x0) * eps

    def estimate(self, x: Tensor, t: Tensor, F: Tensor) -> Tensor:
        """Return D = c_skip · x_t + c_out · F, the estimate of x_0 by the prediction F."""
        return self._at(self.c_skip, t, x) * x + self._at(self.c_out, t, x) * F

    def noise_of(self, x: Tensor, t: Tensor, x0: Tensor) -> Tensor:
        """Return the eps of x_t = alpha_t · x_0 + sigma_t · eps."""
        return (x - self._at(self.alpha, t, x) * x0) / self._at(self.sigma, t, x)

    def network_input(self, x: Tensor, t: Tensor) -> Tensor:
        """Return c_in · x_t, the network's input."""
        return self._at(self.c_in, t, x) * x
