"""The options of a run: their defaults, their help, and the values that they may have."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from runtime.diffusion.program import PREDICTIONS
from runtime.diffusion.schedule import SCHEDULES


def option(default: Any, doc: str, choices: Sequence[str] = ()) -> Any:
    """Return a field with its line of help, and the values that it may have. () allows any."""
    return dataclasses.field(default=default, metadata={"doc": doc, "choices": tuple(choices)})


FREE = (
    "workers",
    "cache_mb",
    "keep",
    "bad_pictures",
    "quality_batch",
    "sample_every",
    "checkpoint_every",
)
"""Options that may differ when a run resumes: they do not change what is learned."""


@dataclass(frozen=True)
class Options:
    """The options of a run as they are given. A `Config` has checked them.

    Each field is an option of trainer.fit, with its text as help.
    """

    # Data.
    data: str = option(
        "emoji",
        "emoji, digits, folder:PATH (a class per subfolder), pairs:PATH (source/ and target/), "
        "npz:FILE, hf:NAME_OR_PATH, or wds:SHARDS",
    )
    name: str = option("", "the run's name, its folder under runs/ (default: the data's name)")
    split: str = option(
        "train",
        "emoji: train leaves out every tenth emoji for later measurements; all takes every one",
        ("train", "all"),
    )
    size: int = option(
        0,
        "files: resize the shorter side to this many pixels and crop; 0 requires that all images "
        "be alike",
    )
    mode: str = option(
        "", "files: convert images to this mode; empty requires that all be alike", ("", "RGB", "L")
    )
    crop: str = option(
        "centre", "files: which part of an image that is not square is kept", ("centre", "random")
    )
    flips: bool = option(False, "mirror half of the images, drawn again every epoch")
    bad_pictures: str = option(
        "skip",
        "files: refuse ends the run at one that cannot be read; skip counts and names it, and "
        "ends the run at more than 1 %",
        ("skip", "refuse"),
    )
    labels: bool = option(True, "condition the network on each image's class")
    label_file: str = option(
        "", "folder: a JSON file that gives each image's class, instead of subfolders"
    )
    image_column: str = option(
        "", "hf, wds: the column or ending that holds the image (default: the first that does)"
    )
    label_column: str = option(
        "", "hf, wds: the column or ending that holds the class (default: label or cls, if there)"
    )
    task: str = option(
        "",
        "what the network is conditioned on: superres, the image made smaller by --factor; "
        "colorize, the grey image; inpaint, the image with a hole; restyle, the same in another "
        "style",
        ("", "superres", "colorize", "inpaint", "restyle"),
    )
    factor: int = option(2, "superres: how often the image is larger on each side")
    condition_column: str = option(
        "",
        "vectors to condition on: hf, a column; npz, an array; folder, a JSON file that gives "
        "each image's",
    )
    condition_dropout: float = option(
        0.1, "share of images whose conditions are 0, which guidance needs"
    )
    in_memory_mb: int = option(
        64, "files: decode all at the start if they take less than this, otherwise stream them"
    )
    cache_mb: int = option(512, "streamed files: how much of them is kept decoded")
    workers: int = option(-1, "processes that decode streamed images; -1: one per core, 8 at most")

    # The network.
    network: str = option("unet", "the kind of network", ("unet", "dit"))
    channels: tuple[int, ...] = option(
        (32, 64, 128), "unet: width at each resolution, halved each time"
    )
    blocks: int = option(1, "unet: residual blocks per resolution")
    attention: tuple[int, ...] = option(
        (8,), "unet: image heights at which the network has attention"
    )
    patch: int = option(2, "dit: side of a patch in pixels")
    width: int = option(384, "dit: channels")
    depth: int = option(12, "dit: blocks")
    heads: int = option(6, "dit: heads of attention")
    dropout: float = option(0.0, "unet: share of activations dropped in each residual block")

    # What is learned.
    prediction: str = option("v", "what the network predicts", PREDICTIONS)
    schedule: str = option(
        "cosine", "the variance schedule", tuple(s for s in SCHEDULES if s != "from_betas")
    )
    T: int = option(1000, "knots of the schedule")
    zero_terminal_snr: bool = option(
        False, "rescale the schedule so that its last knot is pure noise"
    )
    weighting: str = option(
        "uniform", "the weight of each noise level in the loss", ("uniform", "min_snr", "edm")
    )
    min_snr_gamma: float = option(
        5.0, "min_snr: the signal-to-noise ratio beyond which a level weighs no more"
    )
    times: str = option(
        "stratified",
        "how noise levels are drawn: a stretch of knots for each image, knots, or "
        "ln(sigma/alpha) normal",
        ("stratified", "uniform", "log_normal"),
    )
    time_mean: float = option(-1.2, "log_normal: mean of ln(sigma/alpha)")
    time_std: float = option(1.2, "log_normal: standard deviation of ln(sigma/alpha)")

    # How it is learned.
    steps: int = option(4200, "optimizer steps in all")
    batch: int = option(64, "images per step, over all processes")
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
        "half-lives of the weights' moving averages in images, shorter at first; the first is "
        "sampled",
    )
    ema_power: tuple[float, ...] = option(
        (),
        "relative widths of power-function averages kept as snapshots, such as 0.05,0.1, for "
        "trainer.average",
    )
    snapshot_every: int = option(1000, "steps between those snapshots")
    start_from: str = option(
        "", "start from the averaged weights of this run or bundle instead of random ones"
    )
    seed: int = option(0, "all randomness is a function of (seed, step)")

    # The device and the speed: these change last bits at most, and `precision` more.
    device: str = option("auto", "auto: cuda if there is one", ("auto", "cpu", "cuda"))
    precision: str = option(
        "auto",
        "auto: bf16 on a GPU that has it, otherwise fp32; fp16 needs a GPU",
        ("auto", "fp32", "bf16", "fp16"),
    )
    channels_last: bool = option(
        True, "keep the network's weights and images with their channels last"
    )
    compile: bool = option(False, "compile the network with torch.compile")
    checkpointing: bool = option(
        False, "recompute activations in the backward pass, to save memory"
    )

    # What a run writes.
    checkpoint_every: int = option(250, "steps between checkpoints")
    keep: int = option(3, "checkpoints kept, the newest")
    sample_every: int = option(500, "steps between sample grids; 0 for none")
    sample_solver: str = option("ddim", "solver of the sample grids")
    sample_steps: int = option(20, "steps of the sample grids")
    quality_every: int = option(
        0,
        "images trained on between two measurements of how far samples are from the "
        "data, to the step; 0 for none",
    )
    quality_samples: int = option(1000, "samples, and images, that are compared")
    quality_batch: int = option(64, "batch size of those samples")
    features: str = option(
        "",
        "a TorchScript file of Inception, uint8 [B, 3, H, W] to features (default: a classifier "
        "trained on the data)",
    )
    log_every: int = option(20, "steps between log rows")
