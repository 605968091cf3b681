"""What is learned: how noise levels are drawn, and what each weighs in the loss."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from runtime.diffusion.program import precondition
from runtime.diffusion.schedule import Float64, Schedule

from ..config import Config

BUCKETS = 10
"""Equal stretches of the schedule whose loss is logged."""


def loss_weights(config: Config, schedule: Schedule) -> Float64:
    """[T]: what the squared error of the network's answer F weighs at each knot.

    Weightings are defined on the error of the denoised estimate D, which is c_out² times that of F;
    with SNR = alpha²/sigma²:
    uniform: 1 on F. min_snr: min(SNR, gamma) on D (Hang et al. 2023, eq. 8). edm: (sigma² +
    sigma_data²)/(sigma·sigma_data)² on D, for x/alpha at noise sigma/alpha (Karras et al. 2022,
    table 1), which is 1 on EDM's F.
    """
    alpha = schedule.alpha
    sigma = schedule.sigma
    if config.weighting == "uniform":
        return np.ones(len(schedule))
    data = schedule.parameters.get("sigma_data", 0.5)
    c, _ = precondition(config.prediction, alpha, sigma, data)
    if config.weighting == "min_snr":
        on_D = np.minimum((alpha / sigma) ** 2, config.min_snr_gamma)
    else:  # multiplied through by alpha², so that alpha = 0 needs no special case
        on_D = (sigma**2 + (alpha * data) ** 2) / (sigma * data) ** 2
    return on_D * c[:, 2] ** 2


def draw_knots(config: Config, schedule: Schedule, generator: torch.Generator) -> Tensor:
    """[batch] int64: the knots that the pictures of one step are noised to.

    stratified: one draw from each of B equal stretches of the schedule, in random order, so that
    every batch covers it (Kingma et al. 2021, appendix I.1). uniform: any knot. log_normal: the
    knot nearest to ln(sigma/alpha) ~ N(time_mean, time_std²) (Karras et al. 2022; for `flow` this
    is the logit-normal of Esser et al. 2024), stratified likewise.
    """
    B = config.batch
    T = config.T
    if config.times == "uniform":
        return torch.randint(T, (B,), generator=generator)
    u = (torch.randperm(B, generator=generator) + torch.rand(B, generator=generator)) / B
    if config.times == "stratified":
        return (u * T).long().clamp(max=T - 1)
    wanted = (
        config.time_mean
        + config.time_std * torch.special.ndtri(u.double().clamp(1e-9, 1 - 1e-9)).numpy()
    )
    found = -0.5 * np.maximum(
        schedule.log_snr, -100.0
    )  # ln(sigma/alpha), rising; the last knot may be pure noise
    edges = (found[1:] + found[:-1]) / 2
    return torch.from_numpy(np.searchsorted(edges, wanted))


def buckets(t: Tensor, losses: Tensor, T: int) -> Tensor:
    """[2, BUCKETS] float64: the sum of losses [B], and their number, in each stretch of knots."""
    where = (t * BUCKETS // T).cpu()
    found = torch.zeros(2, BUCKETS, dtype=torch.float64)
    found[0].index_add_(0, where, losses.detach().double().cpu())
    found[1].index_add_(0, where, torch.ones(len(where), dtype=torch.float64))
    return found
