"""Why a sample has other bytes in a batch than alone: mixed samples, or a node that rounds."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnx
from numpy.typing import NDArray

from runtime.backends.base import Backend
from runtime.bundle.conditions import PREFIX
from runtime.bundle.format import step_file
from runtime.diffusion.program import TIME

from .examples import Examples
from .independence import BATCH, Dependency, Inputs, neighbours, unsteady_node
from .report import StepCheck
from .verdict import REFERENCE

PORTS = ("state", "noise", "label", "call", "update")
"""The inputs of a step graph by their names in `Buffers` and `Example`, without conditions."""


def explained(check: StepCheck, examples: Examples, backend: Backend, guided: bool) -> StepCheck:
    """Return the check of a graph whose samples depend on their batch, with what they depend on."""
    # Mixed samples first: they are a fault of the network, and rounding is one of the library.
    dependency = _dependency(examples, backend, guided)
    if dependency is not None:
        return replace(
            check, unlike_alone=f"{check.unlike_alone}; {dependency}", mixes_samples=True
        )
    node = _rounding_node(examples, backend, guided)
    if node is None:
        return check
    return replace(
        check,
        unlike_alone=f"{check.unlike_alone}; the first node that rounds otherwise there is {node}",
    )


def _dependency(examples: Examples, backend: Backend, guided: bool) -> Dependency | None:
    """Return on what the graph's samples depend besides their own inputs; None for rounding."""
    example = examples.at(0, guided)
    count = min(BATCH, examples.count)
    buffers = backend.bind(count)

    # The same rows at every call, so that only the inputs of the other samples change.
    def network(inputs: Inputs) -> NDArray[np.float32]:
        buffers.state[:] = inputs.x
        buffers.call[:] = example.call[:count]
        buffers.call[:, TIME] = inputs.time
        buffers.update[:] = example.update[:count]
        buffers.noise[:] = example.noise[:count]
        if inputs.label is not None:
            buffers.label[:] = inputs.label
        for name, array in buffers.conditions.items():
            array[:] = inputs.conditions[name.removeprefix(PREFIX)]
        buffers.step(guided)
        return buffers.denoised.copy()

    def inputs(first: int) -> Inputs:
        who = (np.arange(count) + first) % examples.count
        label = example.label[who] if examples.bundle.labels else None
        time = example.call[who, TIME].astype(np.float32)
        conditions = {name: array[who] for name, array in example.conditions.items()}
        return Inputs(example.state[who], time, label, conditions)

    return neighbours(network, inputs(0), inputs(1))


def _rounding_node(examples: Examples, backend: Backend, guided: bool) -> str | None:
    """Return the first node that rounds a sample differently in a batch, if ONNX Runtime shows
    it."""
    # Only ONNX Runtime can output every value inside a graph.
    if backend.name != REFERENCE:
        return None
    example = examples.at(0, guided)
    folder = examples.bundle.path / backend.precision
    path = folder / step_file(guided, pixels=True)
    graph = onnx.load(path if path.exists() else folder / step_file(guided))
    feeds = {name: getattr(example, name) for name in PORTS}
    for name in ("call", "update"):
        feeds[name] = feeds[name].astype(np.float32)
    feeds |= {f"{PREFIX}{name}": array for name, array in example.conditions.items()}
    inputs = {port.name for port in graph.graph.input}
    given = {name: feeds[name] for name in feeds if name in inputs}
    try:
        return unsteady_node(graph, given)
    except Exception:  # ONNX Runtime's own: not every value can be an output, such as a sequence
        return None
