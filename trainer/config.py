"""The config of a run: one frozen record, checked when made, printed, and saved beside what it made."""

from __future__ import annotations

import argparse
import dataclasses
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from runtime.arguments import integer, number
from runtime.errors import RequestError, unknown
from runtime.schedule import SCHEDULES, Schedule, make_schedule


def option(default: Any, doc: str, choices: Sequence[str] = ()) -> Any:
    return dataclasses.field(default=default, metadata={"doc": doc, "choices": tuple(choices)})


@dataclass(frozen=True)
class Config:
    """Everything that decides what a run learns. Two runs with equal configs on one machine end with equal weights."""

    data: str = option("emoji", "emoji, digits, or folder:PATH (a class per subfolder)")
    name: str = option("", "the run's name, its folder under runs/ (default: the data's name)")
    split: str = option(
        "train",
        "emoji: train leaves out every tenth emoji for later measurements; all takes every one",
        ("train", "all"),
    )
    size: int = option(
        0, "folder: resize the shorter side to this many pixels and crop the centre; 0 asks that all pictures be alike"
    )
    mode: str = option("", "folder: convert pictures to this mode; empty asks that all be alike", ("", "RGB", "L"))
    bad_pictures: str = option("refuse", "folder: what to do with a picture that cannot be read", ("refuse", "skip"))

    channels: tuple[int, ...] = option((32, 64, 128), "network width at each resolution, halved each time")
    blocks: int = option(1, "residual blocks a resolution")
    attention: tuple[int, ...] = option((8,), "picture heights at which the network has attention")

    prediction: str = option("v", "what the network learns to answer", ("epsilon", "v", "x0"))
    schedule: str = option(
        "cosine", "the variance schedule", tuple(s for s in SCHEDULES if s not in ("from_betas", "flow", "edm"))
    )
    T: int = option(1000, "knots of the schedule")
    zero_terminal_snr: bool = option(False, "rescale the schedule so that its last knot is pure noise")

    steps: int = option(4200, "optimizer steps in all")
    batch: int = option(64, "pictures a step")
    learning_rate: float = option(1e-3, "peak learning rate, after the warm-up and before the cosine decay to 0")
    warmup: int = option(200, "steps of linear warm-up")
    weight_decay: float = option(0.01, "AdamW's weight decay")
    gradient_clip: float = option(1.0, "largest gradient norm")
    label_dropout: float = option(0.1, "share of labels replaced by the null label, which guidance needs")
    ema_half_life: int = option(10_000, "half-life of the weights' moving average in pictures, shorter at first")
    seed: int = option(0, "all randomness is a function of (seed, step)")

    device: str = option("auto", "auto takes cuda where there is one", ("auto", "cpu", "cuda"))
    precision: str = option("auto", "auto takes bf16 on a GPU that has it, else fp32", ("auto", "fp32", "bf16"))
    checkpoint_every: int = option(250, "steps between checkpoints")
    keep: int = option(3, "checkpoints kept, the newest")
    sample_every: int = option(500, "steps between sample grids; 0 for none")
    log_every: int = option(20, "steps between log rows")

    def __post_init__(self) -> None:
        for f in dataclasses.fields(self):
            choices, value = f.metadata["choices"], getattr(self, f.name)
            if choices and value not in choices:
                raise unknown(f"value for --{_flag(f.name)}", value, [c or "''" for c in choices])
        for name in ("T", "steps", "batch", "blocks", "ema_half_life", "checkpoint_every", "keep", "log_every"):
            integer(_flag(name), getattr(self, name), 1)
        for name in ("size", "warmup", "sample_every"):
            integer(_flag(name), getattr(self, name), 0)
        integer("seed", self.seed, 0, 2**63 - 1)
        number("learning-rate", self.learning_rate, 1e-12, 1e3)
        number("gradient-clip", self.gradient_clip, 1e-12, 1e12)
        number("weight-decay", self.weight_decay, 0, 1e3)
        number("label-dropout", self.label_dropout, 0, 1)
        if not self.channels or not all(type(c) is int and c >= 8 and c % 8 == 0 for c in self.channels):
            raise RequestError(f"channels must be multiples of 8, found {self.channels}.")
        kind = self.data.split(":", 1)[0]
        if kind not in PRESETS:
            raise unknown("data", self.data, ["emoji", "digits", "folder:PATH"])
        if kind == "folder" and not self.data.removeprefix("folder:").strip(":"):
            raise RequestError("data 'folder' needs a path: --data folder:PATH, a folder with a subfolder per class.")
        if not self.name:
            name = Path(self.data.removeprefix("folder:")).resolve().name if kind == "folder" else kind
            object.__setattr__(self, "name", name or "run")
        if "/" in self.name or "\\" in self.name or self.name.startswith("."):
            raise RequestError(f"a run's name is a plain folder name, found {self.name!r}.")
        if self.make_schedule().alpha[-1] == 0 and self.prediction == "epsilon":
            raise RequestError(
                "an epsilon network says nothing at zero terminal SNR: use --prediction v or x0, or leave the schedule as it is."
            )

    def make_schedule(self) -> Schedule:
        """The schedule of the runtime that this config names."""
        schedule = make_schedule(self.schedule, T=self.T)
        return schedule.zero_terminal_snr() if self.zero_terminal_snr else schedule

    def to_json(self) -> dict[str, Any]:
        return {k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(self).items()}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Config:
        """The config that `to_json` wrote. Raises RequestError for an unknown key."""
        known = {f.name for f in dataclasses.fields(cls)}
        for key in value:
            if key not in known:
                raise unknown("config key", key, sorted(known))
        given: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in value.items()}
        return cls(**given)


PRESETS: Mapping[str, Mapping[str, Any]] = {
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
}
"""What differs from the config's own defaults for each kind of data; what is given on the command line goes before both."""


def _flag(name: str) -> str:
    return name.replace("_", "-")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """One option a field, with its line of documentation as help."""
    types = typing.get_type_hints(Config)
    for f in dataclasses.fields(Config):
        kind, doc, choices = types[f.name], f.metadata["doc"], f.metadata["choices"]
        shown = ",".join(map(str, f.default)) if isinstance(f.default, tuple) else f.default
        of = f" ({', '.join(c for c in choices if c)})" if choices else ""
        text = f"{doc}{of}" + (f" [{shown}]" if shown not in ("", None) else "")
        parse: dict[str, Any] = {"default": None, "help": text.replace("%", "%%")}
        if kind is bool:
            parse["action"] = argparse.BooleanOptionalAction
        elif kind in (int, float, str):
            parse.update(type=kind, metavar=kind.__name__.upper() if kind is not str else "TEXT")
        else:
            parse.update(type=_integers, metavar="N,N,…")
        parser.add_argument(f"--{_flag(f.name)}", **parse)


def _integers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(",") if part.strip())


def from_arguments(arguments: argparse.Namespace) -> Config:
    """The resolved config: what was given, then the data's preset, then the defaults. Raises RequestError for values that make no sense."""
    given = {
        f.name: getattr(arguments, f.name) for f in dataclasses.fields(Config) if getattr(arguments, f.name) is not None
    }
    kind = given.get("data", "emoji").split(":", 1)[0]
    return Config(**{**PRESETS.get(kind, {}), **given})
