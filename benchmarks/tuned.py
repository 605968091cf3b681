"""Tuned solvers against every other, at the same number of calls.

    python benchmarks/tuned.py [BUNDLE] [--write]

The distance is that of `benchmarks/solvers.py`: root mean square over all pixels, samples in -1 …
1, to DDIM with 1,000 calls from the same x_T. No tuned solver was fitted on the seeds 0, 1, …; the
classes take turns. Every solver is tried on every grid with a few seeds. All seeds are measured on
its best grid, and on every grid that comes near the best of all. Two more figures separate blur
from difference. One is a Fréchet distance (Heusel et al. 2017) to the training images, in the
features of a small classifier trained on them here. The other is the share of fine detail left.

--also takes a copy of the bundle whose solvers were fitted by another loss: export.tune COPY --loss
pixels. Measurements are stored in out/tuned, and the same command resumes; --minutes stops it
early. Takes about half an hour on two cores.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import time
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from figures import fill, machine, most_steps
from numpy.typing import NDArray
from solvers import GRIDS, REFERENCE, SOLVERS, figure, shown
from torch import nn

from runtime import Sampler
from runtime.bundle.bundle import Bundle
from runtime.files import from_json, replacing, to_json, write_text
from runtime.images import from_uint8, save, tile, to_uint8
from runtime.terminal.progress import track
from trainer.data.builtin import emoji
from trainer.data.memory import Pictures

OUT = Path("out/tuned")
EVERY_GRID = (*GRIDS, "log_snr(4)", "log_snr(5)", "log_snr(6)")
CALLS = (4, 6, 8, 12, 15)
LIKELY = ("ddim", "dpmpp_2m", "dpmpp_3m", "unipc 2 bh2", "unipc 3")
LIKELY_GRIDS = ("trailing", "log_snr", "log_snr(4)", "log_snr(5)", "log_snr(6)", "log_snr(7)")
GOAL = {4: 8, 6: 12, 8: 15}
"""Tuned calls, and the calls of the best untuned solver with which they are compared."""
SCREENED = 8
"""Seeds on which every grid is tried."""
NEAR = 1.25
"""A run within so much of the best error of its budget is measured in full."""
MANY = {"solver": "unipc", "steps": 60, "grid": "log_snr", "order": 3}
"""The substitute for many calls if there are too many images for the reference."""


class Run(NamedTuple):
    """A solver on a grid within a number of calls; steps is its number of steps."""

    solver: str
    grid: str
    calls: int
    steps: int
    guidance: float

    def __str__(self) -> str:
        return f"{self.solver}, {self.grid}, {self.steps} steps, guidance {self.guidance:g}"

    def settings(self) -> dict[str, Any]:
        if self.solver == "tuned":
            return {"solver": "tuned", "steps": self.steps}
        solver, options = SOLVERS[self.solver]
        return {"solver": solver, "steps": self.steps, "grid": self.grid, **options}


class OutOfTime(Exception):
    """The minutes are over; the measurements are stored."""


class Bench:
    """Errors [seeds] of runs, computed a chunk at a time and kept."""

    def __init__(self, sampler: Sampler, minutes: float) -> None:
        self.sampler, self.until = sampler, time.monotonic() + 60 * minutes
        bundle = sampler.bundle
        weights, fitted = (
            bundle.files["fp32/weights.bin"].sha256,
            to_json({k: t.to_json() for k, t in bundle.tuned.items()}),
        )
        self.folder = OUT / f"{bundle.name}-{weights[:12]}"
        self.known = {
            path.name: from_json(path.read_bytes()) for path in self.folder.glob("errors-*.json")
        }
        self.fitted = hashlib.sha256(fitted.encode()).hexdigest()[:8]

    def sample(
        self, first: int, count: int, guidance: float, **settings: Any
    ) -> NDArray[np.float32]:
        if time.monotonic() > self.until:
            raise OutOfTime
        labels = (first + np.arange(count)) % self.sampler.bundle.num_classes
        return self.sampler.sample(count, first, label=labels, guidance=guidance, **settings)

    def samples(
        self, name: str, count: int, guidance: float, **settings: Any
    ) -> NDArray[np.float32]:
        """Of seeds 0 …, from the folder where they are there."""
        found, size = [], self.sampler.max_batch
        for first in range(0, count, size):
            path = self.folder / f"{name}-{guidance:g}-{first}.npy"
            if not path.exists():
                path.parent.mkdir(parents=True, exist_ok=True)
                x = self.sample(first, size, guidance, **settings)
                with replacing(path) as temporary, temporary.open("wb") as file:
                    np.save(file, x)
            found.append(np.load(path))
        return np.concatenate(found)[:count]

    def reference(self, count: int, guidance: float) -> NDArray[np.float32]:
        return self.samples(
            "reference", count, guidance, solver="ddim", steps=REFERENCE, grid="trailing"
        )

    def errors(self, run: Run, count: int) -> NDArray[np.float64]:
        key = f"{run}{' ' + self.fitted if run.solver == 'tuned' else ''}"
        file = f"errors-{run.guidance:g}.json"
        known = self.known.setdefault(file, {})
        have = known.get(key, [])
        if len(have) < count:
            reference, size = self.reference(count, run.guidance), self.sampler.max_batch
            for first in range(len(have), count, size):
                last = min(first + size, count)
                x = self.sample(first, last - first, run.guidance, **run.settings())
                apart = x.astype(np.float64) - reference[first:last]
                have = [*have, *np.sqrt((apart**2).mean((1, 2, 3)))]
            known[key] = have
            write_text(self.folder / file, json.dumps(known))
        return np.array(have[:count])


def rms(error: NDArray[np.float64]) -> float:
    return float(np.sqrt(np.mean(error**2)))


def plan(bench: Bench, guidance: float) -> Iterator[Run]:
    """Every solver on every grid with the most steps that each budget allows; guided, where each
    call is two, the likeliest few."""
    bundle = bench.sampler.bundle
    names, grids = (SOLVERS, EVERY_GRID) if guidance == 1 else (LIKELY, LIKELY_GRIDS)
    for name, grid, budget in product(names, grids, CALLS):
        solver, options = SOLVERS[name]
        steps = most_steps(
            budget, lambda n, s=solver, g=grid, o=options: bundle.program(s, n, g, **o)
        )
        if steps:
            yield Run(name, grid, budget, steps, guidance)


def measure(bench: Bench, seeds: int, guidance: float) -> dict[Run, NDArray[np.float64]]:
    """Errors [seeds]: every solver on its best grid, runs that come near the best, and the tuned
    ones.
    """
    runs = list(plan(bench, guidance))
    screened = {
        run: rms(bench.errors(run, SCREENED))
        for run in track(runs, f"guidance {guidance:g}, every grid")
    }
    chosen = []
    for budget in CALLS:
        of = [run for run in runs if run.calls == budget]
        least = min(screened[run] for run in of)
        chosen += [
            min((r for r in of if r.solver == name), key=screened.__getitem__, default=None)
            for name in SOLVERS
        ]
        chosen += [run for run in of if screened[run] <= NEAR * least]
    tuned = [Run("tuned", "its own", K, K, guidance) for K in sorted(bench.sampler.bundle.tuned)]
    unique = list(dict.fromkeys(run for run in [*chosen, *tuned] if run))
    return {
        run: bench.errors(run, seeds) for run in track(unique, f"guidance {guidance:g}, all seeds")
    }


def best(
    found: dict[Run, NDArray[np.float64]], calls: int, solver: str | None = None
) -> Run | None:
    """The run with the least error at this budget: of one solver, or of all untuned ones."""
    runs = [
        r
        for r in found
        if r.calls == calls and (r.solver == solver if solver else r.solver != "tuned")
    ]
    return min(runs, key=lambda r: rms(found[r]), default=None)


def cell(run: Run | None, error: NDArray[np.float64] | None) -> str:
    """RMS and median, and the grid."""
    if run is None or error is None:
        return "–"
    grid = "" if run.solver == "tuned" else f" {run.grid}"
    return f"{figure(rms(error))} ({figure(float(np.median(error)))}){grid}"


def table(found: dict[Run, NDArray[np.float64]]) -> str:
    """Every solver at its best grid, a column a budget."""
    lines = [
        "| calls, at most | " + " | ".join(map(str, CALLS)) + " |",
        "|---" * (len(CALLS) + 1) + "|",
    ]
    for name in ("tuned", *SOLVERS):
        runs = [best(found, calls, name) for calls in CALLS]
        if not any(runs):
            continue
        cells = [cell(run, found[run] if run else None) for run in runs]
        lines.append(
            f"| {'**`tuned`**' if name == 'tuned' else shown(name)} | " + " | ".join(cells) + " |"
        )
    return "\n".join(lines)


def verdicts(found: dict[Run, NDArray[np.float64]]) -> str:
    """The tuned solvers against the best untuned ones: with as many calls, and with as many as the
    goal."""
    lines = [
        "| tuned | best untuned, as many calls | ratio | best untuned, more calls | tuned is "
        "nearer |",
        "|---" * 5 + "|",
    ]
    for K, goal in GOAL.items():
        own, same, more = best(found, K, "tuned"), best(found, K), best(found, goal)
        if own is None or same is None or more is None:
            continue
        a, b, c = (rms(found[run]) for run in (own, same, more))
        names = [f"{figure(e)} {shown(r.solver)} `{r.grid}`" for e, r in ((b, same), (c, more))]
        lines.append(
            f"| {K} calls: {figure(a)} | {names[0]} | {a / b:.2f} | {goal} calls: {names[1]} | "
            f"{'yes' if a <= c else 'no'} |"
        )
    return "\n".join(lines)


def record(bundle: Bundle) -> str:
    """What the tuned solvers' own record in bundle.json says: errors on the held-out samples they
    were judged by when they were fitted."""
    lines = [
        "| calls | tuned | guidance 1 | guided | the best untuned with as many calls |",
        "|---" * 5 + "|",
    ]
    for K, program in sorted(bundle.tuned.items()):
        held, untuned = program.made["errors"]["held_out"], program.made["untuned"]
        apart = [figure(found["rms"]) for _, found in sorted(held["guidance"].items())]
        solver, _, grid = untuned["name"].partition(" on ")
        lines.append(
            f"| {K} | {figure(held['rms'])} | {' | '.join(apart)} | "
            f"{figure(untuned['held_out']['rms'])}, {shown(solver)} on `{grid}` |"
        )
    return "\n".join(lines)


class Classifier(nn.Module):
    """x [B, 3, 32, 32] in -1 … 1 → (logits [B, classes], features [B, 64])."""

    def __init__(self, classes: int, width: int = 32) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for inputs, outputs in ((3, width), (width, 2 * width), (2 * width, 2 * width)):
            layers += [
                nn.Conv2d(inputs, outputs, 3, padding=1),
                nn.BatchNorm2d(outputs),
                nn.ReLU(),
                nn.MaxPool2d(2),
            ]
        self.layers, self.out = nn.Sequential(*layers), nn.Linear(2 * width, classes)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        features = self.layers(x).mean((2, 3))
        return self.out(features), features


def classifier(data: Pictures, folder: Path, epochs: int = 15) -> Classifier:
    """A classifier of labels, trained on the training images of the bundle; deterministic, and
    kept."""
    torch.manual_seed(0)
    net, path = (
        Classifier(len(data.classes)),
        folder / f"classifier-{data.fingerprint()[:12]}-{epochs}.pt",
    )
    if not path.exists():
        draw = torch.Generator().manual_seed(0)
        x, label = torch.from_numpy(from_uint8(data.images)), torch.from_numpy(data.labels)
        batches = [
            b for _ in range(epochs) for b in torch.randperm(len(x), generator=draw).split(64)
        ]
        optimizer = torch.optim.AdamW(net.parameters(), 2e-3, weight_decay=0.05)
        for batch in track(batches, "training the classifier"):
            optimizer.zero_grad()
            nn.functional.cross_entropy(net(x[batch])[0], label[batch]).backward()
            optimizer.step()
        torch.save(net.state_dict(), path)
    net.load_state_dict(torch.load(path, weights_only=True))
    return net.eval()


def features(net: Classifier, x: NDArray[np.float32]) -> NDArray[np.float64]:
    with torch.inference_mode():
        return net(torch.from_numpy(np.clip(x, -1, 1)))[1].double().numpy()


def frechet(a: NDArray[np.float64], b: NDArray[np.float64]) -> float:
    """|μ_a - μ_b|² + tr(A + B - 2(AB)^½) of features [n, F], as normal distributions."""
    A, B = np.cov(a.T), np.cov(b.T)
    root = np.sqrt(np.maximum(np.linalg.eigvals(A @ B).real, 0)).sum()
    return float(((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(A) + np.trace(B) - 2 * root)


def detail(x: NDArray[np.float32]) -> float:
    """Root mean square of the Laplacian: what blurring takes first."""
    inner = x[..., 1:-1, 1:-1]
    around = x[..., :-2, 1:-1] + x[..., 2:, 1:-1] + x[..., 1:-1, :-2] + x[..., 1:-1, 2:]
    return float(np.sqrt(np.mean((around - 4 * inner) ** 2)))


def fitted_otherwise(other: Bundle, bundle: Bundle, calls: int) -> bool:
    return calls in other.tuned and other.tuned[calls].to_json() != bundle.tuned[calls].to_json()


def looks(
    bench: Bench,
    also: Bench | None,
    found: dict[Run, NDArray[np.float64]],
    seeds: int,
    count: int,
    sheet: Path | None,
) -> str:
    """Fréchet distance to the training images and fine detail against many calls', at guidance 1;
    and the images themselves, a row each.

    also: of the same network, with solvers fitted by another loss.
    """
    data, bundle = emoji(), bench.sampler.bundle
    net = classifier(data, bench.folder)
    real = from_uint8(data.images)
    shown_real, many = features(net, real), bench.samples("many", count, 1.0, **MANY)
    rows, strips = [("60 calls", "", many)], [many]
    for K in sorted(bundle.tuned):
        untuned, tuned = best(found, K), Run("tuned", "its own", K, K, 1.0)
        assert untuned is not None
        other = also if also and fitted_otherwise(also.sampler.bundle, bundle, K) else None
        for by, run in ((bench, tuned), (other, tuned), (bench, untuned)):
            if by is None:
                continue
            name = (
                f"tuned-{K}-{by.fitted}" if run == tuned else f"untuned-{run.solver}-{run.grid}-{K}"
            )
            x = by.samples(name.replace(" ", "-"), count, 1.0, **run.settings())
            loss = by.sampler.bundle.tuned[K].made["settings"].get("loss", "pixels")
            how = f", fitted by {loss}" if run == tuned else f" `{run.grid}`"
            rows.append((f"{K}, {shown(run.solver)}{how}", figure(rms(by.errors(run, seeds))), x))
            strips.append(x)
    lines = [
        "| calls | RMS | Fréchet distance | above many calls' | fine detail left |",
        "|---" * 5 + "|",
    ]
    floor, sharp = frechet(features(net, many), shown_real), detail(many)
    for name, error, x in rows:
        distance = frechet(features(net, x), shown_real)
        lines.append(
            f"| {name} | {error} | {distance:.2f} | {distance - floor:+.2f} | "
            f"{detail(x) / sharp:.0%} |"
        )
    if sheet:
        columns = bundle.num_classes
        save(sheet, tile(to_uint8(np.concatenate([x[:columns] for x in strips])), columns), 1200)
    return "\n".join(lines)


def draw(path: Path, found: dict[Run, NDArray[np.float64]], name: str) -> None:
    """Distance against calls, both logarithmic: every solver at its best grid in grey, the nearest
    few and the tuned ones in colour."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure_, axis = plt.subplots(figsize=(9, 6), layout="constrained")
    colours = {
        "tuned": "#d55e00",
        "unipc 3": "#0072b2",
        "dpmpp_3m": "#009e73",
        "dpmpp_2m": "#cc79a7",
        "ddim": "#555555",
    }
    for solver in (*SOLVERS, "tuned"):
        runs = [run for calls in CALLS if (run := best(found, calls, solver))]
        how = (
            {"color": colours[solver], "linewidth": 2, "label": solver}
            if solver in colours
            else {"color": "#cccccc"}
        )
        marker = (
            {"marker": "*", "markersize": 13}
            if solver == "tuned"
            else {"marker": ".", "markersize": 5}
        )
        axis.plot(
            [r.calls for r in runs],
            [rms(found[r]) for r in runs],
            zorder=3 if solver in colours else 1,
            **how,
            **marker,
        )
    axis.plot([], [], color="#cccccc", marker=".", label="the other solvers")
    axis.set(
        xscale="log",
        yscale="log",
        xlabel="calls of the network",
        ylabel=f"RMS distance to DDIM with {REFERENCE:,} calls",
    )
    axis.set_title(f"{name}: every solver at its best grid, and the tuned ones")
    axis.minorticks_off()
    axis.set_xticks(CALLS, [str(c) for c in CALLS])
    axis.set_yticks([0.02, 0.05, 0.1, 0.2, 0.5, 1])
    axis.yaxis.set_major_formatter("{x:g}")
    axis.grid(alpha=0.3)
    axis.legend(fontsize=9)
    figure_.savefig(path, dpi=110, metadata={"Software": None})
    plt.close(figure_)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("bundle", nargs="?", type=Path, default=Path("bundles/emoji32"))
    parser.add_argument(
        "--also",
        type=Path,
        metavar="BUNDLE",
        help="the same network with solvers fitted by another loss, to compare",
    )
    parser.add_argument("--seeds", type=int, default=64, help="at guidance 1 [64]")
    parser.add_argument(
        "--guided", type=int, default=16, help="seeds at the bundle's own guidance [16]"
    )
    parser.add_argument("--pictures", type=int, default=256, help="for the Fréchet distance [256]")
    parser.add_argument(
        "--minutes",
        type=float,
        default=1e6,
        help="stop after this many minutes; the same command resumes",
    )
    parser.add_argument("--threads", type=int, help="of the inference library [one a core]")
    parser.add_argument(
        "--write", action="store_true", help="refresh docs/tuned-solvers.md and its images"
    )
    given = parser.parse_args()
    bench = Bench(Sampler.load(given.bundle, threads=given.threads), given.minutes)
    bundle, docs = bench.sampler.bundle, Path("docs")
    try:
        plain = measure(bench, given.seeds, 1.0)
        guided = measure(bench, given.guided, bundle.defaults.guidance)
        also = (
            Bench(Sampler.load(given.also, threads=given.threads), given.minutes)
            if given.also
            else None
        )
        seen = looks(
            bench,
            also,
            plain,
            given.seeds,
            given.pictures,
            docs / "tuned-pictures.png" if given.write else None,
        )
    except OutOfTime:
        raise SystemExit("out of time; re-run the same command to resume from here") from None
    source = (
        f"Measured by `benchmarks/tuned.py` on `{bundle.name}` with {given.seeds} seeds at "
        f"guidance 1, {given.guided} at "
        f"{bundle.defaults.guidance:g} and {given.pictures} images, on {machine()}."
    )
    sections = {
        "record": record(bundle),
        "verdict": verdicts(plain),
        "error": table(plain),
        "guided": f"{verdicts(guided)}\n\n{table(guided)}",
        "looks": seen,
        "source": source,
    }
    print("\n\n".join(sections.values()))
    if given.write:
        draw(docs / "tuned-solvers.png", plain, bundle.name)
        for marker, text in sections.items():
            fill(docs / "tuned-solvers.md", marker, text)


if __name__ == "__main__":
    main()
