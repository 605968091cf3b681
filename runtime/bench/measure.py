"""How runtime.bench measures pairs of a backend and a precision."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Sequence

import numpy as np

from ..backends.base import Float32
from ..backends.streams import bind
from ..bundle.bundle import Bundle
from ..sampler import Sampler
from ..terminal.progress import Progress
from .fresh import cold
from .results import Result, Speed
from .workload import Effort, Workload

REFERENCE = ("onnxruntime", "fp32")
"""The pair that the others are compared with, if this machine runs it; else the first fp32 pair."""
LEAST = 5
"""Timed calls of each pair and batch, however long they take."""
TENTHS = 10
"""Units of the progress bar for each pair and batch."""


class Cell:
    """A pair at a batch size, with the times of its calls.

    Each call of `sample` is timed together with as many calls of the network only.
    """

    def __init__(self, sampler: Sampler, result: Result, batch: int, workload: Workload) -> None:
        self.result = result
        self.batch = batch
        self._sampler = sampler
        self._seed = workload.seed
        self._arguments = workload.arguments(batch)
        table = workload.table
        self.guided = table.guided
        # The network alone runs the first row again and again: an identity keeps the state as it
        # is, so that no value ever overflows.
        self._buffers = bind(sampler.backend, batch, sampler.costs.streams)
        self._buffers.state[:] = 0
        self._buffers.noise[:] = 0
        self._buffers.label[:] = 0
        for array in self._buffers.conditions.values():
            array[:] = 0
        self._buffers.call[:] = table.call[0]
        self._buffers.update[:] = np.eye(*table.update[0].shape)
        self.latency: list[float] = []
        self.network: list[float] = []

    def run(self) -> None:
        """Time one call of each."""
        begun = time.perf_counter()
        self._sampler.sample(self.batch, self._seed, **self._arguments)
        between = time.perf_counter()
        for guided in self.guided:
            self._buffers.step(bool(guided))
        self.latency.append(between - begun)
        self.network.append(time.perf_counter() - between)

    def speed(self) -> Speed:
        """Summarize the times."""
        latency = {f"p{p}": 1e3 * percentile(self.latency, p) for p in (50, 95, 99)}
        call = 1e3 * statistics.median(self.network) / len(self.guided)
        # The calls are interleaved, so background load affects both parts of a ratio equally.
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
    """Return the nearest-rank percentile, one of the values.

    For p = 99 of fewer than 100 values it is the largest.
    """
    return sorted(values)[max(0, math.ceil(p / 100 * len(values)) - 1)]


def measure(
    bundle: Bundle,
    pairs: Sequence[tuple[str, str]],
    batches: Sequence[int],
    workload: Workload,
    effort: Effort,
) -> list[Result]:
    """Measure every pair in fresh processes and warm, and its distance from the reference."""
    results = [Result(b, p) for b, p in pairs]
    processes = effort.cold + 1 if effort.cold else 0
    units = len(pairs) * (1 + processes + len(batches) * TENTHS)
    with Progress("measuring", units) as bar:
        # Before this process loads a library itself, whose threads would take time.
        if effort.cold:
            for result in results:
                result.cold = cold(
                    bundle.path, result, effort.threads, workload.request, effort.cold, bar
                )
        samplers = [
            Sampler(bundle, r.backend, r.precision, effort.threads, max(batches), effort.streams)
            for r in results
        ]
        judge(bundle, results, samplers, workload, effort, bar)
        cells = [
            Cell(s, r, n, workload) for s, r in zip(samplers, results, strict=True) for n in batches
        ]
        alternate(cells, effort.seconds, bar)
    for cell in cells:
        cell.result.speeds.append(cell.speed())
    return results


def alternate(cells: Sequence[Cell], seconds: float, bar: Progress) -> None:
    """Time one call of each cell in turn, until each has had its seconds and LEAST calls.

    Every round starts with another cell: none is always measured after the same neighbour.
    """
    # The first call of each is not counted: it allocates and compiles.
    for cell in cells:
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
            timed = spent / seconds if seconds else 1.0
            done = min(TENTHS, int(TENTHS * min(timed, len(cell.latency) / LEAST)))
            bar.advance(done - shown[cell], note=f"{cell.result.name}, batch {cell.batch}")
            shown[cell] = done
        going = [cell for cell in going if shown[cell] < TENTHS]
        turn += 1


def judge(
    bundle: Bundle,
    results: Sequence[Result],
    samplers: Sequence[Sampler],
    workload: Workload,
    effort: Effort,
    bar: Progress,
) -> None:
    """Fill in every result's samples and their distance from the reference's of the same seeds."""
    n = effort.pictures
    arguments = workload.arguments(n)
    pairs = [(r.backend, r.precision) for r in results]
    first = next(
        (pair for pair in (REFERENCE, *pairs) if pair in pairs and pair[1] == "fp32"), None
    )
    # If no pair computes fp32, the reference is opened for this purpose only.
    if first is None:
        first = REFERENCE
        reference = Sampler(bundle, *first, effort.threads)
    else:
        reference = samplers[pairs.index(first)]
    expected = reference.sample(n, workload.seed, **arguments)
    for result, pair, sampler in zip(results, pairs, samplers, strict=True):
        result.samples = (
            expected if pair == first else sampler.sample(n, workload.seed, **arguments)
        )
        if pair != first:
            result.psnr_db, result.rms = distance(result.samples, expected, bundle.sample_range)
        bar.advance()


def distance(
    found: Float32, expected: Float32, data_range: tuple[float, float]
) -> tuple[float, float]:
    """Compare samples [n, *S] with the expected ones.

    Returns:
        The median of the samples' peak signal-to-noise ratios, in dB, at most 200; and the root of
        the mean square of all differences.
    """
    with np.errstate(invalid="ignore"):  # of infinities
        square = np.square(found.astype(np.float64) - expected).reshape(len(found), -1).mean(1)
    span = data_range[1] - data_range[0]
    # Equal samples have an infinite ratio, which JSON cannot hold. One with NaN has none: -inf.
    each = -10 * np.log10(np.maximum(square / span**2, 1e-20))
    psnr = np.where(np.isfinite(square), each, -np.inf)
    return float(np.median(psnr)), float(np.sqrt(square.mean()))
