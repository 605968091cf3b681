"""The cost of an image at the quality of a thousand calls: distance against wall time by system.

    python benchmarks/same_quality.py [--quick] [--write] [--pictures N] [--only PATTERN]

The shipped bundle makes images of each class in turn, without guidance. A setting is a system, a
solver and a number of steps. `student` is the network distilled from it, if it is there, with its
own guidance. Every setting makes images of the same seeds in batches of 16, and the
settings take turns within each round. Its time is the median over the timed rounds. More images
follow that are not timed, so they may be made next to other work. Quality:

- RMS: distance of the timed images to the output of DDIM with 1,000 calls from the same x_T in
  float32.
- Fréchet distance of all images to 1,024 training images of the same labels, by the classifier of
  `trainer.evaluate`. The mark to reach is the distance of the same number of images of DDPM with
  1,000 calls, by our fp32, plus one standard error. Few images support no finer statement. The
  distance depends on the number of images, so compare only within a table.

The time of DDPM with 1,000 calls is twenty times that of 50 steps, timed in the same rounds.
--write refreshes docs/benchmarks.md and its plot. Needs the extra bench. Takes an hour on two
cores, with 256 images; --quick (250 calls instead of 1,000) takes six minutes with 96. A stopped
run resumes.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from figures import WORK, busy, fill, kept, machine, markdown
from numpy.typing import NDArray
from systems import Network, diffusers_loop, emoji32

from runtime import BackendError, Bundle, RequestError, Sampler
from runtime.images import to_uint8
from runtime.terminal.progress import Progress
from trainer.config import Config
from trainer.data import sources
from trainer.quality.distances import frechet
from trainer.quality.judge import Judge

BATCH = 16
STUDENT = Path("bundles/emoji32-fast")
SCALED = 50
"""Steps of DDPM that are timed for the thousand; its images are not compared."""
TIMED = 6
"""Rounds that are timed, at most."""
REAL = 1024
"""Training images that all images are compared with."""
OURS = (("onnxruntime", "fp32"), ("openvino", "bf16"), ("openvino", "int8"))
COLORS = {"diffusers, eager": "#d55e00", "diffusers, channels_last": "#cc79a7"}
COLORS |= {
    "unnoise, onnxruntime fp32": "#444444",
    "unnoise, openvino bf16": "#0072b2",
    "unnoise, openvino int8": "#009e73",
}


class Setting(NamedTuple):
    """A system with its settings."""

    system: str
    solver: str
    steps: int


Make = Callable[[int], NDArray[np.float32]]
"""The images of a round's seeds."""


def settings(network: Network, quick: bool) -> dict[Setting, Make]:
    """Everything that is timed."""
    found: dict[Setting, Make] = {}
    ddim, fast = (
        ((10, 50), (5, 8, 12, 20))
        if quick
        else ((10, 20, 50, 100), (4, 5, 6, 8, 10, 12, 16, 20, 30))
    )
    grid = {"ddim": "trailing", "ddpm": "trailing", "dpmpp_2m": "log_snr(7)"}
    for backend, precision in OURS:
        try:
            sampler = Sampler(network.bundle, backend, precision)
        except (BackendError, RequestError) as error:
            print(f"left out: {backend} {precision}: {error}", file=sys.stderr)
            continue
        ways = [("ddim", n) for n in ddim] + [("dpmpp_2m", n) for n in fast] + [("ddpm", SCALED)]
        ways += [("tuned", n) for n in sorted(network.bundle.tuned)]
        system = f"unnoise, {backend} {precision}"
        for solver, steps in ways:
            how = {"solver": solver, "steps": steps, "guidance": 1.0}
            how |= {"grid": grid[solver]} if solver in grid else {}
            found[Setting(system, solver, steps)] = own(network, sampler, how)
        found |= students(network, system, backend, precision)
    for name, layout in (
        ("diffusers, eager", torch.contiguous_format),
        ("diffusers, channels_last", torch.channels_last),
    ):
        if quick and "last" in name:
            continue
        module = network.module if "eager" in name else _moved(network.module, layout)
        ways = (
            [("ddim", n) for n in ddim if n <= 50]
            + [("dpmpp_2m", n) for n in fast]
            + [("ddpm", SCALED)]
        )
        for solver, steps in ways:
            found[Setting(name, solver, steps)] = theirs(network, module, solver, steps, layout)
    return found


def students(network: Network, system: str, backend: str, precision: str) -> dict[Setting, Make]:
    """The student's settings, one for each number of calls that it was distilled for."""
    if not STUDENT.is_dir():
        return {}
    try:
        sampler = Sampler.load(STUDENT, backend, precision)
    except (BackendError, RequestError) as error:
        print(f"left out: the student on {backend} {precision}: {error}", file=sys.stderr)
        return {}
    assert sampler.bundle.distilled is not None
    return {
        Setting(system, "student", steps): own(network, sampler, {"steps": steps})
        for steps in sorted(sampler.bundle.distilled.levels)
    }


def own(network: Network, sampler: Sampler, how: Mapping[str, Any]) -> Make:
    return lambda r: sampler.sample(BATCH, r * BATCH, label=labels_made(network), **how)


def labels_made(network: Network) -> list[int]:
    """Every class in turn; the same in each round."""
    return [i % network.bundle.num_classes for i in range(BATCH)]


def _moved(module: torch.nn.Module, layout: torch.memory_format) -> torch.nn.Module:
    import copy

    return copy.deepcopy(module).to(memory_format=layout)


def theirs(
    network: Network, module: Any, solver: str, steps: int, layout: torch.memory_format
) -> Make:
    def make(r: int) -> NDArray[np.float32]:
        moved = network.with_seeds(r * BATCH)
        torch.manual_seed(r)  # of DDPM's noise
        return diffusers_loop(moved, module, BATCH, steps, layout, kind=solver)()

    return make


class Rounds:
    """Every setting's time and images, a round at a time; opened, and warm, when the first round is
    asked for. The rounds after the timed ones leave out what is only timed."""

    def __init__(self, network: Network, quick: bool, only: str) -> None:
        self.network, self.quick, self.only = network, quick, only

    @cached_property
    def every(self) -> list[tuple[Setting, Make]]:
        found = [
            (setting, make)
            for setting, make in settings(self.network, self.quick).items()
            if setting.solver == "ddpm" or re.search(self.only, " ".join(map(str, setting)))
        ]
        for make in {setting.system: make for setting, make in reversed(found)}.values():
            make(0)
        return found

    def __call__(self, r: int) -> list[dict[str, Any]]:
        """Round r; the order turns by one from round to round."""
        every, found, before = self.every, [], None
        if r >= TIMED:
            every = [one for one in every if one[0].solver != "ddpm"]
        if not every:
            return []
        with Progress(f"round {r + 1}", len(every)) as bar:
            for setting, make in every[r % len(every) :] + every[: r % len(every)]:
                if (
                    setting.system != before
                ):  # so that it is not charged for the threads and caches of the one before
                    next(m for s, m in every if s.system == setting.system)(r)
                before = setting.system
                begun = time.perf_counter()
                made = make(r)
                seconds = time.perf_counter() - begun
                path = pictures_of(setting, r, self.quick)
                np.save(path, made)
                found.append({"setting": list(setting), "seconds": seconds, "file": str(path)})
                bar.advance(note=str(setting))
        return found


def pictures_of(setting: Setting, r: int, quick: bool) -> Path:
    name = (
        "-".join([*map(str, setting), str(r), "quick" if quick else "full"])
        .replace(", ", "-")
        .replace(" ", "-")
    )
    folder = WORK / "same-quality"
    folder.mkdir(parents=True, exist_ok=True)
    return folder / f"{name}.npy"


def reference(network: Network, solver: str, calls: int, r: int) -> str:
    """The file of a round's images by `calls` calls in float32."""
    path = pictures_of(Setting("reference", solver, calls), r, False)
    sampler = Sampler(network.bundle, "onnxruntime", "fp32")
    with Progress(f"{solver} with {calls} calls, round {r + 1}", calls) as bar:
        how = {
            "solver": solver,
            "steps": calls,
            "guidance": 1.0,
            "grid": "trailing",
            "on_step": lambda _: bar.advance(),
        }
        np.save(path, sampler.sample(BATCH, r * BATCH, label=labels_made(network), **how))
    return str(path)


def measure(network: Network, quick: bool, rounds: int, calls: int, only: str) -> dict[str, Any]:
    """Time and distances of every setting, and the marks.

    rounds: Of BATCH images, the first TIMED of which are timed.
    only: A pattern of "system solver steps"; "" for every setting.
    """
    timed_rounds = min(rounds, TIMED)
    files = {name: f.sha256 for name, f in network.bundle.files.items()}
    student = Bundle.load(STUDENT).files if STUDENT.is_dir() else {}
    timed = {**files, **{f"student/{name}": f.sha256 for name, f in student.items()}}
    exact, marks = (
        [
            kept(
                f"same-quality-{solver}-{r}",
                (calls, files),
                lambda s=solver, r=r: reference(network, s, calls, r),
            )
            for r in range(count)
        ]
        for solver, count in (("ddim", timed_rounds), ("ddpm", rounds))
    )
    rounds_of = Rounds(network, quick, only)
    done = [
        kept(f"same-quality-round-{r}", (quick, only, timed), lambda r=r: rounds_of(r))
        for r in range(rounds)
    ]
    measured = Distance(network)
    limit = np.concatenate([np.load(path) for path in exact])
    every = list(dict.fromkeys(tuple(one["setting"]) for one in done[0]))
    found = []
    for setting in every:
        each = [one for part in done for one in part if tuple(one["setting"]) == setting]
        pictures = np.concatenate([np.load(one["file"]) for one in each])
        seconds = statistics.median(one["seconds"] for one in each[:timed_rounds])
        first = pictures[: len(limit)].astype(np.float64)
        found.append(
            {
                "setting": setting,
                "ms": 1e3 * seconds / BATCH,
                "rms": float(np.sqrt(np.mean((first - limit) ** 2))),
                # Of fewer images, a distance says nothing next to the others.
                "frechet": measured(pictures) if len(each) == rounds else math.inf,
            }
        )
    marked = np.concatenate([np.load(path) for path in marks])
    return {
        "settings": found,
        "mark": measured(marked),
        "spread": measured.standard_error(marked),
        "limit": measured(limit) if timed_rounds == rounds else math.inf,
        "calls": calls,
        "pictures": rounds * BATCH,
    }


class Distance:
    """The Fréchet distance of images to the data, whose labels are as frequent as the images'."""

    def __init__(self, network: Network) -> None:
        config = Config.from_json(network.bundle.provenance["config"])
        data = sources.load(config)
        self._judge = Judge(config, data, None, torch.device("cpu"))
        rng = np.random.default_rng(0)
        labels = np.asarray(data.labels)
        chosen = []
        for label in labels_made(network):
            of_label = np.flatnonzero(labels == label)
            count = REAL // BATCH
            chosen.append(rng.choice(of_label, count, replace=len(of_label) < count))
        self._real = self._judge.features(data.gather(np.concatenate(chosen))[0])

    def __call__(self, images: NDArray[np.float32]) -> float:
        return self._of(self._features(images))

    def standard_error(self, images: NDArray[np.float32], draws: int = 100) -> float:
        """Of the distance of a few images: its standard deviation over samples of them, drawn with
        replacement (Efron 1979)."""
        found, rng = self._features(images), np.random.default_rng(0)
        n = len(found)
        return float(np.std([self._of(found[rng.integers(0, n, n)]) for _ in range(draws)]))

    def _features(self, images: NDArray[np.float32]) -> NDArray[np.float32]:
        return self._judge.features(to_uint8(images))

    def _of(self, found: NDArray[np.float32]) -> float:
        return frechet(self._real, found)


def cost(found: Mapping[str, Any], system: str) -> float:
    """Milliseconds per image by DDPM with all its calls."""
    ms = next(
        one["ms"]
        for one in found["settings"]
        if one["setting"][:2] in ((system, "ddpm"), [system, "ddpm"])
    )
    return ms * found["calls"] / SCALED


def good(found: Mapping[str, Any], system: str) -> Mapping[str, Any] | None:
    """A system's cheapest setting that reaches the mark, as far as this number of images can show."""
    enough = found["mark"] + found["spread"]
    reached = [
        one for one in found["settings"] if one["setting"][0] == system and one["frechet"] <= enough
    ]
    return min(reached, key=lambda one: one["ms"], default=None)


def table(found: Mapping[str, Any]) -> str:
    """Each system's cheapest setting at the mark, against DDPM in full."""
    calls, rows = found["calls"], []
    systems = list(dict.fromkeys(one["setting"][0] for one in found["settings"]))
    slow = cost(found, "diffusers, eager")
    for system in systems:
        one = good(found, system)
        row = [system, f"{cost(found, system):,.0f}"]
        if one is None:
            rows.append([*row, "not reached", "–", "–", "–"])
            continue
        _, solver, steps = one["setting"]
        row += [
            f"{one['ms']:.1f}: `{solver}`, {steps} steps",
            f"{one['frechet']:.2f}",
            f"{one['rms']:.3f}",
            f"{slow / one['ms']:.0f} ×",
        ]
        rows.append(row)
    head = [
        "",
        f"ms per image by DDPM, {calls} calls",
        "ms per image at its quality",
        "Fréchet distance",
        "RMS",
        f"faster than diffusers' DDPM, {calls} calls",
    ]
    mark, spread = found["mark"], found["spread"]
    exact = f" DDIM with {calls:,} calls has {found['limit']:.2f}."
    limit = exact if math.isfinite(found["limit"]) else ""
    marks = (
        f"The mark: Fréchet distance {mark:.2f} ± {spread:.2f}, of {found['pictures']} images "
        f"by DDPM with {calls:,} calls.{limit} A setting with at most {mark + spread:.2f} counts as "
        "equally good."
    )
    return f"{marks}\n\n{markdown(head, rows)}"


def draw(path: Path, found: Mapping[str, Any]) -> None:
    """RMS, and Fréchet distance, against milliseconds per image."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    picture, axes = plt.subplots(1, 2, figsize=(13, 5), layout="constrained")
    styles: Sequence[tuple[str, str]] = (
        ("ddim", "o:"),
        ("dpmpp_2m", "s-"),
        ("tuned", "^--"),
        ("student", "D-."),
    )
    for axis, key in zip(axes, ("rms", "frechet"), strict=True):
        for system, color in COLORS.items():
            for solver, style in styles:
                line = sorted(
                    (
                        one
                        for one in found["settings"]
                        if one["setting"][0] == system and one["setting"][1] == solver
                    ),
                    key=lambda one: one["ms"],
                )
                if line:
                    label = system if solver == "dpmpp_2m" else None
                    axis.plot(
                        [one["ms"] for one in line],
                        [one[key] for one in line],
                        style,
                        color=color,
                        label=label,
                        markersize=5,
                        linewidth=1.3,
                    )
        axis.set(xscale="log", yscale="log", xlabel="ms per image, batch 16")
        for which in (axis.xaxis, axis.yaxis):
            which.set_major_formatter("{x:g}")
        axis.yaxis.set_minor_formatter("{x:g}")
        axis.tick_params(axis="y", which="minor", labelsize=7)
        axis.grid(alpha=0.3, which="both")
    axes[0].set_title(f"RMS from DDIM with {found['calls']} calls, the same seeds")
    axes[1].set_title("Fréchet distance from the training images")
    axes[1].axhline(found["mark"], color="#d55e00", linewidth=0.8)
    for system in ("diffusers, eager", "unnoise, onnxruntime fp32"):
        axes[1].plot(cost(found, system), found["mark"], "*", color=COLORS[system], markersize=13)
    axes[1].annotate(
        f"DDPM with {found['calls']} calls",
        (cost(found, "diffusers, eager"), found["mark"]),
        (0, 10),
        textcoords="offset points",
        ha="right",
    )
    for solver, style in styles:
        axes[0].plot([], [], style, color="#999999", label=solver)
    axes[0].legend(fontsize=8)
    picture.savefig(path, dpi=110, metadata={"Software": None})
    plt.close(picture)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--quick", action="store_true", help="fewer settings, 250 calls in place of 1,000"
    )
    parser.add_argument("--pictures", type=int, help="[256; 96 with --quick]")
    parser.add_argument(
        "--write", action="store_true", help="refresh docs/benchmarks.md and docs/same-quality.png"
    )
    parser.add_argument(
        "--only",
        default="",
        help="a pattern of the settings that run besides ddpm, such as 'student' [all]",
    )
    given = parser.parse_args()
    load, network = busy(), emoji32()
    pictures = given.pictures or (96 if given.quick else 256)
    rounds, calls = pictures // BATCH, 250 if given.quick else 1000
    found = measure(network, given.quick, rounds, calls, given.only)
    source = (
        f"Measured by `benchmarks/same_quality.py` on {machine()}. {found['pictures']} images "
        f"of the shipped bundle in batches of {BATCH}, all settings interleaved in each of "
        f"{min(rounds, TIMED)} timed rounds. DDPM's time is that of {SCALED} steps, scaled.{load}"
    )
    print(table(found), source, json.dumps(found), sep="\n\n")
    if given.write:
        draw(Path("docs/same-quality.png"), found)
        plot = "![Distance against time, one curve per system](same-quality.png)"
        fill(Path("docs/benchmarks.md"), "same-quality", "\n\n".join([plot, table(found), source]))


if __name__ == "__main__":
    main()
