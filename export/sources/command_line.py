"""The command line's source as a `Model`: a run, a bundle, a diffusers folder, or a module."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from runtime.bundle.shipped import named_folder
from runtime.diffusion.schedule import SCHEDULES, Schedule, make_schedule
from runtime.errors import RequestError, unknown
from runtime.errors.messages import printable
from runtime.options import assignment, integers
from runtime.terminal.output import say

from .bundle import from_bundle, is_bundle
from .conditions import add_condition_option, described
from .diffusers.folder import is_diffusers
from .diffusers.model import from_diffusers
from .loading import load_module, load_weights
from .model import Model, bundle_name
from .module import from_module
from .run import from_run, newest_run

RUN = "a run"
BUNDLE = "a bundle"
DIFFUSERS = "a diffusers folder"
MODULE = "--module"
DEFAULTS = ("guidance", "solver", "steps", "grid")
ACCEPTS = {
    RUN: ("runs", "weights", "guidance"),
    BUNDLE: (),
    DIFFUSERS: (
        "name",
        "schedule",
        "schedule_option",
        "prediction",
        "null_label",
        "label_names",
        "variant",
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
"""The options that each kind of source takes; the others are refused, so that none is ignored."""


def named(given: argparse.Namespace) -> Model:
    """Return the model that the options name.

    Raises:
        RequestError: Options contradict each other.
        ExportError: See `from_run`, `from_bundle`, `from_diffusers` and `from_module`.
    """
    if given.module is not None:
        if given.run is not None:
            raise RequestError(
                f"give a folder or --module, not both: found {given.run} and --module "
                f"{given.module}."
            )
        return _module(given)
    run = named_folder(given.run) if given.run else newest_run(given.runs or Path("runs"))
    if is_bundle(run):
        _taken(given, BUNDLE)
        say(f"the network in {printable(run)}, a bundle")
        return from_bundle(run)
    return _diffusers(run, given) if is_diffusers(run) else _run(run, given)


def _run(run: Path, given: argparse.Namespace) -> Model:
    options = _taken(given, RUN)
    weights = options.get("weights", "ema")
    if weights not in ("ema", "weights"):
        raise unknown("--weights of a run", weights, ("ema", "weights"))
    say(f"the network of {printable(run)}, {weights}")
    return from_run(run, options.get("guidance", 2.0), weights)


def _diffusers(folder: Path, given: argparse.Namespace) -> Model:
    options = _taken(given, DIFFUSERS)
    say(f"the network in {printable(folder)}, a diffusers folder")
    return from_diffusers(folder, schedule=_schedule(options), **options)


def _module(given: argparse.Namespace) -> Model:
    options = _taken(given, MODULE)
    schedule = _schedule(options)
    weights = options.pop("weights", None)
    missing = [flag for flag in ("sample_shape", "prediction") if flag not in options]
    missing += [] if schedule else ["schedule"]
    if missing:
        flags = ", ".join("--" + flag.replace("_", "-") for flag in missing)
        raise RequestError(f"--module needs {flags} too, for instance {EXAMPLE}.")
    module = load_module(given.module)
    if weights is not None:
        load_weights(module, Path(weights))
    source = printable(weights) if weights else "with the weights that it comes with"
    say(f"the network of {printable(given.module)}, {source}")
    name = options.pop("name", bundle_name(given.module.rpartition(":")[2]))
    options["options"] = _together("--option", options.pop("option", ()))
    options |= described(options.pop("condition", ()))
    return from_module(module.requires_grad_(False), schedule=schedule or "", name=name, **options)


EXAMPLE = "--sample-shape 3,32,32 --prediction epsilon --schedule linear_raw"


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
    parameters = _together("--schedule-option", options.pop("schedule_option", ()))
    if name is None:
        if parameters:
            raise RequestError("--schedule-option needs --schedule.")
        return None
    return make_schedule(name, **parameters)


def _together(flag: str, assignments: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    """Return NAME=VALUE options as one mapping. Raises RequestError for a name given twice."""
    values: dict[str, Any] = {}
    for name, value in assignments:
        if name in values:
            raise RequestError(f"{flag} must give each name once, got {name!r} twice. Remove one.")
        values[name] = value
    return values


def _range(text: str) -> tuple[float, float]:
    try:
        low, high = (float(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"must be two numbers with a comma between them, such as -1,1, got {text!r}"
        ) from None
    return low, high


def _names(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(","))


def add_options(parser: argparse.ArgumentParser, flag: str | None = None) -> None:
    """Add the options that say what is exported; each is None unless it is given.

    Args:
        parser: Of a command.
        flag: The flag for RUN; None makes it a positional argument.
    """
    what = "a run's, a bundle's or a diffusers folder, or a shipped bundle's name"
    if flag:
        parser.add_argument(flag, dest="run", help=what, type=Path, metavar="RUN")
    else:
        text = f"{what} [the newest run under runs/]"
        parser.add_argument("run", nargs="?", help=text, type=Path, metavar="RUN")
    _add_run_options(parser.add_argument_group("runs of trainer.fit"))
    _add_module_options(
        parser.add_argument_group("any PyTorch module", f"needs {EXAMPLE} or the like")
    )
    _add_network_options(
        parser.add_argument_group("modules, and diffusers networks without a scheduler")
    )
    _add_diffusers_options(parser.add_argument_group("diffusers folders"))
    _add_label_options(parser.add_argument_group("labels of modules and diffusers folders"))
    _add_bundle_options(parser.add_argument_group("the bundle"))


def _add_run_options(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--runs", type=Path, metavar="DIR", help="the folder that holds the runs [runs]")
    add(
        "--weights",
        metavar="WHICH",
        help="ema, the moving average, or weights, the last step's own [ema]; with --module, a "
        ".safetensors file",
    )


def _add_module_options(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add(
        "--module",
        metavar="PACKAGE.FILE:FACTORY",
        help="called without arguments, returns module(x, time[, label], **conditions) → F. This "
        "runs the code in that file",
    )
    add(
        "--sample-shape",
        type=integers,
        metavar="C,H,W",
        help="without the batch; any rank from 1 to 4",
    )
    add(
        "--sample-range",
        type=_range,
        metavar="LOW,HIGH",
        help="of the data [-1,1]; write --sample-range=LOW,HIGH",
    )
    add(
        "--clip",
        type=float,
        metavar="BOUND",
        help="on the denoised estimate; 1 for images [none]",
    )
    add("--num-classes", type=int, metavar="N", help="without the null label [0, no labels]")
    add_condition_option(group)
    add(
        "--option",
        type=assignment,
        action="append",
        metavar="NAME=VALUE",
        help="of the default solver",
    )


def _add_network_options(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--prediction", metavar="KIND", help="what F is: epsilon, v, x0, flow or edm")
    add("--schedule", metavar="NAME", help=", ".join(sorted(set(SCHEDULES) - {"from_betas"})))
    add(
        "--schedule-option",
        type=assignment,
        action="append",
        metavar="NAME=VALUE",
        help="such as T=500",
    )


def _add_diffusers_options(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--variant",
        metavar="NAME",
        help="of the weights, such as fp16; they are computed in float32",
    )


def _add_label_options(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add(
        "--null-label",
        type=int,
        metavar="N",
        help="the number that means no label, if one was trained",
    )
    add(
        "--label-names",
        type=_names,
        metavar="A,B,…",
        help="of the classes, without the null label [their numbers]",
    )


def _add_bundle_options(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--name", help="[the folder's, or the factory's]")
    add(
        "--guidance",
        type=float,
        help="the default guidance scale, 1 for none [2 if a null label was trained]",
    )
    add("--solver", metavar="NAME", help="the default one [the scheduler's; ddim]")
    add("--steps", type=int, metavar="N", help="the default number [the scheduler's; 50]")
    add("--grid", metavar="NAME", help="the default one [the scheduler's; trailing]")
