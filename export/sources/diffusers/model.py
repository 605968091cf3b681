"""A diffusers folder as a `Model`: DDPMPipeline, DDIMPipeline, or a bare network.

Only files on disk are read. Every setting is mapped to its counterpart here; unsupported ones raise
an error that names them. diffusers itself is imported when it is needed, and loads the weights.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from runtime.bundle.conditions import Condition
from runtime.diffusion.arrays import Array
from runtime.diffusion.schedule import Schedule
from runtime.errors import RequestError
from runtime.errors.arguments import text

from ..conditions import declared_conditions
from ..model import bundle_name, json_object
from ..module import from_module
from ..torch_model import TorchModel
from .config import Config
from .folder import Folder, existing_folder, parts_of
from .network import CONDITIONAL, load_network, network_of, sample_shape, texts_of, wrapped
from .scheduler import PIPELINE_STEPS, Scheduler, most_steps, scheduler_of


def from_diffusers(
    folder: str | Path,
    *,
    name: str | None = None,
    schedule: Schedule | str | None = None,
    prediction: str | None = None,
    clip: float | None = None,
    null_label: int | None = None,
    label_names: Sequence[str] | None = None,
    variant: str | None = None,
    conditions: Sequence[Condition] = (),
    nulls: Mapping[str, Array] | None = None,
    examples: Mapping[str, Array] | None = None,
    solver: str | None = None,
    steps: int | None = None,
    grid: str | None = None,
    guidance: float = 2.0,
    provenance: Mapping[str, Any] | None = None,
) -> TorchModel:
    """Read the network and the scheduler that `save_pretrained` wrote.

    Args:
        folder: With model_index.json, unet/ and scheduler/; or config.json, the weights and
            scheduler_config.json. Or a network alone, such as unet/ of a training checkpoint.
        name: The bundle's name [the folder's].
        schedule, prediction: For a network alone, whose files say neither.
        clip: For a network alone, see `from_module` [1; none for a UNet2DConditionModel].
        null_label, label_names, guidance, provenance: As in `from_module`.
        variant: As in diffusers, such as "fp16". The network is computed in float32.
        conditions, nulls, examples: encoder_hidden_states, if the network takes it [77 tokens].
        solver, steps, grid: The bundle's defaults [the scheduler's].

    Raises:
        ExportError: A file or a setting cannot be exported. The message names it.
        RequestError: An argument is invalid.
    """
    _check_names(variant, solver, grid)
    extra = json_object("provenance", provenance)
    parts = parts_of(existing_folder(folder))
    network = network_of(parts)
    shape = sample_shape(network)
    texts = texts_of(network, declared_conditions(conditions))
    config, read = scheduler_of(parts, schedule, prediction, clip, network.kind == CONDITIONAL)
    classes = _classes(parts, network, null_label, label_names)
    # After all checks of settings, because it takes longest.
    unet, version = load_network(parts.unet, variant, network.kind)
    return from_module(
        wrapped(unet, network).eval(),
        name=bundle_name(parts.path.resolve().name) if name is None else name,
        sample_shape=shape,
        num_classes=classes - (null_label is not None),
        null_label=null_label,
        label_names=label_names,
        conditions=texts,
        nulls=nulls,
        examples=examples,
        **_sampling(read, solver, steps, grid),
        guidance=guidance,
        provenance={**_provenance(parts, network, config, version), **extra},
    )


def _sampling(
    read: Scheduler, solver: str | None, steps: int | None, grid: str | None
) -> dict[str, Any]:
    """Return the settings of a scheduler for `from_module`, with the caller's in their place."""
    own_solver = solver in (None, read.solver)
    return {
        "prediction": read.prediction,
        "schedule": read.schedule,
        "clip": read.clip,
        "solver": read.solver if solver is None else solver,
        "options": read.options if own_solver else {},
        "steps": _steps(read, own_solver) if steps is None else steps,
        "grid": read.grid if grid is None else grid,
    }


def _classes(
    parts: Folder, network: Config, null_label: int | None, names: Sequence[str] | None
) -> int:
    """Return the number of labels, 0 for none. Raises RequestError for labels that do not exist."""
    classes = network.get("num_class_embeds") or 0
    if not classes and (null_label is not None or names is not None):
        raise RequestError(
            f"{parts.path} has no labels (num_class_embeds is not set): leave null_label and "
            f"label_names out."
        )
    return classes


def _steps(read: Scheduler, own_solver: bool) -> int:
    """Return the default number of steps: the scheduler's, or for another solver DDIM's."""
    if own_solver:
        return read.steps
    return most_steps(read.grid, len(read.schedule), PIPELINE_STEPS["ddim"])


def _provenance(
    parts: Folder, network: Config, scheduler: Config | None, version: str
) -> dict[str, object]:
    mapped = list(scheduler.mapped) if scheduler else []
    return {
        "source": f"diffusers, {parts.pipeline or network.kind}",
        "unet": network.public(),
        "scheduler": scheduler and scheduler.public(),
        **({"mapped": mapped} if mapped else {}),
        "diffusers": version,
    }


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
