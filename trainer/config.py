"""The config of a run: one frozen record, checked when made, printed, and saved beside what it
made."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from runtime.arguments import integer, number
from runtime.diffusion.program import PREDICTIONS, Program
from runtime.diffusion.schedule import SCHEDULES, Schedule, make_schedule
from runtime.diffusion.solvers import make_program
from runtime.errors import RequestError, unknown

from .data.labels import text_fault


def option(default: Any, doc: str, choices: Sequence[str] = ()) -> Any:
    return dataclasses.field(default=default, metadata={"doc": doc, "choices": tuple(choices)})


KINDS = {
    "emoji": "",
    "digits": "",
    "folder": "a folder with a subfolder of pictures per class",
    "npz": "a file with arrays images [N, H, W, C] and perhaps labels [N]",
    "hf": "a dataset's name on the Hub, its saved folder, or a parquet file",
    "wds": "tar shards, such as data/{000..099}.tar",
}
"""What --data may start with; where something is said of it, a place follows after a colon."""
FREE = (
    "workers",
    "cache_mb",
    "keep",
    "bad_pictures",
    "quality_batch",
    "sample_every",
    "checkpoint_every",
)
"""Options that may differ when a run goes on: they do not change what is learned."""
LONGEST_NAME = 200
"""Bytes of a run's name: file systems allow 255, and temporary names are longer than the name."""


@dataclass(frozen=True)
class Config:
    """Everything that decides what a run learns. Two runs with equal configs on one machine end
    with equal weights."""

    data: str = option(
        "emoji",
        "emoji, digits, folder:PATH (a class per subfolder), npz:FILE, hf:NAME_OR_PATH, or "
        "wds:SHARDS",
    )
    name: str = option("", "the run's name, its folder under runs/ (default: the data's name)")
    split: str = option(
        "train",
        "emoji: train leaves out every tenth emoji for later measurements; all takes every one",
        ("train", "all"),
    )
    size: int = option(
        0,
        "files: resize the shorter side to this many pixels and crop; 0 asks that all pictures be "
        "alike",
    )
    mode: str = option(
        "", "files: convert pictures to this mode; empty asks that all be alike", ("", "RGB", "L")
    )
    crop: str = option(
        "centre", "files: where a picture that is no square is cropped", ("centre", "random")
    )
    flips: bool = option(False, "mirror half of the pictures, drawn anew every epoch")
    bad_pictures: str = option(
        "skip",
        "files: refuse ends the run at one that cannot be read; skip counts and names it, and "
        "ends the run at more than 1 %",
        ("skip", "refuse"),
    )
    labels: bool = option(True, "tell the network each picture's class")
    label_file: str = option(
        "", "folder: a JSON file that gives each picture's class, instead of subfolders"
    )
    image_column: str = option(
        "", "hf, wds: the column or ending that holds the picture (default: the first that does)"
    )
    label_column: str = option(
        "", "hf, wds: the column or ending that holds the class (default: label or cls, if there)"
    )
    in_memory_mb: int = option(
        64, "files: decoded at the start where all of them take less than this, else streamed"
    )
    cache_mb: int = option(512, "files that are streamed: how much of them is kept decoded")
    workers: int = option(
        -1, "processes that decode streamed pictures; -1 takes one a core, 8 at most"
    )

    network: str = option("unet", "the kind of network", ("unet", "dit"))
    channels: tuple[int, ...] = option(
        (32, 64, 128), "unet: width at each resolution, halved each time"
    )
    blocks: int = option(1, "unet: residual blocks a resolution")
    attention: tuple[int, ...] = option(
        (8,), "unet: picture heights at which the network has attention"
    )
    patch: int = option(2, "dit: side of a patch in pixels")
    width: int = option(384, "dit: channels")
    depth: int = option(12, "dit: blocks")
    heads: int = option(6, "dit: heads of attention")
    dropout: float = option(0.0, "unet: share of activations dropped in each residual block")

    prediction: str = option("v", "what the network learns to answer", PREDICTIONS)
    schedule: str = option(
        "cosine", "the variance schedule", tuple(s for s in SCHEDULES if s != "from_betas")
    )
    T: int = option(1000, "knots of the schedule")
    zero_terminal_snr: bool = option(
        False, "rescale the schedule so that its last knot is pure noise"
    )
    weighting: str = option(
        "uniform", "what each noise level weighs in the loss", ("uniform", "min_snr", "edm")
    )
    min_snr_gamma: float = option(
        5.0, "min_snr: the signal-to-noise ratio beyond which a level weighs no more"
    )
    times: str = option(
        "stratified",
        "how noise levels are drawn: a stretch of knots for each picture, knots, or "
        "ln(sigma/alpha) normal",
        ("stratified", "uniform", "log_normal"),
    )
    time_mean: float = option(-1.2, "log_normal: mean of ln(sigma/alpha)")
    time_std: float = option(1.2, "log_normal: standard deviation of ln(sigma/alpha)")

    steps: int = option(4200, "optimizer steps in all")
    batch: int = option(64, "pictures a step, over all processes")
    accumulate: int = option(1, "parts that a process takes its share of a step in, to save memory")
    learning_rate: float = option(
        1e-3, "peak learning rate, after the warm-up and before the decay"
    )
    decay: str = option(
        "cosine",
        "the learning rate after the warm-up: a half cosine down to 0, or constant",
        ("cosine", "constant"),
    )
    warmup: int = option(200, "steps of linear warm-up")
    weight_decay: float = option(0.01, "AdamW's weight decay")
    gradient_clip: float = option(1.0, "largest gradient norm")
    label_dropout: float = option(
        0.1, "share of labels replaced by the null label, which guidance needs"
    )
    ema_half_life: tuple[int, ...] = option(
        (10_000,),
        "half-lives of the weights' moving averages in pictures, shorter at first; the first is "
        "sampled",
    )
    ema_power: tuple[float, ...] = option(
        (),
        "relative widths of power-function averages kept as snapshots, such as 0.05,0.1, for "
        "trainer.average",
    )
    snapshot_every: int = option(1000, "steps between those snapshots")
    start_from: str = option(
        "", "begin with the averaged weights of this run or bundle in place of random ones"
    )
    seed: int = option(0, "all randomness is a function of (seed, step)")

    device: str = option("auto", "auto takes cuda where there is one", ("auto", "cpu", "cuda"))
    precision: str = option(
        "auto",
        "auto takes bf16 on a GPU that has it, else fp32; fp16 needs a GPU",
        ("auto", "fp32", "bf16", "fp16"),
    )
    channels_last: bool = option(
        True, "keep the network's weights and pictures with their channels last"
    )
    compile: bool = option(False, "compile the network with torch.compile")
    checkpointing: bool = option(
        False, "compute activations again in the backward pass, to save memory"
    )
    checkpoint_every: int = option(250, "steps between checkpoints")
    keep: int = option(3, "checkpoints kept, the newest")
    sample_every: int = option(500, "steps between sample grids; 0 for none")
    sample_solver: str = option("ddim", "solver of the sample grids")
    sample_steps: int = option(20, "steps of the sample grids")
    quality_every: int = option(
        0,
        "pictures trained on between grids that are measured for their distance from the data, to "
        "the step; 0 for none",
    )
    quality_samples: int = option(1000, "samples, and pictures, that are compared")
    quality_batch: int = option(64, "samples made at once for that")
    features: str = option(
        "",
        "a TorchScript file of Inception, uint8 [B, 3, H, W] to features (default: a classifier "
        "trained on the data)",
    )
    log_every: int = option(20, "steps between log rows")

    def __post_init__(self) -> None:
        if isinstance(self.ema_half_life, int) and not isinstance(self.ema_half_life, bool):
            self._set("ema_half_life", (self.ema_half_life,))
        self._check_types()
        for name, (low, high) in _COUNTS.items():
            self._set(name, integer(flag(name), getattr(self, name), low, high))
        for name, (low, high) in _NUMBERS.items():
            self._set(name, number(flag(name), getattr(self, name), low, high))
        self._check_network()
        self._check_averages()
        self._check_data()
        self._check_name()
        if self.make_schedule().alpha[-1] == 0 and self.prediction == "epsilon":
            raise RequestError(
                "an epsilon network says nothing at zero terminal SNR: use --prediction v, x0 or "
                "flow, or another schedule."
            )
        self.sample_program()  # or the first grid, hours later, would be where a wrong solver is found

    def _set(self, name: str, value: Any) -> None:
        """Store a value as Python's own type: numpy's are not JSON."""
        object.__setattr__(self, name, value)

    def _check_types(self) -> None:
        """Check text, booleans, tuples and choices; numbers have their own checks."""
        for f in dataclasses.fields(self):
            value = getattr(self, f.name)
            choices = f.metadata["choices"]
            if isinstance(f.default, bool) and not isinstance(value, bool):
                raise RequestError(
                    f"{flag(f.name)} must be True or False, got {ascii(value)[:80]}."
                )
            if isinstance(f.default, tuple) and not isinstance(value, tuple):
                raise RequestError(
                    f"{flag(f.name)} must be a tuple of numbers, got {ascii(value)[:80]}."
                )
            if isinstance(f.default, str):
                text(f"--{flag(f.name)}", value)
            if choices and value not in choices:
                raise unknown(f"value for --{flag(f.name)}", value, [c or "''" for c in choices])

    def _check_name(self) -> None:
        text("a run's name", self.name)
        if "/" in self.name or "\\" in self.name or self.name.startswith("."):
            raise RequestError(
                f"a run's name is a plain folder name, got {self.name!r}. Choose another --name."
            )
        if not self.name.strip() or len(self.name.encode()) > LONGEST_NAME:
            raise RequestError(
                f"a run's name must have 1 to {LONGEST_NAME} bytes and not be blank, "
                f"got {self.name[:80]!r} ({len(self.name.encode())} bytes). Choose another --name."
            )

    def _check_network(self) -> None:
        for value in self.channels:
            if type(value) is not int or value % 8:
                raise RequestError(f"channels must be multiples of 8, found {self.channels}.")
            integer("channels", value, 8, 2**16)
        if not self.channels:
            raise RequestError(f"channels must be multiples of 8, found {self.channels}.")
        if len(self.channels) > 16:
            raise RequestError(f"channels must be at most 16 numbers, got {len(self.channels)}.")
        self._set("attention", tuple(integer("attention", v, 1, 2**14) for v in self.attention))
        if self.width % (4 * self.heads):
            raise RequestError(
                f"width must be a multiple of 4 times the heads, found {self.width} with "
                f"{self.heads} heads."
            )
        if self.batch % self.accumulate:
            raise RequestError(
                f"batch must be a multiple of accumulate, found {self.batch} pictures in "
                f"{self.accumulate} parts."
            )

    def _check_averages(self) -> None:
        if not self.ema_half_life:
            raise RequestError(
                "ema-half-life needs at least one half-life in pictures, such as 10000."
            )
        lives = tuple(integer("ema-half-life", value, 1, 10**15) for value in self.ema_half_life)
        self._set("ema_half_life", lives)
        powers = tuple(number("ema-power", value, 1e-3, 0.28) for value in self.ema_power)
        self._set("ema_power", powers)
        for name in ("ema_half_life", "ema_power"):
            if len(set(getattr(self, name))) < len(getattr(self, name)):
                raise RequestError(
                    f"{flag(name)} must differ from each other, found {getattr(self, name)}."
                )

    def _check_data(self) -> None:
        kind, colon, place = self.data.partition(":")
        if kind not in KINDS or bool(colon) > bool(KINDS[kind]):
            raise unknown(
                "data", self.data, [f"{k}:PLACE" if what else k for k, what in KINDS.items()]
            )
        if KINDS[kind] and not place.strip(":"):
            raise RequestError(
                f"data {kind!r} needs a place: --data "
                f"{kind}:{'PATH' if kind == 'folder' else 'PLACE'}, {KINDS[kind]}."
            )
        if not self.name:
            self._set("name", _default_name(kind, place).lstrip(".") or "run")

    def make_schedule(self) -> Schedule:
        """The schedule of the runtime that this config names."""
        schedule = make_schedule(self.schedule, T=self.T)
        return schedule.zero_terminal_snr() if self.zero_terminal_snr else schedule

    def sample_program(self, solver: str = "", steps: int = 0) -> Program:
        """What grids and samples that are judged are made with. Raises RequestError for a solver
        that there is not."""
        chosen = solver or self.sample_solver
        return make_program(
            self.make_schedule(),
            self.prediction,
            chosen,
            min(steps or self.sample_steps, self.T),
            clip=1.0,
        )

    def to_json(self) -> dict[str, Any]:
        return {
            k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(self).items()
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Config:
        """The config that `to_json` wrote. Raises RequestError for an unknown key."""
        known = {f.name for f in dataclasses.fields(cls)}
        for key in value:
            if key not in known:
                raise unknown("config key", key, sorted(known))
        given: dict[str, Any] = {
            k: tuple(v) if isinstance(v, list) else v for k, v in value.items()
        }
        return cls(**given)


MANY = 10**12
_COUNTS = {
    "size": (0, 2**14),
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
_NUMBERS = {
    "learning_rate": (1e-12, 1e3),
    "gradient_clip": (1e-12, 1e12),
    "weight_decay": (0.0, 1e3),
    "label_dropout": (0.0, 1.0),
    "dropout": (0.0, 0.95),
    "min_snr_gamma": (1e-6, 1e9),
    "time_mean": (-20.0, 20.0),
    "time_std": (1e-3, 20.0),
}


def _default_name(kind: str, place: str) -> str:
    if kind == "folder":
        return os.path.basename(os.path.realpath(place))
    return Path(place.split("{")[0]).stem if place else kind


def flag(name: str) -> str:
    return name.replace("_", "-")


def text(name: str, value: Any) -> str:
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
