"""How near every deterministic solver comes, call for call, to where its trajectory ends.

    python benchmarks/solvers.py [BUNDLE] [--seeds N] [--calls N ...] [--write]

The error is the root mean square, over all pixels of samples in the bundle's own range, of the
distance to the output of DDIM with 1,000 calls from the same x_T: same seeds, same labels, no
guidance, the bundle's own clip, all through `runtime.Sampler`. Each solver is given the most steps
whose calls do not exceed the budget. Stochastic solvers end elsewhere, so they are left out.
--write refreshes docs/solvers.md and its plot (matplotlib, of the export extra). About 11,000
calls: twenty minutes on two cores.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Sequence
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from figures import fill, machine, most_steps

from runtime import Sampler
from runtime.diffusion.grid import GRIDS as NAMED
from runtime.terminal.progress import Progress

GRIDS = (*NAMED, "log_snr(7)")
CALLS = (5, 8, 10, 15, 20, 30, 50)
REFERENCE = 1000
SOLVERS: dict[str, tuple[str, dict[str, Any]]] = {
    "ddim": ("ddim", {}),
    "heun": ("heun", {}),
    "kdpm2": ("kdpm2", {}),
    "dpmpp_2s": ("dpmpp_2s", {}),
    "dpmpp_3s": ("dpmpp_3s", {}),
    "dpmpp_2m": ("dpmpp_2m", {}),
    "dpmpp_3m": ("dpmpp_3m", {}),
    "unipc 2 bh1": ("unipc", {"order": 2, "variant": "bh1"}),
    "unipc 2 bh2": ("unipc", {"order": 2, "variant": "bh2"}),
    "unipc 3": ("unipc", {"order": 3, "variant": "bh2"}),
    "deis 2": ("deis", {"order": 2}),
    "deis 3": ("deis", {"order": 3}),
    "lms 4": ("lms", {"order": 4}),
    "plms": ("plms", {}),
}
"""`euler` is `ddim`, and `edm` without churn is `heun`: the same numbers."""
PANELS = {
    "several calls a step, no memory": ("heun", "kdpm2", "dpmpp_2s", "dpmpp_3s"),
    "DPM-Solver++, a memory of D": ("dpmpp_2m", "dpmpp_3m"),
    "UniPC, with its corrector": ("unipc 2 bh1", "unipc 2 bh2", "unipc 3"),
    "a memory of eps": ("deis 2", "deis 3", "lms 4", "plms"),
}
IN_FULL = ("ddim", "dpmpp_2m", "dpmpp_3m", "unipc 2 bh2")
FULL_CALLS = (10, 20, 50)


class Run(NamedTuple):
    """One solver on one grid: the calls allowed and made, and how far it ends from the reference."""

    solver: str
    grid: str
    budget: int
    steps: int
    calls: int
    error: float


def plan(sampler: Sampler, budgets: Sequence[int]) -> list[Run]:
    """Every solver on every grid at every budget, not yet measured."""
    bundle, runs = sampler.bundle, []
    for name, (solver, options) in SOLVERS.items():
        for grid, budget in product(GRIDS, budgets):
            program = partial(bundle.program, solver, grid=grid, **options)
            steps = most_steps(min(budget, len(bundle.schedule)), program)
            runs.append(Run(name, grid, budget, steps, len(program(steps)), math.nan))
    return runs


def measure(sampler: Sampler, seeds: int, budgets: Sequence[int]) -> tuple[list[Run], float]:
    """Every run with its error; and the distance of the reference from DPM-Solver++(2M) with as
    many calls, below which no figure means much."""
    bundle, runs = sampler.bundle, plan(sampler, budgets)
    labels = np.arange(seeds) % bundle.num_classes if bundle.labels else None
    most = min(REFERENCE, len(bundle.schedule))
    chunks = math.ceil(seeds / sampler.max_batch)
    with Progress("measuring", chunks * (2 * most + sum(run.calls for run in runs))) as bar:

        def sample(solver: str, steps: int, grid: str, **options: Any) -> np.ndarray:
            given = {
                "label": labels,
                "guidance": 1.0,
                "solver": solver,
                "steps": steps,
                "grid": grid,
                **options,
            }
            return sampler.sample(seeds, 0, on_step=lambda _: bar.advance(), **given).astype(
                np.float64
            )

        reference = sample("ddim", most, "trailing")

        def error(solver: str, steps: int, grid: str, **options: Any) -> float:
            return float(
                np.sqrt(np.mean((sample(solver, steps, grid, **options) - reference) ** 2))
            )

        floor = error("dpmpp_2m", most, "trailing")
        done = []
        for run in runs:
            solver, options = SOLVERS[run.solver]
            done.append(run._replace(error=error(solver, run.steps, run.grid, **options)))
    return done, floor


def best(runs: Sequence[Run], solvers: Sequence[str], budget: int) -> Run:
    """The run with the least error among some solvers, on any grid."""
    return min(
        (r for r in runs if r.solver in solvers and r.budget == budget), key=lambda r: r.error
    )


def shown(name: str) -> str:
    """ "unipc 2 bh1" → "`unipc` 2 bh1"."""
    solver, *options = name.split()
    return " ".join([f"`{solver}`", *options])


def figure(error: float) -> str:
    """Two digits that count, never as a power of ten: 0.012, 0.0034."""
    if error == 0:
        return "0"
    rounded = float(f"{error:.1e}")
    return f"{rounded:.{max(0, 1 - math.floor(math.log10(rounded)))}f}"


def by_calls(runs: Sequence[Run], budgets: Sequence[int]) -> str:
    """The table of every solver at its best grid: a column a budget, with the calls really made
    where they are fewer."""
    lines = [
        "| calls, at most | " + " | ".join(map(str, budgets)) + " |",
        "|---" * (len(budgets) + 1) + "|",
    ]
    for name in SOLVERS:
        cells = []
        for run in (best(runs, [name], budget) for budget in budgets):
            fewer = "" if run.calls == run.budget else f" ({run.calls})"
            cells.append(f"{figure(run.error)} {run.grid}{fewer}")
        lines.append(f"| {shown(name)} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def by_grid(runs: Sequence[Run], budgets: Sequence[int]) -> str:
    """The table of a few solvers on every grid."""
    error = {(r.solver, r.budget, r.grid): figure(r.error) for r in runs}
    lines = ["| solver | calls | " + " | ".join(GRIDS) + " |", "|---" * (len(GRIDS) + 2) + "|"]
    for name in IN_FULL:
        for budget in (b for b in FULL_CALLS if b in budgets):
            cells = " | ".join(error[name, budget, grid] for grid in GRIDS)
            lines.append(f"| {shown(name)} | {budget} | {cells} |")
    return "\n".join(lines)


def verdict(runs: Sequence[Run]) -> str:
    """In a sentence: the best of UniPC and DPM-Solver++ at 10 calls against DDIM at 50; empty where
    these were not measured."""
    if not {10, 50} <= {run.budget for run in runs}:
        return ""
    few = best(runs, [name for name in SOLVERS if "unipc" in name or "dpmpp" in name], 10)
    many = best(runs, ["ddim"], 50)
    outcome = f"{'smaller' if few.error < many.error else 'not smaller'}, the ratio is {figure(few.error / many.error)}"
    return (
        f"The best of UniPC and DPM-Solver++ at {few.calls} calls ({shown(few.solver)} on "
        f"`{few.grid}`) has an error of {figure(few.error)}. "
        f"DDIM at {many.calls} calls (`{many.grid}`) has {figure(many.error)}: the first is {outcome}."
    )


def draw(
    path: Path, runs: Sequence[Run], budgets: Sequence[int], floor: float, bundle: str
) -> None:
    """Error against calls, both logarithmic: one panel per family, DDIM in each, every solver at
    its best grid; grey where the reference errs as much."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    styles = [("#0072b2", "o"), ("#d55e00", "s"), ("#009e73", "^"), ("#cc79a7", "D")]
    picture, axes = plt.subplots(
        2, 2, figsize=(10, 7.5), sharex=True, sharey=True, layout="constrained"
    )
    for axis, (title, names) in zip(axes.flat, PANELS.items(), strict=True):
        for name, (color, marker) in zip(
            ("ddim", *names), [("#555555", "."), *styles], strict=False
        ):
            line = [best(runs, [name], budget) for budget in budgets]
            axis.plot(
                [run.calls for run in line],
                [run.error for run in line],
                color=color,
                marker=marker,
                markersize=5,
                linestyle="--" if name == "ddim" else "-",
                linewidth=1.4,
                label=name,
            )
        axis.set(xscale="log", yscale="log", title=title)
        axis.axhspan(floor / 100, floor, color="#eeeeee", zorder=0)
        axis.grid(alpha=0.3)
        axis.legend(fontsize=9, loc="lower left")
        axis.minorticks_off()
        axis.set_xticks(budgets, [str(b) for b in budgets])
        axis.yaxis.set_major_formatter("{x:g}")
        axis.tick_params(labelbottom=True, labelleft=True)
    axes[0, 0].set_ylim(min(floor, *(run.error for run in runs)) / 1.5)
    picture.supxlabel("calls of the network")
    picture.supylabel(f"RMS distance to DDIM with {REFERENCE:,} calls")
    picture.suptitle(f"{bundle}: every solver at its best grid")
    picture.savefig(path, dpi=110, metadata={"Software": None})
    plt.close(picture)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("bundle", nargs="?", type=Path, default=Path("bundles/emoji32"))
    parser.add_argument(
        "--seeds",
        type=int,
        default=16,
        help="samples, each with its own seed and label (default 16)",
    )
    parser.add_argument("--calls", type=int, nargs="+", default=CALLS, help="budgets of calls")
    parser.add_argument("--plot", type=Path, help="write the plot here too")
    parser.add_argument(
        "--write", action="store_true", help="refresh docs/solvers.md and docs/solvers.png"
    )
    given = parser.parse_args()
    sampler, budgets = Sampler.load(given.bundle), sorted(set(given.calls))
    runs, floor = measure(sampler, given.seeds, budgets)
    name = sampler.bundle.name
    source = (
        f"Measured by `benchmarks/solvers.py` on `{name}` with {given.seeds} seeds, one class each, "
        f"on {machine()}. "
        f"DPM-Solver++(2M) with as many calls as the reference ends {figure(floor)} from it: "
        f"smaller differences mean nothing."
    )
    print(verdict(runs), by_calls(runs, budgets), by_grid(runs, budgets), source, sep="\n\n")
    print(
        json.dumps(
            {
                "bundle": name,
                "seeds": given.seeds,
                "floor": floor,
                "runs": [r._asdict() for r in runs],
            }
        )
    )
    if given.plot:
        draw(given.plot, runs, budgets, floor, name)
    if given.write:
        docs = Path("docs")
        draw(docs / "solvers.png", runs, budgets, floor, name)
        plot = "![Error against calls, both logarithmic, one panel per family](solvers.png)"
        fill(
            docs / "solvers.md",
            "error",
            "\n\n".join([verdict(runs), plot, by_calls(runs, budgets), source]).strip(),
        )
        fill(docs / "solvers.md", "grids", by_grid(runs, budgets))


if __name__ == "__main__":
    main()
