"""How the cost of a call grows with batch, pixels, steps and threads, and which share of the
machine's own rate a call reaches.

    python benchmarks/growth.py [--quick] [--write]

All sides of a curve are timed in turn, round by round; medians. The machine's rate is measured in
the same run: the best of PyTorch and OpenVINO at a large matrix product, and at a chain of 3×3
convolutions of 128 channels. Multiply-adds are those of the network as PyTorch writes it, in
convolutions and linear layers: what an export saves by folding counts as speed. --write refreshes
docs/benchmarks.md and its plots. Needs the extra bench. Ten minutes, --quick three.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import onnxruntime as ort
import torch
from backends import alternate
from figures import WORK, busy, fill, kept, machine, markdown
from systems import Network, cifar10, emoji32, random_unet

from runtime import BackendError, RequestError, Sampler
from runtime.bench.plot import plain
from runtime.terminal.progress import Progress

SIDES = (("onnxruntime", "fp32"), ("openvino", "fp32"), ("openvino", "bf16"), ("openvino", "int8"))
COLORS = {"fp32": "#444444", "bf16": "#0072b2", "int8": "#d55e00"}
Curve = dict[str, dict[str, float]]
"""By side and x: milliseconds."""
RATED = (("emoji32", 16), ("CIFAR-shaped", 8))
"""Network and batch of the shares."""


def call(sampler: Sampler, batch: int) -> Callable[[], object]:
    """One call of the step graph on a batch."""
    buffers = sampler.backend.bind(batch)
    buffers.state[:, 0] = np.random.default_rng(0).normal(size=buffers.state[:, 0].shape)
    buffers.call[:], buffers.update[:] = (500, 1, 1, -1, 1, 1), np.eye(4, 6)
    return lambda: buffers.step(False)


def samplers(network: Network, threads: int | None = None) -> Iterator[tuple[str, Sampler]]:
    """Every side that this machine and bundle have."""
    for backend, precision in SIDES:
        try:
            yield f"{backend} {precision}", Sampler(network.bundle, backend, precision, threads, 64)
        except (BackendError, RequestError) as error:
            print(
                f"left out: {network.name} on {backend} {precision}: {str(error)[:120]}",
                file=sys.stderr,
            )


def timed(sides: Mapping[tuple[str, str], Callable[[], object]], rounds: int, title: str) -> Curve:
    """Medians, ms, by name and x."""
    with Progress(title, rounds) as bar:
        spent = alternate(
            {json.dumps(key): run for key, run in sides.items()}, 1, rounds, bar, settle=True
        )
    found: Curve = {}
    for key, times in spent.items():
        name, x = json.loads(key)
        found.setdefault(name, {})[x] = 1e3 * statistics.median(times)
    return found


def by_batch(network: Network, batches: Sequence[int], rounds: int) -> Curve:
    return timed(
        {(name, str(b)): call(s, b) for name, s in samplers(network) for b in batches},
        rounds,
        "batch",
    )


def by_pixels(sizes: Sequence[int], rounds: int) -> Curve:
    """The shipped network's shape with random weights, batch 1."""
    return timed(
        {(n, str(p)): call(s, 1) for p in sizes for n, s in samplers(random_unet(p))},
        rounds,
        "pixels",
    )


def by_steps(network: Network, steps: Sequence[int], rounds: int) -> Curve:
    """A whole image of batch 1, DPM-Solver++(2M), no guidance."""

    def sample(sampler: Sampler, n: int) -> Callable[[], object]:
        label = 0 if network.bundle.labels else None
        return lambda: sampler.sample(1, 0, label=label, guidance=1.0, solver="dpmpp_2m", steps=n)

    return timed(
        {(name, str(n)): sample(s, n) for name, s in samplers(network) for n in steps},
        rounds,
        "steps",
    )


def by_threads(network: Network, threads: Sequence[int], rounds: int) -> Curve:
    """x is threads and batch."""
    return timed(
        {
            (name, f"{t} {b}"): call(s, b)
            for t in threads
            for name, s in samplers(network, t)
            for b in (1, 16)
        },
        rounds,
        "threads",
    )


def multiply_adds(network: Network) -> int:
    """Of one sample, in convolutions and linear layers, as PyTorch writes them."""
    total = 0

    def count(module: Any, _: Any, output: torch.Tensor) -> None:
        nonlocal total
        inputs = module.weight[0].numel()  # a convolution's: input channels by kernel
        total += output.numel() * inputs

    layers = [
        m for m in network.module.modules() if isinstance(m, (torch.nn.Conv2d, torch.nn.Linear))
    ]
    hooks = [m.register_forward_hook(count) for m in layers]
    labels = network.labels(1)
    extra = [] if labels is None else [torch.from_numpy(labels)]
    with torch.inference_mode():
        network.module(torch.from_numpy(network.start(1)), torch.full((1,), 500.0), *extra)
    for hook in hooks:
        hook.remove()
    return total


def rates(rounds: int) -> dict[str, dict[str, float]]:
    """This machine's own rate, 10⁹ multiply-adds per second, by precision: matrix product of 2048³,
    and convolution; the best of the tried ones."""
    n, channels, side, batch, layers = 2048, 128, 32, 8, 8
    work = {
        "matrix product": float(n**3),
        "convolution": float(layers * batch * channels * channels * 9 * side * side),
    }
    sides: dict[tuple[str, str], Callable[[], object]] = {}
    for precision, kind in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        a = torch.randn(n, n, dtype=kind)
        sides[precision, "matrix product, PyTorch"] = lambda a=a: a @ a
        convs = torch.nn.Sequential(
            *[torch.nn.Conv2d(channels, channels, 3, padding=1) for _ in range(layers)]
        )
        convs = convs.to(kind).to(memory_format=torch.channels_last).requires_grad_(False)
        x = torch.randn(batch, channels, side, side, dtype=kind).to(
            memory_format=torch.channels_last
        )
        sides[precision, "convolution, PyTorch"] = lambda convs=convs, x=x: convs(x)
    whole = torch.randint(-127, 127, (n, n), dtype=torch.int8)
    sides["int8", "matrix product, PyTorch"] = lambda: torch._int_mm(whole, whole)
    for precision in COLORS:
        sides[precision, "matrix product, OpenVINO"] = chain(precision, (n, n), None, 1)
        sides[precision, "convolution, OpenVINO"] = chain(
            precision, (batch, channels, side, side), 3, layers
        )
    good = {}
    for key, run in sides.items():
        try:
            run()
            good[key] = run
        except Exception as error:  # a library may lack a kernel; the others are there
            print(f"left out: {key}: {str(error)[:120]}", file=sys.stderr)
    curve = timed(good, rounds, "the machine's rate")
    found: dict[str, dict[str, float]] = {}
    for precision, each in curve.items():
        for name, ms in each.items():
            kind = name.split(",")[0]
            rate = work[kind] / ms / 1e6
            found.setdefault(precision, {})[kind] = max(
                rate, found.get(precision, {}).get(kind, 0.0)
            )
    return found


def chain(
    precision: str, shape: tuple[int, ...], kernel: int | None, layers: int
) -> Callable[[], object]:
    """Layers one after another in OpenVINO: products with a matrix, or convolutions with as many
    channels out as in."""
    import openvino
    from openvino import opset13 as op

    rng = np.random.default_rng(0)
    x = first = op.parameter(shape, np.float32)
    for _ in range(layers):
        size = (shape[1], shape[1]) if kernel is None else (shape[1], shape[1], kernel, kernel)
        weights: Any = op.constant(
            (rng.normal(size=size) / np.sqrt(np.prod(size[1:]))).astype(np.float32)
        )
        if precision == "int8":
            x = quantized(op, x, 4.0, 256)
            weights = quantized(op, weights, 0.2, 255)
        x = (
            op.matmul(x, weights, False, True)
            if kernel is None
            else op.convolution(x, weights, [1, 1], [1, 1], [1, 1], [1, 1])
        )
    hint = {
        "INFERENCE_PRECISION_HINT": "bf16" if precision == "bf16" else "f32",
        "PERFORMANCE_HINT": "LATENCY",
    }
    request = (
        openvino.Core()
        .compile_model(openvino.Model([x], [first]), "CPU", hint)
        .create_infer_request()
    )
    request.set_input_tensor(openvino.Tensor(rng.normal(size=shape).astype(np.float32)))

    def run() -> None:
        request.start_async()
        request.wait()

    return run


def quantized(op: Any, x: Any, bound: float, levels: int) -> Any:
    low, high = (op.constant(np.float32(v)) for v in (-bound, bound))
    return op.fake_quantize(x, low, high, low, high, levels)


@contextmanager
def profiled_onnxruntime() -> Iterator[list[Any]]:
    """The sessions that are made in the block, which write down how long every node takes."""
    sessions, Session = [], ort.InferenceSession

    def make(model: Any, options: Any, **how: Any) -> Any:
        options.enable_profiling = True
        options.profile_file_prefix = str(WORK / "profile")
        sessions.append(Session(model, options, **how))
        return sessions[-1]

    with mock.patch.object(ort, "InferenceSession", make):
        yield sessions


def profile(
    network: Network, backend: str, precision: str, batch: int, calls: int = 10
) -> dict[str, float]:
    """Which share of the nodes' time is spent in nodes of each type, largest first."""
    spent: Counter[str] = Counter()
    WORK.mkdir(parents=True, exist_ok=True)
    if backend == "onnxruntime":
        with profiled_onnxruntime() as sessions:
            run = call(Sampler(network.bundle, backend, precision), batch)
            for _ in range(calls):
                run()
        for path in {Path(session.end_profiling()) for session in sessions}:
            for event in json.loads(path.read_text()):
                if event.get("cat") == "Node" and event["name"].endswith("_kernel_time"):
                    spent[event["args"]["op_name"]] += event["dur"]
            path.unlink()
    else:
        from runtime.backends.openvino import OpenVino

        configs = OpenVino._configs
        watched = lambda self, parts: [{**c, "PERF_COUNT": True} for c in configs(self, parts)]  # noqa: E731
        with (
            mock.patch.object(OpenVino, "_configs", watched),
            mock.patch.dict(os.environ, {"UNNOISE_CACHE": "off"}),
        ):
            sampler = Sampler(network.bundle, backend, precision)
            parts = sampler.backend.compiled(False, batch)  # type: ignore[attr-defined]
        for part in parts:
            request = part.create_infer_request()
            for _ in range(calls):
                request.infer(
                    {p: np.zeros(list(p.shape), p.element_type.to_dtype()) for p in part.inputs}
                )
                for node in request.get_profiling_info():
                    spent[node.node_type] += node.real_time.total_seconds()
    total = sum(spent.values()) or 1.0
    return {name: value / total for name, value in spent.most_common(5) if value}


def shares(networks: Mapping[str, Network], rounds: int) -> dict[str, Any]:
    """Rate of every side, and where its time goes."""
    found: dict[str, Any] = {}
    for name, batch in RATED:
        network = networks[name]
        work = batch * multiply_adds(network)
        sides = {(side, str(batch)): call(s, batch) for side, s in samplers(network)}
        curve = timed(sides, rounds, f"{name}, batch {batch}")
        for side, each in curve.items():
            backend, precision = side.split()
            rate = work / each[str(batch)] / 1e6
            found[f"{name}, batch {batch}: {side}"] = {
                "rate": rate,
                "profile": profile(network, backend, precision, batch),
            }
    return found


def rate_table(machines: Mapping[str, Mapping[str, float]], found: Mapping[str, Any]) -> str:
    rows = [
        [
            f"this machine, {precision}",
            *(f"{each[k]:.0f}" if k in each else "–" for k in ("matrix product", "convolution")),
            "",
            "",
        ]
        for precision, each in machines.items()
    ]
    for name, one in found.items():
        own = machines[name.split()[-1]]
        where = ", ".join(f"{op} {share:.0%}" for op, share in list(one["profile"].items())[:4])
        share = [
            f"{one['rate'] / own[k]:.0%}" if k in own else "–"
            for k in ("matrix product", "convolution")
        ]
        rows.append([name, *share, f"{one['rate']:.0f}", where])
    head = [
        "",
        "matrix product",
        "convolution",
        "10⁹ multiply-adds a second",
        "time by kind of node",
    ]
    return markdown(head, rows)


def words(found: Mapping[str, Curve]) -> str:
    """What the curves come to: the bend of each, in figures."""
    lines = []
    for side, curve in found["batch"].items():
        xs = sorted(map(int, curve))
        each = {x: curve[str(x)] / x for x in xs}
        enough = next(x for x in xs if each[x] <= 1.15 * min(each.values()))
        lines.append(
            f"`{side}`: {each[1]:.2f} ms per image and call at batch 1, {min(each.values()):.2f} at "
            f"best; a batch of {enough} is within 15 % of that."
        )
    steps = []
    for side, curve in found["steps"].items():
        xs = sorted(map(int, curve))
        slope, fixed = np.polyfit(xs, [curve[str(x)] for x in xs], 1)
        steps.append(f"`{side}` {slope:.2f} ms per step and {max(0.0, fixed):.2f} ms fixed")
    threads = []
    for side, curve in found["threads"].items():
        gains = [curve[f"1 {b}"] / curve[f"2 {b}"] for b in (1, 16) if f"2 {b}" in curve]
        if gains:
            threads.append(f"`{side}` {' and '.join(f'{g:.2f}' for g in gains)}")
    text = [
        "Batch:",
        *(f"- {line}" for line in lines),
        "",
        f"Steps, whole images at batch 1: {'; '.join(steps)}.",
    ]
    return "\n".join(
        [*text, "", f"Two threads compared with one, batch 1 and 16: {'; '.join(threads)}."]
        if threads
        else text
    )


def draw(path: Path, found: Mapping[str, Curve]) -> None:
    """A panel a curve, both axes logarithmic but for threads."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    picture, axes = plt.subplots(1, 4, figsize=(16, 4.2), layout="constrained")
    titles = {
        "batch": ("batch", "ms per image and call"),
        "pixels": ("height = width, pixels (batch 1)", "ms per call"),
        "steps": ("steps (batch 1)", "ms per image"),
    }
    for axis, (name, (label, title)) in zip(axes, titles.items(), strict=False):
        for side, curve in found[name].items():
            xs = sorted(map(int, curve))
            ys = [curve[str(x)] / (x if name == "batch" else 1) for x in xs]
            style = "o-" if side.startswith("onnxruntime") else "s--"
            axis.plot(
                xs,
                ys,
                style,
                color=COLORS[side.split()[1]],
                label=side,
                markersize=5,
                linewidth=1.4,
            )
        if name == "pixels":
            low = min(xs)
            axis.plot(
                xs,
                [0.6 * min(c[str(low)] for c in found[name].values()) * (x / low) ** 2 for x in xs],
                ":",
                color="#999999",
                label="as pixels",
            )
        axis.set(xscale="log", yscale="log", xlabel=label, title=title)
        axis.minorticks_off()
        axis.set_xticks(xs, [str(x) for x in xs])
        plain(
            axis.yaxis,
            [
                ms / (int(x) if name == "batch" else 1)
                for c in found[name].values()
                for x, ms in c.items()
            ],
        )
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    for i, (side, curve) in enumerate(found["threads"].items()):
        for b, hatch in ((1, ""), (16, "///")):
            if f"2 {b}" in curve:
                gain = curve[f"1 {b}"] / curve[f"2 {b}"]
                axes[3].bar(
                    i + (0.2 if b == 16 else -0.2),
                    gain,
                    0.38,
                    color=COLORS[side.split()[1]],
                    hatch=hatch,
                    edgecolor="white",
                )
    axes[3].set_xticks(
        range(len(found["threads"])), [s.replace(" ", "\n") for s in found["threads"]], fontsize=8
    )
    axes[3].axhline(2, color="#999999", linestyle=":")
    axes[3].set(
        title="two threads over one (batch 1, hatched: 16)", ylabel="times as fast", ylim=(0, 2.3)
    )
    picture.savefig(path, dpi=110, metadata={"Software": None})
    plt.close(picture)


def draw_rates(
    path: Path, machines: Mapping[str, Mapping[str, float]], found: Mapping[str, Any]
) -> None:
    """Rate of every side against the machine's, and where its time goes."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    names = list(found)
    picture, axes = plt.subplots(
        1, 2, figsize=(14, 1.2 + 0.42 * len(names)), sharey=True, layout="constrained"
    )
    for i, name in enumerate(names):
        precision = name.split()[-1]
        axes[0].barh(i, found[name]["rate"], color=COLORS[precision])
        for kind, style in (("convolution", "-"), ("matrix product", ":")):
            own = machines[precision].get(kind)
            if own:
                axes[0].plot([own, own], [i - 0.4, i + 0.4], style, color="#111111")
        own = machines[precision].get("convolution")
        if own:
            share = f"{found[name]['rate'] / own:.0%} of convolution "
            axes[0].text(
                found[name]["rate"], i, share, va="center", ha="right", fontsize=8, color="white"
            )
        left = 0.0
        for k, (op, part) in enumerate(found[name]["profile"].items()):
            axes[1].barh(
                i, part, left=left, color=COLORS[precision], alpha=1 - 0.17 * k, edgecolor="white"
            )
            if part > 0.09:
                axes[1].text(
                    left + part / 2,
                    i,
                    f"{op[:12]}\n{part:.0%}",
                    ha="center",
                    va="center",
                    fontsize=6.5,
                    color="white" if k < 3 else "black",
                )
            left += part
    axes[0].set_yticks(range(len(names)), names)
    axes[0].set_ylim(len(names) - 0.5, -0.5)
    axes[0].set(xscale="log")
    axes[0].set_title(
        "10⁹ multiply-adds a second\nline: the machine's convolution, dotted: its matrix product",
        fontsize=10,
    )
    axes[0].minorticks_off()
    own_rates = [r for each in machines.values() for r in each.values()]
    plain(axes[0].xaxis, [min(one["rate"] for one in found.values()) / 3, *own_rates])
    axes[1].set(xlim=(0, 1), title="where the time goes")
    picture.savefig(path, dpi=110, metadata={"Software": None})
    plt.close(picture)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="3 rounds, fewer points")
    parser.add_argument(
        "--write",
        action="store_true",
        help="refresh docs/benchmarks.md, docs/growth.png and docs/rate.png",
    )
    given = parser.parse_args()
    quick, load = given.quick, busy()
    rounds = 3 if quick else 7
    batches = (1, 2, 4, 8, 16, 32) if quick else (1, 2, 4, 8, 16, 32, 64)
    sizes, steps = (16, 32, 64, 128), (1, 2, 5, 10, 20) if quick else (1, 2, 5, 10, 20, 50, 100)
    threads = [t for t in (1, 2, 4, 8) if t <= (os.cpu_count() or 1)][:2]
    networks = {n.name: n for n in (emoji32(), cifar10())}
    small = networks["emoji32"]
    files = [{k: f.sha256 for k, f in n.bundle.files.items()} for n in networks.values()]
    curves = {
        "batch": kept(
            "growth-batch", (rounds, batches, files), lambda: by_batch(small, batches, rounds)
        ),
        "pixels": kept("growth-pixels", (rounds, sizes), lambda: by_pixels(sizes, rounds)),
        "steps": kept(
            "growth-steps", (rounds, steps, files), lambda: by_steps(small, steps, rounds)
        ),
        "threads": kept(
            "growth-threads", (rounds, threads, files), lambda: by_threads(small, threads, rounds)
        ),
    }
    own = kept("growth-rates", (rounds,), lambda: rates(max(5, rounds)))
    reached = kept("growth-shares", (rounds, files), lambda: shares(networks, rounds))
    source = f"Measured by `benchmarks/growth.py` on {machine()}. Medians of {rounds} alternating rounds.{load}"
    print(
        words(curves),
        rate_table(own, reached),
        source,
        json.dumps([curves, own, reached]),
        sep="\n\n",
    )
    if given.write:
        docs = Path("docs")
        draw(docs / "growth.png", curves)
        draw_rates(docs / "rate.png", own, reached)
        plots = (
            "![Cost against batch, pixels, steps and threads](growth.png)",
            "![Rates and profiles](rate.png)",
        )
        fill(docs / "benchmarks.md", "growth", "\n\n".join([plots[0], words(curves), source]))
        fill(
            docs / "benchmarks.md",
            "rate",
            "\n\n".join([plots[1], rate_table(own, reached), source]),
        )


if __name__ == "__main__":
    main()
