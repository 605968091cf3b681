"""What a tick costs: seconds of the plain and of the guided graph by batch size, measured once a
machine and kept in the cache."""

from __future__ import annotations

import json
import os
import platform
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from ..backends import cache
from ..backends.base import Backend, Float32
from ..backends.registry import BACKENDS
from ..bundle.bundle import Bundle
from ..diffusion.noise import Stream, noises
from ..diffusion.program import GUIDANCE

Clock: TypeAlias = Callable[[], float]
Points: TypeAlias = tuple[tuple[int, float], ...]

FORMAT = 1
"""Of the cached entry: a change makes older entries unknown."""
WITHIN = 1.05
"""The cap is the smallest batch whose seconds per sample are within this factor of the best."""
LEAST_CALLS = 2
MOST_CALLS = 8
"""Calls of each size, after one that is not counted. The fastest counts."""
AGREE = 1.05
"""Calls of a size are enough once the fastest two differ by no more than this factor."""
BUDGET_S = 0.8
"""Seconds for each graph. Three sizes are measured in any case."""
CHEAPER = 0.9
"""Plain rows ride in the guided graph if that takes no more than this share of both calls."""
GUIDANCE_SCALE = 2.0
"""Any scale but 1, which is the plain graph's."""


@dataclass(frozen=True)
class CostCurve:
    """Seconds of a network call by its number of samples.

    Attributes:
        plain, guided: (samples, seconds) of each measured batch size, ascending.
        mergeable: Whether a plain row has the same bytes in the guided graph, at every size.
        same_bytes: Whether a row has the same bytes at every measured size.
        settled: Whether each size was measured twice alike. If not, the machine was busy.
    """

    plain: Points
    guided: Points
    mergeable: bool = False
    same_bytes: bool = True
    settled: bool = True

    def points(self, guided: bool) -> Points:
        """(samples, seconds) of a graph."""
        return self.guided if guided else self.plain

    def seconds(self, samples: int, guided: bool) -> float:
        """Seconds of a call; between measured sizes on the line that joins them."""
        points = self.points(guided)
        low = points[0]
        for high in points:
            if samples <= high[0]:
                share = (samples - low[0]) / (high[0] - low[0]) if high is not low else 0.0
                return low[1] + share * (high[1] - low[1])
            low = high
        return low[1] * samples / low[0]

    def many(self, samples: NDArray[np.float64], guided: bool) -> NDArray[np.float64]:
        """Seconds [n] to run a row of samples [n] each, in calls of at most the cap."""
        sizes, seconds = np.array(self.points(guided), np.float64).T
        cap = self.cap(guided)
        full = self.seconds(cap, guided) / cap
        return np.where(samples <= cap, np.interp(samples, sizes, seconds), samples * full)

    def cap(self, guided: bool) -> int:
        """Most samples of a call: the smallest size that is nearly as cheap a sample as any."""
        points = self.points(guided)
        best = min(seconds / size for size, seconds in points)
        return next(size for size, seconds in points if seconds / size <= WITHIN * best)

    def merges(self, plain: int, guided: int) -> bool:
        """Whether one call of the guided graph is cheaper than a call of each, and allowed."""
        if not (self.mergeable and plain and guided and plain + guided <= self.cap(True)):
            return False
        apart = self.seconds(plain, False) + self.seconds(guided, True)
        return self.seconds(plain + guided, True) < CHEAPER * apart

    def could_merge(self) -> bool:
        """Whether merging would be cheaper at any sizes, if it were allowed."""
        allowed = CostCurve(self.plain, self.guided, mergeable=True)
        cap = self.cap(True)
        sizes = range(1, cap)
        return any(allowed.merges(p, g) for p in sizes for g in range(1, cap - p + 1))


def cost_curve(
    bundle: Bundle, backend: Backend, max_batch: int, clock: Clock = time.perf_counter
) -> CostCurve:
    """The curve of a bundle on a backend: from the cache, or measured and then cached.

    Args:
        bundle: Its first program gives the rows.
        backend: Opened with that bundle.
        max_batch: No larger batch is measured.
        clock: Seconds.
    """
    kind = BACKENDS.get(backend.name)
    if kind is None or kind.gpu:
        # A GPU is measured in a moment, and the backend does not say which one it is.
        return measure(bundle, backend, max_batch, clock)
    name = cache.key("cost", FORMAT, _depends(bundle, backend, kind.module), max_batch)
    found = _read(name)
    if found is None:
        found = measure(bundle, backend, max_batch, clock)
        if found.settled:
            cache.store(name, [json.dumps(asdict(found)).encode()])
    return found


def measure(
    bundle: Bundle, backend: Backend, max_batch: int, clock: Clock = time.perf_counter
) -> CostCurve:
    """Run both graphs at 1, 2, 4, … samples, until a larger batch is no cheaper a sample."""
    probe = _Probe(bundle, backend, clock)
    largest = min(max_batch, getattr(backend, "largest", None) or max_batch)
    sizes = sorted({largest, *(2**k for k in range(largest.bit_length()))})
    plain = probe.curve(sizes, guided=False)
    guided = probe.curve(sizes, guided=True) if bundle.can_guide else plain
    curve = CostCurve(plain, guided, same_bytes=probe.same_bytes, settled=probe.settled)
    mergeable = bundle.can_guide and curve.could_merge() and probe.equal_in_both(curve.cap(True))
    return replace(curve, mergeable=mergeable)


class _Probe:
    """Runs rows of the bundle's default program, each sample at another row.

    Attributes:
        same_bytes: Whether each row had the same bytes at all sizes so far.
        settled: Whether the fastest two calls of all sizes so far agreed.
    """

    def __init__(self, bundle: Bundle, backend: Backend, clock: Clock) -> None:
        self.same_bytes = True
        self.settled = True
        self._bundle = bundle
        self._backend = backend
        self._clock = clock
        self._program = bundle.program()

    def curve(self, sizes: Sequence[int], guided: bool) -> Points:
        """(samples, seconds) of the fastest call, by size."""
        end = self._clock() + BUDGET_S
        points: list[tuple[int, float]] = []
        before: list[Float32] = []
        no_cheaper = 0
        for size in sizes:
            spent, rows = self._run(size, guided, GUIDANCE_SCALE if guided else 1.0, end)
            pairs = zip(before, rows, strict=False)
            self.same_bytes &= all(a.tobytes() == b.tobytes() for a, b in pairs)
            before = list(rows)
            best = min((seconds / n for n, seconds in points), default=float("inf"))
            no_cheaper = no_cheaper + 1 if WITHIN * spent / size > best else 0
            points.append((size, spent))
            # The next size takes about twice as long.
            late = self._clock() + 2 * (1 + LEAST_CALLS) * spent > end
            if len(points) > 2 and (no_cheaper > 1 or late):
                break
        return tuple(points)

    def equal_in_both(self, largest: int) -> bool:
        """Whether rows without guidance have the same bytes in both graphs, at sizes up to
        `largest`."""
        for size in range(1, largest + 1):
            _, plain = self._run(size, False, 1.0)
            _, merged = self._run(size, True, 1.0)
            if plain.tobytes() != merged.tobytes():
                return False
        return True

    def _run(
        self, size: int, guided: bool, scale: float, end: float | None = None
    ) -> tuple[float, Float32]:
        """Seconds of the fastest call, and the state after it, [size, R, *S].

        end: when to stop repeating; None makes one call.
        """
        shape = self._bundle.sample_shape
        buffers = self._backend.bind(size)
        ports = {c.name: c.port for c in self._bundle.conditions}
        rows = np.arange(size) % len(self._program.call)
        buffers.call[:size] = self._program.call[rows]
        buffers.call[:size, GUIDANCE] = scale
        buffers.update[:size] = self._program.update[rows]
        buffers.label[:size] = np.arange(size) % max(self._bundle.num_classes, 1)
        for name, values in self._bundle.draw_conditions(size).items():
            buffers.conditions[ports[name]][:size] = values
        buffers.noise[:size] = noises(range(size), Stream.STEP, 0, shape)
        state = np.zeros((size, *buffers.state.shape[1:]), np.float32)
        state[:, 0] = noises(range(size), Stream.INITIAL, 0, shape)

        def call() -> float:
            buffers.state[:size] = state
            begun = self._clock()
            buffers.run(guided, 0, size)
            spent = self._clock() - begun
            buffers.turn()
            return spent

        first = call()  # binds memory, and may compile
        if end is None:
            return first, buffers.state[:size].copy()
        spent: list[float] = []
        while len(spent) < LEAST_CALLS or (
            len(spent) < MOST_CALLS and not _agree(spent) and self._clock() < end
        ):
            spent.append(call())
        self.settled &= _agree(spent)
        return min(spent), buffers.state[:size].copy()


def _agree(spent: Sequence[float]) -> bool:
    """Whether the fastest two calls took about as long."""
    fastest, second = sorted(spent)[:2]
    return second <= AGREE * fastest


def _read(name: str) -> CostCurve | None:
    """The cached curve; None if there is none, or it is not one."""
    parts = cache.load(name)
    if parts is None:
        return None
    try:
        value = json.loads(parts[0].tobytes())
        plain, guided = (
            tuple((int(size), float(seconds)) for size, seconds in value[graph])
            for graph in ("plain", "guided")
        )
        curve = CostCurve(plain, guided, bool(value["mergeable"]), bool(value["same_bytes"]))
        if all(points and min(map(min, points)) > 0 for points in (plain, guided)):
            return curve
    except (ValueError, TypeError, LookupError):
        pass
    cache.forget(name)
    return None


def _depends(bundle: Bundle, backend: Backend, library: str) -> tuple[object, ...]:
    """What a curve depends on: the graphs, the inference library and the processor."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return (
        sorted((name, file.sha256) for name, file in bundle.files.items()),
        type(backend).__qualname__,
        backend.name,
        backend.precision,
        getattr(backend, "threads", None),
        getattr(sys.modules.get(library), "__version__", None),
        _processor(),
        cores,
    )


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, "") or platform.processor() or platform.machine()
