"""What int8 is made from: the ranges of activations along the model's own trajectories, and which
layers must stay float32."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, cast

import numpy as np
import onnxruntime
from numpy.typing import NDArray
from onnx import ModelProto, TensorProto, helper

from runtime.bundle.spec import ModelSpec
from runtime.diffusion.noise import Stream, noise
from runtime.diffusion.program import Program, R
from runtime.engine.batch import Table
from runtime.terminal.progress import Progress

from ..errors import ExportError
from .edit import copy_of
from .precision import Layer, Range, layers, quantize

Float32 = NDArray[np.float32]
KEPT = 65536
"""How many values of each activation are kept to choose its range."""
FIRST_SEED = 1_000_000
"""The first seed of calibration; the proof uses other seeds."""


@dataclass(frozen=True)
class Calibration:
    """How int8 is made.

    Args:
        pictures: Samples of the trajectories along which activations are observed.
        steps: Grid intervals of these trajectories.
        judged: Images by which a choice of layers is compared with fp32.
        ranked: Images by which the damage of one layer is measured.
        ways: The (solver, steps) of the judged images.
    """

    pictures: int = 16
    steps: int = 20
    judged: int = 16
    ranked: int = 4
    ways: tuple[tuple[str, int], ...] = (("dpmpp_2m", 20), ("ddim", 50))


QUICK_CALIBRATION = Calibration(pictures=2, steps=10, judged=2, ranked=1, ways=(("dpmpp_2m", 10),))
"""For large networks."""
MARGIN = 1.0
"""dB beyond the bound that a choice must reach: the proof uses other images and backends."""


class Session(Protocol):
    """An ONNX Runtime session, as far as it is used here: all its outputs are arrays."""

    def run(
        self, outputs: Sequence[str], feeds: Mapping[str, NDArray[np.generic]]
    ) -> list[NDArray[Any]]: ...


class Trajectories:
    """Runs step graphs that are in no bundle along programs of a model, all labels in turn."""

    def __init__(self, spec: ModelSpec, pictures: int, first_seed: int) -> None:
        self.spec = spec
        self.pictures = pictures
        classes = spec.num_classes
        known = np.arange(spec.num_labels) if classes else np.zeros(1)
        self.label = np.resize(known, pictures).astype(np.int64)
        self.start = np.stack(
            [noise(first_seed + i, Stream.INITIAL, 0, spec.sample_shape) for i in range(pictures)]
        )

    def run(
        self,
        session: Session,
        program: Program,
        outputs: Sequence[str] = (),
        see: Callable[..., object] | None = None,
    ) -> Float32:
        """Return the final samples [n, *S].

        Args:
            session: Of a step graph.
            program: What it runs.
            outputs: Further outputs of the session.
            see: Called after each row with the values of `outputs`.
        """
        table = Table.of(program)
        n = self.pictures
        state = np.zeros((n, R, *self.spec.sample_shape), np.float32)
        state[:, 0] = table.start * self.start
        z = np.zeros_like(self.start)
        feeds: dict[str, NDArray[np.generic]] = {"noise": z}
        if self.spec.labels:
            feeds["label"] = self.label
        for call, update in zip(table.call, table.update, strict=True):
            feeds |= {
                "state": state,
                "call": np.tile(call, (n, 1)),
                "update": np.tile(update, (n, 1, 1)),
            }
            state, *seen = session.run(["next_state", *outputs], feeds)
            if see:
                see(*seen)
        return state[:, 0].copy()


def session(proto: ModelProto) -> Session:
    """An ONNX Runtime session of a graph with its weights inside."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    created = onnxruntime.InferenceSession(
        proto.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    return cast("Session", created)


def seen_values(step: ModelProto, names: Sequence[str]) -> ModelProto:
    """Return the step graph with these float32 values as further outputs."""
    proto = copy_of(step)
    known = {o.name for o in proto.graph.output} | {i.name for i in proto.graph.input}
    new = [name for name in dict.fromkeys(names) if name not in known]
    proto.graph.output.extend(
        helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in new
    )
    return proto


def observe(
    step: ModelProto,
    spec: ModelSpec,
    names: Sequence[str],
    calibration: Calibration,
    see: Callable[[str, Float32], object],
) -> None:
    """Call see(name, values) for each named value at each row of DDIM along the whole schedule."""
    names = list(dict.fromkeys(names))
    program = spec.program("ddim", min(calibration.steps, len(spec.schedule)), guidance=1.0)
    with Progress("observing", len(program)) as bar:

        def every(*values: Float32) -> None:
            for name, value in zip(names, values, strict=True):
                see(name, value)
            bar.advance()

        way = Trajectories(spec, calibration.pictures, FIRST_SEED)
        way.run(session(seen_values(step, names)), program, names, every)


def ranges(
    step: ModelProto, spec: ModelSpec, calibration: Calibration
) -> list[tuple[Range, Range]]:
    """Return a range (unsigned, signed) for the input of each of `layers(step)`.

    The range is the one that rounds the observed values with the least mean square error.
    """
    names = [layer.input for layer in layers(step)]
    kept: dict[str, list[Float32]] = {name: [] for name in names}
    extremes: dict[str, Range] = {}
    generator = np.random.Generator(np.random.Philox(key=0))

    def see(name: str, value: Float32) -> None:
        flat = value.ravel()
        kept[name].append(flat[generator.integers(0, flat.size, KEPT // calibration.steps)])
        old = extremes.get(name, Range(0.0, 0.0))
        extremes[name] = Range(min(old.low, float(flat.min())), max(old.high, float(flat.max())))

    observe(step, spec, names, calibration, see)
    found = {}
    for name, parts in kept.items():
        values = np.concatenate(parts)
        found[name] = (
            best(values, extremes[name], signed=False),
            best(values, extremes[name], signed=True),
        )
    return [found[name] for name in names]


def best(values: Float32, extreme: Range, signed: bool) -> Range:
    """Return the part of the extreme range with the least error of rounding and clipping."""

    def error(range_: Range) -> float:
        scale, zero = range_.grid(signed)
        lowest, highest = (-127, 127) if signed else (0, 255)
        q = np.clip(np.round(values / scale) + int(zero), lowest, highest) - int(zero)
        return float(np.mean(np.square(q * scale - values, dtype=np.float64)))

    shares = np.linspace(0.3, 1.0, 29)
    return min((Range(extreme.low * a, extreme.high * a) for a in shares), key=error)


def median_psnr(found: Float32, expected: Float32, data_range: tuple[float, float]) -> float:
    """Return the median peak signal-to-noise ratio of samples [n, …] in dB.

    A sample that is not finite counts as -inf, an exact one as 200 dB.
    """
    span = data_range[1] - data_range[0]
    square = np.square(found.astype(np.float64) - expected).reshape(len(found), -1).mean(1)
    with np.errstate(divide="ignore"):
        each = np.minimum(-10 * np.log10(square / span**2), 200.0)
    return float(np.median(np.where(np.isfinite(square), each, -np.inf)))


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

    def to_json(self) -> dict[str, Any]:
        """For the report."""
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
    reached = judge.full(quantize(step, found, (), signed))
    if min(reached.values()) >= least + MARGIN:
        return Choice((), {}, reached, 0.0)
    damage: dict[str, float] = {}
    with Progress("ranking layers", len(names)) as bar:
        for name in names:
            others = [other for other in names if other != name]
            damage[name] = judge.quick(quantize(step, found, others, signed))
            bar.advance()
    order = sorted(names, key=lambda name: damage[name])
    low = 1
    high = len(order)
    with Progress("choosing layers", max(1, len(order)).bit_length() + 1) as bar:
        while low < high:  # PSNR grows with the number of layers kept, worst first
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
        knots = len(spec.schedule)
        self.programs = {
            f"{solver}, {steps} steps": spec.program(solver, min(steps, knots), guidance=1.0)
            for solver, steps in calibration.ways
        }
        self.few = Trajectories(spec, calibration.ranked, FIRST_SEED + 1000)
        self.many = Trajectories(spec, calibration.judged, FIRST_SEED + 2000)
        self.short = spec.program("dpmpp_2m", min(8, knots), guidance=1.0)
        self.expected_few = self.few.run(reference, self.short)
        self.expected = {
            name: self.many.run(reference, program) for name, program in self.programs.items()
        }

    def quick(self, proto: ModelProto) -> float:
        return median_psnr(
            self.few.run(session(proto), self.short), self.expected_few, self.spec.sample_range
        )

    def full(self, proto: ModelProto) -> dict[str, float]:
        candidate = session(proto)
        return {
            name: median_psnr(
                self.many.run(candidate, program), self.expected[name], self.spec.sample_range
            )
            for name, program in self.programs.items()
        }
