"""The same images by the same steps, from unnoise, diffusers and other libraries.

    python benchmarks/same_work.py [--quick] [--write] [--rounds N] [--network NAME ...] [--only RE]

The systems are unnoise, diffusers, denoising-diffusion-pytorch, and inference libraries called raw.
For each network and batch, every system makes the images of the same x_T with DDIM. They are
compared with ours before anything is timed. In each round every system runs once, after a call that
is not counted; the first system changes from round to round. A ratio is taken within a round, and
the median over the rounds is reported. Each cell is stored in out/benchmarks, so a stopped run
resumes. --write refreshes docs/benchmarks.md, its plot, and the README. Needs the extra bench.
Takes half an hour on two cores, with --quick five minutes.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import readme
from backends import alternate, over
from figures import busy, fill, kept, machine, markdown
from systems import EAGER, REFERENCE, Network, Systems, cifar10, emoji32, large

from runtime.bench.plot import plain
from runtime.terminal.progress import Progress

NETWORKS: Mapping[str, tuple[Callable[[], Network], int, int, tuple[str, ...]]] = {
    "emoji32": (emoji32, 10, 5, ("default", "max-autotune")),
    "cifar10": (cifar10, 5, 3, ("default",)),
    "unet64": (large, 5, 3, ("default",)),
}
"""How a network is obtained, with how many steps it is sampled here, in how many rounds, and the
modes of torch.compile, which takes minutes for a large one."""
SAME = 2e-3
"""The most by which images of float32 systems may differ, largest difference, in a range of 2:
rounding, where c_out multiplies it."""
HALF = ("bf16", "int8")
COLORS = {"unnoise": "#0072b2", "diffusers": "#d55e00", "denoising": "#cc79a7", "raw": "#777777"}


def measure(
    network: Network, steps: int, batch: int, rounds: int, modes: Sequence[str], only: str = ""
) -> dict[str, Any]:
    """One cell: every system's seconds in each round, and the distance of its images from ours."""
    systems = Systems(network, modes, only)
    every = systems.all(batch, steps)
    apart = {
        name: difference(made, systems.expected(name, batch, steps))
        for name, (_, made) in every.items()
    }
    for name, (largest, _) in apart.items():
        if largest > SAME and not any(p in name for p in HALF):
            systems.left_out[name] = f"its images differ by {largest:.1e}"
            print(f"left out: {name}: {systems.left_out[name]}")
    sides = {name: make for name, (make, _) in every.items() if name not in systems.left_out}
    with Progress(f"{network.name}, batch {batch}", rounds) as bar:
        spent = alternate(sides, 1, rounds, bar, settle=True)
    return {
        "spent": spent,
        "apart": apart,
        "left_out": systems.left_out,
        "parameters": network.parameters,
    }


def difference(found: np.ndarray, expected: np.ndarray) -> tuple[float, float]:
    """The largest difference, and the root of the mean square."""
    error = found.astype(np.float64) - expected
    return float(np.abs(error).max()), float(np.sqrt(np.mean(error**2)))


def per_picture(cell: Mapping[str, Any], name: str, batch: int) -> float:
    """Milliseconds."""
    return 1e3 * statistics.median(cell["spent"][name]) / batch


def table(cells: Mapping[int, Mapping[str, Any]]) -> str:
    """Every system at every batch: milliseconds per image, speed-up over eager, and the distance of
    its images.
    """
    names = list(dict.fromkeys(name for cell in cells.values() for name in cell["spent"]))
    base = EAGER if EAGER in names else names[0]
    rows = []
    for name in names:
        row = [name]
        for batch, cell in cells.items():
            if name not in cell["spent"] or base not in cell["spent"]:
                row.append("–")
                continue
            low, middle, high = over(cell["spent"], base, name)
            row.append(
                f"{per_picture(cell, name, batch):.1f} ({middle:.2f} ×, {low:.2f} … {high:.2f})"
            )
        rms = max(cell["apart"][name][1] for cell in cells.values() if name in cell["apart"])
        rows.append([*row, "–" if name == REFERENCE else f"{rms:.0e}"])
    head = [
        "",
        *(
            f"batch {b}: ms per image (× {'eager' if base == EAGER else base}, quartiles)"
            for b in cells
        ),
        "RMS from ours, fp32",
    ]
    return markdown(head, rows)


def draw(path: Path, found: Mapping[str, Mapping[int, Any]], steps: Mapping[str, int]) -> None:
    """Milliseconds per image by system, with one panel per network and one marker per batch size."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    names = list(
        dict.fromkeys(
            n for cells in found.values() for cell in cells.values() for n in cell["spent"]
        )
    )
    picture, axes = plt.subplots(
        1,
        len(found),
        figsize=(2.2 + 4.1 * len(found), 1.5 + 0.34 * len(names)),
        sharey=True,
        squeeze=False,
        layout="constrained",
    )
    for axis, (network, cells) in zip(axes[0], found.items(), strict=True):
        for (batch, cell), marker in zip(cells.items(), "os^Dv", strict=False):
            for i, name in enumerate(names):
                if name in cell["spent"]:
                    axis.plot(
                        per_picture(cell, name, batch),
                        i,
                        marker,
                        color=COLORS[name.split(",")[0].split()[0].split("-")[0]],
                        markersize=7,
                    )
            axis.plot([], [], marker, color="#444444", label=f"batch {batch}")
            if EAGER in cell["spent"]:
                axis.axvline(
                    per_picture(cell, EAGER, batch), color="#d55e00", alpha=0.25, linewidth=0.8
                )
        millions = next(iter(cells.values()))["parameters"]
        axis.set(
            xscale="log",
            xlabel="ms per image",
            title=f"{network}: {millions:.1f} M parameters, {steps[network]} steps",
        )
        axis.minorticks_off()
        plain(
            axis.xaxis,
            [
                per_picture(cell, name, batch)
                for batch, cell in cells.items()
                for name in cell["spent"]
            ],
        )
        axis.grid(alpha=0.3, which="both")
        axis.legend(fontsize=8)
    axes[0, 0].set_yticks(range(len(names)), names)
    axes[0, 0].set_ylim(len(names) - 0.5, -0.5)
    picture.suptitle("the same images, the same steps: left is faster; lines are diffusers, eager")
    picture.savefig(path, dpi=110, metadata={"Software": None})
    plt.close(picture)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--quick",
        action="store_true",
        help="small batches, torch.compile on the smallest network alone",
    )
    parser.add_argument(
        "--rounds", type=int, help="[5 of the shipped network, 3 of the large ones]"
    )
    parser.add_argument("--network", action="append", choices=list(NETWORKS), help="[all]")
    parser.add_argument("--only", default="", help="a pattern of the systems that run [all]")
    parser.add_argument("--steps", type=int, help="steps of each image [10, or 5]")
    parser.add_argument("--batch", type=int, action="append", help="[1, 4, 16; fewer with --quick]")
    parser.add_argument(
        "--write",
        action="store_true",
        help="refresh docs/benchmarks.md, docs/same-work.png and README.md",
    )
    given = parser.parse_args()
    load = busy()
    found: dict[str, dict[int, Any]] = {}
    steps = {}
    for key in given.network or NETWORKS:
        opened, count, usual, modes = NETWORKS[key]
        rounds = given.rounds or usual
        count = given.steps or count
        network = opened()
        steps[network.name] = count
        if given.quick:
            modes = modes[:1] if key == "emoji32" else ()
        batches = given.batch or (
            (1, 4, 16) if not given.quick else (1, 4) if key == "emoji32" else (1,)
        )
        files = {name: file.sha256 for name, file in network.bundle.files.items()}
        found[network.name] = {
            b: kept(
                f"same-work-{key}-{b}",
                (rounds, count, modes, files, given.only),
                lambda n=network, c=count, b=b, r=rounds, k=modes: measure(
                    n, c, b, r, k, given.only
                ),
            )
            for b in batches
        }
    left = {
        f"{name}: {why}"
        for cells in found.values()
        for cell in cells.values()
        for name, why in cell["left_out"].items()
    }
    source = (
        f"Measured by `benchmarks/same_work.py` on {machine()}. diffusers, torch and OpenVINO are "
        f"those of constraints.txt. Medians of {given.rounds or '3 to 5'} alternating rounds.{load}"
        + "".join(f" Left out: {what}." for what in sorted(left))
    )
    parts = [
        f"{name}, DDIM, {steps[name]} steps:\n\n{table(cells)}" for name, cells in found.items()
    ]
    print(*parts, source, json.dumps(found), sep="\n\n")
    if given.write:
        draw(Path("docs/same-work.png"), found, steps)
        plot = "![Milliseconds per image of every system, one panel per network](same-work.png)"
        fill(Path("docs/benchmarks.md"), "same-work", "\n\n".join([plot, *parts, source]))
        readme.write()


if __name__ == "__main__":
    main()
