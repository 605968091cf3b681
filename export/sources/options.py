"""The options of a command line that say what is exported."""

from __future__ import annotations

import argparse
from pathlib import Path

from runtime.diffusion.schedule import SCHEDULES
from runtime.terminal.options import assignment, integers

from .conditions import add_condition_option

EXAMPLE = "--sample-shape 3,32,32 --prediction epsilon --schedule linear_raw"
ONNX_EXAMPLE = "--prediction epsilon --schedule scaled_linear"


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
    _add_onnx_options(parser.add_argument_group("networks in ONNX files", f"needs {ONNX_EXAMPLE}"))
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
    add("--num-classes", type=int, metavar="N", help="without the null label [0, no labels]")
    add_condition_option(group)
    add(
        "--option",
        type=assignment,
        action="append",
        metavar="NAME=VALUE",
        help="of the default solver",
    )


def _add_onnx_options(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--onnx", type=Path, metavar="FILE", help="a network; PyTorch is not needed for it")
    add(
        "--input",
        type=_pair,
        action="append",
        metavar="WHAT=NAME",
        help="the file's input that is x, time, label, or a condition of this name [by their "
        "types, shapes and usual names]",
    )
    add("--output", metavar="NAME", help="the prediction among outputs [the one shaped like x]")


def _pair(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not (name and equals and value):
        raise argparse.ArgumentTypeError(f"must be WHAT=NAME, such as time=t, got {text!r}")
    return name, value


def _add_network_options(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--prediction", metavar="KIND", help="what F is: epsilon, v, x0, flow or edm")
    add(
        "--clip",
        type=float,
        metavar="BOUND",
        help="on the denoised estimate; 1 for images [none; 1 for a UNet2DModel]",
    )
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
