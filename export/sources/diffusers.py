"""A diffusers folder as a `Model`: DDPMPipeline, DDIMPipeline, or a bare UNet2DModel.

Only files on disk are read. Every setting is mapped to what it means here or refused by name.
diffusers itself is imported when it is needed, and loads the weights.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from runtime.diffusion.schedule import Schedule, from_betas, make_schedule
from runtime.errors import RequestError
from runtime.errors.arguments import file_path, text
from runtime.errors.messages import described, printable
from runtime.files import from_json

from ..errors import ExportError
from .diffusers_config import (
    Config,
    class_name,
    diffusers_module,
    in_json,
    network_config,
    read_json,
    scheduler_config,
)
from .diffusers_convert import advice
from .loading import mismatch
from .model import Model, bundle_name, json_object
from .module import from_module, schedule_of

PIPELINES = ("DDPMPipeline", "DDIMPipeline")
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
WEIGHTS = "diffusion_pytorch_model"
NETWORKS = ("unet", "unet_ema")
"""The folders that diffusers' training scripts write networks to, in a checkpoint."""
PIPELINE_STEPS = {"ddpm": 1000, "ddim": 50}
"""The default number of steps of DDPMPipeline and DDIMPipeline."""


class UNet(nn.Module):
    """A UNet2DModel as module(x, time[, label]) → F."""

    def __init__(self, unet: nn.Module) -> None:
        super().__init__()
        self.unet = unet

    def forward(self, x: Tensor, time: Tensor, *label: Tensor) -> Tensor:
        return self.unet(x, time, *label, return_dict=False)[0]


class Scheduler(NamedTuple):
    """A scheduler's config in the terms of this project."""

    schedule: Schedule
    prediction: str
    clip: float | None
    solver: str
    options: dict[str, Any]
    grid: str
    steps: int


class _Folder(NamedTuple):
    """The parts of a diffusers folder.

    pipeline: the class in model_index.json, None without one. classes: of the unet and the
    scheduler, as model_index.json names them.
    """

    pipeline: str | None
    classes: Mapping[str, str]
    unet: Path
    scheduler: Path | None


def is_diffusers(folder: Path) -> bool:
    """Return whether a folder looks like one that diffusers wrote, and not like a run."""
    try:
        if (folder / "model_index.json").exists() or _checkpoints(folder):
            return True
        if any((folder / name / "config.json").exists() for name in NETWORKS):
            return True
        if any(folder.glob(f"{WEIGHTS}*")):
            return True
        return "_class_name" in from_json((folder / "config.json").read_bytes())
    except (OSError, ValueError, TypeError):
        return False


def from_diffusers(
    folder: str | Path,
    *,
    name: str | None = None,
    schedule: Schedule | str | None = None,
    prediction: str | None = None,
    null_label: int | None = None,
    label_names: Sequence[str] | None = None,
    variant: str | None = None,
    solver: str | None = None,
    steps: int | None = None,
    grid: str | None = None,
    guidance: float = 2.0,
    provenance: Mapping[str, Any] | None = None,
) -> Model:
    """Read the network and the scheduler that `save_pretrained` wrote.

    Args:
        folder: model_index.json with unet/ and scheduler/; or config.json, the weights and
            scheduler_config.json side by side; or a UNet2DModel alone, such as unet/ or unet_ema/
            of a checkpoint that a training script of diffusers wrote.
        name: The bundle's name [the folder's].
        schedule, prediction: For a network alone, whose files say neither.
        null_label: The label among num_class_embeds that stands for none, if one was trained.
        label_names: The names of the classes, without the null label [their numbers].
        variant: As in diffusers, such as "fp16". The network is computed in float32.
        solver, steps, grid: The bundle's defaults [the scheduler's].
        guidance, provenance: As in `from_module`.

    Raises:
        ExportError: A file or a setting cannot be exported. The message names it.
        RequestError: An argument is invalid.
    """
    folder = _existing_folder(folder)
    _check_names(variant, solver, grid)
    extra = json_object("provenance", provenance)
    parts = _parts(folder)
    network = _network(parts)
    shape = _sample_shape(network)
    settings, read = _scheduler(folder, parts, schedule, prediction)
    classes = network.get("num_class_embeds") or 0
    if not classes and (null_label is not None or label_names is not None):
        raise RequestError(
            f"{folder} has no labels (num_class_embeds is not set): leave null_label and "
            f"label_names out."
        )
    unet, version = _load(parts.unet, variant)
    own_solver = solver in (None, read.solver)
    if steps is None:
        most = PIPELINE_STEPS["ddim"]
        steps = read.steps if own_solver else _most_steps(read.grid, len(read.schedule), most)
    return from_module(
        UNet(unet).eval(),
        name=bundle_name(folder.resolve().name) if name is None else name,
        sample_shape=shape,
        prediction=read.prediction,
        schedule=read.schedule,
        clip=read.clip,
        num_classes=classes - (null_label is not None),
        null_label=null_label,
        label_names=label_names,
        solver=read.solver if solver is None else solver,
        options=read.options if own_solver else {},
        steps=steps,
        grid=read.grid if grid is None else grid,
        guidance=guidance,
        provenance={
            "source": f"diffusers, {parts.pipeline or 'UNet2DModel'}",
            "unet": network.public(),
            "scheduler": settings and settings.public(),
            **({"mapped": list(settings.mapped)} if settings and settings.mapped else {}),
            "diffusers": version,
            **extra,
        },
    )


def _existing_folder(folder: Any) -> Path:
    found = file_path("folder", folder)
    try:
        if found.is_dir():
            return found
    except OSError as error:
        raise ExportError(f"{printable(found)} cannot be read ({error.strerror}).") from error
    raise ExportError(f"{printable(found)} is not a folder. Pass one that save_pretrained wrote.")


def _check_names(variant: Any, solver: Any, grid: Any) -> None:
    if variant is not None and not re.fullmatch(r"\w[\w.-]*", text("variant", variant, "fp16")):
        raise RequestError(
            f"variant must be letters, digits, '_', '-' and '.', got {variant!r}. "
            "Pass the part of the file's name that names the variant, such as 'fp16'."
        )
    if solver is not None:
        text("solver", solver, "ddim")
    if grid is not None:
        text("grid", grid, "trailing")


def _parts(folder: Path) -> _Folder:
    """Find the parts of a folder. Raises ExportError for one that diffusers did not write."""
    index = folder / "model_index.json"
    pipeline, classes = _pipeline(index) if index.exists() else (None, {})
    unet = _network_folder(folder, pipeline is not None)
    paths = (
        folder / "scheduler" / "scheduler_config.json",
        folder / "scheduler_config.json",
    )
    scheduler = next((path for path in paths if path.exists()), None)
    if pipeline and not scheduler:
        raise ExportError(
            f"{folder} is a {pipeline} without its scheduler: {paths[0]} is missing. "
            "Save the folder again with save_pretrained."
        )
    return _Folder(pipeline, classes, unet, scheduler)


def _pipeline(index: Path) -> tuple[str, dict[str, str]]:
    """Return the class of a pipeline, and those of its unet and its scheduler.

    Raises ExportError for other pipelines, and for parts that these pipelines do not have.
    """
    found = read_json(index)
    pipeline = found.get("_class_name")
    if not isinstance(pipeline, str) or pipeline not in PIPELINES:
        raise ExportError(
            f"{index}: _class_name must be {' or '.join(PIPELINES)}, got {in_json(pipeline)}. "
            "A UNet2DModel alone can be exported too: pass its folder, with --schedule and "
            "--prediction. Export any other network as a PyTorch module, with --module."
        )
    classes = {}
    for part, entry in found.items():
        if part.startswith("_") or entry == [None, None]:
            continue
        if part not in ("unet", "scheduler"):
            raise ExportError(
                f"{index}: a {pipeline} has a unet and a scheduler, got the unknown key "
                f"{part!r}={in_json(entry)}. Remove it if the pictures do not depend on it."
            )
        library, name = entry if isinstance(entry, list) and len(entry) == 2 else (None, None)
        if library != "diffusers" or not isinstance(name, str):
            raise ExportError(
                f'{index}: {part} must be ["diffusers", CLASS], got {in_json(entry)}. '
                "Export a network with code of its own as a PyTorch module, with --module."
            )
        classes[part] = name
    return pipeline, classes


def _network_folder(folder: Path, is_pipeline: bool) -> Path:
    """Return the folder of the network. Raises ExportError if there is none, or a choice of two."""
    names = NETWORKS[:1] if is_pipeline else NETWORKS
    networks = [folder / name for name in names if (folder / name).is_dir()]
    if len(networks) == 2:
        raise ExportError(
            f"{folder} is a training checkpoint with two networks: {networks[0]}, the weights of "
            f"its last step, and {networks[1]}, their moving average, which is what training "
            "scripts sample with. Pass one of these folders, with --schedule and --prediction."
        )
    unet = networks[0] if networks else folder
    if (unet / "config.json").is_file():
        return unet
    if (unet / "config.json").exists():
        raise ExportError(f"{unet / 'config.json'} must be a file, and it is a folder.")
    checkpoints = _checkpoints(folder)
    if checkpoints:
        raise ExportError(
            f"{folder} has no network itself, but {len(checkpoints)} training checkpoints, the "
            f"newest of which is {checkpoints[-1]}. Pass {_networks_of(checkpoints[-1])}, with "
            "--schedule and --prediction."
        )
    part = "" if unet == folder else f"{unet.name}/"
    raise ExportError(
        f"{folder} has no {part}config.json. Pass a folder that save_pretrained wrote."
    )


def _checkpoints(folder: Path) -> list[Path]:
    """Return the checkpoints that a training script of diffusers left in a folder, oldest first."""
    numbered = {
        int(match[1]): path
        for path in folder.glob("checkpoint-*")
        if (match := re.fullmatch(r"checkpoint-(\d{1,18})", path.name)) and _networks_of(path)
    }
    return [numbered[number] for number in sorted(numbered)]


def _networks_of(checkpoint: Path) -> str:
    names = [name for name in NETWORKS if (checkpoint / name / "config.json").exists()]
    return " or ".join(str(checkpoint / name) for name in names)


def _network(parts: _Folder) -> Config:
    """Read the config of a UNet2DModel. Raises ExportError for other networks."""
    path = parts.unet / "config.json"
    found = read_json(path)
    kind = class_name(path, found, parts.classes.get("unet"))
    if kind != "UNet2DModel":
        raise ExportError(
            f"{path}: _class_name must be UNet2DModel, got {in_json(kind)}. "
            "Export any other network as a PyTorch module, with --module."
        )
    return network_config(path, found)


def _scheduler(
    folder: Path, parts: _Folder, schedule: Schedule | str | None, prediction: str | None
) -> tuple[Config | None, Scheduler]:
    """Read the scheduler's config, or take what the caller says of a network alone."""
    if parts.scheduler is None:
        return None, _own_scheduler(folder, schedule, prediction)
    if schedule is not None or prediction is not None:
        raise RequestError(
            f"{folder} has a scheduler, which says schedule and prediction: leave them out."
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


def _sample_shape(config: Config) -> tuple[int, int, int]:
    """Return [C, H, W] of a UNet2DModel's config. Raises ExportError for unsupported settings."""
    values = config.values
    channels = config.get("in_channels")
    out = config.get("out_channels")
    if out == 2 * channels:
        raise config.refused(
            "out_channels",
            "twice in_channels is a learned variance, and solvers here fix their variance",
        )
    if out != channels:
        raise config.refused("out_channels", f"in_channels is {channels}, and F has x's shape")
    if config.get("center_input_sample"):
        raise config.refused(
            "center_input_sample",
            "its samples lie in 0 to 1, and every scheduler here uses -1 to 1",
        )
    if values["time_embedding_type"] == "fourier":
        raise config.refused(
            "time_embedding_type",
            "such a network is conditioned on sigma and divides by it, as score SDEs do",
        )
    if values["time_embedding_type"] != "positional":
        raise config.refused(
            "time_embedding_type",
            "the network must take any time, between integers too: positional",
        )
    if values["class_embed_type"] is not None:
        raise config.refused("class_embed_type", "labels are integers: null with num_class_embeds")
    if values["sample_size"] is None:
        raise config.refused(
            "sample_size", "the graph has one size: write it into the network's config.json"
        )
    size = config.get("sample_size")
    height, width = (size, size) if isinstance(size, int) else size
    return channels, height, width


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
        steps=_most_steps(grid, len(schedule), PIPELINE_STEPS[solver]),
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
        with np.errstate(all="ignore"):  # Schedule refuses what is not finite
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


def _most_steps(grid: str, T: int, most: int) -> int:
    """Return the most steps, up to `most`, that a scheduler's grid has on T knots.

    A grid that starts at knot 1 has no T steps.
    """
    match = re.fullmatch(r"leading\((\d+)\)", grid)
    offset = int(match[1]) if match else 0
    return next(n for n in range(min(T, most), 0, -1) if (n - 1) * (T // n) + offset < T)


def _own_scheduler(
    folder: Path, schedule: Schedule | str | None, prediction: str | None
) -> Scheduler:
    """Return what the caller says of a network alone. Raises ExportError if it says nothing."""
    if schedule is None or prediction is None:
        raise ExportError(
            f"{folder} has no scheduler_config.json, so schedule and prediction must be given: "
            "--schedule linear_raw --prediction epsilon is what DDPMScheduler is by default."
        )
    made = schedule_of(schedule)
    return Scheduler(made, prediction, 1.0, "ddim", {}, "trailing", min(50, len(made)))


def _load(folder: Path, variant: str | None) -> tuple[nn.Module, str]:
    """Load the network in float32 and evaluation mode; return it and diffusers' version.

    Raises ExportError unless every weight is there, as safetensors.
    """
    _find_weights(folder, variant)
    diffusers = diffusers_module()
    try:
        unet, info = diffusers.UNet2DModel.from_pretrained(
            folder,
            variant=variant,
            use_safetensors=True,
            local_files_only=True,
            low_cpu_mem_usage=False,
            torch_dtype=torch.float32,
            output_loading_info=True,
        )
    except (
        Exception
    ) as error:  # a config that makes no network, damaged files, other shapes: many types
        raise ExportError(
            f"{folder}: diffusers cannot load the network ({described(error)})."
        ) from error
    faults = [
        f"{key!r} is {state}"
        for state in ("missing", "unexpected")
        for key in info[f"{state}_keys"]
    ]
    if faults:
        raise ExportError(mismatch(str(folder), faults))
    return unet.eval().requires_grad_(False), diffusers.__version__


def _find_weights(folder: Path, variant: str | None) -> None:
    """Raises ExportError unless the weights, of this variant, are there as safetensors."""
    endings = (".safetensors", ".safetensors.index.json")
    stems = [f"{WEIGHTS}.{variant}"] if variant else [WEIGHTS]
    # A variant's index has been named both ways.
    indices = [f"{WEIGHTS}.safetensors.index.{variant}.json"] if variant else []
    paths = [folder / name for name in [*(s + e for s in stems for e in endings), *indices]]
    if any(path.is_file() for path in paths):
        return
    folders = [path for path in paths if path.is_dir()]
    if folders:
        raise ExportError(f"{folders[0]} must be a file, and it is a folder.")
    pattern = re.compile(rf"{WEIGHTS}\.([A-Za-z_]\w*?)(?:-\d+-of-\d+)?\.safetensors")
    files = sorted(folder.glob(f"{WEIGHTS}.*.safetensors"))
    matches = (pattern.fullmatch(path.name) for path in files)
    variants = sorted({match[1] for match in matches if match})
    wanted = f"variant {variant!r}" if variant else "plain weights"
    if variants:
        raise ExportError(
            f"{folder} has no {wanted}. It has the variants {', '.join(variants)}: name one with "
            f"--variant."
        )
    if list(folder.glob(f"{WEIGHTS}*.bin")):
        raise ExportError(
            f"{folder} has its weights as .bin only, a format that can run code when it is opened, "
            "so it is not read. If you trust the file: diffusers.UNet2DModel.from_pretrained("
            "path, use_safetensors=False).save_pretrained(path)."
        )
    if list(folder.glob("*.msgpack")):
        raise ExportError(
            f"{folder} has Flax weights (.msgpack) only. Convert them with a diffusers version "
            "that reads Flax: UNet2DModel.from_pretrained(path, from_flax=True)."
        )
    raise ExportError(
        f"{folder} has no {stems[0]}.safetensors. Save the network with save_pretrained."
    )
