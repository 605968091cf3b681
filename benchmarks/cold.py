"""From nothing to an image: installed size, import, load, and memory, in fresh processes.

    python benchmarks/cold.py [--quick] [--write]

One network of 28×28 and 1.1 million parameters makes one image in ten steps, by the program that a
user of each library would write. Each program runs in its own processes, and the systems take
turns. The time starts before the process and ends when its image exists; medians are reported. The
first run of each is not counted, except for "nothing cached", where every run is a first one.
diffusers has a network of its own kind and the same size. --write refreshes docs/benchmarks.md and
its plot. Needs the extra bench. Takes a minute.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from figures import WORK, busy, fill, machine, markdown
from systems import Network, network_onnx, tiny

from runtime.terminal.progress import track

STEPS = 10
CACHE = WORK / "cold-cache"
PROGRAM = """
import json, time
begun = time.perf_counter()
{imports}
imported = time.perf_counter()
{load}
loaded = time.perf_counter()
{sample}
print(json.dumps(dict(import_s=imported - begun, load_s=loaded - imported, sample_s=time.perf_counter() - loaded)), flush=True)
status = open("/proc/self/status").read()
print(int(status.partition("VmHWM:")[2].split()[0]) / 1024)
"""
OURS = (
    "from runtime import Sampler",
    "sampler = Sampler.load({bundle!r}, {backend!r})",
    "sampler.sample(1, solver='ddim', steps=10)",
)
LOOP = """
x = np.random.default_rng(0).normal(size=(1, 1, 28, 28)).astype(np.float32)
for k, t in enumerate(range(999, -1, -100)):
    a, b = np.cos((t + 1) / 1001 * np.pi / 2), np.cos((t - 99) / 1001 * np.pi / 2) if k < 9 else 1.0
    s, u = np.sqrt(1 - a * a), np.sqrt(1 - b * b)
    F = run(x, np.full(1, t, np.float32))
    D = np.clip(a * x - s * F, -1, 1)
    x = np.float32(b * D + u * (x - a * D) / s)
"""
RAW = {
    "raw ONNX Runtime": (
        "import numpy as np, onnxruntime",
        "session = onnxruntime.InferenceSession({onnx!r}, providers=['CPUExecutionProvider'])\n"
        "run = lambda x, t: session.run(None, dict(x=x, time=t))[0]",
        LOOP,
    ),
    "raw OpenVINO, cached": (
        "import numpy as np, openvino",
        "core = openvino.Core(); core.set_property(dict(CACHE_DIR={cache!r}))\n"
        "config = dict(INFERENCE_PRECISION_HINT='f32', PERFORMANCE_HINT='LATENCY')\n"
        "model = core.read_model({onnx!r}); model.reshape(dict(x=[1, 1, 28, 28], time=[1]))\n"
        "request = core.compile_model(model, 'CPU', config).create_infer_request()\n"
        "run = lambda x, t: request.infer(dict(x=x, time=t))[0]",
        LOOP,
    ),
    "diffusers": (
        "import torch\nfrom diffusers import DDIMPipeline\nfrom diffusers.utils import "
        "logging\nlogging.disable_progress_bar()",
        "pipeline = DDIMPipeline.from_pretrained({diffusers!r}); "
        "pipeline.set_progress_bar_config(disable=True)",
        "pipeline(num_inference_steps=10, output_type='np')",
    ),
}
INSTALLED = {
    "unnoise, onnxruntime": ("numpy", "pillow", "onnxruntime"),
    "unnoise, openvino": ("numpy", "pillow", "openvino"),
    "raw ONNX Runtime": ("numpy", "onnxruntime"),
    "raw OpenVINO": ("numpy", "openvino"),
    "diffusers": ("diffusers", "torch"),
}


def programs(network: Network) -> dict[str, tuple[str, dict[str, str]]]:
    """What each system runs, and in which environment."""
    places = {
        "bundle": str(network.bundle.path.resolve()),
        "onnx": str(network_onnx(network).resolve()),
        "cache": str((CACHE / "raw").resolve()),
        "diffusers": str(diffusers_folder(network).resolve()),
    }
    kept, off = {"UNNOISE_CACHE": str((CACHE / "ours").resolve())}, {"UNNOISE_CACHE": "off"}
    every = {
        "unnoise, onnxruntime": (OURS, {"backend": "onnxruntime"}, kept),
        "unnoise, openvino, nothing cached": (OURS, {"backend": "openvino"}, off),
        "unnoise, openvino, cached": (OURS, {"backend": "openvino"}, kept),
        **{name: (parts, {}, {}) for name, parts in RAW.items()},
    }
    found = {}
    for name, (parts, extra, environment) in every.items():
        imports, load, sample = (part.format(**places, **extra) for part in parts)
        found[name] = PROGRAM.format(imports=imports, load=load, sample=sample), environment
    return found


def diffusers_folder(network: Network) -> Path:
    """A DDIMPipeline of a UNet2DModel of about as many parameters, as its own library saves it."""
    folder = WORK / "cold-diffusers"
    if not (folder / "model_index.json").exists():
        import torch
        from diffusers import DDIMPipeline, DDIMScheduler, UNet2DModel

        torch.manual_seed(0)
        blocks = {
            "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
            "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
        }
        size = {"block_out_channels": (40, 80), "layers_per_block": 1, "norm_num_groups": 8}
        unet = UNet2DModel(28, in_channels=1, out_channels=1, **blocks, **size)
        DDIMPipeline(unet, DDIMScheduler(prediction_type="v_prediction")).save_pretrained(folder)
    return folder


def run(program: str, environment: Mapping[str, str]) -> dict[str, float]:
    """One fresh process."""
    begun = time.perf_counter()
    place = {**os.environ, "PYTHONPATH": str(Path.cwd()), **environment}
    with subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, text=True, env=place
    ) as child:
        assert child.stdout is not None
        line = child.stdout.readline()
        first = time.perf_counter() - begun
        rest = child.stdout.read()
    if child.returncode:
        raise RuntimeError(f"status {child.returncode}")
    return {"first_picture_s": first, **json.loads(line), "peak_mib": float(rest)}


def measure(network: Network, runs: int) -> dict[str, Any]:
    """Medians of every system that can run."""
    shutil.rmtree(CACHE, ignore_errors=True)
    found: dict[str, list[dict[str, float]]] = {}
    todo = programs(network)
    for r in track(range(runs + 1), "fresh processes"):
        for name, (program, environment) in list(todo.items()):
            try:
                one = run(program, environment)
            except (RuntimeError, ValueError, OSError) as error:
                print(f"left out: {name}: {error}", file=sys.stderr)
                del todo[name]
                continue
            if r:
                found.setdefault(name, []).append(one)
    return {
        name: {k: statistics.median(one[k] for one in each) for k in each[0]}
        for name, each in found.items()
    }


def installed(names: tuple[str, ...]) -> float:
    """MB of the distributions and their requirements, as installed on this disk."""
    waiting, seen, size = list(names), set(), 0
    while waiting:
        name = re.sub(r"[-_.]+", "-", waiting.pop()).lower()
        if name in seen:
            continue
        seen.add(name)
        try:
            found = metadata.distribution(name)
        except metadata.PackageNotFoundError:  # of another system or Python
            continue
        size += sum(
            path.stat().st_size
            for f in found.files or []
            if (path := Path(str(f.locate()))).is_file()
        )
        required = [r for r in found.requires or [] if "extra ==" not in r and "win32" not in r]
        waiting += [match[0] for r in required if (match := re.match(r"[\w.-]+", r))]
    return size / 1e6


def own_size() -> float:
    """MB of the runtime itself."""
    return sum(path.stat().st_size for path in Path("runtime").rglob("*.py")) / 1e6


def table(found: Mapping[str, Mapping[str, float]], sizes: Mapping[str, float]) -> str:
    rows = []
    for name, one in found.items():
        times = [f"{one[k]:.2f}" for k in ("first_picture_s", "import_s", "load_s", "sample_s")]
        size = next(mb for key, mb in sizes.items() if name.startswith(key))
        rows.append([name, *times, f"{one['peak_mib']:.0f}", f"{size:.0f}"])
    head = [
        "",
        "first image, s",
        "of it: import",
        "load",
        "10 steps",
        "peak memory, MiB",
        "installed, MB",
    ]
    return markdown(head, rows)


def draw(path: Path, found: Mapping[str, Mapping[str, float]], sizes: Mapping[str, float]) -> None:
    """Seconds by what they are spent on, peak memory, and size on disk."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    names = list(found)
    colors = [
        "#0072b2" if n.startswith("unnoise") else "#d55e00" if n.startswith("diff") else "#777777"
        for n in names
    ]
    picture, axes = plt.subplots(
        1, 3, figsize=(13, 0.9 + 0.5 * len(names)), sharey=True, layout="constrained"
    )
    for i, name in enumerate(names):
        one, left = found[name], 0.0
        start = one["first_picture_s"] - one["import_s"] - one["load_s"] - one["sample_s"]
        for part, alpha in zip(
            (start, one["import_s"], one["load_s"], one["sample_s"]),
            (0.25, 0.45, 0.7, 1.0),
            strict=True,
        ):
            axes[0].barh(i, part, left=left, color=colors[i], alpha=alpha)
            left += part
        size = next(mb for key, mb in sizes.items() if name.startswith(key))
        for axis, value, text in (
            (axes[0], left, f" {left:.2f} s"),
            (axes[1], one["peak_mib"], f" {one['peak_mib']:.0f}"),
            (axes[2], size, f" {size:.0f}"),
        ):
            if axis is not axes[0]:
                axis.barh(i, value, color=colors[i])
            axis.text(value, i, text, va="center", fontsize=9)
    titles = (
        "first image, s: start, import, load, ten steps",
        "peak memory, MiB",
        "installed, MB",
    )
    for axis, title in zip(axes, titles, strict=True):
        axis.set_title(title, fontsize=10)
        axis.margins(x=0.18)
    axes[0].set_yticks(range(len(names)), names)
    axes[0].set_ylim(len(names) - 0.5, -0.5)
    picture.savefig(path, dpi=110, metadata={"Software": None})
    plt.close(picture)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="3 runs of each instead of 9")
    parser.add_argument(
        "--write", action="store_true", help="refresh docs/benchmarks.md and docs/cold.png"
    )
    given = parser.parse_args()
    load, network, runs = busy(), tiny(), 3 if given.quick else 9
    found = measure(network, runs)
    sizes = {
        name: installed(names) + ("unnoise" in name) * own_size()
        for name, names in INSTALLED.items()
    }
    source = (
        f"Measured by `benchmarks/cold.py` on {machine()}. A network of {network.parameters:.2f} "
        f"M parameters, medians of {runs} fresh processes, interleaved. "
        f"torch is the CPU-only build.{load}"
    )
    print(
        table(found, sizes), source, json.dumps({"runs": found, "installed_mb": sizes}), sep="\n\n"
    )
    if given.write:
        draw(Path("docs/cold.png"), found, sizes)
        plot = "![First image, peak memory and size on disk](cold.png)"
        fill(Path("docs/benchmarks.md"), "cold", "\n\n".join([plot, table(found, sizes), source]))


if __name__ == "__main__":
    main()
