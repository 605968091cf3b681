"""The denoising objective: how noise levels are drawn, the target, and what each level weighs."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from runtime.diffusion.program import precondition
from runtime.diffusion.schedule import Float64, Schedule

from ..config import Config
from .forward import ForwardProcess
from .objective import Draws, Networks, stratified

LOWEST_LOG_SNR = -100.0
"""Stands for log-SNR -∞, where the schedule ends in pure noise."""


class Denoising:
    """The squared error of the network's prediction, for any prediction (an `Objective`).

    The target follows from x_0 and eps; see `ForwardProcess.target`.
    """

    def __init__(self, config: Config, schedule: Schedule, device: torch.device) -> None:
        self.config = config
        self.schedule = schedule
        self.process = ForwardProcess(schedule, config.prediction, device)
        self._weights = torch.as_tensor(
            loss_weights(config, schedule), dtype=torch.float32, device=device
        )

    def draw_times(self, generator: torch.Generator) -> Tensor:
        """Return the noise level of each image of a whole batch, [batch] int64."""
        return draw_knots(self.config, self.schedule, generator)

    def losses(self, networks: Networks, draws: Draws) -> Tensor:
        """Return the mean squared error of each image's prediction, [b] float32."""
        x0, label, t, eps = draws
        process = self.process
        x_t = process.jump(x0, t, eps)
        x_in = process.network_input(x_t, t)
        F = networks.student(x_in, process.time[t], label, **draws.given)
        return (F - process.target(x0, t, eps)).square().flatten(1).mean(1)

    def weights(self, t: Tensor) -> Tensor:
        """Return what the losses at noise levels t [b] weigh, [b] float32."""
        return self._weights[t]


def loss_weights(config: Config, schedule: Schedule) -> Float64:
    """Return what the squared error of the prediction F weighs at each noise level, [T].

    Weightings are defined on the error of the denoised estimate D, which is c_out² times that of F.
    With SNR = alpha²/sigma²:

    - uniform: 1 on F.
    - min_snr: min(SNR, gamma) on D (Hang et al. 2023, eq. 8).
    - edm: (sigma² + sigma_data²)/(sigma·sigma_data)² on D, for x/alpha at noise sigma/alpha (Karras
      et al. 2022, table 1), which is 1 on EDM's F.
    """
    alpha = schedule.alpha
    sigma = schedule.sigma
    if config.weighting == "uniform":
        return np.ones(len(schedule))
    data = schedule.parameters.get("sigma_data", 0.5)
    c, _ = precondition(config.prediction, alpha, sigma, data)
    if config.weighting == "min_snr":
        on_D = np.minimum((alpha / sigma) ** 2, config.min_snr_gamma)
    else:
        # Multiplied through by alpha², so that alpha = 0 needs no special case.
        on_D = (sigma**2 + (alpha * data) ** 2) / (sigma * data) ** 2
    c_out = c[:, 2]
    return on_D * c_out**2


def draw_knots(config: Config, schedule: Schedule, generator: torch.Generator) -> Tensor:
    """Return the noise level of each image of one step, [batch] int64.

    - stratified: one draw from each of B equal stretches of the schedule, in random order, so that
      every batch covers it (Kingma et al. 2021, appendix I.1).
    - uniform: each level with the same probability.
    - log_normal: the level nearest to ln(sigma/alpha) ~ N(time_mean, time_std²) (Karras et al.
      2022; for `flow` this is the logit-normal of Esser et al. 2024), stratified likewise.
    """
    B = config.batch
    T = config.T
    if config.times == "uniform":
        return torch.randint(T, (B,), generator=generator)
    u = stratified(B, generator)
    if config.times == "stratified":
        # u can round to 1 in float32.
        return (u * T).long().clamp(max=T - 1)
    normal = torch.special.ndtri(u.double().clamp(1e-9, 1 - 1e-9)).numpy()
    wanted = config.time_mean + config.time_std * normal
    log_ratio = -0.5 * np.maximum(schedule.log_snr, LOWEST_LOG_SNR)  # ln(sigma/alpha), rising
    edges = (log_ratio[1:] + log_ratio[:-1]) / 2
    return torch.from_numpy(np.searchsorted(edges, wanted))
