"""Every backend and precision against PyTorch and against each other, same inputs, in one run.

    python benchmarks/backends.py [--write] [--rounds N]

Two networks: the shipped bundle, and one of google/ddpm-cifar10-32's published shape (35.7 M
parameters, random weights), exported into out/cifar10 on the first run. All sides of a comparison
run in turn within each round. The tables report medians of the ratios, with the quartiles, and the
difference of each side's final images from those of float32. --write fills docs/precisions.md.
Needs the extras diffusers and openvino.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import onnxruntime as ort
import torch
from figures import fill, machine
from step import bare_network, runner

from export import build_bundle
from export.graph.calibrate import QUICK_CALIBRATION
from export.proof.plan import QUICK
from export.sources.bundle import from_bundle
from runtime import BackendError, Bundle, RequestError, Sampler
from runtime.terminal.progress import Progress

CIFAR = {
    "sample_size": 32,
    "in_channels": 3,
    "out_channels": 3,
    "center_input_sample": False,
    "time_embedding_type": "positional",
    "freq_shift": 1,
    "flip_sin_to_cos": False,
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
    "block_out_channels": (128, 256, 256, 256),
    "layers_per_block": 2,
    "downsample_padding": 0,
    "act_fn": "silu",
    "attention_head_dim": None,
    "norm_num_groups": 32,
    "norm_eps": 1e-6,
}
"""The published config of google/ddpm-cifar10-32."""
PAIRS = (
    ("onnxruntime", "fp32"),
    ("onnxruntime", "int8"),
    ("openvino", "fp32"),
    ("openvino", "bf16"),
    ("openvino", "int8"),
)
EAGER = ("PyTorch eager", "PyTorch eager, channels_last")
STEPS = 10


class Cifar(torch.nn.Module):
    """diffusers' network as module(x, time) → F."""

    def __init__(self) -> None:
        from diffusers import UNet2DModel

        super().__init__()
        torch.manual_seed(0)
        self.network = UNet2DModel(**CIFAR)

    def forward(self, x: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
        return self.network(x, time, return_dict=False)[0]


def cifar(folder: Path) -> tuple[Bundle, torch.nn.Module]:
    """The CIFAR-shaped network's bundle with int8, and its module."""
    module = Cifar().eval().requires_grad_(False)
    if not (folder / "bundle.json").is_file():
        described = {
            "sample_shape": (3, 32, 32),
            "prediction": "epsilon",
            "schedule": "linear_raw",
            "clip": 1.0,
        }
        made = {"plan": QUICK, "precisions": ("int8",), "calibration": QUICK_CALIBRATION}
        build_bundle(module, folder, name="cifar10", **described, **made)
    return Bundle.load(folder), module


def sides(bundle: Bundle, module: torch.nn.Module, batch: int) -> dict[str, Callable[[], object]]:
    """One call of the network on a batch, by each side that this machine can run."""
    label = np.arange(batch, dtype=np.int64) % max(1, bundle.num_classes)
    x = np.random.default_rng(0).normal(size=(batch, *bundle.sample_shape)).astype(np.float32)
    found: dict[str, Callable[[], object]] = {}
    for name in EAGER:
        layout = torch.channels_last if "last" in name else torch.contiguous_format
        network = (
            module.to(memory_format=layout)
            if name == EAGER[0]
            else _copy(module).to(memory_format=layout)
        )
        inputs = [torch.from_numpy(x).to(memory_format=layout), torch.full((batch,), 500.0)]
        inputs += [torch.from_numpy(label)] if bundle.labels else []
        found[name] = lambda network=network, inputs=inputs: network(*inputs)
    for backend, precision in PAIRS:
        try:
            buffers = Sampler.load(bundle.path, backend, precision).backend.bind(batch)
        except (BackendError, RequestError) as error:
            print(f"left out: {backend} {precision}: {error}")
            continue
        buffers.state[:, 0], buffers.label[:] = x, label
        buffers.call[:], buffers.update[:] = (500, 1, 1, -1, 1, 1), np.eye(4, 6)
        found[f"{backend} {precision}"] = lambda buffers=buffers: buffers.step(False)
    return found


def _copy(module: torch.nn.Module) -> torch.nn.Module:
    import copy

    return copy.deepcopy(module)


def alternate(
    sides: Mapping[str, Callable[[], object]],
    calls: int,
    rounds: int,
    bar: Progress,
    settle: bool = False,
) -> dict[str, list[float]]:
    """Seconds per call of every side in every round; the order turns by one from round to round.

    settle: one call before the timed ones, so that a side is not charged for the threads and caches
        of the side before it. After the first round it is skipped if a call takes more than a
        second, because the effect is then negligible.
    """
    spent: dict[str, list[float]] = {name: [] for name in sides}
    names = list(sides)
    with torch.inference_mode():
        for name in () if settle else names:
            sides[name]()
        for r in range(rounds):
            for name in names[r % len(names) :] + names[: r % len(names)]:
                if settle and not (r and spent[name][-1] > 1):
                    sides[name]()
                begun = time.perf_counter()
                for _ in range(calls):
                    sides[name]()
                spent[name].append((time.perf_counter() - begun) / calls)
            bar.advance()
    return spent


def over(spent: Mapping[str, list[float]], slow: str, fast: str) -> list[float]:
    """Quartiles of how many times faster `fast` is than `slow`."""
    return statistics.quantiles([a / b for a, b in zip(spent[slow], spent[fast], strict=True)], n=4)


def distance(bundle: Bundle) -> dict[str, float]:
    """Median PSNR of final images against ONNX Runtime's fp32, 20-step DPM-Solver++(2M), as
    measured by the export, dB.
    """
    return {
        f"{b} {p}": entry["psnr_db"]
        for p, entries in bundle.report.items()
        for b, entry in entries.items()
    }


def loop_overhead(bundle: Bundle, batch: int, rounds: int, bar: Progress) -> list[float]:
    """Quartiles of: time of sampling through `Sampler` / of as many calls of the bare network in a
    loop with no update."""
    # Uncut, as the bare network is: a ratio is to show the loop alone.
    sampler = Sampler(bundle, streams=1)
    label = (np.arange(batch) % bundle.num_classes).tolist() if bundle.labels else None
    network = ort.InferenceSession(
        bare_network(bundle).SerializeToString(), providers=["CPUExecutionProvider"]
    )
    shape = (batch, *bundle.sample_shape)
    values = [
        np.zeros(shape, np.float32),
        np.full(batch, 500, np.float32),
        np.zeros(batch, np.int64),
    ]
    feeds = dict(zip((i.name for i in network.get_inputs()), values, strict=False))
    bare = runner(network, feeds, {network.get_outputs()[0].name: shape})

    def ours() -> None:
        guidance = None if label is None else 1.0
        sampler.sample(batch, 0, label=label, guidance=guidance, solver="dpmpp_2m", steps=STEPS)

    def theirs() -> None:
        for _ in range(STEPS):
            bare()

    spent = alternate(
        {"ours": ours, "theirs": theirs}, max(1, 8 // batch), rounds, bar, settle=True
    )
    return over(spent, "ours", "theirs")


def table(
    name: str, batch: int, spent: Mapping[str, list[float]], psnr: Mapping[str, float]
) -> str:
    """Every side's time, and how many times faster than eager and than ONNX Runtime's fp32."""
    eager = min(EAGER, key=lambda side: statistics.median(spent[side]))
    lines = [
        f"{name}, batch {batch}:",
        "",
        f"| | ms per call | × {EAGER[0]} | × the better eager | × onnxruntime fp32 | PSNR to fp32, "
        f"dB |",
        "|---|---|---|---|---|---|",
    ]
    for side, times in spent.items():
        ratios = [
            f"{over(spent, slow, side)[1]:.2f}" for slow in (EAGER[0], eager, "onnxruntime fp32")
        ]
        near = (
            "–" if side in EAGER or side not in psnr or psnr[side] >= 199 else f"{psnr[side]:.0f}"
        )
        lines.append(
            f"| {side} | {1e3 * statistics.median(times):.2f} | {' | '.join(ratios)} | {near} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--write", action="store_true", help="refresh docs/precisions.md")
    given = parser.parse_args()
    shipped = Bundle.load("bundles/emoji32")
    networks = {
        "emoji32": (shipped, from_bundle(shipped.path).module, ((1, 10), (16, 1))),
        "CIFAR-shaped": (*cifar(Path("out/cifar10")), ((1, 2), (8, 1), (16, 1))),
    }
    parts, loops, raw = [], [], {}
    with Progress("measuring", given.rounds * 9) as bar:
        for name, (bundle, module, batches) in networks.items():
            for batch, calls in batches:
                every = sides(bundle, module, batch)
                spent = alternate(every, calls, given.rounds, bar, settle=True)
                parts.append(table(name, batch, spent, distance(bundle)))
                raw[f"{name} {batch}"] = spent
            for batch in (1, 16):
                low, median, high = loop_overhead(bundle, batch, given.rounds, bar)
                loops.append(f"| {name}, batch {batch} | {median:.3f} | {low:.3f} … {high:.3f} |")
    head = f"| {STEPS} steps of `dpmpp_2m` through `Sampler` / {STEPS} calls of the bare network | ratio | quartiles |\n|---|---|---|"
    source = f"Measured by `benchmarks/backends.py` on {machine()}. Medians of {given.rounds} alternating rounds."
    text = "\n\n".join([*parts, "\n".join([head, *loops]), source])
    print(text, json.dumps(raw), sep="\n")
    if given.write:
        fill(Path("docs/precisions.md"), "backends", text)


if __name__ == "__main__":
    main()
