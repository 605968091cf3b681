"""What the engine costs in addition to the network, and what it gives under load.

    python benchmarks/serving.py [BUNDLE] [--rounds N] [--plot FILE] [--virtual]

Three things are measured.
- The bookkeeping of a tick of 16 samples, on a backend that does nothing.
- The engine's saturation against `Sampler.sample_requests` on the same requests, both sides in turn.
- Latencies and saturation of three policies on a virtual clock (benchmarks/traffic.py). These do
  not depend on the machine. --plot draws latency against load; --virtual does only this part.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
import traffic
from figures import busy, machine, markdown
from traffic import LAUNCH_BOUND, TWO_CORES

from runtime import Bundle, Engine, Limits, Request, Sampler
from runtime.backends.ports import shapes
from runtime.engine.cost import CostCurve

BATCH = 16
OVERHEAD_STEPS = 200
OVERHEAD_BOUND_MS = 0.3
SATURATION_BOUND = 0.95
LOADS = (0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.1, 1.2, 1.3)
"""Of the saturation of one at a time."""
NEAR = 0.97
"""Of its saturation: the greatest load at which a policy is drawn."""
ARRIVALS = 2000
SEEDS = 5
STYLES = {
    "one at a time": ("#404040", "o-"),
    "static batches": ("#0072b2", "s--"),
    "engine": ("#d55e00", "^-"),
}
POLICIES = {
    "one at a time": traffic.one_at_a_time,
    "static batches": traffic.static,
    "engine": traffic.fair,
}
ALL_AT_ONCE = CostCurve(((1, 1e-3), (BATCH, 1e-3)), ((1, 1e-3), (BATCH, 1e-3)))
UNBOUNDED = Limits(samples=100_000, rows=10**9, seconds=1e9, flow_share=1.0)


class NoBuffers:
    """Memory of a batch that no network runs on."""

    def __init__(self, bundle: Bundle, batch: int) -> None:
        kinds = {"label": np.int64}
        for name, shape in shapes(bundle, batch).items():
            setattr(self, name, np.zeros(shape, kinds.get(name, np.float32)))

    def run(self, guided: bool, first: int, count: int) -> None:
        pass

    def turn(self) -> None:
        pass

    def step(self, guided: bool) -> None:
        pass


class NoBackend:
    """A backend whose network takes no time."""

    name = "onnxruntime"
    precision = "fp32"

    def __init__(self, bundle: Bundle) -> None:
        self.bundle = bundle

    def bind(self, batch: int) -> Any:
        return NoBuffers(self.bundle, batch)


def overhead_ms(bundle: Bundle, rounds: int) -> list[float]:
    """Milliseconds of the processor in a tick of 16 DDIM samples without the network, by round.

    It is the time of this process, so that other work on the machine does not count. A round
    includes the submission and the first noise of its samples.
    """
    found = []
    sampler = Sampler(bundle, NoBackend(bundle), max_batch=BATCH)
    with Engine(sampler, UNBOUNDED, curve=ALL_AT_ONCE) as engine:
        many = [
            Request(seed, label=_label(bundle, seed), steps=OVERHEAD_STEPS, solver="ddim")
            for seed in range(BATCH)
        ]
        engine.submit(many).result()
        for _ in range(rounds):
            before = engine.stats().ticks
            begun = time.process_time()
            engine.submit(many).result()
            spent = time.process_time() - begun
            found.append(1e3 * spent / (engine.stats().ticks - before))
    return found


def saturation(sampler: Sampler, rounds: int) -> list[tuple[float, float]]:
    """The sampler's time over the engine's for the same requests, by round: seconds that passed,
    and seconds of the processor."""
    bundle = sampler.bundle
    steps = [10] * 14 + [25] * 7 + [40] * 3
    scales = [1.0] * 21 + [2.0 if bundle.can_guide else 1.0] * 3
    many = [
        Request(i, label=_label(bundle, i), steps=n, guidance=scale, solver="ddim")
        for i, (n, scale) in enumerate(zip(steps, scales, strict=True))
    ]
    found = []
    with Engine(sampler, UNBOUNDED) as engine:
        print(f"cost curve: {engine.curve}")

        def through_engine() -> None:
            tickets = [engine.submit(request, flow=str(i)) for i, request in enumerate(many)]
            for ticket in tickets:
                ticket.result()

        for call in (through_engine, lambda: sampler.sample_requests(many)):
            call()
        sides = {"engine": through_engine, "sampler": lambda: sampler.sample_requests(many)}
        for i in range(rounds):
            passed: dict[str, float] = {}
            spent: dict[str, float] = {}
            for name in sorted(sides, reverse=bool(i % 2)):
                begun = time.perf_counter()
                begun_cpu = time.process_time()
                sides[name]()
                passed[name] = time.perf_counter() - begun
                spent[name] = time.process_time() - begun_cpu
            of = [times["sampler"] / times["engine"] for times in (passed, spent)]
            found.append((of[0], of[1]))
    return found


def _label(bundle: Bundle, i: int) -> int | None:
    return i % bundle.num_classes if bundle.labels else None


def simulated() -> str:
    """Tables of the virtual clock."""
    rows = []
    for name, curve in (("two cores", TWO_CORES), ("launch bound", LAUNCH_BOUND)):
        one = traffic.saturation(traffic.one_at_a_time, curve)
        arrivals = traffic.poisson(0.7 * one, 2000, seed=0)
        for policy, run in POLICIES.items():
            latencies = run(arrivals, curve)
            p95 = [traffic.percentile(latencies, arrivals, n, 95) for n in (10, 25, 100)]
            gain = traffic.saturation(run, curve) / one
            rows.append([name, policy, f"{gain:.2f} ×", *(f"{s:.2f}" for s in p95)])
    head = ["curve", "policy", "saturation", "p95, 10 steps, s", "25 steps", "100 guided steps"]
    return markdown(head, rows)


def plot(path: Path) -> None:
    """Draw the p95 latency of the shortest and of the longest requests against load, on two cores.

    Each policy is drawn up to its saturation: beyond it, latencies grow for as long as requests
    come.
    """
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    picture, axes = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained", sharey=True)
    titles = {10: "requests of 10 steps", 100: "requests of 100 guided steps"}
    one = traffic.saturation(traffic.one_at_a_time, TWO_CORES)
    for name, run in POLICIES.items():
        most = NEAR * traffic.saturation(run, TWO_CORES)
        rates = [rate for rate in (*(load * one for load in LOADS), most) if rate <= most]
        found = [_p95(run, rate) for rate in rates]
        color, style = STYLES[name]
        for axis, steps in zip(axes, titles, strict=True):
            seconds = [p95[steps] for p95 in found]
            axis.plot(rates, seconds, style, color=color, label=name, markersize=5, linewidth=1.4)
    for axis, title in zip(axes, titles.values(), strict=True):
        axis.axvline(one, linestyle=":", color="#999999")
        axis.set(yscale="log", xlabel="requests a second", title=title)
        axis.yaxis.set_major_formatter("{x:g}")
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("p95 latency, s")
    axes[0].legend()
    picture.savefig(path, dpi=110)


def _p95(run: traffic.Policy, rate: float) -> dict[int, float]:
    """The p95 latency by steps, the mean of a few runs."""
    found = []
    for seed in range(SEEDS):
        arrivals = traffic.poisson(rate, ARRIVALS, seed)
        latencies = run(arrivals, TWO_CORES)
        found.append([traffic.percentile(latencies, arrivals, n, 95) for n in (10, 100)])
    return dict(zip((10, 100), np.mean(found, axis=0).tolist(), strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("bundle", nargs="?", type=Path, default=Path("bundles/emoji32"))
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--plot", type=Path, help="draw latency against load")
    parser.add_argument("--virtual", action="store_true", help="only the virtual clock")
    given = parser.parse_args()
    if given.plot:
        plot(given.plot)
    print(simulated())
    if given.virtual:
        return
    sampler = Sampler.load(given.bundle, max_batch=BATCH)
    ticks = overhead_ms(sampler.bundle, given.rounds)
    print(
        f"a tick of {BATCH} without the network: median {statistics.median(ticks):.3f} ms "
        f"({min(ticks):.3f} … {max(ticks):.3f}), bound {OVERHEAD_BOUND_MS} ms"
    )
    pairs = saturation(sampler, given.rounds)
    for what, ratios in zip(
        ("seconds", "the processor's time"), zip(*pairs, strict=True), strict=True
    ):
        print(
            f"saturation against Sampler at {BATCH}, by {what}: median "
            f"{statistics.median(ratios):.3f} ({min(ratios):.3f} … {max(ratios):.3f}), "
            f"bound {SATURATION_BOUND}"
        )
    print(f"{machine()}; medians of {given.rounds} rounds. {busy()}")


if __name__ == "__main__":
    main()
