"""The command line's source as a `Model`: a run, a bundle, a diffusers folder, a module, a file."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from runtime.bundle.shipped import named_folder
from runtime.diffusion.schedule import Schedule, make_schedule
from runtime.errors import RequestError, unknown
from runtime.errors.messages import printable
from runtime.terminal.options import together
from runtime.terminal.output import say

from .conditions import described
from .diffusers.folder import is_diffusers
from .model import Model, bundle_name
from .onnx_file.model import from_onnx
from .options import EXAMPLE, ONNX_EXAMPLE

RUN = "a run"
BUNDLE = "a bundle"
DIFFUSERS = "a diffusers folder"
MODULE = "--module"
ONNX = "--onnx"
DEFAULTS = ("guidance", "solver", "steps", "grid")
ACCEPTS = {
    RUN: ("runs", "weights", "guidance"),
    BUNDLE: (),
    DIFFUSERS: (
        "name",
        "schedule",
        "schedule_option",
        "prediction",
        "clip",
        "null_label",
        "label_names",
        "variant",
        "condition",
        *DEFAULTS,
    ),
    MODULE: (
        *(
            "weights",
            "sample_shape",
            "sample_range",
            "prediction",
            "schedule",
            "schedule_option",
            "clip",
            "name",
        ),
        *("num_classes", "null_label", "label_names", "condition", "option", *DEFAULTS),
    ),
}
ACCEPTS[ONNX] = ("input", "output", *(key for key in ACCEPTS[MODULE] if key != "weights"))
"""The options that each kind of source takes; the others are refused, so that none is ignored."""


def named(given: argparse.Namespace) -> Model:
    """Return the model that the options name.

    Raises:
        RequestError: Options contradict each other.
        ExportError: See `from_run`, `from_bundle`, `from_diffusers` and `from_module`.
    """
    sources = {"a folder": given.run, MODULE: given.module, ONNX: given.onnx}
    stated = [f"{kind} {value}" for kind, value in sources.items() if value is not None]
    if len(stated) > 1:
        raise RequestError(f"give a folder, --module or --onnx, got {' and '.join(stated)}.")
    if given.module is not None:
        return _module(given)
    return _onnx(given) if given.onnx is not None else _folder(given)


def _folder(given: argparse.Namespace) -> Model:
    # Here and below, because they import PyTorch, which the export of an ONNX file does without.
    from .bundle import from_bundle, is_bundle
    from .run import newest_run

    run = named_folder(given.run) if given.run else newest_run(given.runs or Path("runs"))
    if is_bundle(run):
        _taken(given, BUNDLE)
        say(f"the network in {printable(run)}, a bundle")
        return from_bundle(run)
    return _diffusers(run, given) if is_diffusers(run) else _run(run, given)


def _run(run: Path, given: argparse.Namespace) -> Model:
    from .run import from_run

    options = _taken(given, RUN)
    weights = options.get("weights", "ema")
    if weights not in ("ema", "weights"):
        raise unknown("--weights of a run", weights, ("ema", "weights"))
    say(f"the network of {printable(run)}, {weights}")
    return from_run(run, options.get("guidance", 2.0), weights)


def _diffusers(folder: Path, given: argparse.Namespace) -> Model:
    from .diffusers.model import from_diffusers

    options = _taken(given, DIFFUSERS)
    say(f"the network in {printable(folder)}, a diffusers folder")
    options |= described(options.pop("condition", ()))
    return from_diffusers(folder, schedule=_schedule(options), **options)


def _module(given: argparse.Namespace) -> Model:
    from .loading import load_module, load_weights
    from .module import from_module

    options = _taken(given, MODULE)
    schedule = _schedule(options)
    weights = options.pop("weights", None)
    _require(MODULE, ("sample_shape", "prediction"), options, schedule, EXAMPLE)
    module = load_module(given.module)
    if weights is not None:
        load_weights(module, Path(weights))
    source = printable(weights) if weights else "with the weights that it comes with"
    say(f"the network of {printable(given.module)}, {source}")
    name = options.pop("name", bundle_name(given.module.rpartition(":")[2]))
    options["options"] = together("--option", options.pop("option", ()))
    options |= described(options.pop("condition", ()))
    return from_module(module.requires_grad_(False), schedule=schedule or "", name=name, **options)


def _onnx(given: argparse.Namespace) -> Model:
    options = _taken(given, ONNX)
    schedule = _schedule(options)
    _require(ONNX, ("prediction",), options, schedule, ONNX_EXAMPLE)
    say(f"the network in {printable(given.onnx)}")
    options["options"] = together("--option", options.pop("option", ()))
    options["inputs"] = together("--input", options.pop("input", ()))
    options |= described(options.pop("condition", ()))
    return from_onnx(given.onnx, schedule=schedule or "", **options)


def _require(
    kind: str,
    flags: Sequence[str],
    options: dict[str, Any],
    schedule: Schedule | None,
    example: str,
) -> None:
    """Raises RequestError for a source without an option that it needs."""
    missing = [flag for flag in flags if flag not in options]
    missing += [] if schedule else ["schedule"]
    if missing:
        named = ", ".join("--" + flag.replace("_", "-") for flag in missing)
        raise RequestError(f"{kind} needs {named} too, for instance {example}.")


def _taken(given: argparse.Namespace, kind: str) -> dict[str, Any]:
    """Return the options that were given. Raises RequestError for one of another kind of source."""
    options = {
        key: value for key, value in vars(given).items() if value is not None and key in _EVERY
    }
    for key in options:
        if key not in ACCEPTS[kind]:
            kinds = " and ".join(k for k, keys in ACCEPTS.items() if key in keys)
            raise RequestError(
                f"--{key.replace('_', '-')} is for {kinds}, and this is {kind}: leave it out."
            )
    return {key: value for key, value in options.items() if key != "runs"}


_EVERY = {key for keys in ACCEPTS.values() for key in keys}


def _schedule(options: dict[str, Any]) -> Schedule | None:
    """Take --schedule and its options out of the others."""
    name = options.pop("schedule", None)
    parameters = together("--schedule-option", options.pop("schedule_option", ()))
    if name is None:
        if parameters:
            raise RequestError("--schedule-option needs --schedule.")
        return None
    return make_schedule(name, **parameters)
