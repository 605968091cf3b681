"""What this machine can run, what is missing, and what a bundle holds: python -m runtime.info
[BUNDLE]"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import sys
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from .backends.registry import BACKENDS, GPU, offered
from .bundle.bundle import Bundle
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
"""What decides how fast a processor multiplies, by Linux's name for it."""


def machine() -> dict[str, Any]:
    """The processor in words, its cores that this process may use, and its instruction sets (on
    Linux)."""
    path = Path("/proc/cpuinfo")
    text = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
    name = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    flags = set(re.findall(r"\w+", (re.search(r"^flags\s*:(.+)$", text, re.MULTILINE) or [""])[0]))
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "processor": name[1].strip() if name else platform.processor() or platform.machine(),
        "cores": cores,
        "instructions": [shown for flag, shown in INSTRUCTIONS.items() if flag in flags],
    }


def backends() -> dict[str, dict[str, Any]]:
    """For every backend its version and what it can compute here, or what is missing and how to get
    it."""
    return {name: _backend(name) for name in BACKENDS}


def _backend(name: str) -> dict[str, Any]:
    kind = BACKENDS[name]
    install = f"pip install 'unnoise[{kind.extra}]'"
    if find_spec(kind.module) is None:
        return {"version": None, "precisions": [], "missing": install}
    version = _version(name)
    if kind.gpu and version is None:
        return {"version": None, "precisions": [], "missing": install}
    precisions = list(kind.folders)
    lacking = None
    if kind.gpu and (lacking := _no_gpu(name)):
        precisions = []
    if name == "openvino":
        import openvino

        from .backends.openvino import capabilities

        if "BF16" not in capabilities(openvino):
            precisions.remove("bf16")
            lacking = "bf16 needs a processor that has it"
    return {"version": version or "?", "precisions": precisions, "missing": lacking}


DISTRIBUTIONS = {
    "onnxruntime-cuda": ("onnxruntime-gpu",),
    "tensorrt": ("tensorrt", "tensorrt-cu13", "tensorrt-cu12"),
    "tensorrt-rtx": ("tensorrt-rtx-cu13", "tensorrt-rtx-cu12", "tensorrt-rtx"),
}
"""What brings a backend's module, where it is not called as the backend is."""


def _version(name: str) -> str | None:
    for distribution in DISTRIBUTIONS.get(name, (name,)):
        try:
            return metadata.version(distribution)
        except metadata.PackageNotFoundError:  # onnxruntime-gpu brings the module onnxruntime
            continue
    return None


def _no_gpu(name: str) -> str | None:
    """Why this process cannot use an NVIDIA GPU, in one line; None where it can, or where that
    cannot be told."""
    from .backends.nvidia.cuda import Cuda, cudart

    try:
        api = cudart()
    except BackendError as error:
        return None if name == "onnxruntime-cuda" else str(error)
    try:
        Cuda(api)
    except BackendError as error:
        return str(error).partition(". ")[0].rstrip(".")
    return None


def contents(bundle: Bundle, here: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """What a bundle is, and for each of its precisions and backends whether it runs here and how
    its export found it."""
    pairs = offered(bundle)
    checked = bundle.report
    rows = [
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
        "prediction": bundle.prediction,
        "schedule": bundle.schedule.name,
        "knots": len(bundle.schedule),
        "defaults": {**vars(bundle.defaults), "options": dict(bundle.defaults.options)},
        "bytes": sum(file.size for file in bundle.files.values()),
        "for_gpus": [p for p in bundle.precisions if p in GPU],
        "runs": rows,
    }


def describe(found: dict[str, Any]) -> str:
    """The facts as a person reads them."""
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


def _describe_bundle(b: dict[str, Any]) -> list[str]:
    d = b["defaults"]
    shape = "×".join(map(str, b["shape"]))
    labels = f"{len(b['labels'])} labels" if b["labels"] else "no labels"
    lines = [
        f"bundle    {b['name']}: samples of {shape} in {b['range'][0]:g} … {b['range'][1]:g}, "
        f"{labels}, {b['bytes'] / 1e6:.1f} MB",
        f"network   prediction {b['prediction']}, schedule {b['schedule']} with {b['knots']} knots",
        f"default   {d['solver']}, {d['steps']} steps on {d['grid']}, guidance {d['guidance']:g}",
        "",
    ]
    rows = [
        [
            "precision",
            "backend",
            "here",
            "F apart",
            "PSNR to fp32",
            "ms a call where it was exported",
        ]
    ]
    for run in b["runs"]:
        checked = run["checked"] or {}
        ms = ", ".join(
            f"{time:.1f} (batch {batch})" for batch, time in checked.get("ms_a_call", {}).items()
        )
        psnr = checked.get("psnr_db")
        near = "–" if psnr is None or run["precision"] == "fp32" else f"{psnr:.1f} dB"
        apart = f"{checked['answer']:.1e}" if "answer" in checked else "not checked"
        rows.append(
            [
                run["precision"],
                run["backend"],
                "yes" if run["runs_here"] else "no",
                apart,
                near,
                ms or "–",
            ]
        )
    lines += columns(rows)
    if b["for_gpus"]:
        lines += ["", f"for GPUs  {', '.join(b['for_gpus'])}"]
    return lines


def columns(rows: list[list[str]]) -> list[str]:
    """The rows as lines, their cells under each other."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]


def main(arguments: list[str] | None = None) -> int:
    return run_verb(_parser(), info, arguments)


def info(given: argparse.Namespace) -> None:
    """Do what the command line asks."""
    bundle = Bundle.load(given.bundle) if given.bundle else None
    found: dict[str, Any] = {"machine": machine(), "backends": backends()}
    if bundle:
        found["bundle"] = contents(bundle, found["backends"])
    say(json.dumps(found, indent=1) if given.json else describe(found))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=program("runtime.info"), description=__doc__)
    add = parser.add_argument
    what = "a bundle's folder or a shipped bundle's name [none: the machine alone]"
    add("bundle", nargs="?", type=Path, metavar="BUNDLE", help=what)
    add("--json", action="store_true", help="for programs")
    return parser


if __name__ == "__main__":
    sys.exit(main())
