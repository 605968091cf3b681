"""The parts of a folder that diffusers wrote: its network, its scheduler, their classes."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from runtime.errors.arguments import file_path
from runtime.errors.messages import printable
from runtime.files import from_json

from ...errors import ExportError
from .config import in_json, read_json

PIPELINES = ("DDPMPipeline", "DDIMPipeline")
WEIGHTS = "diffusion_pytorch_model"
NETWORKS = ("unet", "unet_ema")
"""The folders that diffusers' training scripts write networks to, in a checkpoint."""


class Folder(NamedTuple):
    """The parts of a diffusers folder.

    Attributes:
        path: The folder.
        pipeline: The class in model_index.json; None without one.
        classes: Those of the unet and the scheduler, as model_index.json names them.
        unet: The folder of the network.
        scheduler: The scheduler's config file; None without one.
    """

    path: Path
    pipeline: str | None
    classes: Mapping[str, str]
    unet: Path
    scheduler: Path | None


def is_diffusers(folder: Path) -> bool:
    """Return whether a folder looks like one that diffusers wrote, and not like a run."""
    # A run has a config.json too, but without diffusers' _class_name.
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


def existing_folder(folder: Any) -> Path:
    """Return the path of a folder. Raises ExportError if there is none that can be read."""
    found = file_path("folder", folder)
    try:
        if found.is_dir():
            return found
    except OSError as error:
        raise ExportError(f"{printable(found)} cannot be read ({error.strerror}).") from error
    raise ExportError(f"{printable(found)} is not a folder. Pass one that save_pretrained wrote.")


def parts_of(folder: Path) -> Folder:
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
    return Folder(folder, pipeline, classes, unet, scheduler)


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
        # diffusers writes [null, null] for an optional part that was left out.
        if part.startswith("_") or entry == [None, None]:
            continue
        if part not in ("unet", "scheduler"):
            raise ExportError(
                f"{index}: a {pipeline} has a unet and a scheduler, got the unknown key "
                f"{part!r}={in_json(entry)}. Remove it if the images do not depend on it."
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
    # Both networks of a checkpoint are valid; only the user knows which one is meant.
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
    # By number, because checkpoint-1000 comes before checkpoint-500 by name.
    numbered = {
        int(match[1]): path
        for path in folder.glob("checkpoint-*")
        if (match := re.fullmatch(r"checkpoint-(\d{1,18})", path.name)) and _networks_of(path)
    }
    return [numbered[number] for number in sorted(numbered)]


def _networks_of(checkpoint: Path) -> str:
    names = [name for name in NETWORKS if (checkpoint / name / "config.json").exists()]
    return " or ".join(str(checkpoint / name) for name in names)
