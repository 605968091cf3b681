"""Serving policies on a virtual clock: what users would see of them, without a network.

Traffic arrives at random, a cost curve says what a network call takes, and three policies are
compared: one request at a time, static batches of equal shape, and the engine's own code
(`runtime.engine.fair`). Nothing here reads a clock, so the same arguments give the same figures.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from runtime.engine.cost import CostCurve
from runtime.engine.fair import FairQueue, Work

PLAIN, GUIDED = b"\0", b"\1"
MIX = ((0.6, PLAIN * 10), (0.3, PLAIN * 25), (0.1, GUIDED * 100))
"""The share of each kind of request, and its rows: 10 and 25 plain steps, 100 guided ones."""
CLIENTS = 1000
"""Flows that requests come from."""
LIVE = 64


def doubled(plain: dict[int, float], mergeable: bool = False) -> CostCurve:
    """A curve whose guided graph runs a batch of 2B. plain: seconds by samples, 1, 2, 4, …"""
    guided = {size // 2: seconds for size, seconds in plain.items() if size > 1}
    points = (tuple(sorted(curve.items())) for curve in (plain, guided))
    return CostCurve(*points, mergeable=mergeable)


def _per_row(milliseconds: dict[int, float]) -> dict[int, float]:
    return {size: size * ms / 1e3 for size, ms in milliseconds.items()}


TWO_CORES = doubled(_per_row({1: 7.84, 2: 6.78, 4: 5.92, 8: 5.3, 16: 5.2, 32: 5.18}))
"""emoji32 on two cores, onnxruntime fp32 (docs/benchmarks.md)."""
LAUNCH_BOUND = doubled({2**k: 1.89e-3 + 0.11e-3 * 2**k for k in range(7)}, mergeable=True)
"""An assumed device on which starting a call takes most of the time: 2.0 ms for 1 sample, 0.17 ms
each for 32."""


@dataclass(frozen=True)
class Arrival:
    """A request: when, from whom, and its rows."""

    at: float
    flow: str
    guided: bytes


def poisson(rate: float, number: int, seed: int, clients: int = CLIENTS) -> list[Arrival]:
    """So many requests of `MIX`, `rate` a second on average, each from a random client."""
    generator = np.random.Generator(np.random.Philox(key=seed))
    times = np.cumsum(generator.exponential(1 / rate, number))
    kinds = generator.choice(len(MIX), size=number, p=[share for share, _ in MIX])
    flows = generator.integers(clients, size=number)
    return [
        Arrival(float(at), f"client {flow}", MIX[kind][1])
        for at, kind, flow in zip(times, kinds, flows, strict=True)
    ]


Latencies = NDArray[np.float64]
Policy = Callable[[Sequence[Arrival], CostCurve], Latencies]


def fair(arrivals: Sequence[Arrival], curve: CostCurve) -> Latencies:
    """Seconds from arrival to finish of each request under the engine's policy."""
    queue = FairQueue(curve, LIVE)
    finished = np.zeros(len(arrivals))
    now = 0.0
    coming = 0
    while coming < len(arrivals) or len(queue):
        if not len(queue):
            now = max(now, arrivals[coming].at)
        while coming < len(arrivals) and arrivals[coming].at <= now:
            arrival = arrivals[coming]
            queue.add([Work(coming, arrival.flow, coming, arrival.guided)])
            coming += 1
        tick = queue.pick()
        assert tick is not None
        now += curve.seconds(len(tick.works), tick.guided)
        for work in queue.advance(tick.works):
            finished[work.key] = now
    return finished - [arrival.at for arrival in arrivals]


def one_at_a_time(arrivals: Sequence[Arrival], curve: CostCurve) -> Latencies:
    """The same, if each request runs alone, in the order of arrival."""
    finished = np.zeros(len(arrivals))
    now = 0.0
    for i, arrival in enumerate(arrivals):
        now = max(now, arrival.at) + run_seconds(arrival.guided, curve)
        finished[i] = now
    return finished - [arrival.at for arrival in arrivals]


def static(
    arrivals: Sequence[Arrival], curve: CostCurve, most: int = 16, wait_s: float = 0.05
) -> Latencies:
    """The same in batches of equal programs that run to their end.

    A batch is the oldest request and those like it. It starts once there are `most`, or the oldest
    has waited for `wait_s`.
    """
    finished = np.zeros(len(arrivals))
    waiting: list[int] = []
    now = 0.0
    coming = 0
    while coming < len(arrivals) or waiting:
        while coming < len(arrivals) and arrivals[coming].at <= now:
            waiting.append(coming)
            coming += 1
        following = arrivals[coming].at if coming < len(arrivals) else np.inf
        if not waiting:
            now = following
            continue
        oldest = arrivals[waiting[0]]
        members = [i for i in waiting if arrivals[i].guided == oldest.guided][:most]
        if len(members) < most and now < oldest.at + wait_s:
            now = min(following, oldest.at + wait_s)
            continue
        now += run_seconds(oldest.guided, curve, len(members))
        finished[members] = now
        waiting = [i for i in waiting if i not in members]
    return finished - [arrival.at for arrival in arrivals]


def run_seconds(guided: bytes, curve: CostCurve, samples: int = 1) -> float:
    """Seconds of a whole program for so many samples that stay together."""
    kinds = [bool(kind) for kind in guided]
    return sum(kinds.count(kind) * curve.seconds(samples, kind) for kind in set(kinds))


def saturation(policy: Policy, curve: CostCurve, number: int = 1000, seed: int = 0) -> float:
    """Requests a second if all of them are there from the start."""
    backlog = [Arrival(0.0, a.flow, a.guided) for a in poisson(1.0, number, seed)]
    return number / float(policy(backlog, curve).max())


def percentile(latencies: Latencies, arrivals: Iterable[Arrival], rows: int, q: float) -> float:
    """A percentile of the latencies of requests with so many steps."""
    chosen = [latencies[i] for i, arrival in enumerate(arrivals) if len(arrival.guided) == rows]
    return float(np.percentile(chosen, q))
