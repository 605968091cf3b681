"""The bundle format: its version, and the names of the files in a bundle's folder.

A folder holds bundle.json, the report and the card; each precision has a subfolder of graphs
that share one weights file.
"""

from __future__ import annotations

FORMAT = 2
"""The newest format that this version reads and writes."""
PLAIN = 1
"""The format of a bundle without conditions, which older versions read, too."""
MANIFEST = "bundle.json"
CARD = "README.md"
REPORT = "report.json"
REPORT_IMAGE = "report.png"
SAMPLES_IMAGE = "samples.png"
TUNED_IMAGE = "tuned.png"
WEIGHTS = "weights.bin"
NETWORK = "network."
"""Before the names of the network's weights and nodes in graphs."""
PIXELS = "_pixels"
"""Suffix of a step graph that computes the same values faster on a CPU. The CPU backend prefers
it; other backends ignore it."""


def step_name(guided: bool) -> str:
    """Return the name of the step graph, or of the guided one: "step" or "step_guided"."""
    return "step_guided" if guided else "step"


def step_file(guided: bool, pixels: bool = False) -> str:
    """Return the file of the step graph or the guided one; `pixels` selects its CPU variant."""
    return f"{step_name(guided)}{PIXELS if pixels else ''}.onnx"


def sampler_file(guided: bool) -> str:
    """Return the file of the graph that holds the whole sampling loop."""
    return "sampler_guided.onnx" if guided else "sampler.onnx"


def null_file(condition: str) -> str:
    """Return the file of a condition's learned null value: its numbers, little-endian."""
    return f"nulls/{condition}.bin"


def inside(precision: str, file: str) -> str:
    """Return the path of a precision's file inside the bundle, as bundle.json lists it."""
    return f"{precision}/{file}"


STEP = step_file(guided=False)
STEP_GUIDED = step_file(guided=True)
STEPS = (STEP, STEP_GUIDED)
REQUIRED = inside("fp32", STEP)
"""The one graph that every bundle has."""
