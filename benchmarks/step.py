"""The cost of the step and loop graphs over the bare network, and the time to the first image.

    python benchmarks/step.py [BUNDLE] [--write]

Both sides run in one process, in turn. A ratio is taken within each round, and the median over the
rounds is reported, with the quartiles. --write puts the tables between the markers of
docs/benchmarks.md. Needs the export extra (onnx).
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
from figures import ROUNDS, fill, machine, ratio
from onnx.utils import Extractor

from export.graph.precision import scope
from runtime import Sampler
from runtime.bundle.bundle import Bundle
from runtime.bundle.format import NETWORK, REQUIRED, sampler_file, step_file
from runtime.diffusion.noise import Stream, noise
from runtime.diffusion.program import D
from runtime.terminal.progress import Progress

STEPS = 10


def bare_network(bundle: Bundle) -> onnx.ModelProto:
    """The network alone, cut out of the step graph that ONNX Runtime runs, where its nodes begin
    and end: x, time[, label] → F, in that order."""
    fast = f"fp32/{step_file(False, pixels=True)}"
    model = onnx.load(str(bundle.path / (fast if fast in bundle.files else REQUIRED)))
    nodes = model.graph.node
    inside = [node for node in nodes if f"{scope(node)}.".startswith(NETWORK)]
    made = {output for node in inside for output in node.output}
    constants = {tensor.name for tensor in model.graph.initializer}
    goes_in = dict.fromkeys(
        name for node in inside for name in node.input if name and name not in made | constants
    )
    comes_out = next(
        name for node in nodes if node not in inside for name in node.input if name in made
    )
    ranks = {"time": [], "x": list(bundle.sample_shape)}
    readers = {name: node.op_type for node in inside for name in node.input if name in goes_in}
    value = onnx.helper.make_tensor_value_info
    del model.graph.value_info[:]
    names = {}
    for name in goes_in:
        kind = (
            "label"
            if name == "label"
            else "time"
            if readers[name] in ("Unsqueeze", "Reshape", "Mul")
            else "x"
        )
        names[kind] = name
        if kind != "label":
            model.graph.value_info.append(
                value(name, onnx.TensorProto.FLOAT, ["batch", *ranks[kind]])
            )
    model.graph.value_info.append(
        value(comes_out, onnx.TensorProto.FLOAT, ["batch", *bundle.sample_shape])
    )
    order = [names[kind] for kind in ("x", "time", "label") if kind in names]
    return Extractor(model).extract_model(order, [comes_out])


def runner(
    session: ort.InferenceSession, feeds: dict[str, np.ndarray], shapes: dict[str, tuple[int, ...]]
) -> Callable[[], dict[str, np.ndarray]]:
    """Runs a session with inputs and outputs bound once, like the runtime's own buffers."""
    binding = session.io_binding()
    outputs = {name: np.zeros(shape, np.float32) for name, shape in shapes.items()}
    for name, array in feeds.items():
        binding.bind_input(name, "cpu", 0, array.dtype.type, array.shape, array.ctypes.data)
    for name, array in outputs.items():
        binding.bind_output(name, "cpu", 0, array.dtype.type, array.shape, array.ctypes.data)

    def run() -> dict[str, np.ndarray]:
        session._sess.run_with_iobinding(binding._iobinding, None)
        return outputs

    run.keep = feeds  # type: ignore[attr-defined]  # the bound memory lives as long as the runner
    return run


def measure(bundle: Bundle) -> dict[str, Any]:
    """The ratios at batch 1 and 16, and by how much the two sides' outputs differ."""
    # Uncut, as the graphs next to it are.
    sampler, shape = Sampler(bundle, streams=1), bundle.sample_shape
    network = ort.InferenceSession(
        bare_network(bundle).SerializeToString(), providers=["CPUExecutionProvider"]
    )
    loop = ort.InferenceSession(
        str(bundle.path / "fp32" / sampler_file(False)), providers=["CPUExecutionProvider"]
    )
    program = bundle.program("ddim", STEPS)
    call, update = program.call.astype(np.float32), program.update.astype(np.float32)
    found: dict[str, Any] = {}
    with Progress("measuring", 2 * 2 * ROUNDS) as bar:
        for batch in (1, 16):
            label = np.arange(batch, dtype=np.int64) % bundle.num_classes
            x = np.stack([noise(s, Stream.INITIAL, 0, shape) for s in range(batch)])
            buffers = sampler.backend.bind(batch)
            buffers.state[:], buffers.label[:] = 0, label
            buffers.state[:, 0], buffers.call[:], buffers.update[:] = x, call[0], update[0]
            names = [i.name for i in network.get_inputs()]
            bare = runner(
                network,
                dict(zip(names, (x, buffers.call[:, 0].copy(), label), strict=True)),
                {network.get_outputs()[0].name: x.shape},
            )
            buffers.step(False)
            c = call[0]
            expected = np.clip(c[2] * x + c[3] * next(iter(bare().values())), -c[4], c[4])
            difference = float(np.abs(buffers.denoised - expected).max())
            calls = max(1, 64 // batch)
            found[f"fused step / bare network, batch {batch}"] = {
                **ratio(lambda b=buffers: b.step(False), bare, calls, bar),
                "difference": difference,
            }

            def step_loop(batch: int = batch, label: np.ndarray = label) -> np.ndarray:
                return sampler.sample(
                    batch, 0, label=label, guidance=1.0, solver="ddim", steps=STEPS
                )

            feeds = {
                "x": x,
                "noise": np.zeros((STEPS, *x.shape), np.float32),
                "call": np.repeat(call[:, None], batch, axis=1),
                "update": np.repeat(update[:, None], batch, axis=1),
                "label": label,
            }
            whole = runner(loop, feeds, {"sample": x.shape})
            difference = float(np.abs(whole()["sample"] - step_loop()).max())
            calls = max(1, 8 // batch)
            found[f"sampler.onnx / step loop, batch {batch}"] = {
                **ratio(whole, step_loop, calls, bar),
                "difference": difference,
            }
    assert D == 4  # the step graph's layout, which `expected` above relies on
    return found


def fresh(code: str, runs: int = 9) -> list[dict[str, float]]:
    """What `code` prints as JSON in fresh processes, one after another; the first is not counted."""
    found = []
    for _ in range(runs + 1):
        begun = time.perf_counter()
        out = subprocess.run(
            [sys.executable, "-c", code], check=True, capture_output=True, text=True
        ).stdout
        found.append({**json.loads(out), "process_s": time.perf_counter() - begun})
    return found[1:]


def cold(bundle: Path) -> dict[str, float]:
    """Import time beyond numpy, and the first image in a fresh process. Medians."""
    imports = fresh(
        "import numpy, time, json; t = time.perf_counter(); from runtime import Sampler; "
        "print(json.dumps({'s': time.perf_counter() - t}))"
    )
    first = fresh(
        "import time, json; t = time.perf_counter()\n"
        "from runtime import Sampler\n"
        f"sampler = Sampler.load({str(bundle)!r}); loaded = time.perf_counter() - t\n"
        "sampler.pictures(1, label=0, guidance=1.0, steps=10)\n"
        "first = time.perf_counter() - t\n"
        "peak = int(open('/proc/self/status').read().partition('VmHWM:')[2].split()[0]) / 1024  # "
        "the process's own\n"
        "print(json.dumps({'load_s': loaded, 'first_s': first, 'peak_mib': peak}))"
    )
    return {
        "import_beyond_numpy_s": statistics.median(r["s"] for r in imports),
        **{
            name: statistics.median(r[name] for r in first)
            for name in ("load_s", "first_s", "process_s", "peak_mib")
        },
    }


def table(found: dict[str, Any]) -> str:
    lines = [
        "| fp32, medians of ratios within a round | ratio | quartiles | ms per call | outputs differ by "
        "|",
        "|---|---|---|---|---|",
    ]
    for name, r in found.items():
        spread, times = (
            f"{r['quartile_low']:.3f} … {r['quartile_high']:.3f}",
            f"{r['a_ms']:.1f} / {r['b_ms']:.1f}",
        )
        lines.append(f"| {name} | {r['ratio']:.3f} | {spread} | {times} | {r['difference']:.0e} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("bundle", nargs="?", type=Path, default=Path("bundles/emoji32"))
    parser.add_argument("--write", action="store_true", help="refresh docs/benchmarks.md")
    given = parser.parse_args()
    found, start = measure(Bundle.load(given.bundle)), cold(given.bundle.resolve())
    print(machine(), table(found), json.dumps({"ratios": found, "cold": start}), sep="\n")
    if given.write:
        page = Path("docs/benchmarks.md")
        source = f"Measured by `benchmarks/step.py` on {machine()}. {STEPS} DDIM steps per loop, {ROUNDS} rounds."
        fill(page, "step", f"{table(found)}\n\n{source}")
        sentence = (
            "The shipped bundle, 10 steps, one image, medians of fresh processes: loaded in "
            f"{start['load_s']:.2f} s, first image after {start['first_s']:.2f} s "
            f"({start['process_s']:.2f} s with the start of Python). Peak memory is "
            f"{start['peak_mib']:.0f} MiB, and importing `Sampler` takes "
            f"{start['import_beyond_numpy_s']:.3f} s on top of numpy."
        )
        fill(page, "cold-start", sentence)


if __name__ == "__main__":
    main()
