"""What runtime.bench measures: a pair of backend and precision, warm and in fresh processes, and
how far its samples are from float32's."""

from __future__ import annotations

import json
import math
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ..backends.base import Float32
from ..bundle.bundle import Bundle
from ..engine.request import Planner, Request
from ..errors import BackendError
from ..options import in_turn
from ..sampler import Sampler
from ..terminal.progress import Progress

REFERENCE = ("onnxruntime", "fp32")
"""Whose pictures the others are held against, where this machine has it; else the first pair that
computes fp32."""
LEAST = 5
"""Timed calls of each pair and batch, however long they take."""
# What a user's first program does, in a process of its own, timed by its parent from before it
# began.
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
from runtime.bench.measure import peak_mib
print(json.dumps(peak_mib()))
"""


@dataclass(frozen=True)
class Cold:
    """The first picture of a fresh process, medians: seconds from its start, of which importing,
    loading, and sampling; its peak memory."""

    first_picture_s: float
    import_s: float
    load_s: float
    sample_s: float
    peak_mib: float | None


@dataclass(frozen=True)
class Speed:
    """One batch size. latency_ms: percentiles of a whole call; call_ms: of the network; loop: share
    of the latency that is not in such calls."""

    batch: int
    timed: int
    latency_ms: Mapping[str, float]
    samples_per_s: float
    call_ms: float
    loop: float


@dataclass
class Result:
    """A backend in a precision. psnr_db (median) and rms: its samples against the reference's, None
    for the reference itself."""

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
    """A pair at a batch size: the times of its calls of `sample`, and beside each that of as many
    calls of the network alone."""

    def __init__(
        self, sampler: Sampler, result: Result, batch: int, how: Mapping[str, Any]
    ) -> None:
        self.result = result
        self.batch = batch
        self._sampler = sampler
        self._how = how
        self._labels = each(how, batch)
        request = Request(0, **requested({**how, **self._labels}))
        table = Planner(sampler.bundle).job(request).table
        self.guided = table.guided
        self._buffers = sampler.backend.bind(batch)
        self._buffers.state[:] = 0
        self._buffers.noise[:] = 0
        self._buffers.label[:] = 0
        self._buffers.call[:] = table.call[0]
        self._buffers.update[:] = np.eye(*table.update[0].shape)
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
        return Speed(
            self.batch,
            len(self.latency),
            latency,
            self.batch / statistics.mean(self.latency),
            call,
            loop,
        )


def percentile(values: Sequence[float], p: float) -> float:
    """The nearest-rank percentile, a value that was seen: for p = 99 of fewer than 100 it is the
    largest."""
    return sorted(values)[max(0, math.ceil(p / 100 * len(values)) - 1)]


def each(how: Mapping[str, Any], n: int) -> dict[str, Any]:
    """The labels of n samples."""
    return {"label": in_turn(how.get("label"), n)} if how.get("label") else {}


def requested(how: Mapping[str, Any]) -> dict[str, Any]:
    """What `Sampler.sample` takes, as the fields of a `Request` for its first sample."""
    fields = {
        k: v
        for k, v in how.items()
        if k in ("guidance", "guidance_interval", "solver", "steps", "grid")
    }
    label = how.get("label")
    fields["label"] = label[0] if isinstance(label, list) else label
    return {**fields, "options": {k: v for k, v in how.items() if k not in (*fields, "seed")}}


def measure(
    bundle: Bundle,
    pairs: Sequence[tuple[str, str]],
    batches: Sequence[int],
    how: Mapping[str, Any],
    given: Any,
) -> list[Result]:
    """Every pair, cold and warm, and its distance to the reference."""
    results = [Result(b, p) for b, p in pairs]
    units = len(pairs) * (1 + (given.cold + 1) * bool(given.cold) + len(batches) * 10)
    with Progress("measuring", units) as bar:
        if given.cold:
            for result in results:
                result.cold = cold(
                    bundle.path, result, given.threads, {**how, **each(how, 1)}, given.cold, bar
                )
        samplers = [
            Sampler(bundle, r.backend, r.precision, given.threads, max(batches)) for r in results
        ]
        judge(bundle, results, samplers, how, given, bar)
        cells = [
            Cell(s, r, n, how) for s, r in zip(samplers, results, strict=True) for n in batches
        ]
        alternate(cells, given.seconds, bar)
    for cell in cells:
        cell.result.speeds.append(cell.speed())
    return results


def alternate(cells: Sequence[Cell], seconds: float, bar: Progress) -> None:
    """Time the cells in turn, one call each, which is first changing from round to round, until
    each has had its seconds and LEAST calls."""
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
        going = [cell for cell in going if shown[cell] < 10]
        turn = turn + 1


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
    first = (
        REFERENCE
        if REFERENCE in pairs
        else next((pair for pair in pairs if pair[1] == "fp32"), REFERENCE)
    )
    reference = (
        samplers[pairs.index(first)] if first in pairs else Sampler(bundle, *first, given.threads)
    )
    expected = reference.sample(n, **arguments)
    for result, pair, sampler in zip(results, pairs, samplers, strict=True):
        result.samples = expected if pair == first else sampler.sample(n, **arguments)
        if pair != first:
            result.psnr_db, result.rms = apart(result.samples, expected, bundle.sample_range)
        bar.advance()


def apart(
    found: Float32, expected: Float32, data_range: tuple[float, float]
) -> tuple[float, float]:
    """Median peak signal-to-noise ratio of the samples, dB, 200 where they are equal; and the root
    of the mean square over all of them."""
    square = np.square(found.astype(np.float64) - expected).reshape(len(found), -1).mean(1)
    span = data_range[1] - data_range[0]
    each = -10 * np.log10(np.maximum(square / span**2, 1e-20))
    return float(np.median(np.where(np.isfinite(square), each, -np.inf))), float(
        np.sqrt(square.mean())
    )


def cold(
    path: Path,
    result: Result,
    threads: int | None,
    how: Mapping[str, Any],
    runs: int,
    bar: Progress | None = None,
) -> Cold:
    """The first picture in fresh processes, one after another, after one that is not counted."""
    arguments = json.dumps(
        [str(path.resolve()), result.backend, result.precision, threads, dict(how)]
    )
    here = str(Path(__file__).resolve().parents[1])
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([here, os.environ.get("PYTHONPATH", "")]),
    }
    found = []
    for _ in range(runs + 1):
        begun = time.perf_counter()
        with subprocess.Popen(
            [sys.executable, "-c", FIRST, arguments],
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        ) as child:
            assert child.stdout is not None
            line = child.stdout.readline()
            first = time.perf_counter() - begun
            rest = child.stdout.read()
        if child.returncode or not line:
            raise BackendError(
                f"a fresh process could not sample with {result.name} (status "
                f"{child.returncode}); what it said stands above."
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
