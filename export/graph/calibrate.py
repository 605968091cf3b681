"""What int8 is made from: the ranges of activations along the model's own trajectories."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, cast

import numpy as np
import onnxruntime
from numpy.typing import NDArray
from onnx import ModelProto, TensorProto, helper

from runtime.bundle.spec import ModelSpec
from runtime.diffusion.noise import Stream, noises
from runtime.diffusion.program import Program, R
from runtime.engine.job import Table
from runtime.errors.arguments import integer
from runtime.terminal.progress import Progress

from ..sources.model import checked_ways, steps_of
from .edit import copy_of
from .quantization import Range, layers

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

    Raises:
        RequestError: A number is below 1, or there is no way.
    """

    pictures: int = 16
    steps: int = 20
    judged: int = 16
    ranked: int = 4
    ways: tuple[tuple[str, int], ...] = (("dpmpp_2m", 20), ("ddim", 50))

    def __post_init__(self) -> None:
        for name in ("pictures", "steps", "judged", "ranked"):
            integer(name, getattr(self, name), 1, KEPT)
        # Frozen, so that checked values can only be set this way.
        object.__setattr__(self, "ways", checked_ways(self.ways))


QUICK_CALIBRATION = Calibration(pictures=2, steps=10, judged=2, ranked=1, ways=(("dpmpp_2m", 10),))
"""For large networks."""


class Session(Protocol):
    """An ONNX Runtime session as it is used here: every output is an array, of any shape."""

    def run(
        self, outputs: Sequence[str], feeds: Mapping[str, NDArray[np.generic]]
    ) -> list[NDArray[Any]]: ...


class Trajectories:
    """Runs step graphs that are in no bundle along programs of a model.

    All labels, and the conditions that the model draws, are used in turn.
    """

    def __init__(self, spec: ModelSpec, pictures: int, first_seed: int) -> None:
        self.spec = spec
        self.pictures = pictures
        classes = spec.num_classes
        known = np.arange(spec.num_labels) if classes else np.zeros(1)
        self.label = np.resize(known, pictures).astype(np.int64)
        self.seeds = range(first_seed, first_seed + pictures)
        drawn = spec.draw_conditions(pictures, first_seed)
        # The last sample has the null values: guidance computes them, too.
        for name, null in spec.null_conditions().items() if pictures > 1 else ():
            drawn[name][-1] = null
        self.conditions = {c.port: drawn[c.name] for c in spec.conditions}
        self.start = noises(self.seeds, Stream.INITIAL, 0, spec.sample_shape)

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
        feeds: dict[str, NDArray[np.generic]] = {**self.conditions}
        if self.spec.labels:
            feeds["label"] = self.label
        none = np.zeros_like(self.start)
        for k, (call, update) in enumerate(zip(table.call, table.update, strict=True)):
            noisy = bool(program.noisy[k])
            z = noises(self.seeds, Stream.STEP, k, self.spec.sample_shape) if noisy else none
            feeds |= {
                "noise": z,
                "state": state,
                "call": np.tile(call, (n, 1)),
                "update": np.tile(update, (n, 1, 1)),
            }
            state, *seen = session.run(["next_state", *outputs], feeds)
            if see:
                see(*seen)
        return state[:, 0].copy()


def session(proto: ModelProto) -> Session:
    """Return an ONNX Runtime session of a graph with its weights inside."""
    options = onnxruntime.SessionOptions()
    # Errors only: intermediate values as outputs make ONNX Runtime warn of each.
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
    """Call see(name, values) for each named value at each row of DDIM along the whole schedule.

    Values have any shape, with the batch of the trajectories among its axes.
    """
    names = list(dict.fromkeys(names))
    program = spec.program("ddim", steps_of(spec, calibration.steps), guidance=1.0)
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
    rows = steps_of(spec, calibration.steps)

    def see(name: str, value: Float32) -> None:
        # All values of all rows do not fit in memory: a sample of each row, and its extremes.
        flat = value.ravel()
        kept[name].append(flat[generator.integers(0, flat.size, KEPT // rows)])
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
    """Return the part of the extreme range with the smallest mean square error.

    Args:
        values: Samples of the activation, of any shape.
        extreme: From the smallest to the largest value ever observed.
        signed: Whether the zero point is 0, see `Range.grid`.
    """

    def error(range_: Range) -> float:
        scale, zero = range_.grid(signed)
        lowest, highest = (-127, 127) if signed else (0, 255)
        # The rounding that QuantizeLinear and DequantizeLinear do, clipping included.
        q = np.clip(np.round(values / scale) + int(zero), lowest, highest) - int(zero)
        return float(np.mean(np.square(q * scale - values, dtype=np.float64)))

    # A narrower range rounds most values more finely, and clips a few. One number to search: both
    # ends shrink alike.
    shares = np.linspace(0.3, 1.0, 29)
    return min((Range(extreme.low * a, extreme.high * a) for a in shares), key=error)
