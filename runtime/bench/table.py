"""How fast a bundle samples here, and how far its pictures are from float32's: python -m
runtime.bench BUNDLE --backend all --precision all"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

from ..backends.registry import BACKENDS, offered
from ..bundle.bundle import Bundle
from ..engine.request import Planner, Request, resolve
from ..errors import BackendError, RequestError
from ..errors.arguments import choice, integer, number
from ..errors.messages import shown
from ..info import backends, columns, machine
from ..options import add_sampling, settings
from ..sampler import Sampler
from ..terminal.output import say
from ..terminal.verbs import program, run_verb
from . import plot as bench_plot
from .measure import Result, each, measure, requested

EXAMPLE = """
examples:
  python -m runtime.bench bundles/emoji32
  python -m runtime.bench bundles/emoji32 --backend all --precision all --plot bench.png
  python -m runtime.bench bundles/emoji32 --backend openvino --precision fp32,bf16 --json

p50, p95, p99: of one whole call of Sampler.sample(batch), with all its steps and its noise.
Configurations are interleaved call by call, so background load affects all of them equally.
loop: the share of the time that is not spent in calls of the network. to fp32: the median PSNR of
final images against fp32's of the same seeds. first picture: from the start of a fresh process;
what a backend compiles is then in its cache.
"""


def chosen(bundle: Bundle, backend: str, precision: str) -> tuple[list[tuple[str, str]], list[str]]:
    """The pairs that a command line names, and what was left out and why. `all` is whatever this
    machine runs; `auto` onnxruntime, fp32.

    Raises RequestError for a name that nobody knows, or where no pair is left, BackendError where
    one named by itself cannot run here.
    """
    auto = {"auto": "onnxruntime"}, {"auto": "fp32"}
    names = [auto[0].get(n, n) for n in listed("--backend", backend)]
    kinds = [auto[1].get(p, p) for p in listed("--precision", precision)]
    every = offered(bundle)
    here = backends()
    for name in names:
        if name not in ("all", *BACKENDS):
            choice("backend", name, ["all", "auto", *BACKENDS])  # raises, with the nearest name
    wanted = list(product(list(BACKENDS) if "all" in names else names, kinds))
    wanted = [
        (b, q) for b, p in wanted for q in ([k for c, k in every if c == b] if p == "all" else [p])
    ]
    wanted = list(dict.fromkeys(wanted))
    several = len(wanted) > 1 or "all" in (*names, *kinds)
    runs = []
    left = []
    for b, p in wanted:
        if (b, p) in every and p in here[b]["precisions"]:
            runs.append((b, p))
        elif not several:
            Sampler(bundle, b, p)  # says why not
            raise BackendError(f"{b} cannot compute {p} on this machine: {here[b]['missing']}.")
        else:
            why = here[b]["missing"] if (b, p) in every else f"{bundle.name} is not offered so"
            left.append(f"{b} {p}: {why}")
    if not runs:
        raise RequestError(
            f"nothing to measure. {'; '.join(left)}. See: python -m runtime.info {bundle.path}"
        )
    return runs, left


def listed(option: str, text: str) -> list[str]:
    names = [part.strip() for part in text.split(",") if part.strip()]
    if not names:
        raise RequestError(
            f"{option} needs a name, several with commas between, or all; got {shown(text)}."
        )
    return names


def sizes(text: str) -> list[int]:
    """The batch sizes of --batch, ascending."""
    try:
        found = [int(part) for part in listed("--batch", text)]
    except ValueError:
        raise RequestError(
            f"--batch needs whole numbers with commas between, got {shown(text)}."
        ) from None
    return sorted({integer("batch", size, 1, 4096) for size in found})


def facts(bundle: Bundle, how: Mapping[str, Any], given: Any, load: float | None) -> dict[str, Any]:
    """What the times depend on."""
    request = Request(0, **requested({**how, **each(how, 1)}))
    options = resolve(bundle, request).options
    table = Planner(bundle).job(request).table
    found = machine()
    here = backends()
    return {
        "bundle": bundle.name,
        "shape": list(bundle.sample_shape),
        "solver": options.solver,
        "steps": options.steps,
        "grid": options.grid,
        "calls": len(table),
        "guided_calls": int(table.guided.sum()),
        "guidance": options.guidance,
        "seed": how["seed"],
        "pictures": given.pictures,
        "threads": given.threads or found["cores"],
        "machine": found,
        "load_before": load,
        "versions": {
            "python": platform.python_version(),
            "numpy": np.__version__,
            **{name: b["version"] for name, b in here.items() if b["version"]},
        },
    }


def describe(found: Mapping[str, Any], results: Sequence[Result], left: Sequence[str]) -> str:
    """The figures as a person reads them."""
    lines = [*heading(found), ""]
    rows = [
        [
            "backend",
            "precision",
            "batch",
            "p50 ms",
            "p95",
            "p99",
            "pictures/s",
            "ms a call",
            "loop",
            "to fp32",
        ]
    ]
    for r in results:
        for s in r.speeds:
            times = [f"{s.latency_ms[p]:.1f}" for p in ("p50", "p95", "p99")]
            rest = [
                f"{s.samples_per_s:.1f}",
                f"{s.call_ms:.2f}",
                f"{max(0.0, s.loop):.1%}",
                nearness(r),
            ]
            rows.append([r.backend, r.precision, str(s.batch), *times, *rest])
    lines += columns(rows)
    if any(r.cold for r in results):
        rows = [
            ["fresh process", "", "first picture", "of it: import", "load", "sample", "peak memory"]
        ]
        for r in results:
            if r.cold:
                c = r.cold
                times = [
                    f"{t:.2f} s" for t in (c.first_picture_s, c.import_s, c.load_s, c.sample_s)
                ]
                rows.append(
                    [
                        r.backend,
                        r.precision,
                        *times,
                        "–" if c.peak_mib is None else f"{c.peak_mib:.0f} MiB",
                    ]
                )
        lines += ["", *columns(rows)]
    fewest = min(s.timed for r in results for s in r.speeds)
    lines += [
        "",
        f"timed in turn, {fewest} calls of each or more"
        + (", so p99 is the slowest" if fewest < 100 else ""),
    ]
    lines += [f"left out: {what}" for what in left]
    return "\n".join(lines)


def heading(found: Mapping[str, Any]) -> list[str]:
    """Two lines: what was sampled, and on what."""
    m = found["machine"]
    calls = f"{found['calls']} calls" + (
        f", {found['guided_calls']} of them guided" if found["guided_calls"] else ""
    )
    versions = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    busy = found["load_before"]
    return [
        f"{found['bundle']}, {'×'.join(map(str, found['shape']))}: {found['solver']}, "
        f"{found['steps']} steps ({calls}), "
        f"seeds {found['seed']} …; PSNR of {found['pictures']}",
        f"{m['processor']}, {m['cores']} cores ({', '.join(m['instructions'])}), "
        f"{found['threads']} thread{'s' * (found['threads'] > 1)}; {versions}"
        + (
            f"; load before {busy:.1f}"
            + (": the machine was busy" if busy > 0.5 * m["cores"] else "")
            if busy
            else ""
        ),
    ]


def nearness(result: Result) -> str:
    """The distance of a result's pictures from the reference's, in a cell."""
    if result.psnr_db is None:
        return "reference"
    return "the same" if result.rms == 0 else f"{result.psnr_db:.1f} dB"


def as_json(found: Mapping[str, Any], results: Sequence[Result], left: Sequence[str]) -> str:
    """One line for programs."""
    runs = [
        {
            "backend": r.backend,
            "precision": r.precision,
            "psnr_db": r.psnr_db,
            "rms": r.rms,
            "cold": r.cold and asdict(r.cold),
            "batches": [asdict(s) for s in r.speeds],
        }
        for r in results
    ]
    return json.dumps(
        {**found, "runs": runs, "left_out": list(left)}, ensure_ascii=False, allow_nan=False
    )


def bench(given: argparse.Namespace) -> str:
    """Do what the command line asks; returns what to print."""
    bundle = Bundle.load(given.bundle)
    batches = sizes(given.batch)
    integer("pictures", given.pictures, 1)
    integer("cold", given.cold, 0)
    number("seconds", given.seconds, 0.0, 86400.0)
    pairs, left = chosen(bundle, given.backend, given.precision)
    if given.plot:
        bench_plot.check(given.plot)
    labels = given.label or (list(range(bundle.num_classes)) if bundle.labels else None)
    how = {"seed": given.seed, **settings(given), **({"label": labels} if labels else {})}
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    found = facts(bundle, how, given, load)
    results = measure(bundle, pairs, batches, how, given)
    if given.plot:
        bench_plot.draw(given.plot, found, results, bundle.sample_range)
    return as_json(found, results, left) if given.json else describe(found, results, left)


def main(arguments: list[str] | None = None) -> int:
    return run_verb(_parser(), lambda given: say(bench(given)), arguments)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=program("runtime.bench"),
        description=__doc__,
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_sampling(parser)
    add = parser.add_argument
    add(
        "--label",
        action="append",
        help="a label's name or number; several in turn if given again [every label in turn]",
    )
    add(
        "--backend",
        default="auto",
        help="inference library; several with commas between, or all [auto: onnxruntime]",
    )
    add(
        "--precision",
        default="auto",
        help="several with commas between, or all that this machine runs [auto: fp32]",
    )
    add("--batch", default="1,4,16", help="batch sizes with commas between [1,4,16]")
    add("--threads", type=int, help="of the inference library [one a core]")
    add(
        "--seconds",
        type=float,
        default=2.0,
        help="time for each pair and batch; never fewer than 5 calls [2]",
    )
    add("--cold", type=int, default=3, help="fresh processes a pair, 0 for none [3]")
    add("--pictures", type=int, default=16, help="samples that are held against fp32's [16]")
    add("--json", action="store_true", help="one line for programs")
    add(
        "--plot",
        type=Path,
        metavar="FILE",
        help="draw it too, as .png, .svg or .pdf; needs matplotlib",
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
