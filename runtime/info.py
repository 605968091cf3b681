"""What this machine can run, and what a bundle holds: python -m runtime.info [BUNDLE]"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import NotRequired, TypedDict

from .backends.registry import GPU, offered
from .backends.survey import BackendState, Machine, backends, machine
from .bundle.bundle import Bundle
from .bundle.manifest import Figures
from .terminal.output import columns, say
from .terminal.verbs import program, run_verb


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
