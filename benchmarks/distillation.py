"""A student against its teacher: python benchmarks/distillation.py TEACHER [STUDENT] [--write]

For each number of network calls, the Fréchet distance of `trainer.evaluate` between 1,024 samples
and as many training images, with the data's labels; for the teacher by several solvers, without
guidance and with the student's. Precision, recall, and how far samples of one label differ from
each other. A sheet shows the same seeds and labels by 1, 2 and 4 calls of the student and 50 of the
teacher, with the student's guidance.
Without a student, the teacher's tuned solvers against `unipc` on the best of a few grids, without
guidance and with the bundle's own.
Results are kept in out/distillation, so that a stopped measurement continues. --write refreshes
docs/distillation.md and its two images, or docs/tuned-solvers.md. Takes half an hour on two cores.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import torch
from figures import fill, machine, markdown
from numpy.typing import NDArray

from runtime import Sampler
from runtime.files import from_json, to_json, write_text
from runtime.images import save, tile
from trainer.config import Config
from trainer.data.sources import load
from trainer.quality.judge import Judge

SAMPLES = 1024
COARSE = "unipc, log_snr(4)"
MIDDLE = "unipc, log_snr(5)"
FINE = "unipc, log_snr(6)"
CALLS: Mapping[str, tuple[int, ...]] = {COARSE: (2, 4), MIDDLE: (5,), FINE: (2, 5, 10, 50)}
"""The teacher's numbers of steps without guidance; `tuned` has those of the bundle."""
CALLS_GUIDED: Mapping[str, tuple[int, ...]] = {COARSE: (4,), MIDDLE: (5,), FINE: (5, 10)}
UNTUNED: Mapping[str, tuple[int, ...]] = {COARSE: (4,), MIDDLE: (6,), FINE: (4, 6, 20)}
"""Steps of the untuned solvers that tuned ones are compared with."""
SOLVERS: Mapping[str, Mapping[str, Any]] = {
    "tuned": {"solver": "tuned"},
    COARSE: {"solver": "unipc", "grid": "log_snr(4)", "variant": "bh1"},
    MIDDLE: {"solver": "unipc", "grid": "log_snr(5)"},
    FINE: {"solver": "unipc", "grid": "log_snr(6)"},
}
ALIKE = 64
"""Samples of one label whose distances from each other are measured."""
SHOWN = 9
FIGURES = ("frechet", "precision", "recall", "spread")


@dataclass(frozen=True)
class Way:
    """One way to sample.

    Attributes:
        who: teacher or student.
        calls: Steps, each one call of the network, or two with guidance.
    """

    who: str
    solver: str
    calls: int
    guidance: float

    def settings(self) -> dict[str, Any]:
        own = {} if self.who == "student" else SOLVERS[self.solver]
        return {**own, "steps": self.calls, "guidance": self.guidance}

    @property
    def evaluations(self) -> int:
        return self.calls * (1 if self.guidance == 1 else 2)


def ways(teacher: Sampler, student: Sampler) -> Iterator[Way]:
    assert student.bundle.distilled is not None
    for calls in sorted(student.bundle.distilled.levels):
        yield Way("student", "lcm", calls, 1.0)
    tuned = tuple(sorted(teacher.bundle.tuned))
    for guidance, by_solver in {built_in(student): CALLS_GUIDED, 1.0: CALLS}.items():
        for solver, numbers in ({"tuned": tuned} | dict(by_solver)).items():
            for calls in numbers:
                yield Way("teacher", solver, calls, guidance)


def tuned_ways(teacher: Sampler) -> Iterator[Way]:
    for guidance in (1.0, teacher.bundle.defaults.guidance):
        every = {"tuned": tuple(sorted(teacher.bundle.tuned)), **UNTUNED}
        for solver, numbers in every.items():
            for calls in numbers:
                yield Way("teacher", solver, calls, guidance)


def built_in(student: Sampler) -> float:
    """Return the guidance that a student was taught."""
    assert student.bundle.distilled is not None
    guidance = student.bundle.distilled.made["guidance"]
    assert isinstance(guidance, float)
    return guidance


def spread(judge: Judge, sampler: Sampler, way: Way) -> float:
    """Return the mean distance between features of samples of one label, over a few labels."""
    found = []
    count = sampler.bundle.num_classes
    for label in range(0, count, max(1, count // 3)):
        images = sampler.pictures(ALIKE, seed=10**6, label=label, **way.settings())
        features = judge.features(images)
        distances = np.linalg.norm(features[:, None] - features[None], axis=-1)
        found.append(distances.sum() / (ALIKE * (ALIKE - 1)))
    return float(np.mean(found))


def measure(
    judge: Judge, samplers: Mapping[str, Sampler], every: Iterable[Way], folder: Path
) -> dict[Way, Any]:
    """Return the figures of every way, measuring those that are not in the folder."""
    found = {}
    for way in every:
        sampler = samplers[way.who]
        weights = sampler.bundle.files["fp32/weights.bin"].sha256
        tuned = sampler.bundle.tuned.get(way.calls) if way.solver == "tuned" else None
        solver = tuned.to_json() if tuned else ""
        told = f"{weights} {way} {solver} {SAMPLES} {sorted(samplers)}"
        key = hashlib.sha256(told.encode()).hexdigest()[:16]
        path = folder / f"{key}.json"
        if not path.exists():

            def sample(
                n: int, seed: int, label: NDArray[Any], sampler: Any = sampler, way: Way = way
            ) -> Any:
                return sampler.pictures(n, seed=seed, label=label.tolist(), **way.settings())

            figures = judge(sample)
            if "student" in samplers:
                figures |= {"spread": spread(judge, sampler, way)}
            write_text(path, to_json(figures))
        found[way] = from_json(path.read_bytes())
        print(way, {name: round(value, 3) for name, value in found[way].items()}, flush=True)
    return found


def best(found: Mapping[Way, Any], calls: int, guidance: float) -> Way | None:
    """Return the teacher's way with the least distance at this number of steps."""
    same = [w for w in found if (w.who, w.calls, w.guidance) == ("teacher", calls, guidance)]
    return min(same, key=lambda w: found[w]["frechet"], default=None)


def table(found: Mapping[Way, Any]) -> str:
    rows = []
    students = [way for way in found if way.who == "student"]
    guidances = sorted({way.guidance for way in found})
    numbers = sorted({way.calls for way in found if way.who == "teacher"})
    teachers = [best(found, calls, g) for g in guidances for calls in numbers]
    for way in (*students, *filter(None, teachers)):
        figures = [f"{found[way][name]:.2f}" for name in FIGURES]
        guided = "built in" if way.who == "student" else f"{way.guidance:g}"
        counts = (str(way.calls), str(way.evaluations))
        rows.append([way.who, f"`{way.solver}`", guided, *counts, *figures])
    head = ["", "solver", "guidance", "steps", "network calls", "Fréchet", "precision", "recall"]
    return markdown([*head, "distance within a label"], rows)


def tuned_table(found: Mapping[Way, Any]) -> str:
    """The Fréchet distance by steps and guidance, tuned and untuned next to each other."""
    guidances = sorted({way.guidance for way in found})
    rows = []
    for steps in sorted({way.calls for way in found}):
        cells = []
        for guidance in guidances:
            same = {w: v for w, v in found.items() if (w.calls, w.guidance) == (steps, guidance)}
            for is_tuned in (True, False):
                way = best(
                    {w: v for w, v in same.items() if (w.solver == "tuned") == is_tuned},
                    steps,
                    guidance,
                )
                name = "" if is_tuned or way is None else f" on `{way.solver.split()[1]}`"
                cells.append(f"{found[way]['frechet']:.2f}{name}" if way else "–")
        rows.append([str(steps), *cells])
    names = [f"`{name}`, guidance {g:g}" for g in guidances for name in ("tuned", "unipc")]
    return markdown(["steps", *names], rows)


def draw(path: Path, found: Mapping[Way, Any], name: str) -> None:
    """Draw the distance against network calls: the student, and the teacher's solvers."""
    figure, axis = plt.subplots(figsize=(8, 5), constrained_layout=True)
    guidances = sorted({way.guidance for way in found if way.who == "teacher"})
    for guidance, style in zip(guidances, ("-", "--"), strict=False):
        for i, solver in enumerate(SOLVERS):
            line = [w for w in found if (w.solver, w.guidance) == (solver, guidance)]
            line = [w for w in line if w.who == "teacher"]
            points = [(w.evaluations, found[w]["frechet"]) for w in line]
            if not points:
                continue
            label = f"{solver}, guidance {guidance:g}"
            axis.plot(*zip(*points, strict=True), style, color=f"C{i}", marker=".", label=label)
    students = [way for way in found if way.who == "student"]
    points = [(w.evaluations, found[w]["frechet"]) for w in students]
    axis.plot(*zip(*points, strict=True), color="black", marker="o", lw=2, label="student")
    ticks = [1, 2, 4, 8, 16, 32, 64]
    axis.set(xscale="log", yscale="log", xlabel="network calls of an image", title=name)
    axis.set_ylabel(f"Fréchet distance of {SAMPLES:,} images")
    axis.set_xticks(ticks, map(str, ticks))
    axis.grid(alpha=0.3, which="both")
    axis.legend(fontsize=8)
    figure.savefig(path, dpi=110)


def sheet(samplers: Mapping[str, Sampler]) -> NDArray[np.uint8]:
    """Return rows of the same seeds and labels: the student's numbers of calls, then 50."""
    student = samplers["student"]
    teacher = samplers["teacher"]
    assert student.bundle.distilled is not None
    labels = list(range(0, teacher.bundle.num_classes, 2))[:SHOWN]
    rows = [
        student.pictures(len(labels), seed=7, label=labels, steps=calls)
        for calls in sorted(student.bundle.distilled.levels)
    ]
    how = {"solver": "ddim", "steps": 50, "guidance": built_in(student)}
    rows.append(teacher.pictures(len(labels), seed=7, label=labels, **how))
    return tile(np.concatenate(rows), len(labels))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("teacher", type=Path)
    parser.add_argument("student", type=Path, nargs="?")
    parser.add_argument("--write", action="store_true", help="refresh the document")
    given = parser.parse_args()
    both = {"teacher": given.teacher, "student": given.student}
    samplers = {name: Sampler.load(path) for name, path in both.items() if path}
    record = samplers["teacher"].bundle.provenance["config"]
    config = dataclasses.replace(Config.from_json(record), quality_samples=SAMPLES)
    judge = Judge(config, load(config), None, torch.device("cpu"))
    source = (
        f"{SAMPLES:,} samples against as many training images, by the classifier of "
        f"`trainer.evaluate`. Measured by `benchmarks/distillation.py` on {machine()}."
    )
    if not given.student:
        every = tuned_ways(samplers["teacher"])
        found = measure(judge, samplers, every, Path("out/distillation"))
        text = f"{tuned_table(found)}\n\nThe Fréchet distance of {source}"
        print(text)
        if given.write:
            fill(Path("docs/tuned-solvers.md"), "judged", text)
        return
    every = ways(samplers["teacher"], samplers["student"])
    found = measure(judge, samplers, every, Path("out/distillation"))
    text = (
        f"{table(found)}\n\nThe teacher's rows are the best of {len(SOLVERS)} solvers at that "
        "number of steps: `tuned`, and `unipc` on three grids. "
        f"{source}\n\n"
        "![Fréchet distance against network calls](distillation.png)\n\n"
        "![The same seeds and labels: the student's calls from few to many, then 50 of the "
        "teacher](distillation-images.png)"
    )
    print(text)
    docs = Path("docs") if given.write else Path("out")
    draw(docs / "distillation.png", found, samplers["student"].bundle.name)
    save(docs / "distillation-images.png", sheet(samplers), 900)
    if given.write:
        fill(docs / "distillation.md", "distillation", text)


if __name__ == "__main__":
    main()
