"""Checkpoints: a folder of safetensors files and one JSON file, whole or not there. Never pickle.

runs/NAME/checkpoints/step-00000250/
    weights.safetensors  ema.safetensors  optimizer.safetensors
    ema-50000.safetensors  power-0.05.safetensors    other averages, if there are any
    state.json    step, seconds, environment, what else is counted, the sha256 of each file
"""

from __future__ import annotations

import hashlib
import platform
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from runtime.files import from_json, is_temporary, replacing_folder, to_json

from ..errors import CheckpointError
from .log import BUCKETS

Tensors = dict[str, Tensor]
Environment = Mapping[str, str | int]
"""What decides the last bit of a training step besides the config, by name."""
PARTS = ("weights", "ema", "optimizer")
NAME = re.compile(r"step-[0-9]{8,}")


@dataclass(frozen=True)
class Checkpoint:
    """Everything that a run resumes from, to the weights of a run that never stopped.

    Attributes:
        step: Optimizer steps so far.
        seconds: Time spent in them.
        weights: The weights by name.
        ema: Their average, which is sampled and exported.
        optimizer: Its state by "NAME:KEY", the name that of a weight.
        environment: What decides the last bits of a step besides the config, see `Environment`.
        more: Other averages by name.
        state: The entries that are not tensors, as JSON: bad, buckets, scaler; see `TrainingState`.
    """

    step: int
    seconds: float
    weights: Tensors
    ema: Tensors
    optimizer: Tensors
    environment: Environment
    more: Mapping[str, Tensors] = field(default_factory=dict)
    state: Mapping[str, Any] = field(default_factory=dict)


def environment(device: torch.device, processes: int = 1, sharded: bool = False) -> Environment:
    """Return what decides the last bit of a training step besides the config."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "machine": platform.machine(),
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        **({"processes": processes} if processes > 1 else {}),
        **({"sharded": True} if sharded else {}),
    }


def to_bytes(tensors: Mapping[str, Tensor]) -> bytes:
    """Return tensors of any shape as a safetensors file.

    The bytes do not depend on the tensors' order or their layout in memory.
    """
    return save({k: v.detach().cpu().contiguous() for k, v in tensors.items()})


def _name(step: int) -> str:
    return f"step-{step:08d}"


def write(folder: Path, checkpoint: Checkpoint, keep: int) -> Path:
    """Write the checkpoint under `folder`, then remove all but it and the newest `keep` - 1 others.

    Returns:
        Its folder.
    """
    path = folder / _name(checkpoint.step)
    with replacing_folder(path) as temporary:
        hashes = {}
        for part, tensors in {
            **{part: getattr(checkpoint, part) for part in PARTS},
            **checkpoint.more,
        }.items():
            data = to_bytes(tensors)
            hashes[part] = hashlib.sha256(data).hexdigest()
            (temporary / f"{part}.safetensors").write_bytes(data)
        state = {
            "step": checkpoint.step,
            "seconds": checkpoint.seconds,
            "environment": checkpoint.environment,
            "sha256": hashes,
            **({"state": checkpoint.state} if checkpoint.state else {}),
        }
        (temporary / "state.json").write_text(to_json(state), encoding="utf-8")
    # Only after the new one is there: a full disk leaves the old ones.
    others = [p for p in found(folder) if p != path]
    left_by_a_kill = filter(is_temporary, folder.glob(".step-*"))
    for old in (*others[: max(0, len(others) - keep + 1)], *left_by_a_kill):
        shutil.rmtree(old)
    return path


def found(folder: Path) -> list[Path]:
    """Return the checkpoints under `folder`, oldest first.

    Folders with other names are not among them, such as a copy that the user made, or a temporary
    one that a kill left behind.
    """
    paths = (p for p in folder.glob("step-*") if NAME.fullmatch(p.name) and p.is_dir())
    # By number: a step beyond eight digits would come first as text.
    return sorted(paths, key=lambda path: int(path.name.removeprefix("step-")))


def read(path: Path) -> Checkpoint:
    """Return the checkpoint at `path`.

    Raises:
        CheckpointError: A file is missing, cut short or changed.
    """

    def damaged(why: str) -> CheckpointError:
        return CheckpointError(
            f"checkpoint {path} is damaged: {why}. Delete this folder to resume from the "
            f"checkpoint before it."
        )

    try:
        state = from_json((path / "state.json").read_bytes())
        if fault := _fault(state):
            raise damaged(f"state.json {fault}")
        if path.name != _name(state["step"]):
            raise damaged(f"state.json is that of step {state['step']}")
        parts = {}
        # state.json is not trusted: a part's name becomes a path.
        for part in (*PARTS, *(name for name in state["sha256"] if name not in PARTS)):
            if not re.fullmatch(r"[a-z][a-z0-9.-]*", part):
                raise damaged(f"{part!r} is not the name of a part")
            data = (path / f"{part}.safetensors").read_bytes()
            if hashlib.sha256(data).hexdigest() != state["sha256"][part]:
                raise damaged(
                    f"{part}.safetensors is not the file that was written ({len(data)} bytes found)"
                )
            parts[part] = load(data)
        return Checkpoint(
            step=int(state["step"]),
            seconds=float(state["seconds"]),
            environment=state["environment"],
            **{part: parts.pop(part) for part in PARTS},
            more=parts,
            state=state.get("state", {}),
        )
    except FileNotFoundError as error:
        raise damaged(f"{Path(error.filename).name} is missing") from error
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise damaged(f"{type(error).__name__}: {error}") from error


def _fault(state: Any) -> str:
    """Return the fault of a state.json, or "" if it has the entries that `write` gives it."""
    if not isinstance(state, dict):
        return "is not a JSON object"
    more = state.get("state", {})
    if not all(
        isinstance(value, dict) for value in (state.get("sha256"), state.get("environment"), more)
    ):
        return "has no sha256, environment or state by name"
    if type(state.get("step")) is not int or state["step"] < 0:
        return "has no step"
    if type(state.get("seconds")) not in (int, float):
        return "has no seconds"
    bad = more.get("bad", [])
    if not isinstance(bad, list) or not all(type(i) is int and i >= 0 for i in bad):
        return "has a damaged list of unreadable images"
    buckets = more.get("buckets", [[0.0] * BUCKETS] * 2)
    rows = buckets if isinstance(buckets, list) else []
    sound = [isinstance(row, list) and len(row) == BUCKETS and _are_numbers(row) for row in rows]
    return "" if sound == [True, True] else "has damaged losses"


def _are_numbers(values: list[object]) -> bool:
    return all(type(value) in (int, float) for value in values)


def newest(folder: Path) -> Checkpoint | None:
    """Return the newest checkpoint under `folder`, or None if there is none.

    Raises:
        CheckpointError: It is damaged.
    """
    while paths := found(folder):
        try:
            return read(paths[-1])
        except CheckpointError:
            # A run that trains meanwhile may have replaced it, and removed it.
            if found(folder)[-1:] == paths[-1:]:
                raise
    return None


def required(folder: Path, otherwise: str) -> Checkpoint:
    """Return the newest checkpoint under `folder`.

    Args:
        otherwise: The message of the error if there is none.

    Raises:
        CheckpointError: There is none, or it is damaged.
    """
    checkpoint = newest(folder)
    if checkpoint is None:
        raise CheckpointError(otherwise)
    return checkpoint
