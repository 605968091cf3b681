"""The cost besides the network: building and proving a program, noise, and the sampler's loop.

    python benchmarks/overhead.py [BUNDLE] [--write]

A program is timed from the solver's name to the frozen, proved table. Every solver runs with its
defaults on the bundle's default grid; the median of several builds is reported. Noise and loop are
ratios to the step graph's own time: both sides in turn, medians of ratios within a round.
--write puts the table between the markers of docs/programs.md.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from figures import ROUNDS, fill, machine, most_steps, ratio

from runtime import Sampler
from runtime.bundle.bundle import Bundle
from runtime.diffusion.noise import Stream, noises
from runtime.diffusion.solvers import SOLVERS
from runtime.terminal.progress import Progress

BUILDS = 9
BATCH, STEPS = 16, 10
BUILD_BOUND_MS = {20: 2.0, 1000: 30.0}
"""For so many rows."""
NOISE_BOUND = 0.03


def builds(bundle: Bundle, bar: Progress) -> dict[int, dict[str, float]]:
    """Milliseconds to build each solver's program of at most so many rows."""
    found: dict[int, dict[str, float]] = {rows: {} for rows in BUILD_BOUND_MS}
    for rows, times in found.items():
        for solver in SOLVERS:
            program = partial(bundle.program, solver)
            steps, spent = most_steps(rows, program), []
            for _ in range(BUILDS):
                begun = time.perf_counter()
                program(steps)
                spent.append(1e3 * (time.perf_counter() - begun))
            times[solver] = statistics.median(spent)
            bar.advance()
    return found


def ratios(sampler: Sampler, bar: Progress) -> dict[str, dict[str, float]]:
    """Noise of a batch, and whole DDPM loops, over the step graph's own time for as many steps."""
    bundle, shape = sampler.bundle, sampler.bundle.sample_shape
    label = np.arange(BATCH) % bundle.num_classes if bundle.labels else None
    program = bundle.program("ddpm", STEPS)
    buffers = sampler.backend.bind(BATCH)
    buffers.state[:], buffers.noise[:], buffers.label[:] = 0, 0, 0 if label is None else label
    buffers.state[:, 0] = noises(range(BATCH), Stream.INITIAL, 0, shape)
    buffers.call[:], buffers.update[:] = program.call[0], program.update[0]

    def draw() -> None:
        noises(range(BATCH), Stream.STEP, 3, shape)

    def steps() -> None:
        for _ in range(STEPS):
            buffers.step(False)

    def loop() -> None:
        sampler.sample(BATCH, 0, label=label, guidance=1.0, solver="ddpm", steps=STEPS)

    return {
        "noise / step": ratio(draw, lambda: buffers.step(False), 8, bar),
        "ddpm loop / its steps": ratio(loop, steps, 1, bar),
    }


def table(found: dict[str, Any]) -> str:
    lines = ["| | measured | bound |", "|---|---|---|"]
    for rows, bound in BUILD_BOUND_MS.items():
        times = found["build_ms"][rows]
        slowest = max(times, key=times.__getitem__)
        middle = f"median of the {len(times)} solvers {statistics.median(times.values()):.2f} ms"
        lines.append(
            f"| a program of {rows:,} rows, proof included | slowest `{slowest}` "
            f"{times[slowest]:.2f} ms, {middle} | {bound:g} ms |"
        )
    for name, what, bound in (
        ("noise / step", f"noise of {BATCH} samples / a step of {BATCH}", f"{NOISE_BOUND:.0%}"),
        (
            "ddpm loop / its steps",
            f"{STEPS} rows of `ddpm` through `Sampler`, with noise / its steps alone",
            "–",
        ),
    ):
        r = found["ratios"][name]
        quartiles = f"{r['quartile_low']:.1%} … {r['quartile_high']:.1%}"
        lines.append(
            f"| {what} | {r['ratio']:.1%} ({quartiles}), {r['a_ms']:.1f} / {r['b_ms']:.1f} ms | "
            f"{bound} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("bundle", nargs="?", type=Path, default=Path("bundles/emoji32"))
    parser.add_argument("--write", action="store_true", help="refresh docs/programs.md")
    given = parser.parse_args()
    sampler = Sampler.load(given.bundle, streams=1)
    with Progress("measuring", len(BUILD_BOUND_MS) * len(SOLVERS) + 2 * ROUNDS) as bar:
        found = {"build_ms": builds(sampler.bundle, bar), "ratios": ratios(sampler, bar)}
    source = f"Measured by `benchmarks/overhead.py` on {machine()}. Medians of {BUILDS} builds and of {ROUNDS} rounds."
    for rows, times in found["build_ms"].items():
        print(
            f"{rows} rows: "
            + ", ".join(f"{solver} {spent:.2f} ms" for solver, spent in times.items())
        )
    print(table(found), source, json.dumps({"bundle": sampler.bundle.name, **found}), sep="\n")
    if given.write:
        fill(Path("docs/programs.md"), "overhead", f"{table(found)}\n\n{source}")


if __name__ == "__main__":
    main()
