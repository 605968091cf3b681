"""The checks of options: types, ranges, and options that contradict each other."""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Mapping
from pathlib import Path

from runtime.errors import RequestError, unknown
from runtime.errors.arguments import integer, number

from .options import Options
from .text import text_fault

KINDS = {
    "emoji": "",
    "digits": "",
    "folder": "a folder with a subfolder of pictures per class",
    "pairs": "a folder with source/ and target/, images of the same names",
    "npz": "a file with arrays images [N, H, W, C] and perhaps labels [N]",
    "hf": "a dataset's name on the Hub, its saved folder, or a parquet file",
    "wds": "tar shards, such as data/{000..099}.tar",
}
"""What --data may start with. If a kind has a text, a place follows after a colon."""
ONLY = {
    "condition_column": ("hf", "npz", "folder"),
    "image_column": ("hf", "wds"),
    "label_column": ("hf", "wds"),
    "label_file": ("folder", "pairs"),
}
"""Options that only some kinds of data have."""
LONGEST_NAME = 200
"""Bytes of a run's name: file systems allow 255, and temporary names are longer than the name."""
MOST_LEVELS = 16
"""Resolutions of a U-Net."""
MANY = 10**12

COUNTS = {
    "size": (0, 2**14),
    "factor": (2, 64),
    "in_memory_mb": (0, 2**24),
    "cache_mb": (0, 2**24),
    "workers": (-1, 256),
    "T": (1, 10**6),
    "steps": (1, MANY),
    "batch": (1, 2**20),
    "accumulate": (1, 2**20),
    "blocks": (1, 1000),
    "patch": (1, 2**14),
    "width": (1, 2**16),
    "depth": (1, 1000),
    "heads": (1, 2**14),
    "warmup": (0, MANY),
    "seed": (0, 2**63 - 1),
    "snapshot_every": (1, MANY),
    "checkpoint_every": (1, MANY),
    "keep": (1, MANY),
    "sample_every": (0, MANY),
    "sample_steps": (1, MANY),
    "quality_every": (0, MANY),
    "quality_samples": (1, MANY),
    "quality_batch": (1, 2**20),
    "log_every": (1, MANY),
}
NUMBERS = {
    "learning_rate": (1e-12, 1e3),
    "gradient_clip": (1e-12, 1e12),
    "weight_decay": (0.0, 1e3),
    "label_dropout": (0.0, 1.0),
    "condition_dropout": (0.0, 1.0),
    "dropout": (0.0, 0.95),
    "min_snr_gamma": (1e-6, 1e9),
    "time_mean": (-20.0, 20.0),
    "time_std": (1e-3, 20.0),
}

Value = str | bool | int | float | tuple[int, ...] | tuple[float, ...]


def checked(options: Options) -> dict[str, Value]:
    """Check options, and return those whose values are to be replaced by Python's own.

    Raises:
        RequestError: A value has the wrong type, is out of range, or contradicts another.
    """
    values: dict[str, Value] = {}
    lives = options.ema_half_life
    if isinstance(lives, int) and not isinstance(lives, bool):
        # A single half-life may be given as a number.
        values["ema_half_life"] = lives = (lives,)
    _check_types(options, values)
    # Ranges come before the checks that combine several options, which rely on them.
    for name, (low, high) in COUNTS.items():
        values[name] = integer(flag(name), getattr(options, name), low, high)
    for name, (low, high) in NUMBERS.items():
        values[name] = number(flag(name), getattr(options, name), low, high)
    values["attention"] = _checked_network(options)
    values |= _checked_averages(lives, options.ema_power)
    default_name = _checked_data(options)
    values["name"] = _checked_name(options.name or default_name)
    return values


def _check_types(options: Options, values: Mapping[str, Value]) -> None:
    """Check text, booleans, tuples and choices; numbers have their own checks."""
    for f in dataclasses.fields(Options):
        value = values.get(f.name, getattr(options, f.name))
        choices = f.metadata["choices"]
        if isinstance(f.default, bool) and not isinstance(value, bool):
            raise RequestError(f"{flag(f.name)} must be True or False, got {ascii(value)[:80]}.")
        if isinstance(f.default, tuple) and not isinstance(value, tuple):
            raise RequestError(
                f"{flag(f.name)} must be a tuple of numbers, got {ascii(value)[:80]}."
            )
        if isinstance(f.default, str):
            text(f"--{flag(f.name)}", value)
        if choices and value not in choices:
            raise unknown(f"value for --{flag(f.name)}", value, [c or "''" for c in choices])


def _checked_network(options: Options) -> tuple[int, ...]:
    """Check the options of networks. Returns `attention`."""
    for value in options.channels:
        if type(value) is not int or value % 8:
            raise RequestError(f"channels must be multiples of 8, found {options.channels}.")
        integer("channels", value, 8, 2**16)
    if not options.channels:
        raise RequestError(f"channels must be multiples of 8, found {options.channels}.")
    if len(options.channels) > MOST_LEVELS:
        raise RequestError(
            f"channels must be at most {MOST_LEVELS} numbers, got {len(options.channels)}."
        )
    attention = tuple(integer("attention", v, 1, 2**14) for v in options.attention)
    # Positions take a quarter of the width each for the sine and cosine of row and column.
    if options.width % (4 * options.heads):
        raise RequestError(
            f"width must be a multiple of 4 times the heads, found {options.width} with "
            f"{options.heads} heads."
        )
    if options.batch % options.accumulate:
        raise RequestError(
            f"batch must be a multiple of accumulate, found {options.batch} images in "
            f"{options.accumulate} parts."
        )
    return attention


def _checked_averages(lives: tuple[int, ...], powers: tuple[float, ...]) -> dict[str, Value]:
    if not lives:
        raise RequestError("ema-half-life needs at least one half-life in images, such as 10000.")
    averages = {
        "ema_half_life": tuple(integer("ema-half-life", value, 1, 10**15) for value in lives),
        "ema_power": tuple(number("ema-power", value, 1e-3, 0.28) for value in powers),
    }
    for name, values in averages.items():
        # Two equal ones would share a name, and a file.
        if len(set(values)) < len(values):
            raise RequestError(f"{flag(name)} must differ from each other, found {values}.")
    return dict(averages)


def _checked_data(options: Options) -> str:
    """Check what --data names. Returns the run's name by default."""
    kind, colon, place = options.data.partition(":")
    if kind not in KINDS or bool(colon) > bool(KINDS[kind]):
        raise unknown(
            "data", options.data, [f"{k}:PLACE" if what else k for k, what in KINDS.items()]
        )
    if KINDS[kind] and not place.strip(":"):
        raise RequestError(
            f"data {kind!r} needs a place: --data "
            f"{kind}:{'PATH' if kind in ('folder', 'pairs') else 'PLACE'}, {KINDS[kind]}."
        )
    if kind == "pairs" and options.crop != "centre":
        raise RequestError("--data pairs needs --crop centre: both images must be cropped alike.")
    for name, kinds in ONLY.items():
        if getattr(options, name) and kind not in kinds:
            raise RequestError(
                f"--{name.replace('_', '-')} is for --data {' and '.join(kinds)}, got {kind}. "
                "Leave it out."
            )
    if options.task == "restyle" and kind not in ("emoji", "pairs"):
        raise RequestError(
            "--task restyle needs pairs of images: --data emoji, whose two styles are pairs, or "
            "--data pairs:PATH."
        )
    return _default_name(kind, place).lstrip(".") or "run"


def _default_name(kind: str, place: str) -> str:
    if kind in ("folder", "pairs"):
        return os.path.basename(os.path.realpath(place))  # of `.` and of links
    # What stands before a pattern: the folder of `shards/*.tar`, the beginning of `a-{0..9}.tar`.
    return Path(re.split(r"[{*?[]", place)[0]).stem if place else kind


def _checked_name(name: str) -> str:
    text("a run's name", name)
    if "/" in name or "\\" in name or name.startswith("."):
        raise RequestError(
            f"a run's name is a plain folder name, got {name!r}. Choose another --name."
        )
    if not name.strip() or len(name.encode()) > LONGEST_NAME:
        raise RequestError(
            f"a run's name must have 1 to {LONGEST_NAME} bytes and not be blank, "
            f"got {name[:80]!r} ({len(name.encode())} bytes). Choose another --name."
        )
    return name


def flag(name: str) -> str:
    """Return an option as it is written on the command line, without its dashes."""
    return name.replace("_", "-")


def text(name: str, value: object) -> str:
    """Return text that config.json can hold.

    Raises:
        RequestError: It is not text, not UTF-8, or contains a control character.
    """
    if not isinstance(value, str):
        raise RequestError(
            f"{name} must be text, got {ascii(value)[:80]} ({type(value).__name__})."
        )
    if fault := text_fault(value):
        raise RequestError(
            f"{name} {ascii(value)[:200]} {fault}. Rename it, or choose another one."
        )
    return value
