"""The config from a command line: what is given, then the preset, then what fits the data, then the
defaults."""

from __future__ import annotations

import argparse
import dataclasses
import typing
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from runtime.errors import unknown

from . import Config
from .options import Options
from .validation import flag

T = TypeVar("T")

DATA: Mapping[str, Mapping[str, Any]] = {
    "emoji": {},
    "digits": {
        "channels": (32, 64),
        "attention": (4,),
        "steps": 600,
        "learning_rate": 2e-3,
        "warmup": 50,
        "checkpoint_every": 200,
    },
    "folder": {},
    "pairs": {},
    "npz": {},
    "hf": {},
    "wds": {},
}
"""What differs from the config's own defaults for each kind of data."""

_DDPM = {"prediction": "epsilon", "schedule": "linear", "weight_decay": 0.0, "decay": "constant"}
_DIT = {
    "network": "dit",
    "learning_rate": 1e-4,
    "weight_decay": 0.0,
    "decay": "constant",
    "warmup": 0,
}
_LARGE = {
    "blocks": 2,
    "attention": (16, 8),
    "mode": "RGB",
    "flips": True,
    "batch": 256,
    "learning_rate": 1e-4,
    "warmup": 5000,
    "weight_decay": 0.0,
    "weighting": "min_snr",
    "ema_half_life": (500_000,),
    "checkpoint_every": 5000,
    "sample_every": 10_000,
}
PRESETS: Mapping[str, Mapping[str, Any]] = {
    "tiny": {"channels": (16, 32), "attention": ()},
    "small": {"channels": (32, 64, 128), "attention": (8,)},
    # Ho et al. 2020, appendix B: 35.7 M parameters, 800k steps of 128, a rate of 2e-4, dropout 0.1,
    # decay 0.9999 per step.
    "cifar": {
        **_DDPM,
        "channels": (128, 256, 256, 256),
        "blocks": 2,
        "attention": (16,),
        "dropout": 0.1,
        "flips": True,
        "batch": 128,
        "steps": 800_000,
        "learning_rate": 2e-4,
        "warmup": 5000,
        "ema_half_life": (887_000,),
        "labels": False,
        "checkpoint_every": 5000,
        "sample_every": 10_000,
    },
    "64": {**_LARGE, "channels": (128, 256, 384, 512), "size": 64, "steps": 400_000},
    "128": {**_LARGE, "channels": (128, 128, 256, 384, 512), "size": 128, "steps": 500_000},
    # The widths of Ho et al. 2020's network for 256 pixels.
    "256": {
        **_LARGE,
        "channels": (128, 128, 256, 256, 512, 512),
        "size": 256,
        "steps": 500_000,
        "batch": 64,
        "learning_rate": 5e-5,
    },
    # Peebles & Xie 2023, table 1.
    "dit-s": {**_DIT, "width": 384, "depth": 12, "heads": 6},
    "dit-b": {**_DIT, "width": 768, "depth": 12, "heads": 12},
}
"""Networks, and how they are trained: --preset NAME."""


def _integers(text: str) -> tuple[int, ...]:
    return _listed(text, int, "whole numbers")


def _numbers(text: str) -> tuple[float, ...]:
    return _listed(text, float, "numbers")


def _listed(text: str, kind: Callable[[str], T], what: str) -> tuple[T, ...]:
    try:
        return tuple(kind(part) for part in text.split(",") if part.strip())
    except ValueError:
        rule = f"must be {what} with commas between, got {text[:40]!r}"
        raise argparse.ArgumentTypeError(rule) from None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add an option for each of `Options`, with its text as help; and --preset."""
    parser.add_argument(
        "--preset", metavar="NAME", help=f"a network, and how it is trained ({', '.join(PRESETS)})"
    )
    add_fields(parser, Options, {f.name: f.default for f in dataclasses.fields(Options)})


def add_fields(parser: argparse.ArgumentParser, record: type, defaults: Mapping[str, Any]) -> None:
    """Add an option for some fields of a record, with its text as help.

    Args:
        record: A dataclass whose fields are made by `option`.
        defaults: The fields, and their defaults as the help shows them.
    """
    # No defaults: an option that is not given leaves the choice to the preset and the data.
    types = typing.get_type_hints(record)
    for f in dataclasses.fields(record):
        if f.name not in defaults:
            continue
        kind = types[f.name]
        doc = f.metadata["doc"]
        choices = f.metadata["choices"]
        default = defaults[f.name]
        shown = ",".join(map(str, default)) if isinstance(default, tuple) else default
        of = f" ({', '.join(c for c in choices if c)})" if choices else ""
        text = f"{doc}{of}" + (f" [{shown}]" if shown not in ("", None) else "")
        parse: dict[str, Any] = {"default": None, "help": text.replace("%", "%%")}
        if kind is bool:
            parse["action"] = argparse.BooleanOptionalAction
        elif kind in (int, float, str):
            parse.update(type=kind, metavar=kind.__name__.upper() if kind is not str else "TEXT")
        else:
            parse.update(
                type=_numbers if float in typing.get_args(kind) else _integers, metavar="N,N,…"
            )
        parser.add_argument(f"--{flag(f.name)}", **parse)


def given_fields(arguments: argparse.Namespace, record: type) -> dict[str, Any]:
    """Return the fields of a record that a command line gives, by name."""
    found = {f.name: getattr(arguments, f.name, None) for f in dataclasses.fields(record)}
    return {name: value for name, value in found.items() if value is not None}


def from_arguments(arguments: argparse.Namespace) -> Config:
    """Return the config: what is given, then the preset, then what fits the data.

    Raises:
        RequestError: A value makes no sense, or there is no such preset.
    """
    given = given_fields(arguments, Options)
    preset = arguments.preset
    if preset is not None and preset not in PRESETS:
        raise unknown("preset", preset, PRESETS)
    kind = given.get("data", "emoji").split(":", 1)[0]
    return Config(**{**DATA.get(kind, {}), **(PRESETS[preset] if preset else {}), **given})
