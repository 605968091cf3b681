"""What this machine can run, and what a bundle holds: python -m runtime.info [BUNDLE]"""

from __future__ import annotations

import argparse
import json
import sys
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import NotRequired, TypedDict

from .backends.processor import flags, processor_name, usable_cores
from .backends.registry import BACKENDS, GPU, offered
from .bundle.bundle import Bundle
from .bundle.manifest import Figures
from .errors import BackendError
from .terminal.output import say
from .terminal.verbs import program, run_verb

INSTRUCTIONS = {
    "avx2": "AVX2",
    "avx512f": "AVX-512",
    "avx512_vnni": "VNNI",
    "avx512_bf16": "bf16",
    "amx_tile": "AMX",
}
"""The instruction sets that decide how fast a processor multiplies, by Linux's names."""


class Machine(TypedDict):
    """A machine: its processor, the cores that this process may use, and instruction sets."""

    processor: str
    cores: int
    instructions: list[str]


class BackendState(TypedDict):
    """A backend on this machine. `version` is None if absent, `missing` says how to get it."""

    version: str | None
    precisions: list[str]
    missing: str | None


class Pair(TypedDict):
    """A precision and a backend of a bundle; `checked` holds the figures of its export."""

    precision: str
    backend: str
    runs_here: bool
    checked: Figures | None


class Contents(TypedDict):
    """A bundle."""

    name: str
    shape: list[int]
    range: list[float]
    labels: list[str]
    conditions: list[str]
    prediction: str
    schedule: str
    knots: int
    defaults: dict[str, object]
    bytes: int
    for_gpus: list[str]
    runs: list[Pair]


class Facts(TypedDict):
    """The output of the command, as JSON."""

    machine: Machine
    backends: dict[str, BackendState]
    bundle: NotRequired[Contents]


def machine() -> Machine:
    """Return the facts of this machine; instruction sets are read on Linux only."""
    here = flags()
    return {
        "processor": processor_name(),
        "cores": usable_cores(),
        "instructions": [shown for flag, shown in INSTRUCTIONS.items() if flag in here],
    }


def backends() -> dict[str, BackendState]:
    """Return every backend's state on this machine, by name."""
    return {name: _backend(name) for name in BACKENDS}


def _backend(name: str) -> BackendState:
    kind = BACKENDS[name]
    install = f"pip install 'unnoise[{kind.extra}]'"
    if find_spec(kind.module) is None:
        return {"version": None, "precisions": [], "missing": install}
    version = _version(name)
    # onnxruntime-gpu brings a module of the same name as onnxruntime: only the version shows which
    # one it is.
    if kind.gpu and version is None:
        return {"version": None, "precisions": [], "missing": install}
    precisions = list(kind.folders)
    lacking = None
    if kind.gpu and (lacking := _no_gpu(name)):
        precisions = []
    if name == "openvino":
        import openvino

        from .backends.openvino import lacks

        said = {precision: lacks(precision, openvino) for precision in precisions}
        precisions = [precision for precision in precisions if not said[precision]]
        lacking = "; ".join(one.partition(" (")[0] for one in said.values() if one) or None
    return {"version": version or "?", "precisions": precisions, "missing": lacking}


DISTRIBUTIONS = {
    "onnxruntime-cuda": ("onnxruntime-gpu",),
    "tensorrt": ("tensorrt", "tensorrt-cu13", "tensorrt-cu12"),
    "tensorrt-rtx": ("tensorrt-rtx-cu13", "tensorrt-rtx-cu12", "tensorrt-rtx"),
}
"""The distributions of a backend's module, if they are not named like the backend."""


def _version(name: str) -> str | None:
    for distribution in DISTRIBUTIONS.get(name, (name,)):
        try:
            return metadata.version(distribution)
        except metadata.PackageNotFoundError:
            continue
    return None


def _no_gpu(name: str) -> str | None:
    """Return why this process cannot use an NVIDIA GPU, in one line.

    None means that it can, or that it is unknown.
    """
    from .backends.nvidia.cuda import Cuda, cudart

    try:
        api = cudart()
    except BackendError as error:
        # cuda-bindings is missing, which onnxruntime does not need.
        return None if name == "onnxruntime-cuda" else str(error)
    try:
        Cuda(api)
    except BackendError as error:
        return str(error).partition(". ")[0].rstrip(".")
    return None


def contents(bundle: Bundle, here: dict[str, BackendState]) -> Contents:
    """Return a bundle's facts, and which of its precisions and backends run on this machine.

    Args:
        here: What `backends` returned.
    """
    pairs = offered(bundle)
    checked = bundle.report
    rows: list[Pair] = [
        {
            "precision": precision,
            "backend": backend,
            "runs_here": precision in here[backend]["precisions"],
            "checked": checked.get(precision, {}).get(backend),
        }
        for backend, precision in pairs
    ]
    return {
        "name": bundle.name,
        "shape": list(bundle.sample_shape),
        "range": list(bundle.sample_range),
        "labels": list(bundle.labels.names) if bundle.labels else [],
        "conditions": [str(condition) for condition in bundle.conditions],
        "prediction": bundle.prediction,
        "schedule": bundle.schedule.name,
        "knots": len(bundle.schedule),
        "defaults": {**vars(bundle.defaults), "options": dict(bundle.defaults.options)},
        "bytes": sum(file.size for file in bundle.files.values()),
        "for_gpus": [p for p in bundle.precisions if p in GPU],
        "runs": rows,
    }


def describe(found: Facts) -> str:
    """Return the facts as readable text."""
    m = found["machine"]
    lines = [
        f"machine   {m['processor']}, {m['cores']} cores; "
        f"{', '.join(m['instructions']) or 'instruction sets unknown'}",
        "",
    ]
    rows = [["backend", "version", "computes", "missing"]]
    rows += [
        [name, b["version"] or "–", ", ".join(b["precisions"]) or "–", b["missing"] or ""]
        for name, b in found["backends"].items()
    ]
    lines += columns(rows)
    if "bundle" in found:
        lines += ["", *_describe_bundle(found["bundle"])]
    return "\n".join(lines)


def _describe_bundle(b: Contents) -> list[str]:
    d = b["defaults"]
    shape = "×".join(map(str, b["shape"]))
    labels = f"{len(b['labels'])} labels" if b["labels"] else "no labels"
    lines = [
        f"bundle    {b['name']}: samples of {shape} in {b['range'][0]:g} … {b['range'][1]:g}, "
        f"{labels}, {b['bytes'] / 1e6:.1f} MB",
        f"network   prediction {b['prediction']}, schedule {b['schedule']} with {b['knots']} knots",
        *(f"condition {condition}" for condition in b["conditions"]),
        f"default   {d['solver']}, {d['steps']} steps on {d['grid']}, guidance {d['guidance']:g}",
        "",
    ]
    heads = ["precision", "backend", "here", "F differs", "PSNR to fp32", "ms a call at export"]
    lines += columns([heads, *(_row(pair) for pair in b["runs"])])
    if b["for_gpus"]:
        lines += ["", f"for GPUs  {', '.join(b['for_gpus'])}"]
    return lines


def _row(pair: Pair) -> list[str]:
    """Return the cells of a precision and a backend."""
    checked = pair["checked"] or {}
    ms = ", ".join(
        f"{time:.1f} (batch {batch})" for batch, time in checked.get("ms_a_call", {}).items()
    )
    psnr = checked.get("psnr_db")
    # fp32 is the reference of the PSNR.
    near = "–" if psnr is None or pair["precision"] == "fp32" else f"{psnr:.1f} dB"
    differs = f"{checked['answer']:.1e}" if "answer" in checked else "not checked"
    here = "yes" if pair["runs_here"] else "no"
    return [pair["precision"], pair["backend"], here, differs, near, ms or "–"]


def columns(rows: list[list[str]]) -> list[str]:
    """Return the rows as lines, with their cells aligned."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]


def main(arguments: list[str] | None = None) -> int:
    return run_verb(_parser(), info, arguments)


def info(given: argparse.Namespace) -> None:
    """Run the command line."""
    bundle = Bundle.load(given.bundle) if given.bundle else None
    found: Facts = {"machine": machine(), "backends": backends()}
    if bundle:
        found["bundle"] = contents(bundle, found["backends"])
    say(json.dumps(found, indent=1) if given.json else describe(found))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=program("runtime.info"), description=__doc__)
    add = parser.add_argument
    what = "a bundle's folder or a shipped bundle's name [none: the machine alone]"
    add("bundle", nargs="?", type=Path, metavar="BUNDLE", help=what)
    add("--json", action="store_true", help="print JSON, for programs")
    return parser


if __name__ == "__main__":
    sys.exit(main())
