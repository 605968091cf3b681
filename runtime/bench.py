"""How fast a bundle samples here, and how far its pictures are from float32's: python -m runtime.bench BUNDLE --backend all --precision all"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

from . import bench_plot
from .arguments import integer, number
from .backends import BACKENDS, Float32, offered
from .bundle import Bundle
from .command import add_sampling, in_turn, settings
from .errors import BackendError, RequestError, status, unknown
from .info import backends, columns, machine
from .progress import Progress
from .request import Planner, Request
from .sampler import Sampler

REFERENCE = ("onnxruntime", "fp32")
"""Whose pictures the others are held against, where this machine has it; else the first pair that computes fp32."""
LEAST = 5
"""Timed calls of each pair and batch, however long they take."""
EXAMPLE = """
examples:
  python -m runtime.bench bundles/emoji32
  python -m runtime.bench bundles/emoji32 --backend all --precision all --batch 1,4,16 --plot bench.png
  python -m runtime.bench bundles/emoji32 --backend openvino --precision fp32,bf16 --solver dpmpp_2m --steps 10 --json

p50, p95, p99: of one whole call of Sampler.sample(batch), all its steps, noise and all. Pairs and batches are timed in turn, call by call,
so that what else happens on the machine meets all alike. loop: the share of it that is not spent in calls of the network. to fp32: median
PSNR of final pictures against fp32's of the same seeds. first picture: from the start of a fresh process; what a backend compiles is then
in its cache.
"""
# What a user's first program does, in a process of its own, timed by its parent from before it began.
FIRST = """
import json, sys, time
begun = time.perf_counter()
from runtime.sampler import Sampler
imported = time.perf_counter()
path, backend, precision, threads, how = json.loads(sys.argv[1])
sampler = Sampler.load(path, backend, precision, threads)
loaded = time.perf_counter()
sampler.sample(1, **how)
print(json.dumps({"import_s": imported - begun, "load_s": loaded - imported, "sample_s": time.perf_counter() - loaded}), flush=True)
from runtime.bench import peak_mib
print(json.dumps(peak_mib()))
"""


@dataclass(frozen=True)
class Cold:
    """The first picture of a fresh process, medians: seconds from its start, of which importing, loading, and sampling; its peak memory."""

    first_picture_s: float
    import_s: float
    load_s: float
    sample_s: float
    peak_mib: float | None


@dataclass(frozen=True)
class Speed:
    """One batch size. latency_ms: percentiles of a whole call; call_ms: of the network; loop: share of the latency that is not in such calls."""

    batch: int
    timed: int
    latency_ms: Mapping[str, float]
    samples_per_s: float
    call_ms: float
    loop: float


@dataclass
class Result:
    """A backend in a precision. psnr_db (median) and rms: its samples against the reference's, None for the reference itself."""

    backend: str
    precision: str
    speeds: list[Speed] = field(default_factory=list)
    cold: Cold | None = None
    psnr_db: float | None = None
    rms: float | None = None
    samples: Float32 | None = None

    @property
    def name(self) -> str:
        return f"{self.backend} {self.precision}"


class Cell:
    """A pair at a batch size: the times of its calls of `sample`, and beside each that of as many calls of the network alone."""

    def __init__(self, sampler: Sampler, result: Result, batch: int, how: Mapping[str, Any]) -> None:
        self.result, self.batch = result, batch
        self._sampler, self._how, self._labels = sampler, how, each(how, batch)
        request = Request(0, **requested({**how, **self._labels}))
        table = Planner(sampler.bundle).job(request).table
        self.guided = table.guided
        self._buffers = sampler.backend.bind(batch)
        self._buffers.state[:], self._buffers.noise[:], self._buffers.label[:] = 0, 0, 0
        self._buffers.call[:], self._buffers.update[:] = table.call[0], np.eye(*table.update[0].shape)
        self.latency: list[float] = []
        self.network: list[float] = []

    def run(self) -> None:
        """One call of each, timed."""
        begun = time.perf_counter()
        self._sampler.sample(self.batch, **{**self._how, **self._labels})
        between = time.perf_counter()
        for guided in self.guided:
            self._buffers.step(bool(guided))
        self.latency.append(between - begun)
        self.network.append(time.perf_counter() - between)

    def speed(self) -> Speed:
        latency = {f"p{p}": 1e3 * percentile(self.latency, p) for p in (50, 95, 99)}
        call = 1e3 * statistics.median(self.network) / len(self.guided)
        loop = 1 - statistics.median(b / a for a, b in zip(self.latency, self.network, strict=True))
        return Speed(self.batch, len(self.latency), latency, self.batch / statistics.mean(self.latency), call, loop)


def percentile(values: Sequence[float], p: float) -> float:
    """The nearest-rank percentile, a value that was seen: for p = 99 of fewer than 100 it is the largest."""
    return sorted(values)[max(0, math.ceil(p / 100 * len(values)) - 1)]


def each(how: Mapping[str, Any], n: int) -> dict[str, Any]:
    """The labels of n samples."""
    return {"label": in_turn(how.get("label"), n)} if how.get("label") else {}


def requested(how: Mapping[str, Any]) -> dict[str, Any]:
    """What `Sampler.sample` takes, as the fields of a `Request` for its first sample."""
    fields = {k: v for k, v in how.items() if k in ("guidance", "guidance_interval", "solver", "steps", "grid")}
    label = how.get("label")
    fields["label"] = label[0] if isinstance(label, list) else label
    return {**fields, "options": {k: v for k, v in how.items() if k not in (*fields, "seed")}}


def chosen(bundle: Bundle, backend: str, precision: str) -> tuple[list[tuple[str, str]], list[str]]:
    """The pairs that a command line names, and what was left out and why. `all` is whatever this machine runs; `auto` onnxruntime, fp32.

    Raises RequestError for a name that nobody knows, or where no pair is left, BackendError where one named by itself cannot run here.
    """
    auto = {"auto": "onnxruntime"}, {"auto": "fp32"}
    names = [auto[0].get(n, n) for n in listed("--backend", backend)]
    kinds = [auto[1].get(p, p) for p in listed("--precision", precision)]
    every, here = offered(bundle), backends()
    for name in names:
        if name not in ("all", *BACKENDS):
            raise unknown("backend", name, ["all", "auto", *BACKENDS])
    wanted = list(product(list(BACKENDS) if "all" in names else names, kinds))
    wanted = [(b, q) for b, p in wanted for q in ([k for c, k in every if c == b] if p == "all" else [p])]
    wanted = list(dict.fromkeys(wanted))
    several = len(wanted) > 1 or "all" in (*names, *kinds)
    runs, left = [], []
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
        raise RequestError(f"nothing to measure. {'; '.join(left)}. See: python -m runtime.info {bundle.path}")
    return runs, left


def listed(option: str, text: str) -> list[str]:
    names = [part.strip() for part in text.split(",") if part.strip()]
    if not names:
        raise RequestError(f"{option} needs a name, several with commas between, or all; found {text!r}.")
    return names


def sizes(text: str) -> list[int]:
    """The batch sizes of --batch, ascending."""
    try:
        found = [int(part) for part in listed("--batch", text)]
    except ValueError:
        raise RequestError(f"--batch needs whole numbers with commas between, found {text!r}.") from None
    return sorted({integer("batch", size, 1, 4096) for size in found})


def measure(
    bundle: Bundle, pairs: Sequence[tuple[str, str]], batches: Sequence[int], how: Mapping[str, Any], given: Any
) -> list[Result]:
    """Every pair, cold and warm, and its distance to the reference."""
    results = [Result(b, p) for b, p in pairs]
    units = len(pairs) * (1 + (given.cold + 1) * bool(given.cold) + len(batches) * 10)
    with Progress("measuring", units) as bar:
        if given.cold:
            for result in results:
                result.cold = cold(bundle.path, result, given.threads, {**how, **each(how, 1)}, given.cold, bar)
        samplers = [Sampler(bundle, r.backend, r.precision, given.threads, max(batches)) for r in results]
        judge(bundle, results, samplers, how, given, bar)
        cells = [Cell(s, r, n, how) for s, r in zip(samplers, results, strict=True) for n in batches]
        alternate(cells, given.seconds, bar)
    for cell in cells:
        cell.result.speeds.append(cell.speed())
    return results


def alternate(cells: Sequence[Cell], seconds: float, bar: Progress) -> None:
    """Time the cells in turn, one call each, which is first changing from round to round, until each has had its seconds and LEAST calls."""
    for cell in cells:  # not counted: what is made on first use
        cell.run()
        cell.latency.clear()
        cell.network.clear()
    shown = dict.fromkeys(cells, 0)
    going = list(cells)
    turn = 0
    while going:
        for cell in going[turn % len(going) :] + going[: turn % len(going)]:
            cell.run()
            spent = sum(cell.latency) + sum(cell.network)
            done = min(10, int(10 * min(spent / seconds, len(cell.latency) / LEAST)))
            bar.advance(done - shown[cell], note=f"{cell.result.name}, batch {cell.batch}")
            shown[cell] = done
        going, turn = [cell for cell in going if shown[cell] < 10], turn + 1


def judge(
    bundle: Bundle,
    results: Sequence[Result],
    samplers: Sequence[Sampler],
    how: Mapping[str, Any],
    given: Any,
    bar: Progress,
) -> None:
    """Fill in every result's samples and their distance from the reference's of the same seeds."""
    n = given.pictures
    arguments = {**how, **each(how, n)}
    pairs = [(r.backend, r.precision) for r in results]
    first = REFERENCE if REFERENCE in pairs else next((pair for pair in pairs if pair[1] == "fp32"), REFERENCE)
    reference = samplers[pairs.index(first)] if first in pairs else Sampler(bundle, *first, given.threads)
    expected = reference.sample(n, **arguments)
    for result, pair, sampler in zip(results, pairs, samplers, strict=True):
        result.samples = expected if pair == first else sampler.sample(n, **arguments)
        if pair != first:
            result.psnr_db, result.rms = apart(result.samples, expected, bundle.sample_range)
        bar.advance()


def apart(found: Float32, expected: Float32, data_range: tuple[float, float]) -> tuple[float, float]:
    """Median peak signal-to-noise ratio of the samples, dB, 200 where they are equal; and the root of the mean square over all of them."""
    square = np.square(found.astype(np.float64) - expected).reshape(len(found), -1).mean(1)
    span = data_range[1] - data_range[0]
    each = -10 * np.log10(np.maximum(square / span**2, 1e-20))
    return float(np.median(np.where(np.isfinite(square), each, -np.inf))), float(np.sqrt(square.mean()))


def cold(
    path: Path, result: Result, threads: int | None, how: Mapping[str, Any], runs: int, bar: Progress | None = None
) -> Cold:
    """The first picture in fresh processes, one after another, after one that is not counted."""
    arguments = json.dumps([str(path.resolve()), result.backend, result.precision, threads, dict(how)])
    here = str(Path(__file__).resolve().parents[1])
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([here, os.environ.get("PYTHONPATH", "")])}
    found = []
    for _ in range(runs + 1):
        begun = time.perf_counter()
        with subprocess.Popen(
            [sys.executable, "-c", FIRST, arguments], stdout=subprocess.PIPE, text=True, env=environment
        ) as child:
            assert child.stdout is not None
            line = child.stdout.readline()
            first = time.perf_counter() - begun
            rest = child.stdout.read()
        if child.returncode or not line:
            raise BackendError(
                f"a fresh process could not sample with {result.name} (status {child.returncode}); what it said stands above."
            )
        found.append({"first_picture_s": first, **json.loads(line), "peak_mib": json.loads(rest)})
        if bar:
            bar.advance(note=f"{result.name}, fresh process")
    counted = found[1:]
    known = [run["peak_mib"] for run in counted if run["peak_mib"] is not None]
    times = {k: statistics.median(run[k] for run in counted) for k in counted[0] if k != "peak_mib"}
    return Cold(**times, peak_mib=statistics.median(known) if known else None)


def peak_mib() -> float | None:
    """This process's largest resident memory so far, MiB; None where the system does not say.

    Not getrusage's on Linux: its maximum is handed on from the process that started this one.
    """
    path = Path("/proc/self/status")
    if path.exists():
        words = path.read_text().partition("VmHWM:")[2].split()
        return int(words[0]) / 1024 if words else None
    try:
        import resource
    except ImportError:  # Windows
        return None
    unit = 2**20 if sys.platform == "darwin" else 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


def facts(bundle: Bundle, how: Mapping[str, Any], given: Any, load: float | None) -> dict[str, Any]:
    """What the times depend on."""
    request = requested({**how, **each(how, 1)})
    default, label = bundle.defaults, request["label"]
    guidance = request.get("guidance", default.guidance if bundle.can_guide else 1.0) if label is not None else 1.0
    job = Planner(bundle).job(Request(0, **request))
    found, here = machine(), backends()
    return {
        "bundle": bundle.name,
        "shape": list(bundle.sample_shape),
        "solver": how.get("solver", default.solver),
        "steps": how.get("steps", default.steps),
        "grid": how.get("grid", default.grid),
        "calls": len(job.table.call),
        "guided_calls": int(job.table.guided.sum()),
        "guidance": guidance,
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
    rows = [["backend", "precision", "batch", "p50 ms", "p95", "p99", "pictures/s", "ms a call", "loop", "to fp32"]]
    for r in results:
        for s in r.speeds:
            times = [f"{s.latency_ms[p]:.1f}" for p in ("p50", "p95", "p99")]
            rest = [f"{s.samples_per_s:.1f}", f"{s.call_ms:.2f}", f"{max(0.0, s.loop):.1%}", nearness(r)]
            rows.append([r.backend, r.precision, str(s.batch), *times, *rest])
    lines += columns(rows)
    if any(r.cold for r in results):
        rows = [["fresh process", "", "first picture", "of it: import", "load", "sample", "peak memory"]]
        for r in results:
            if r.cold:
                c = r.cold
                times = [f"{t:.2f} s" for t in (c.first_picture_s, c.import_s, c.load_s, c.sample_s)]
                rows.append([r.backend, r.precision, *times, "–" if c.peak_mib is None else f"{c.peak_mib:.0f} MiB"])
        lines += ["", *columns(rows)]
    fewest = min(s.timed for r in results for s in r.speeds)
    lines += [
        "",
        f"timed in turn, {fewest} calls of each or more" + (", so p99 is the slowest" if fewest < 100 else ""),
    ]
    lines += [f"left out: {what}" for what in left]
    return "\n".join(lines)


def heading(found: Mapping[str, Any]) -> list[str]:
    """Two lines: what was sampled, and on what."""
    m = found["machine"]
    calls = f"{found['calls']} calls" + (f", {found['guided_calls']} of them guided" if found["guided_calls"] else "")
    versions = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    busy = found["load_before"]
    return [
        f"{found['bundle']}, {'×'.join(map(str, found['shape']))}: {found['solver']}, {found['steps']} steps ({calls}), "
        f"seeds {found['seed']} …; PSNR of {found['pictures']}",
        f"{m['processor']}, {m['cores']} cores ({', '.join(m['instructions'])}), {found['threads']} threads; {versions}"
        + (f"; load before {busy:.1f}" + (": the machine was busy" if busy > 0.5 * m["cores"] else "") if busy else ""),
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
    return json.dumps({**found, "runs": runs, "left_out": list(left)}, ensure_ascii=False, allow_nan=False)


def bench(given: argparse.Namespace) -> str:
    """Do what the command line asks; returns what to print."""
    bundle, batches = Bundle.load(given.bundle), sizes(given.batch)
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
    given = _parser().parse_args(arguments)

    def action() -> int:
        print(bench(given))
        return 0

    return status(action)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m runtime.bench",
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
    add("--backend", default="auto", help="inference library; several with commas between, or all [auto: onnxruntime]")
    add("--precision", default="auto", help="several with commas between, or all that this machine runs [auto: fp32]")
    add("--batch", default="1,4,16", help="batch sizes with commas between [1,4,16]")
    add("--threads", type=int, help="of the inference library [one a core]")
    add("--seconds", type=float, default=2.0, help="time for each pair and batch; never fewer than 5 calls [2]")
    add("--cold", type=int, default=3, help="fresh processes a pair, 0 for none [3]")
    add("--pictures", type=int, default=16, help="samples that are held against fp32's [16]")
    add("--json", action="store_true", help="one line for programs")
    add("--plot", type=Path, metavar="FILE", help="draw it too, as .png, .svg or .pdf; needs matplotlib")
    return parser


if __name__ == "__main__":
    sys.exit(main())
