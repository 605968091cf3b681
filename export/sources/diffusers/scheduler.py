"""A scheduler's config in the terms of this project: schedule, prediction, solver, grid."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from runtime.diffusion.schedule import Schedule, from_betas, make_schedule
from runtime.errors import RequestError

from ...errors import ExportError
from ..settings import schedule_of
from .config import Config, class_name, in_json, read_json, scheduler_config
from .convert import advice
from .folder import Folder

SCHEDULERS = ("DDPMScheduler", "DDIMScheduler")
PREDICTION = {"epsilon": "epsilon", "v_prediction": "v", "sample": "x0"}
VARIANCE = {
    # DDPMScheduler computes fixed_small for null, which configs of other schedulers leave here.
    None: "fixed_small",
    "fixed_small": "fixed_small",
    "fixed_small_log": "fixed_small",
    "fixed_large": "fixed_large",
    "fixed_large_log": "fixed_large",
}
"""The _log forms are the same variance, computed from its logarithm.

DDPMScheduler.step takes the square root of fixed_large_log's logarithm and gets NaN. Here it is the
variance that its name says.
"""
PIPELINE_STEPS = {"ddpm": 1000, "ddim": 50}
"""The default number of steps of DDPMPipeline and DDIMPipeline."""


class Scheduler(NamedTuple):
    """A scheduler's config in the terms of this project."""

    schedule: Schedule
    prediction: str
    clip: float | None
    solver: str
    options: dict[str, Any]
    grid: str
    steps: int


def scheduler_of(
    parts: Folder,
    schedule: Schedule | str | None,
    prediction: str | None,
    clip: float | None,
    is_latent: bool,
) -> tuple[Config | None, Scheduler]:
    """Read the scheduler's config, or take what the caller says of a network alone.

    is_latent: Whether samples are latents, which have no bound, and not images.
    """
    if parts.scheduler is None:
        bound = 1.0 if clip is None and not is_latent else clip
        return None, _own_scheduler(parts.path, schedule, prediction, bound)
    if schedule is not None or prediction is not None or clip is not None:
        raise RequestError(
            f"{parts.path} has a scheduler, which says schedule, prediction and clip: leave them "
            "out."
        )
    path = parts.scheduler
    found = read_json(path)
    kind = class_name(path, found, parts.classes.get("scheduler"))
    if not isinstance(kind, str):
        raise ExportError(
            f"{path}: _class_name must be {' or '.join(SCHEDULERS)}, got {in_json(kind)}. "
            "Write the class of the scheduler into the file."
        )
    if kind not in SCHEDULERS:
        raise ExportError(
            f"{path}: _class_name must be {' or '.join(SCHEDULERS)}, got {kind!r}. "
            + advice(path, found, kind)
        )
    config = scheduler_config(path, found, kind)
    return config, read_scheduler(config, parts.pipeline)


def read_scheduler(config: Config, pipeline: str | None = None) -> Scheduler:
    """Translate the config of a DDPMScheduler or a DDIMScheduler.

    Args:
        config: The scheduler's config.
        pipeline: The class of its pipeline. A DDIMPipeline samples with DDIM for any scheduler.

    Raises:
        ExportError: A setting is invalid or unsupported.
    """
    if config.get("thresholding"):
        raise config.refused(
            "thresholding",
            "solvers here clip at a fixed bound; set it to false, with clip_sample if need be",
        )
    ddim = pipeline == "DDIMPipeline" or config.kind == "DDIMScheduler"
    # DDPMScheduler ignores this key, which configs converted from PNDM's keep.
    if ddim and "set_alpha_to_one" in config.values and not config.get("set_alpha_to_one"):
        raise config.refused(
            "set_alpha_to_one",
            "it leaves the noise of the first level in the sample, and grids here end without "
            "noise",
        )
    prediction = PREDICTION[config.get("prediction_type")]
    schedule = read_schedule(config)
    if prediction == "epsilon" and schedule.alpha[-1] == 0:
        key = "rescale_betas_zero_snr" if config.get("rescale_betas_zero_snr") else "beta_end"
        raise config.refused(
            key, "the schedule ends in pure noise, of which an epsilon network says nothing"
        )
    grid = _grid(config, len(schedule))
    solver = "ddim" if ddim else "ddpm"
    return Scheduler(
        schedule=schedule,
        prediction=prediction,
        clip=float(config.get("clip_sample_range")) if config.get("clip_sample") else None,
        solver=solver,
        options={} if ddim else _variance(config),
        grid=grid,
        steps=most_steps(grid, len(schedule), PIPELINE_STEPS[solver]),
    )


def _variance(config: Config) -> dict[str, Any]:
    kind = config.get("variance_type")
    if kind not in VARIANCE:
        raise config.refused("variance_type", "solvers here fix their variance")
    return {} if VARIANCE[kind] == "fixed_small" else {"variance": VARIANCE[kind]}


def read_schedule(config: Config) -> Schedule:
    """Return the schedule of a scheduler's config, in float64. diffusers computes it in float32.

    Raises ExportError for settings that are invalid or make no schedule.
    """
    T = config.get("num_train_timesteps")
    betas = config.get("trained_betas")
    if betas is not None and len(betas) != T:
        raise ExportError(
            f"{config.path}: trained_betas must have num_train_timesteps numbers, got {len(betas)} "
            f"for num_train_timesteps={T}. Correct num_train_timesteps."
        )
    zero_snr = config.get("rescale_betas_zero_snr")
    try:
        with np.errstate(all="ignore"):  # Schedule rejects non-finite values
            found = from_betas(betas) if betas is not None else _named_schedule(config, T)
            return found.zero_terminal_snr() if zero_snr else found
    except RequestError as error:
        raise ExportError(
            f"{config.path}: the betas make no schedule. {error} Correct beta_start, beta_end, "
            "num_train_timesteps or trained_betas."
        ) from error


def _named_schedule(config: Config, T: int) -> Schedule:
    kind = config.get("beta_schedule")
    if kind == "squaredcos_cap_v2":
        return make_schedule("cosine", T=T)
    low = config.get("beta_start")
    high = config.get("beta_end")
    if kind == "sigmoid":
        # β on a sigmoid from -6 to 6 (Xu et al. 2022, GeoDiff). `sigmoid` here is another one.
        steps = 1 / (1 + np.exp(-np.linspace(-6, 6, T)))
        return from_betas((low + (high - low) * steps).tolist())
    name = "linear_raw" if kind == "linear" else "scaled_linear"
    return make_schedule(name, T=T, beta_start=low, beta_end=high)


def _grid(config: Config, T: int) -> str:
    spacing = config.get("timestep_spacing")
    if spacing != "leading":  # the others ignore steps_offset
        return spacing
    offset = config.get("steps_offset")
    if offset >= T:
        raise config.refused("steps_offset", f"it must be below num_train_timesteps, {T}")
    return f"leading({offset})" if offset else spacing


def most_steps(grid: str, T: int, most: int) -> int:
    """Return the most steps, up to `most`, that a scheduler's grid has on T knots.

    A grid that starts at knot 1 has no T steps.
    """
    match = re.fullmatch(r"leading\((\d+)\)", grid)
    offset = int(match[1]) if match else 0
    return next(n for n in range(min(T, most), 0, -1) if (n - 1) * (T // n) + offset < T)


def _own_scheduler(
    folder: Path, schedule: Schedule | str | None, prediction: str | None, clip: float | None
) -> Scheduler:
    """Return what the caller says of a network alone. Raises ExportError if it says nothing."""
    if schedule is None or prediction is None:
        raise ExportError(
            f"{folder} has no scheduler_config.json, so schedule and prediction must be given: "
            "--schedule linear_raw --prediction epsilon is what DDPMScheduler is by default."
        )
    made = schedule_of(schedule)
    return Scheduler(made, prediction, clip, "ddim", {}, "trailing", min(50, len(made)))
