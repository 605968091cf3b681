"""How near a network comes to the largest value of float16."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto

from runtime.bundle.spec import ModelSpec

from .calibrate import Calibration, observe
from .precision import tensors

LARGEST = 65504
"""The largest finite float16."""
NAMED = 10


@dataclass(frozen=True)
class Headroom:
    """How near the network's float32 values come to float16's largest, 65504.

    Attributes:
        tensors: How many values were observed.
        nearest: The share of 65504 that the ten largest reach, by node, the largest first.
        beyond: Those that reach it, in words.
    """

    tensors: int
    nearest: Mapping[str, float]
    beyond: tuple[str, ...] = ()

    def to_json(self) -> dict[str, object]:
        """Return the values as report.json has them."""
        return {
            "tensors": self.tensors,
            "nearest": dict(self.nearest),
            "beyond": list(self.beyond),
        }


def headroom(step: ModelProto, spec: ModelSpec, calibration: Calibration) -> Headroom:
    """Observe the network's float32 values along trajectories.

    Args:
        step: The plain step graph in float32, with its weights inside.
        spec: The model that it was made from.
        calibration: The trajectories.
    """
    largest: dict[str, float] = {}
    node_of = {output: node.name for node in step.graph.node for output in node.output}

    def see(name: str, value: NDArray[np.float32]) -> None:
        largest[name] = max(largest.get(name, 0.0), float(np.abs(value).max()))

    observe(step, spec, list(tensors(step)), calibration, see)
    # By share of float16's largest value, the largest first.
    shares = sorted(
        ((value / LARGEST, node_of[name]) for name, value in largest.items()), reverse=True
    )
    return Headroom(
        tensors=len(shares),
        nearest={node: share for share, node in shares[:NAMED]},
        beyond=tuple(
            f"{node} reaches {share:.2g} of float16's largest value"
            for share, node in shares
            if not share < 1  # NaN is beyond too
        ),
    )
