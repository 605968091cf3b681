"""Times network calls, and compares their bytes: in one part, and cut into streams."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np

from ..backends.base import Backend, Buffers, Float32
from ..backends.streams import StreamBuffers, fixed
from ..bundle.bundle import Bundle
from ..diffusion.noise import Stream, noises
from ..diffusion.program import GUIDANCE

Clock: TypeAlias = Callable[[], float]

LEAST_CALLS = 2
MOST_CALLS = 8
"""Calls of each size and cut, after one that is not counted. The fastest counts."""
AGREE = 1.05
"""Calls are enough once the fastest two differ by no more than this factor."""
DOUBT = 1.3
"""Nor are they while another cut's fastest call is within this factor of the fastest: what else the
machine does for a moment can change times by as much, and the choice is kept."""
HEAVY_S = 1.0
"""Seconds of a call from which on it is not cut: trying would take long, and gain little."""
EQUAL = 1.03
BUSY = 1.25
"""Of cuts whose seconds are within this factor of the fastest, the one with most streams is used.
On a busy machine times say little, and on idle ones streams were always faster."""
GUIDANCE_SCALE = 2.0
"""Any scale but 1, which is the plain graph's."""


@dataclass(frozen=True)
class Point:
    """What a call of some samples costs.

    Attributes:
        seconds: Of the fastest call, cut in the fastest way.
        streams: Into how many parts it is cut then.
        gain: The seconds of the whole call over those, at least 1.
        settled: Whether the fastest cut was measured twice alike, or takes long. If not, the
            machine was busy.
        same_bytes: Whether the samples had the same bytes in every cut. If not, none is used.
    """

    seconds: float
    streams: int = 1
    gain: float = 1.0
    settled: bool = True
    same_bytes: bool = True


class Interrupted(Exception):
    """Somebody needs the backend."""


class Probe:
    """Runs rows of the bundle's default program, each sample at another row."""

    def __init__(
        self,
        bundle: Bundle,
        backend: Backend,
        clock: Clock = time.perf_counter,
        busy: Callable[[], bool] = lambda: False,
    ) -> None:
        """Call nothing yet. Before each call, `busy` is asked; if it is true, `Interrupted` is
        raised."""
        self._busy = busy
        self._bundle = bundle
        self._backend = backend
        self._clock = clock
        self._program = bundle.program()

    def point(
        self,
        size: int,
        guided: bool,
        end: float,
        cut: bool = True,
        least: int = LEAST_CALLS,
    ) -> tuple[Point, Float32]:
        """Measure a call; return its cost, and the state after it, [size, R, *S].

        Args:
            end: When to stop repeating.
            cut: Whether calls that are cut into streams are measured, too.
            least: Calls that are made in any case.
        """
        scale = GUIDANCE_SCALE if guided else 1.0
        buffers, state = self._fill(size, scale)
        self._call(buffers, state, guided)  # binds memory, and may compile
        rows = buffers.state[:size].copy()
        spent = {1: [self._call(buffers, state, guided)]}
        cuts = buffers.choices(guided, size)[1:] if isinstance(buffers, StreamBuffers) else ()
        heavy = spent[1][0] > HEAVY_S
        if heavy or not cut:
            cuts = ()
        # There is nothing to choose between, and another call would take as long.
        if heavy:
            least = 1
        unlike = [n for n in cuts if not self._alike(buffers, state, guided, n, rows)]
        spent.update((n, []) for n in cuts if n not in unlike)
        while not self._enough(spent, end, least):
            # In turn, so that what else the machine does affects all cuts equally.
            for streams, times in spent.items():
                times.append(self._call(buffers, state, guided, streams))
        fastest = {n: min(times) for n, times in spent.items()}
        settled = heavy or _agree(_fastest(spent))
        most = min(fastest.values()) * (EQUAL if settled else BUSY)
        streams = max(n for n, seconds in fastest.items() if seconds <= most)
        point = Point(
            seconds=fastest[streams],
            streams=streams,
            gain=max(1.0, fastest[1] / fastest[streams]) if fastest[streams] else 1.0,
            settled=settled,
            same_bytes=not unlike,
        )
        return point, rows

    def equal_in_both(self, largest: int) -> bool:
        """Whether rows without guidance have the same bytes in both graphs, at sizes up to
        `largest`."""
        for size in range(1, largest + 1):
            buffers, state = self._fill(size, 1.0)
            self._call(buffers, state, False)
            plain = buffers.state[:size].tobytes()
            self._call(buffers, state, True)
            if plain != buffers.state[:size].tobytes():
                return False
        return True

    def _fill(self, size: int, scale: float) -> tuple[Buffers, Float32]:
        """Buffers with rows for some samples, and the state [size, R, *S] to run them on."""
        shape = self._bundle.sample_shape
        buffers = self._backend.bind(size)
        rows = np.arange(size) % len(self._program.call)
        buffers.call[:size] = self._program.call[rows]
        buffers.call[:size, GUIDANCE] = scale
        buffers.update[:size] = self._program.update[rows]
        buffers.label[:size] = np.arange(size) % max(self._bundle.num_classes, 1)
        conditions = self._bundle.draw_conditions(size)
        for condition in self._bundle.conditions:
            buffers.conditions[condition.port][:size] = conditions[condition.name]
        buffers.noise[:size] = noises(range(size), Stream.STEP, 0, shape)
        state = np.zeros((size, *buffers.state.shape[1:]), np.float32)
        state[:, 0] = noises(range(size), Stream.INITIAL, 0, shape)
        return buffers, state

    def _call(self, buffers: Buffers, state: Float32, guided: bool, streams: int = 1) -> float:
        """Run the rows in so many streams. Returns the seconds."""
        if self._busy():
            raise Interrupted
        size = len(state)
        if isinstance(buffers, StreamBuffers):
            buffers.cut = fixed(streams)
        buffers.state[:size] = state
        begun = self._clock()
        buffers.run(guided, 0, size)
        spent = self._clock() - begun
        buffers.turn()
        return spent

    def _alike(
        self, buffers: Buffers, state: Float32, guided: bool, streams: int, rows: Float32
    ) -> bool:
        """Whether the rows have the same bytes in so many streams."""
        self._call(buffers, state, guided, streams)
        return buffers.state[: len(state)].tobytes() == rows.tobytes()

    def _enough(self, spent: dict[int, list[float]], end: float, least: int) -> bool:
        fewest = min(map(len, spent.values()))
        if fewest < least:
            return False
        if fewest >= MOST_CALLS or self._clock() >= end:
            return True
        return _agree(_fastest(spent)) and not _in_doubt(spent)


def _fastest(spent: dict[int, list[float]]) -> list[float]:
    """The seconds of the calls of the fastest cut."""
    return min(spent.values(), key=min)


def _in_doubt(spent: dict[int, list[float]]) -> bool:
    """Whether more calls could find another cut to be the fastest."""
    first, *others = sorted(map(min, spent.values()))
    return bool(others) and others[0] <= DOUBT * first


def _agree(spent: Sequence[float]) -> bool:
    """Whether the fastest two calls took about as long."""
    fastest = sorted(spent)[:2]
    return len(fastest) == 2 and fastest[1] <= AGREE * fastest[0]
