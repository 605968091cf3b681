"""What calls of a bundle cost on a backend: measured once a machine, and kept in the cache.

Costs are measured in two places: by an engine, which needs a whole `CostCurve` before it starts,
and by a sampler, which asks into how many streams a call of one size is cut.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from threading import RLock
from typing import Any, TypeVar

from ..backends import cache
from ..backends.base import Backend, Float32
from ..backends.processor import flags, processor_name, usable_cores
from ..backends.registry import BACKENDS
from ..bundle.bundle import Bundle
from ..errors import BackendError
from .cost import CostCurve, Points, no_cheaper
from .probe import HEAVY_S, Clock, Interrupted, Point, Probe

T = TypeVar("T")
FORMAT = 5
"""Of the cached entries: a change makes older entries unknown."""
ROUGH_S = 0.15
"""Seconds for each graph of a rough curve. Three sizes are measured in any case, by a call each."""
POINT_S = 1.0
"""Seconds for a single size. It ends sooner if a cut is much faster than the others."""


class Costs:
    """The costs of a bundle on a backend. May be used from many threads at once."""

    def __init__(self, bundle: Bundle, backend: Backend, clock: Clock = time.perf_counter) -> None:
        """Measure nothing yet.

        Args:
            bundle: Its first program gives the rows.
            backend: Opened with that bundle.
            clock: Seconds.
        """
        self._bundle = bundle
        self._backend = backend
        self._clock = clock
        self._lock = RLock()
        self._points: dict[tuple[bool, int], Point] = {}
        self._read: set[tuple[bool, int]] = set()
        self._fixed: int | None = getattr(backend, "streams", None)
        self._sizes: list[int] = [1]
        self._rough: CostCurve | None = None

    def curve(self, max_batch: int) -> CostCurve:
        """Return the whole curve up to a batch size from the cache, or measure a rough one."""
        largest = min(max_batch, getattr(self._backend, "largest", None) or max_batch)
        with self._lock:
            self._sizes = sorted({largest, *(2**k for k in range(largest.bit_length()))})
            found = self._load(_curve, "curve", largest)
            if found is None:
                found = self._rough = self.measure()
            return found

    def streams(self, guided: bool, count: int) -> int:
        """Return into how many parts a call is cut: what was fastest at the next power of two.

        Raises:
            BackendError: The backend was opened with `streams`, and a sample has other bytes in
                several streams.
        """
        with self._lock:
            point = self._point(guided, _size(count))
        if self._fixed:
            if not point.same_bytes:
                raise BackendError(
                    f"streams={self._fixed} is not available: a sample of {self._bundle.name} has "
                    f"other bytes in {self._fixed} streams than in one on "
                    f"{self._backend.name}. Leave it out."
                )
            return self._fixed
        # The largest part takes as long as it would in a call that is cut evenly.
        even = -(-count // point.streams) * point.streams
        return point.streams if even <= point.gain * count else 1

    def known_streams(self, guided: bool, count: int) -> int:
        """Return what `streams` does, but 1 for a size that was not measured yet."""
        with self._lock:
            known = self._fixed or self._known(guided, _size(count))
        return self.streams(guided, count) if known else 1

    @property
    def learning(self) -> bool:
        """Whether the curve is rough, and `learn` makes a whole one."""
        return self._rough is not None

    def learn(self, busy: Callable[[], bool]) -> CostCurve | None:
        """Measure one more size of the whole curve, with its cuts.

        Args:
            busy: Asked before each call of the network. If it is true, the measurement stops.

        Returns:
            The whole curve, once all sizes were measured; it is cached. None before.
        """
        with self._lock:
            if self._rough is None:
                return None
            try:
                found = self._whole(self._rough, busy)
            except Interrupted:
                return None
            except Exception:  # the rough curve works, so it stays in use
                found = self._rough
            if found is not None:
                self._rough = None
            return found

    def _whole(self, rough: CostCurve, busy: Callable[[], bool]) -> CostCurve | None:
        """The whole curve; None if a size was measured that lacked."""
        # A longer call would hold up who comes meanwhile. It is not cut, either.
        if rough.seconds(4, True) > HEAVY_S:
            return rough
        graphs: list[Points] = []
        settled = True
        for guided in (False, True) if self._bundle.can_guide else (False,):
            found: list[tuple[int, float]] = []
            for size in self._sizes:
                if not self._known(guided, size):
                    self._point(guided, size, POINT_S / 2, busy)  # interrupted, it starts again
                    return None
                point = self._points[guided, size]
                settled &= point.settled
                found.append((size, point.seconds))
                if no_cheaper(found) or 2 * point.seconds > HEAVY_S:
                    break
            graphs.append(tuple(found))
        curve = replace(rough, plain=graphs[0], guided=graphs[-1], settled=settled)
        # Plain rows were compared in both graphs up to the rough cap alone.
        if curve.cap(True) > rough.cap(True):
            curve = replace(curve, mergeable=False)
        self._store(curve, "curve", self._sizes[-1])
        return curve

    def lone(self, seconds: float) -> Point:
        """Return the cost of a call of one sample, measured for at most so many seconds."""
        with self._lock:
            # Backends are compared by it: what a busy machine gave is measured again.
            if self._known(False, 1) and not self._points[False, 1].settled:
                del self._points[False, 1]
            return self._point(False, 1, seconds)

    def measure(self) -> CostCurve:
        """Run both graphs at 1, 2, 4, … samples, until a larger batch is no cheaper a sample.

        Calls are whole, unless the backend cuts all of them: sessions for parts take time to open.
        """
        probe = Probe(self._bundle, self._backend, self._clock)
        plain, same_bytes, settled = self._measure(probe, False)
        guided = plain
        if self._bundle.can_guide:
            guided, same_too, settled_too = self._measure(probe, True)
            same_bytes &= same_too
            settled &= settled_too
        unmerged = CostCurve(plain, guided)
        mergeable = (
            self._bundle.can_guide
            and unmerged.could_merge()
            and probe.equal_in_both(unmerged.cap(True))
        )
        return CostCurve(plain, guided, mergeable, same_bytes, settled)

    def _measure(self, probe: Probe, guided: bool) -> tuple[Points, bool, bool]:
        """(samples, seconds) of a graph; whether rows had the same bytes at all sizes, and whether
        all were settled."""
        end = self._clock() + ROUGH_S
        found: list[tuple[int, float]] = []
        before: list[Float32] = []
        same_bytes = True
        settled = True
        for size in self._sizes:
            point, rows = probe.point(size, guided, end, cut=self._fixed is not None, least=1)
            pairs = zip(before, rows, strict=False)
            same_bytes &= all(a.tobytes() == b.tobytes() for a, b in pairs)
            settled &= point.settled
            before = list(rows)
            found.append((size, point.seconds))
            # The next size takes about twice as long, and is called twice.
            late = self._clock() + 4 * point.seconds > end
            if len(found) > 2 and (no_cheaper(found) or late):
                break
        return tuple(found), same_bytes, settled

    def _known(self, guided: bool, size: int) -> bool:
        """Whether a size was measured with its cuts, on this machine."""
        key = guided, size
        # The cache is read once for each size.
        if key not in self._read:
            self._read.add(key)
            if found := self._load(_point, "point", *key):
                self._points[key] = found
        return key in self._points

    def _point(
        self,
        guided: bool,
        size: int,
        seconds: float = POINT_S,
        busy: Callable[[], bool] = lambda: False,
    ) -> Point:
        """The cost of a call of one size. Raises Interrupted if `busy` is true meanwhile."""
        key = guided, size
        if not self._known(guided, size):
            probe = Probe(self._bundle, self._backend, self._clock, busy)
            self._points[key], _ = probe.point(size, guided, self._clock() + seconds)
            self._store(self._points[key], "point", *key)
        return self._points[key]

    def _load(self, read: Callable[[Any], T], *what: object) -> T | None:
        """What the cache holds; None if it holds nothing, or nothing that can be read."""
        name = self._name(what)
        parts = cache.load(name) if name else None
        if parts is None:
            return None
        try:
            return read(json.loads(parts[0].tobytes()))
        except (ValueError, TypeError, LookupError):
            cache.forget(name)
            return None

    def _store(self, value: CostCurve | Point, *what: object) -> None:
        """Put a value into the cache.

        A curve of a busy machine is not kept, because predictions follow it. A point is: it only
        chooses between equal bytes, and measuring it in every process would cost more.
        """
        name = self._name(what)
        if name and (value.settled or isinstance(value, Point)):
            cache.store(name, [json.dumps(asdict(value)).encode()])

    def _name(self, what: tuple[object, ...]) -> str:
        """The entry's name; "" if there is none.

        A GPU is measured in a moment, and the backend does not say which one it is.
        """
        kind = BACKENDS.get(self._backend.name)
        if kind is None or kind.gpu:
            return ""
        return cache.key("cost", FORMAT, depends(self._bundle, self._backend), *what)


def _size(count: int) -> int:
    """The measured size that stands for a number of samples."""
    return 1 << (count.bit_length() - 1)


def graphs_here(bundle: Bundle) -> tuple[object, ...]:
    """Return what all costs of a bundle depend on: its graphs, and the processor."""
    files = sorted((name, file.sha256) for name, file in bundle.files.items())
    # Processors of one name may differ in instructions: a virtual machine shows what it likes.
    return files, processor_name(), sorted(flags()), usable_cores()


def depends(bundle: Bundle, backend: Backend) -> tuple[object, ...]:
    """Return what costs depend on: the graphs, the inference library and the processor."""
    return (
        *graphs_here(bundle),
        type(backend).__qualname__,
        backend.name,
        backend.precision,
        getattr(backend, "threads", None),
        getattr(backend, "streams", None),
        getattr(sys.modules.get(BACKENDS[backend.name].module), "__version__", None),
    )


def _curve(value: Any) -> CostCurve:
    """A cached curve. Raises ValueError, TypeError or LookupError for anything else."""
    plain, guided = (
        tuple((int(size), float(seconds)) for size, seconds in value[graph])
        for graph in ("plain", "guided")
    )
    if not all(points and min(map(min, points)) > 0 for points in (plain, guided)):
        raise ValueError
    return CostCurve(plain, guided, bool(value["mergeable"]), bool(value["same_bytes"]))


def _point(value: Any) -> Point:
    """A cached point. Raises ValueError, TypeError or LookupError for anything else."""
    point = Point(
        seconds=float(value["seconds"]),
        streams=int(value["streams"]),
        gain=float(value["gain"]),
        settled=bool(value["settled"]),
        same_bytes=bool(value["same_bytes"]),
    )
    if not (point.seconds > 0 and point.streams > 0 and point.gain >= 1):
        raise ValueError
    return point
