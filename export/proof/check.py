"""The proof: PyTorch against what was exported, step by step across the whole schedule, then over
whole trajectories."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from onnx import ModelProto

from runtime.backends.base import Backend, Buffers
from runtime.backends.onnxruntime import OnnxRuntime
from runtime.backends.registry import BACKENDS
from runtime.bundle import Bundle
from runtime.diffusion.noise import Stream, noise
from runtime.diffusion.program import C_IN, C_OUT, C_SKIP, CLIP, GUIDANCE, TIME, D, Program, R, run
from runtime.diffusion.schedule import Schedule
from runtime.errors import BackendError, BundleError
from runtime.format import PIXELS
from runtime.output import say
from runtime.progress import Progress
from runtime.sampler import Sampler

from ..errors import ExportError
from ..graph.calibrate import Calibration, median_psnr, observe
from ..graph.precision import tensors
from ..sources.model import Model
from .independence import BATCH, Dependency, Inputs, neighbours, unsteady_node

BATCHES = (1, 3, 16)
SIZES = (2, 5, 8)
"""Further sizes of a batch at which a sample must have the bytes that it has alone."""
QUANTIZED_SIZES = (*range(2, 18), 24, 32, 33)
"""The same for int8, whose kernels libraries switch at more sizes."""
TIMES = 13
PICTURES = 3
"""Samples a trajectory."""
ALONE = 3
"""Samples of a batch that are also run alone, at every level but the first, where all are."""
STEPS = 50
"""Grid intervals a trajectory."""
REFERENCE = "onnxruntime"
"""The backend whose misses fail the build. Another one that misses is not offered the precision."""
ROUNDING = 4 * 2.0**-24
"""float32's, relative, of the four factors in c_skip·x + c_out·F."""


@dataclass(frozen=True)
class Plan:
    """How much is compared.

    Args:
        batches: sizes that are compared with PyTorch, in every one of `times` shuffled batches.
        sizes: further sizes, at which a sample is compared with itself alone, in one batch each.
        quantized_sizes: the same for int8.
        times: levels across the schedule.
        pictures: samples of every trajectory.
        steps: grid intervals of every trajectory.
        samples: how many the model card shows.
        judged: images by which another precision is compared with fp32.
        ways: (solver, steps) of these images.

    Raises:
        ExportError: a number is below 1.
    """

    batches: tuple[int, ...] = BATCHES
    sizes: tuple[int, ...] = SIZES
    quantized_sizes: tuple[int, ...] = QUANTIZED_SIZES
    times: int = TIMES
    pictures: int = PICTURES
    steps: int = STEPS
    samples: int = 36
    judged: int = 16
    ways: tuple[tuple[str, int], ...] = (("dpmpp_2m", 20), ("ddim", 50))

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if name == "ways":
                continue
            least = min(value, default=0) if isinstance(value, tuple) else value
            if least < 1:
                raise ExportError(f"a plan needs {name} of at least 1, found {value}.")


QUICK = Plan(
    batches=(1, 3),
    sizes=(2, 5),
    quantized_sizes=(2, 4, 5, 8, 16),
    times=5,
    pictures=1,
    steps=10,
    samples=4,
    judged=2,
    ways=(("dpmpp_2m", 10), ("ddim", 10)),
)
"""For large networks: about a twentieth of the work."""


@dataclass(frozen=True)
class Bounds:
    """The largest differences that pass, of values whose data has the range -1 … 1.

    answer: of the network's F. next_state: times max(1, sigma), beyond what the difference and the
    rounding of F come to there, which the row multiplies by up to sigma/alpha. trajectory: of the
    final samples, times the largest of PyTorch's where that is above 1, which unclipped samples may
    be. These hold for fp32. psnr: the least median, dB, of final pictures in another precision
    against fp32's; their differences at each step are reported.
    """

    answer: float = 1e-4
    next_state: float = 1e-4
    trajectory: float = 2e-3
    psnr: Mapping[str, float] = field(
        default_factory=lambda: {"fp16": 40.0, "bf16": 25.0, "int8": 35.0, "int8-trt": 35.0}
    )


@dataclass(frozen=True)
class Worst:
    """The largest difference of one kind, and where it was found."""

    error: float
    bound: float
    where: str

    def __or__(self, other: Worst) -> Worst:
        """Whichever is nearer to its bound, or further beyond it. A NaN is beyond every bound."""
        return max(self, other, key=lambda w: np.inf if np.isnan(w.error) else w.error / w.bound)


NONE = Worst(0.0, 1.0, "nowhere")


def difference(a: NDArray[Any], b: NDArray[Any]) -> float:
    """Largest |a - b|; NaN where either is not finite."""
    return float(np.abs(a.astype(np.float64) - b.astype(np.float64)).max())


def torch_network(model: Model) -> Callable[..., NDArray[np.float32]]:
    """The module as a network of `runtime.run`."""

    def network(*inputs: NDArray[Any]) -> NDArray[np.float32]:
        with torch.inference_mode():
            return model.module(
                *(torch.from_numpy(np.ascontiguousarray(i)) for i in inputs)
            ).numpy()

    return network


@dataclass(frozen=True, eq=False)
class _Example:
    """A shuffled batch [n, …], each sample at its own level, and what PyTorch makes of it.

    knots, sigma, call, update, label, state, noise: of each sample's row. answer: F.
    """

    knots: NDArray[np.int64]
    sigma: NDArray[np.float64]
    call: NDArray[np.float64]
    update: NDArray[np.float64]
    label: NDArray[np.int64]
    state: NDArray[np.float32]
    noise: NDArray[np.float32]
    answer: NDArray[Any]
    next_state: NDArray[np.float32]

    def share(self, i: int, answer_error: float) -> float:
        """What a difference of F, and rounding it and x to float32, come to in next_state.

        The row of sample i multiplies both by its gain. Zero if that is not finite, so that no
        bound is.
        """
        gain = abs(self.update[i, 0, D] * self.call[i, C_OUT])
        largest = max(np.abs(self.answer[i]).max(), np.abs(self.state[i, 0]).max())
        found = float(gain * (answer_error + ROUNDING * largest))
        return found if np.isfinite(found) else 0.0


class Examples:
    """Rows across the whole schedule on the model's own images, noised, in shuffled batches.

    In example k, sample i stands at another level than its neighbours, and over all examples every
    sample stands at every level. All graphs are compared on the same ones.
    """

    def __init__(self, model: Model, bundle: Bundle, plan: Plan) -> None:
        self.model, self.bundle, self.network, self.plan = model, bundle, torch_network(model), plan
        self.count = max(plan.batches)
        self.clean = self._pictures()
        T = len(bundle.schedule)
        self.knots = np.unique(np.round(np.linspace(T - 1, 0, plan.times)).astype(int))
        self._answers: dict[tuple[int, bool], NDArray[Any]] = {}

    def __len__(self) -> int:
        return len(self.knots)

    def labels(self, turn: int = 0) -> NDArray[np.int64]:
        """Every label in turn, the null label first; another first in each turn."""
        classes = self.bundle.num_classes
        null = bool(self.bundle.labels and self.bundle.labels.null_trained)
        order = np.r_[[classes] if null else [], np.arange(classes)] if classes else np.zeros(1)
        return np.roll(np.resize(order, self.count), turn).astype(np.int64)

    def draw(self, stream: Stream, step: int) -> NDArray[np.float32]:
        seeds = range(self.count)
        return np.stack([noise(seed, stream, step, self.bundle.sample_shape) for seed in seeds])

    def _pictures(self) -> NDArray[np.float32]:
        program = self.bundle.program("ddim", min(10, self.plan.steps, len(self.bundle.schedule)))
        found = run(
            program,
            self.network,
            np.float32(program.start) * self.draw(Stream.INITIAL, 0),
            label=self.labels() if self.bundle.labels else None,
        )
        # Without a clip those of an untrained network reach sigma/alpha. What it is for, and what
        # the bounds are for, is the data's range.
        low, high = self.bundle.sample_range
        return np.clip(found, low, high)

    def guidances(self, guided: bool) -> NDArray[np.float64]:
        """[n]: of each sample; the largest is the bundle's own, or 2."""
        if not guided:
            return np.ones(self.count)
        largest = max(2.0, self.bundle.defaults.guidance)
        return np.resize([largest, 1.5, 1.0, 0.0, largest / 2], self.count)

    def at(self, turn: int, guided: bool) -> _Example:
        """Example `turn`: an ancestral row for each sample, halfway down from its level to the end."""
        schedule, count = self.bundle.schedule, self.count
        knots = self.knots[(turn + 3 * np.arange(count)) % len(self.knots)]
        rows = [self._row(int(k), g) for k, g in zip(knots, self.guidances(guided), strict=True)]
        call, M = np.stack([r[0] for r in rows]), np.stack([r[1] for r in rows])
        columns = [-1, *[1] * len(self.bundle.sample_shape)]
        alpha, sigma = (a[knots].reshape(columns) for a in (schedule.alpha, schedule.sigma))
        state = np.zeros((count, R, *self.bundle.sample_shape), np.float32)
        state[:, 0] = alpha * self.clean + sigma * self.draw(Stream.ENCODE, turn)
        z, label = self.draw(Stream.STEP, turn), self.labels(turn)
        F = self._answer(turn, False, state[:, 0], call, label)
        if guided:
            null = self._answer(turn, True, state[:, 0], call, label)
            F = F + np.float32(call[:, GUIDANCE] - 1).reshape(columns) * (F - null)
        c_skip, c_out, clip = (call[:, i].reshape(columns) for i in (C_SKIP, C_OUT, CLIP))
        denoised = np.clip(c_skip * state[:, 0] + c_out * F.astype(np.float64), -clip, clip)
        known = np.concatenate([state.astype(np.float64), denoised[:, None], z[:, None]], axis=1)
        next_state = np.einsum("brs,bs...->br...", M, known).astype(np.float32)
        return _Example(knots, schedule.sigma[knots], call, M, label, state, z, F, next_state)

    def _row(self, knot: int, guidance: float) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """The row from this knot to the one halfway down, or to the clean end."""
        time = self.bundle.schedule.time
        grid = [time[knot]] + ([time[knot // 2]] if knot else [])
        program = self.bundle.program("ddim", grid=grid, guidance=guidance, eta=1.0)
        return program.call[0], program.update[0]

    def _answer(
        self,
        turn: int,
        null: bool,
        x: NDArray[np.float32],
        call: NDArray[np.float64],
        label: NDArray[np.int64],
    ) -> NDArray[Any]:
        """PyTorch's F under each sample's label, or the null label; kept for the next graph.

        The first example is computed sample by sample, the others as a batch: that the module
        computes a batch as its samples alone was checked to the bit before (`independence`).
        """
        if (turn, null) not in self._answers:
            columns = [-1, *[1] * (x.ndim - 1)]
            scaled = np.float32(call[:, C_IN]).reshape(columns) * x
            time = call[:, TIME].astype(np.float32)
            label = np.full_like(label, self.bundle.num_classes) if null else label
            inputs = Inputs(scaled, time, label if self.bundle.labels else None)
            size = 1 if turn == 0 else len(x)
            parts = [inputs[i : i + size] for i in range(0, len(x), size)]
            found = [self.network(*part.arguments()) for part in parts]
            self._answers[turn, null] = np.concatenate(found)
        return self._answers[turn, null]


@dataclass(frozen=True, eq=False)
class _Found:
    """What a graph makes of some samples [b, …]: next_state, and F, which it gives as D."""

    state: NDArray[np.float32]
    answer: NDArray[np.float32]


def _step(buffers: Buffers, example: _Example, who: NDArray[np.int64], guided: bool) -> _Found:
    """Run the exported graph twice on the samples `who`: as it is, and with a row that reads D = F."""

    def once(only_answer: bool) -> None:
        for name in ("state", "noise", "label", "call", "update"):
            getattr(buffers, name)[:] = getattr(example, name)[who]
        if only_answer:
            buffers.call[:, [C_SKIP, C_OUT, CLIP]] = 0, 1, np.inf
        buffers.step(guided)

    once(False)
    state = buffers.state.copy()
    once(True)
    return _Found(state, buffers.denoised.copy())


@dataclass
class _Steps:
    """What was found of one graph so far."""

    graph: str
    bounds: Bounds
    schedule: Schedule
    answer: Worst = NONE
    next_state: Worst = NONE
    not_finite: int = 0
    by_knot: dict[int, tuple[float, float]] = field(default_factory=dict)
    unlike: str = ""
    """Where a sample first differed from itself alone; "" if nowhere."""

    def compare(self, example: _Example, who: NDArray[np.int64], found: _Found) -> None:
        """Compare each sample with PyTorch's."""
        self.not_finite += int((~np.isfinite(found.answer)).sum())
        for place, i in enumerate(who):
            knot = int(example.knots[i])
            where = f"{self.graph}, time {self.schedule.time[knot]:g}, batch {len(who)}"
            answer_error = difference(found.answer[place], example.answer[i])
            state_error = difference(found.state[place], example.next_state[i])
            self.answer |= Worst(answer_error, self.bounds.answer, where)
            allowed = self.bounds.next_state * max(1.0, float(example.sigma[i]))
            allowed += example.share(i, answer_error)
            self.next_state |= Worst(state_error, allowed, where)
            before = self.by_knot.get(knot, (0.0, 0.0))
            self.by_knot[knot] = max(before[0], answer_error), max(before[1], state_error)

    def same(self, who: NDArray[np.int64], found: _Found, alone: Mapping[int, _Found]) -> None:
        """Compare the bytes of each sample with those of the sample alone, as far as that was run."""
        for place, i in enumerate(who):
            if i not in alone:
                continue
            pairs = (
                (found.state[place], alone[i].state[0]),
                (found.answer[place], alone[i].answer[0]),
            )
            if not self.unlike and any(a.tobytes() != b.tobytes() for a, b in pairs):
                self.unlike = (
                    f"{self.graph}: at place {place} of a batch of {len(who)}, F differs by "
                    f"{difference(*pairs[1]):.2g} from F of the same sample alone"
                )

    def record(self, guidance: float) -> dict[str, Any]:
        """For the report."""
        by_time = [
            {
                "time": float(self.schedule.time[knot]),
                "sigma": float(self.schedule.sigma[knot]),
                "answer": answer,
                "next_state": next_state,
            }
            for knot, (answer, next_state) in sorted(self.by_knot.items())
        ]
        return {
            "answer": vars(self.answer),
            "next_state": vars(self.next_state),
            "batch_invariant": not self.unlike,
            "unlike_alone": self.unlike,
            "not_finite": self.not_finite,
            "guidance": guidance,
            "by_time": by_time,
        }


def check_steps(
    examples: Examples, backend: Backend, guided: bool, bounds: Bounds, bar: Progress
) -> dict[str, Any]:
    """Compare one graph with PyTorch, and every sample with itself alone, in shuffled batches."""
    plan = examples.plan
    bound = {size: backend.bind(size) for size in {1, *plan.batches}}
    graph = "step_guided.onnx" if guided else "step.onnx"
    steps = _Steps(graph, bounds, examples.bundle.schedule)
    generator = np.random.Generator(np.random.Philox(key=0))
    everyone = np.arange(examples.count)
    for turn in range(len(examples)):
        example = examples.at(turn, guided)
        order = generator.permutation(examples.count)
        # Everyone alone once; then, at every other level, a few.
        some = everyone if turn == 0 else order[:ALONE]
        alone = {int(i): _step(bound[1], example, np.array([i]), guided) for i in some}
        for i, found in alone.items():
            steps.compare(example, np.array([i]), found)
        for batch in plan.batches:
            who = order[:batch]
            found = _step(bound[batch], example, who, guided)
            steps.compare(example, who, found)
            steps.same(who, found, alone)
            bar.advance()
        if turn == 0:
            for size in plan.quantized_sizes if "int8" in backend.precision else plan.sizes:
                who = np.resize(generator.permutation(examples.count), size)
                steps.same(who, _step(backend.bind(size), example, who, guided), alone)
    return steps.record(float(examples.guidances(guided).max()))


def why_unlike(
    bundle: Bundle, backend: Backend, examples: Examples, guided: bool
) -> tuple[Dependency | None, str | None]:
    """Why a sample's bytes depend on its batch: on other samples, or on how a node rounds."""
    example = examples.at(0, guided)
    count = min(BATCH, examples.count)
    buffers = backend.bind(count)

    def network(inputs: Inputs) -> NDArray[np.float32]:
        buffers.state[:] = inputs.x
        buffers.call[:] = example.call[:count]
        buffers.call[:, TIME] = inputs.time
        buffers.update[:], buffers.noise[:] = example.update[:count], example.noise[:count]
        if inputs.label is not None:
            buffers.label[:] = inputs.label
        buffers.step(guided)
        return buffers.denoised.copy()

    def inputs(first: int) -> Inputs:
        who = (np.arange(count) + first) % examples.count
        label = example.label[who] if bundle.labels else None
        return Inputs(example.state[who], example.call[who, TIME].astype(np.float32), label)

    found = neighbours(network, inputs(0), inputs(1))
    if found is not None or backend.name != REFERENCE:
        return found, None
    name = f"{backend.precision}/step{'_guided' if guided else ''}"
    path = bundle.path / f"{name}{PIXELS}.onnx"
    graph = onnx.load(path if path.exists() else bundle.path / f"{name}.onnx")
    feeds = {n: getattr(example, n) for n in ("state", "noise", "label")}
    feeds |= {n: getattr(example, n).astype(np.float32) for n in ("call", "update")}
    taken = {i.name for i in graph.graph.input}
    return None, unsteady_node(graph, {n: v for n, v in feeds.items() if n in taken})


@dataclass(frozen=True)
class Trajectory:
    """One way through the reverse process, the same for PyTorch, the step graph and the loop graph."""

    solver: str
    steps: int
    guidance: float
    options: Mapping[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return f"{self.solver}, {self.steps} steps, guidance {self.guidance:g}"


def trajectories(bundle: Bundle, plan: Plan) -> list[Trajectory]:
    """DDIM, DDPM, guided DDIM, and with its own options the solver that the bundle is sampled with
    by default."""
    steps, default = min(plan.steps, len(bundle.schedule)), bundle.defaults
    options = {"ddim": {}, "ddpm": {}, default.solver: default.options}
    ways = [Trajectory(solver, steps, 1.0, given) for solver, given in options.items()]
    if bundle.labels and bundle.labels.null_trained:
        ways.append(Trajectory("ddim", steps, max(2.0, bundle.defaults.guidance)))
    return ways


def check_trajectory(
    model: Model, sampler: Sampler, way: Trajectory, bound: float, pictures: int = PICTURES
) -> tuple[dict[str, Any], NDArray[Any], NDArray[Any]]:
    """One trajectory: the record, PyTorch's final samples and the step graph's, each [pictures,
    *S]."""
    bundle = sampler.bundle
    program = bundle.program(way.solver, way.steps, guidance=way.guidance, **way.options)
    classes = bundle.num_classes
    label = np.arange(pictures) % classes if classes else None
    start = np.float32(program.start) * np.stack(
        [noise(s, Stream.INITIAL, 0, bundle.sample_shape) for s in range(pictures)]
    )

    def z(k: int) -> NDArray[np.float32]:
        return np.stack([noise(s, Stream.STEP, k, bundle.sample_shape) for s in range(pictures)])

    expected = run(program, torch_network(model), start, z, label=label, null_label=classes)
    labels = label if label is None else label.tolist()
    guidance = way.guidance if classes else None
    found = sampler.sample(
        pictures,
        0,
        label=labels,
        guidance=guidance,
        solver=way.solver,
        steps=way.steps,
        **way.options,
    )
    largest = float(np.abs(expected).max())
    record = {
        "trajectory": str(way),
        "error": difference(found, expected),
        "bound": bound * (max(1.0, largest) if np.isfinite(largest) else 1.0),
        "psnr_db": median_psnr(found[None], expected[None], bundle.sample_range),
    }
    if sampler.backend.name == "onnxruntime":
        looped = run_loop_graph(bundle, sampler.backend.precision, program, start, z, label)
        record["loop_graph"] = difference(looped, found)
    return record, expected, found


def run_loop_graph(
    bundle: Bundle,
    precision: str,
    program: Program,
    x: NDArray[Any],
    z: Callable[[int], NDArray[Any]],
    label: NDArray[np.int64] | None,
) -> NDArray[Any]:
    """The final samples of sampler.onnx, or sampler_guided.onnx where the program is guided: one
    run() for the whole loop."""
    import onnxruntime

    B, K = len(x), len(program)
    noises = np.zeros((K, *x.shape), np.float32)
    for k in np.flatnonzero(program.noisy):
        noises[k] = z(int(k))
    guided = bool((program.call[:, GUIDANCE] != 1).any())
    # By path, as a user of the file alone would: ONNX Runtime takes weights from memory for a main
    # graph only, not for a Loop's body.
    path = bundle.path / precision / ("sampler_guided.onnx" if guided else "sampler.onnx")
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    feeds = {
        "x": x,
        "noise": noises,
        "call": np.repeat(program.call.astype(np.float32)[:, None], B, axis=1),
        "update": np.repeat(program.update.astype(np.float32)[:, None], B, axis=1),
    }
    if label is not None:
        feeds["label"] = label
    return np.asarray(session.run(["sample"], feeds)[0])


def identity_holds(bundle: Bundle, backend: Any) -> bool:
    """Whether an identity row returns every register bit for bit, in every graph."""
    guided = (False, True) if f"{backend.precision}/step_guided.onnx" in bundle.files else (False,)
    for g in guided:
        buffers = backend.bind(3)
        state = (
            np.random.Generator(np.random.Philox(key=0))
            .standard_normal(buffers.state.shape)
            .astype(np.float32)
        )
        buffers.state[:] = state
        buffers.call[:] = (bundle.schedule.time[-1], 1, 0, 0, 1, 1)
        buffers.update[:] = np.eye(R, R + 2)
        buffers.step(g)
        if not np.array_equal(buffers.state, state):
            return False
    return True


def candidates(bundle: Bundle) -> list[Backend]:
    """Every precision of the bundle on every backend that this machine has, the reference first.

    GPU backends are left out: engines are built once the bundle is written (export.engines), and
    tests/runtime/test_gpu.py compares them. ONNX Runtime computes fp16 and int8-trt here in float32
    if its CPU kernels lack them: that proves the graph, not what a GPU rounds.

    Raises:
        ExportError: ONNX Runtime cannot run a graph.
    """
    found: list[Backend] = []
    for precision in bundle.precisions:
        try:
            found.append(OnnxRuntime(bundle, precision, None))
        except BundleError as error:
            reason = str(error).partition("onnxruntime cannot load it: ")[2] or str(error)
            raise ExportError(
                f"{bundle.name}: ONNX Runtime cannot run the {precision} network: {reason}"
            ) from error
    for name, kind in BACKENDS.items():
        if kind.gpu or name == REFERENCE:
            continue
        for precision, folder in kind.folders.items():
            if folder in bundle.precisions:
                try:
                    found.append(kind.open(bundle, precision, None))
                except (BackendError, BundleError) as error:
                    say(f"not checked: {precision} on {name}: {error}")
    return found


def check(
    model: Model,
    bundle: Bundle,
    bounds: Bounds | None = None,
    plan: Plan | None = None,
    made: Mapping[str, Any] | None = None,
    same_bytes: bool = True,
) -> tuple[dict[str, Any], Mapping[str, NDArray[Any]]]:
    """Compare every precision of the bundle, on every backend there is, with the model it came
    from.

    Args:
        bounds: the largest differences that pass.
        plan: how much is compared.
        made: how other precisions were made, which goes into the report.
        same_bytes: whether a sample must have the same bytes in any batch.

    Returns:
        The report, and the images that it shows: "pytorch" and one entry a precision, each
        [plan.pictures, *S].

    Raises:
        ExportError: a difference exceeds its bound; the message names the worst case.
    """
    bounds, plan = bounds or Bounds(), plan or Plan()
    ways, pictures = trajectories(bundle, plan), {}
    report: dict[str, Any] = {
        "bounds": {**vars(bounds), "psnr": dict(bounds.psnr)},
        "plan": {
            **vars(plan),
            "batches": list(plan.batches),
            "ways": [list(way) for way in plan.ways],
        },
        "precisions": {},
        **(made or {}),
    }
    examples = Examples(model, bundle, plan)
    graphs = [g for g in (False, True) if f"fp32/step{'_guided' if g else ''}.onnx" in bundle.files]
    backends = candidates(bundle)
    units = len(backends) * (len(graphs) * len(examples.knots) * len(plan.batches) + len(ways) * 10)
    with Progress("checking", units) as bar:
        for backend in backends:
            sampler = Sampler(bundle, backend)
            entry: dict[str, Any] = {
                "steps": {
                    ("step_guided" if g else "step"): check_steps(examples, backend, g, bounds, bar)
                    for g in graphs
                },
                "trajectories": [],
            }
            for way in ways:
                record, expected, found = check_trajectory(
                    model, sampler, way, bounds.trajectory, plan.pictures
                )
                entry["trajectories"].append(record)
                pictures.setdefault("pytorch", expected)
                pictures.setdefault(backend.precision, found)
                bar.advance(10)
            entry["identity"] = identity_holds(bundle, backend)
            _explain(bundle, backend, examples, entry["steps"])
            report["precisions"].setdefault(backend.precision, {})[backend.name] = entry
    _against_fp32(bundle, backends, plan, report["precisions"])
    refuse_misses(report, same_bytes)
    report["same_bytes"] = all(
        step["batch_invariant"]
        for entries in report["precisions"].values()
        for entry in entries.values()
        for step in entry["steps"].values()
        if not entry["missed"]
    )
    return report, pictures


def _explain(
    bundle: Bundle, backend: Backend, examples: Examples, steps: Mapping[str, dict[str, Any]]
) -> None:
    """Add to each graph whose samples depend on their batch what they depend on."""
    for name, step in steps.items():
        if not step["batch_invariant"]:
            dependency, node = why_unlike(bundle, backend, examples, name == "step_guided")
            step["mixes_samples"] = dependency is not None
            if dependency is not None:
                step["unlike_alone"] += f"; {dependency}"
            elif node:
                step["unlike_alone"] += f"; the first node that rounds otherwise there is {node}"


def _against_fp32(
    bundle: Bundle, backends: list[Backend], plan: Plan, entries: Mapping[str, Any]
) -> None:
    """Add to every entry the PSNR of its final pictures against fp32's of ONNX Runtime, and the
    time of a call."""
    n, classes, knots = plan.judged, bundle.num_classes, len(bundle.schedule)
    label = [i % classes for i in range(n)] if classes else None
    expected = {}
    for backend in backends:
        entry, sampler = entries[backend.precision][backend.name], Sampler(bundle, backend)
        entry["psnr_db"] = {}
        for solver, steps in plan.ways:
            found = sampler.sample(
                n,
                500,
                label=label,
                guidance=1.0 if label else None,
                solver=solver,
                steps=min(steps, knots),
            )
            reference = expected.setdefault((solver, steps), found)
            entry["psnr_db"][f"{solver}, {steps} steps"] = median_psnr(
                found, reference, bundle.sample_range
            )
        entry["ms_a_call"] = {
            str(batch): _milliseconds(backend.bind(batch)) for batch in (1, max(plan.batches))
        }


def _milliseconds(buffers: Buffers, calls: int = 7) -> float:
    """Median time of one call of the plain step graph."""
    buffers.step(False)
    spent = []
    for _ in range(calls):
        begun = time.perf_counter()
        buffers.step(False)
        spent.append(time.perf_counter() - begun)
    return 1e3 * statistics.median(spent)


def refuse_misses(report: Mapping[str, Any], same_bytes: bool = True) -> None:
    """Note in every entry what it missed.

    Raises:
        ExportError: the reference backend, ONNX Runtime, missed something.
    """
    failures = [f"fp16: {miss}" for miss in report.get("headroom", {}).get("beyond", ())]
    only_bytes = not failures
    for precision, entries in report["precisions"].items():
        for backend, entry in entries.items():
            found = _misses_of_any(entry)
            if precision == "fp32":
                found += _misses_of_fp32(entry)
            else:
                found += _misses(entry, report["bounds"]["psnr"][precision])
            unlike = _unlike(entry, same_bytes)
            entry["missed"] = found + unlike
            lines = [f"{precision} on {backend}: {miss}" for miss in entry["missed"]]
            if backend == REFERENCE:
                failures += lines
                only_bytes = only_bytes and not found and not _mixes(entry)
            else:
                for line in lines:
                    say(f"not offered: {line}")
    if failures:
        remedy = f"\n{NO_SAME_BYTES}" if only_bytes else ""
        what = "cannot keep the same bytes" if only_bytes else "does not agree with PyTorch"
        raise ExportError(
            f"the export {what}, and nothing was written:\n  " + "\n  ".join(failures) + remedy
        )


NO_SAME_BYTES = (
    "The network treats samples alike; the inference library rounds them differently. If you can "
    "do "
    "without the same bytes for a seed in any batch, export with --no-same-bytes "
    "(same_bytes=False): the bundle then declares same_bytes: false."
)


def _unlike(entry: Mapping[str, Any], same_bytes: bool) -> list[str]:
    """Where a sample's bytes depend on its batch, unless that is allowed."""
    return [
        f"a sample's bytes depend on the batch it stands in: {step['unlike_alone']}"
        for step in entry["steps"].values()
        if not step["batch_invariant"] and (same_bytes or step.get("mixes_samples"))
    ]


def _mixes(entry: Mapping[str, Any]) -> bool:
    return any(step.get("mixes_samples") for step in entry["steps"].values())


def _misses_of_fp32(entry: Mapping[str, Any]) -> list[str]:
    misses = []
    for kind in ("answer", "next_state"):
        for found in (step[kind] for step in entry["steps"].values()):
            if not found["error"] <= found["bound"]:
                misses.append(
                    f"{kind}: {found['error']:.3g} > {found['bound']:.3g} at {found['where']}"
                )
    for t in entry["trajectories"]:
        for kind in ("error", "loop_graph"):
            if kind in t and not t[kind] <= t["bound"]:
                misses.append(
                    f"{kind} of the trajectory {t['trajectory']}: {t[kind]:.3g} > {t['bound']:.3g}"
                )
    return misses


def _misses(entry: Mapping[str, Any], least: float) -> list[str]:
    worst = {name: found for name, found in entry["psnr_db"].items() if not found >= least}
    return [
        f"final pictures {found:.1f} dB from fp32's, {least:g} needed ({name})"
        for name, found in worst.items()
    ]


def _misses_of_any(entry: Mapping[str, Any]) -> list[str]:
    misses = []
    if not entry["identity"]:
        misses.append("an identity row changes the state")
    lost = sum(step["not_finite"] for step in entry["steps"].values())
    if lost:
        misses.append(f"{lost} values of F are not finite")
    return misses


def headroom(step: ModelProto, bundle: Bundle, calibration: Calibration) -> dict[str, Any]:
    """How near the network's float32 values come to float16's largest, along trajectories: share of
    65504, the nearest first."""
    largest: dict[str, float] = {}
    made = {output: node.name for node in step.graph.node for output in node.output}

    def see(name: str, value: NDArray[np.float32]) -> None:
        largest[name] = max(largest.get(name, 0.0), float(np.abs(value).max()))

    observe(step, bundle, list(tensors(step)), calibration, see)
    shares = sorted(((value / 65504, made[name]) for name, value in largest.items()), reverse=True)
    return {
        "tensors": len(shares),
        "nearest": {name: found for found, name in shares[:10]},
        "beyond": [
            f"{name} reaches {found:.2g} of float16's largest value"
            for found, name in shares
            if not found < 1
        ],
    }


def summary(report: Mapping[str, Any]) -> dict[str, Any]:
    """The report in a few numbers, by precision and backend: the worst case of each kind, and the
    least PSNR against fp32."""

    def worst(entry: Mapping[str, Any]) -> dict[str, Any]:
        steps = entry["steps"].values()
        return {
            "answer": max(s["answer"]["error"] for s in steps),
            "next_state": max(s["next_state"]["error"] for s in steps),
            "trajectory": max(t["error"] for t in entry["trajectories"]),
            "psnr_db": min(entry["psnr_db"].values()),
            "ms_a_call": entry["ms_a_call"],
            "missed": len(entry["missed"]),
        }

    return {
        precision: {backend: worst(entry) for backend, entry in entries.items()}
        for precision, entries in report["precisions"].items()
    }
