"""A diffusers folder as a `Model`: DDPMPipeline, DDIMPipeline, or a bare UNet2DModel. Only files on disk are read.

Every setting is mapped to what it means here or refused by name. diffusers itself is imported where it is needed, and loads the weights.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from runtime.errors import RequestError, unknown
from runtime.files import from_json
from runtime.schedule import Schedule, from_betas, make_schedule

from .errors import ExportError
from .from_module import from_module, mismatch
from .model import Model

PIPELINES = ("DDPMPipeline", "DDIMPipeline")
SCHEDULERS = ("DDPMScheduler", "DDIMScheduler")
PREDICTION = {"epsilon": "epsilon", "v_prediction": "v", "sample": "x0"}
VARIANCE = {
    "fixed_small": "fixed_small",
    "fixed_small_log": "fixed_small",
    "fixed_large": "fixed_large",
    "fixed_large_log": "fixed_large",
}
"""The _log forms are the same variance, computed by way of its logarithm. (DDPMScheduler.step takes the square root of
fixed_large_log's logarithm and gets NaN: what is meant is taken.)"""
WEIGHTS = "diffusion_pytorch_model"


class UNet(nn.Module):
    """A UNet2DModel as module(x, time[, label]) → F."""

    def __init__(self, unet: nn.Module) -> None:
        super().__init__()
        self.unet = unet

    def forward(self, x: Tensor, time: Tensor, *label: Tensor) -> Tensor:
        return self.unet(x, time, *label, return_dict=False)[0]


class Scheduler(NamedTuple):
    """What a scheduler's config comes to here."""

    schedule: Schedule
    prediction: str
    clip: float | None
    solver: str
    options: dict[str, Any]
    grid: str
    steps: int


class _Folder(NamedTuple):
    """Where the parts of a diffusers folder are. pipeline: the class in model_index.json, None without one."""

    pipeline: str | None
    unet: Path
    scheduler: Path | None


def is_diffusers(folder: Path) -> bool:
    """Whether a folder looks like one that diffusers wrote, and not like a run."""
    if (folder / "model_index.json").is_file():
        return True
    try:
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
    """The network and scheduler that `save_pretrained` wrote, or a repository's files: model_index.json with unet/ and scheduler/,
    or config.json, the weights and scheduler_config.json side by side, or a UNet2DModel alone.

    schedule, prediction: for a network alone, which says neither. null_label: the label among num_class_embeds that stands for
    none, where one was trained. variant: as in diffusers, such as "fp16"; computed in float32. solver, steps, grid: the bundle's
    defaults instead of the scheduler's. The rest as in `from_module`.

    Raises ExportError, which names the setting, for what cannot be exported rightly; RequestError for arguments that make no sense.
    """
    folder = Path(folder)
    found = _parts(folder)
    config = _config(found.unet / "config.json", "UNet2DModel")
    shape = _sample_shape(config)
    if found.scheduler:
        if schedule is not None or prediction is not None:
            raise RequestError(f"{folder} has a scheduler, which says schedule and prediction: leave them out.")
        settings = _config(found.scheduler, *SCHEDULERS)
        read = read_scheduler(settings, found.pipeline)
    else:
        settings, read = None, _own_scheduler(folder, schedule, prediction)
    classes = config["num_class_embeds"] or 0
    if not classes and (null_label is not None or label_names):
        raise RequestError(
            f"{folder} has no labels (num_class_embeds is not set): leave null_label and label_names out."
        )
    unet, version = _load(found.unet, variant)
    own_solver = solver in (None, read.solver)
    return from_module(
        UNet(unet).eval(),
        name=re.sub(r"[^A-Za-z0-9_.-]", "-", folder.resolve().name) if name is None else name,
        sample_shape=shape,
        prediction=read.prediction,
        schedule=read.schedule,
        clip=read.clip,
        num_classes=classes - (null_label is not None),
        null_label=null_label,
        label_names=label_names,
        solver=read.solver if solver is None else solver,
        options=read.options if own_solver else {},
        steps=steps if steps is not None else read.steps if own_solver else min(50, len(read.schedule)),
        grid=read.grid if grid is None else grid,
        guidance=guidance,
        provenance={
            "source": f"diffusers, {found.pipeline or 'UNet2DModel'}",
            "unet": _public(config),
            "scheduler": settings and _public(settings),
            "diffusers": version,
            **(provenance or {}),
        },
    )


def _parts(folder: Path) -> _Folder:
    """Raises ExportError for a folder that is none of diffusers', and for another pipeline."""
    if not folder.is_dir():
        raise ExportError(f"{folder} is not a folder.")
    pipeline = None
    if (folder / "model_index.json").is_file():
        pipeline = _read(folder / "model_index.json").get("_class_name")
        if pipeline not in PIPELINES:
            raise ExportError(
                f"{folder} is a {pipeline}. What can be exported: {', '.join(PIPELINES)}, and a UNet2DModel alone; "
                "any other network as a PyTorch module, with --module."
            )
    unet = folder / "unet" if (folder / "unet").is_dir() else folder
    if not (unet / "config.json").is_file():
        raise ExportError(
            f"{folder} has no {'unet/' if unet != folder else ''}config.json: a folder that save_pretrained wrote expected."
        )
    paths = (folder / "scheduler" / "scheduler_config.json", folder / "scheduler_config.json")
    scheduler = next((path for path in paths if path.is_file()), None)
    if pipeline and not scheduler:
        raise ExportError(f"{folder} is a {pipeline} without its scheduler: {paths[0]} is missing.")
    return _Folder(pipeline, unet, scheduler)


def _read(path: Path) -> dict[str, Any]:
    try:
        found = from_json(path.read_bytes())
    except (OSError, ValueError) as error:
        raise ExportError(f"{path} cannot be read as JSON ({error}).") from error
    if not isinstance(found, dict):
        raise ExportError(f"{path} is not a config: a JSON object expected.")
    return found


def _config(path: Path, *classes: str) -> dict[str, Any]:
    """A config file with the defaults of its class filled in. Raises ExportError for another class than these."""
    found = _read(path)
    name = found.get("_class_name", classes[0])
    if name not in classes:
        convert = (
            "" if classes != SCHEDULERS else f" {classes[0]}.from_config(….config).save_pretrained(…) converts one."
        )
        raise ExportError(f"{path} is of a {name}; {' or '.join(classes)} expected.{convert}")
    parameters = inspect.signature(getattr(_diffusers(), name).__init__).parameters.values()
    defaults = {p.name: p.default for p in parameters if p.default is not p.empty}
    return {**defaults, **found, "_class_name": name}


def _diffusers() -> Any:
    try:
        import diffusers
    except ImportError as error:
        raise ExportError(
            f"diffusers cannot be imported ({error}). Install it: pip install 'unnoise[diffusers]'."
        ) from error
    return diffusers


def _public(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config without private entries, one of which is a path of the machine that it was saved on."""
    return {k: v for k, v in config.items() if not k.startswith("_") or k in ("_class_name", "_diffusers_version")}


def _refused(setting: str, value: object, why: str) -> ExportError:
    return ExportError(f"{setting}={value!r} cannot be exported: {why}.")


def _sample_shape(config: Mapping[str, Any]) -> tuple[int, int, int]:
    """[C, H, W] of a UNet2DModel's config. Raises ExportError for a setting that has no place here."""
    channels, out, size = config["in_channels"], config["out_channels"], config["sample_size"]
    embedding, embedding_of_class = config["time_embedding_type"], config["class_embed_type"]
    if out == 2 * channels:
        raise _refused("out_channels", out, "twice in_channels is a learned variance, and solvers here fix theirs")
    if out != channels:
        raise _refused("out_channels", out, f"in_channels is {channels}, and F has the shape of x")
    if config["center_input_sample"]:
        raise _refused("center_input_sample", True, "its samples lie in 0 … 1, which no scheduler here is made for")
    if embedding == "fourier":
        raise _refused(
            "time_embedding_type", embedding, "such a network is told sigma and divides by it, as score SDEs do"
        )
    if embedding != "positional":
        raise _refused(
            "time_embedding_type", embedding, "the network must take any time, between whole ones too: positional"
        )
    if embedding_of_class is not None:
        raise _refused("class_embed_type", embedding_of_class, "labels are whole numbers: None with num_class_embeds")
    if size is None:
        raise _refused("sample_size", size, "the graph has one size: write it into the network's config.json")
    height, width = (size, size) if isinstance(size, int) else size
    return channels, height, width


def read_scheduler(config: Mapping[str, Any], pipeline: str | None = None) -> Scheduler:
    """A DDPMScheduler's or DDIMScheduler's config, complete, in our terms. pipeline: a DDIMPipeline samples with DDIM whatever its scheduler.

    Raises ExportError for a setting that has no place here.
    """
    if config["prediction_type"] not in PREDICTION:
        raise unknown("prediction_type", config["prediction_type"], PREDICTION, ExportError)
    if config["thresholding"]:
        raise _refused(
            "thresholding", True, "solvers here clip at a fixed bound; set it to false, with clip_sample if need be"
        )
    ddim = pipeline == "DDIMPipeline" or config["_class_name"] == "DDIMScheduler"
    if not config.get("set_alpha_to_one", True):
        raise _refused(
            "set_alpha_to_one",
            False,
            "it leaves the noise of the first level in the sample, and grids here end without noise",
        )
    schedule = read_schedule(config)
    prediction = PREDICTION[config["prediction_type"]]
    if prediction == "epsilon" and schedule.alpha[-1] == 0:
        raise _refused("rescale_betas_zero_snr", True, "an epsilon network says nothing where there is no signal")
    return Scheduler(
        schedule=schedule,
        prediction=prediction,
        clip=float(config["clip_sample_range"]) if config["clip_sample"] else None,
        solver="ddim" if ddim else "ddpm",
        options={} if ddim else _variance(config["variance_type"]),
        grid=_grid(config, len(schedule)),
        steps=min(50, len(schedule)) if ddim else _most_steps(config, len(schedule)),
    )


def _variance(kind: str) -> dict[str, Any]:
    if kind in ("learned", "learned_range"):
        raise _refused("variance_type", kind, "solvers here fix their variance")
    if kind not in VARIANCE:
        raise unknown("variance_type", kind, VARIANCE, ExportError)
    return {} if VARIANCE[kind] == "fixed_small" else {"variance": VARIANCE[kind]}


def read_schedule(config: Mapping[str, Any]) -> Schedule:
    """The schedule that a scheduler's config names, in float64 where diffusers computes it in float32.

    Raises ExportError for an unknown beta_schedule, RequestError for numbers that are no schedule.
    """
    T, kind, betas = config["num_train_timesteps"], config["beta_schedule"], config["trained_betas"]
    ends = {"T": T, "beta_start": config["beta_start"], "beta_end": config["beta_end"]}
    if betas is not None:
        found = from_betas(betas)
    elif kind == "linear":
        found = make_schedule("linear_raw", **ends)
    elif kind == "scaled_linear":
        found = make_schedule("scaled_linear", **ends)
    elif kind == "squaredcos_cap_v2":
        found = make_schedule("cosine", T=T)
    elif kind == "sigmoid":
        # β on a sigmoid from -6 to 6 (Xu et al. 2022, GeoDiff); what is called `sigmoid` here is another.
        low, high = config["beta_start"], config["beta_end"]
        found = from_betas((low + (high - low) / (1 + np.exp(-np.linspace(-6, 6, T)))).tolist())
    else:
        raise unknown("beta_schedule", kind, ("linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid"), ExportError)
    return found.zero_terminal_snr() if config["rescale_betas_zero_snr"] else found


def _grid(config: Mapping[str, Any], T: int) -> str:
    spacing, offset = config["timestep_spacing"], config["steps_offset"]
    if spacing not in ("leading", "trailing", "linspace"):
        raise unknown("timestep_spacing", spacing, ("leading", "trailing", "linspace"), ExportError)
    if spacing != "leading" or offset == 0:  # the others ignore it
        return spacing
    if not isinstance(offset, int) or not 0 < offset < T:
        raise _refused("steps_offset", offset, f"an integer from 0 to {T - 1} expected")
    return f"leading({offset})"


def _most_steps(config: Mapping[str, Any], T: int) -> int:
    """The most steps up to T that the grid has: one less than T where it starts at 1."""
    offset = config["steps_offset"] if config["timestep_spacing"] == "leading" else 0
    return next(n for n in range(T, 0, -1) if (n - 1) * (T // n) + offset < T)


def _own_scheduler(folder: Path, schedule: Schedule | str | None, prediction: str | None) -> Scheduler:
    """For a network alone: what the caller says of it. Raises ExportError where the caller says nothing."""
    if schedule is None or prediction is None:
        raise ExportError(
            f"{folder} has no scheduler_config.json, so schedule and prediction must be given: "
            "--schedule linear_raw --prediction epsilon is what DDPMScheduler is unless told otherwise."
        )
    schedule = make_schedule(schedule) if isinstance(schedule, str) else schedule
    return Scheduler(schedule, prediction, 1.0, "ddim", {}, "trailing", min(50, len(schedule)))


def _load(folder: Path, variant: str | None) -> tuple[nn.Module, str]:
    """The network in float32 and evaluation mode, and diffusers' version. Raises ExportError unless every weight is there, as safetensors."""
    _find_weights(folder, variant)
    diffusers = _diffusers()
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
    except Exception as error:  # a config that makes no network, damaged files, shapes that do not match: many types
        line = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
        raise ExportError(
            f"{folder}: diffusers cannot load the network ({type(error).__name__}: {line[:300]})."
        ) from error
    faults = [f"{key!r} is {state}" for state in ("missing", "unexpected") for key in info[f"{state}_keys"]]
    if faults:
        raise ExportError(mismatch(str(folder), faults))
    return unet.eval().requires_grad_(False), diffusers.__version__


def _find_weights(folder: Path, variant: str | None) -> None:
    """Raises ExportError unless the weights, of this variant, are there as safetensors."""
    endings = (".safetensors", ".safetensors.index.json")
    stems = [f"{WEIGHTS}.{variant}"] if variant else [WEIGHTS]
    # A variant's index has been named both ways.
    indices = [f"{WEIGHTS}.safetensors.index.{variant}.json"] if variant else []
    if any((folder / name).is_file() for name in [*(s + e for s in stems for e in endings), *indices]):
        return
    pattern = re.compile(rf"{WEIGHTS}\.([A-Za-z_]\w*?)(?:-\d+-of-\d+)?\.safetensors")
    matches = (pattern.fullmatch(path.name) for path in sorted(folder.glob(f"{WEIGHTS}.*.safetensors")))
    variants = sorted({match[1] for match in matches if match})
    wanted = f"variant {variant!r}" if variant else "plain weights"
    if variants:
        raise ExportError(
            f"{folder} has no {wanted}; it has the variants {', '.join(variants)}: name one with --variant."
        )
    if list(folder.glob(f"{WEIGHTS}*.bin")):
        raise ExportError(
            f"{folder} has its weights as .bin only, which can run code when it is opened, so it is not read. Where you trust it: "
            "diffusers.UNet2DModel.from_pretrained(path, use_safetensors=False).save_pretrained(path)."
        )
    raise ExportError(f"{folder} has no {stems[0]}.safetensors.")
