"""Which layers must stay float32: each one's damage to the final images, and a search."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from onnx import ModelProto

from runtime.bundle.spec import ModelSpec
from runtime.terminal.progress import Progress

from ..errors import ExportError
from ..sources.model import steps_of, ways_of
from .calibrate import FIRST_SEED, Calibration, Float32, Trajectories, session
from .quantization import Layer, Range, layers, quantize

MARGIN = 1.0
"""dB beyond the bound that a choice must reach: the proof uses other images and backends."""


@dataclass(frozen=True)
class Choice:
    """Which layers stay float32.

    Attributes:
        keep: Their names, the most damaging first.
        damage: The PSNR in dB when one layer alone is int8, by layer.
        reached: The PSNR in dB of the choice, by solver and steps.
        float_share: The share of multiply-adds that stays float32.
    """

    keep: tuple[str, ...]
    damage: Mapping[str, float]
    reached: Mapping[str, float]
    float_share: float

    def to_json(self) -> dict[str, object]:
        """Return the choice as report.json has it."""
        damage = dict(sorted(self.damage.items(), key=lambda item: item[1]))
        return {
            "float32_layers": list(self.keep),
            "float32_share_of_multiply_adds": self.float_share,
            "psnr_db_of_one_layer_alone": damage,
            "psnr_db_when_chosen": dict(self.reached),
        }


def choose(
    step: ModelProto, judge: Judge, found: Sequence[Range], signed: bool, least: float
) -> Choice:
    """Return the fewest layers in float32 with which the final images reach a PSNR.

    If not all layers can be int8, they are ranked by the damage that each does to the final images
    when it alone is int8.

    Args:
        judge: Compares images with fp32's.
        found: The range of the input of each of `layers(step)`.
        signed: See `quantize`.
        least: The PSNR in dB, beyond which a margin is kept.

    Raises:
        ExportError: Not even one layer can be int8. The message names the worst layers.
    """
    every = layers(step)
    names = list(dict.fromkeys(layer.name for layer in every))
    # If all layers can be int8, the ranking, which takes longest, is not needed.
    reached = judge.full(quantize(step, found, (), signed))
    if min(reached.values()) >= least + MARGIN:
        return Choice((), {}, reached, 0.0)
    # Rank layers by the damage of each alone: fewer images do, because only the order counts.
    damage: dict[str, float] = {}
    with Progress("ranking layers", len(names)) as bar:
        for name in names:
            others = [other for other in names if other != name]
            damage[name] = judge.quick(quantize(step, found, others, signed))
            bar.advance()
    order = sorted(names, key=lambda name: damage[name])
    # Bisect how many to keep: PSNR grows with the number of layers kept, the worst ones first.
    low = 1
    high = len(order)
    with Progress("choosing layers", max(1, len(order)).bit_length() + 1) as bar:
        while low < high:
            middle = (low + high) // 2
            now = judge.full(quantize(step, found, order[:middle], signed))
            bar.advance()
            if min(now.values()) >= least + MARGIN:
                high = middle
                reached = now
            else:
                low = middle + 1
    if low == len(order):
        raise ExportError(
            f"int8 misses {least:g} dB with any layer in it. The worst: "
            + ", ".join(f"{name} alone {damage[name]:.1f} dB" for name in order[:3])
        )
    return Choice(tuple(order[:low]), damage, reached, share(every, order[:low]))


def share(every: Sequence[Layer], keep: Sequence[str]) -> float:
    """Return the share of multiply-adds in the layers that `keep` names."""
    total = sum(layer.multiply_adds for layer in every)
    return (
        sum(layer.multiply_adds for layer in every if layer.name in keep) / total if total else 0.0
    )


class Judge:
    """Compares images of a candidate with those of the float32 graph, which are made once."""

    def __init__(self, step: ModelProto, spec: ModelSpec, calibration: Calibration) -> None:
        self.spec = spec
        reference = session(step)
        self.programs = {
            f"{solver}, {steps} steps": spec.program(solver, steps, guidance=1.0)
            for solver, steps in ways_of(spec, calibration.ways)
        }
        # Not the seeds of the observed trajectories, on which the ranges were chosen.
        self.few = Trajectories(spec, calibration.ranked, FIRST_SEED + 1000)
        self.many = Trajectories(spec, calibration.judged, FIRST_SEED + 2000)
        self.short = spec.program("dpmpp_2m", steps_of(spec, 8), guidance=1.0)
        self.expected_few = self.few.run(reference, self.short)
        self.expected = {
            name: self.many.run(reference, program) for name, program in self.programs.items()
        }

    def quick(self, proto: ModelProto) -> float:
        """Return the median PSNR in dB of a few images of few steps."""
        return median_psnr(
            self.few.run(session(proto), self.short), self.expected_few, self.spec.sample_range
        )

    def full(self, proto: ModelProto) -> dict[str, float]:
        """Return the median PSNR in dB of all images, by solver and steps."""
        candidate = session(proto)
        return {
            name: median_psnr(
                self.many.run(candidate, program), self.expected[name], self.spec.sample_range
            )
            for name, program in self.programs.items()
        }


def median_psnr(found: Float32, expected: Float32, data_range: tuple[float, float]) -> float:
    """Return the median peak signal-to-noise ratio of samples [n, …] in dB.

    A sample that is not finite counts as -inf, an exact one as 200 dB.
    """
    span = data_range[1] - data_range[0]
    square = np.square(found.astype(np.float64) - expected).reshape(len(found), -1).mean(1)
    # -inf for non-finite values, so that no median hides it; 200 dB for an exact sample, because
    # JSON has no infinity.
    with np.errstate(divide="ignore"):
        each = np.minimum(-10 * np.log10(square / span**2), 200.0)
    return float(np.median(np.where(np.isfinite(square), each, -np.inf)))
