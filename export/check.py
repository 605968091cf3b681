"""The proof: PyTorch against what was exported, step by step across the whole schedule, then over whole trajectories."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from onnx import ModelProto

from runtime.backends import BACKENDS, Backend, Buffers
from runtime.backends.onnxruntime import OnnxRuntime
from runtime.bundle import Bundle
from runtime.errors import BackendError
from runtime.noise import Stream, noise
from runtime.program import C_IN, C_OUT, C_SKIP, CLIP, GUIDANCE, TIME, D, Program, R, run
from runtime.progress import Progress
from runtime.sampler import Sampler

from .calibrate import Calibration, median_psnr, observe
from .errors import ExportError
from .model import Model
from .precision import tensors

BATCHES = (1, 3, 16)
TIMES = 13
PICTURES = 3
"""Samples a trajectory."""
STEPS = 50
"""Grid intervals a trajectory."""
ROUNDING = 4 * 2.0**-24
"""float32's, relative, of the four factors in c_skip·x + c_out·F."""


@dataclass(frozen=True)
class Plan:
    """How much is compared. batches: sizes, each at `times` levels across the schedule; pictures, steps: of every trajectory.

    samples: how many the model card shows. judged, ways: pictures, and (solver, steps), that
    another precision is held against fp32 by. Raises ExportError for numbers below 1.
    """

    batches: tuple[int, ...] = BATCHES
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


QUICK = Plan(batches=(1, 3), times=5, pictures=1, steps=10, samples=4, judged=2, ways=(("dpmpp_2m", 10), ("ddim", 10)))
"""For large networks: about a twentieth of the work."""


@dataclass(frozen=True)
class Bounds:
    """The largest differences that pass, of values whose data has the range -1 … 1.

    answer: of the network's F. next_state: times max(1, sigma), beyond what the difference and the rounding of F come to there,
    which the row multiplies by up to sigma/alpha. trajectory: of the final samples, times the largest of PyTorch's where that is
    above 1, which unclipped samples may be. These hold for fp32. psnr: the least median, dB, of final pictures in another precision
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
            return model.module(*(torch.from_numpy(np.ascontiguousarray(i)) for i in inputs)).numpy()

    return network


@dataclass(frozen=True)
class _Example:
    """Inputs of one row for the largest batch, and PyTorch's answer: F and next_state in float32."""

    time: float
    sigma: float
    state: NDArray[np.float32]
    noise: NDArray[np.float32]
    label: NDArray[np.int64]
    program: Program
    answer: NDArray[Any]
    next_state: NDArray[np.float32]

    def share(self, answer_error: float) -> float:
        """What a difference of F, and rounding it and x to float32, come to in next_state: the row multiplies them by its gain.

        Zero where that is not finite, so that no bound is.
        """
        call, M = self.program.call[0], self.program.update[0]
        gain = abs(M[0, D] * call[C_OUT])
        largest = max(np.abs(self.answer).max(), np.abs(self.state[:, 0]).max())
        found = float(gain * (answer_error + ROUNDING * largest))
        return found if np.isfinite(found) else 0.0


class Examples:
    """Rows across the whole schedule on the model's own pictures, noised; both graphs are held against the same ones."""

    def __init__(self, model: Model, bundle: Bundle, plan: Plan) -> None:
        self.model, self.bundle, self.network, self.plan = model, bundle, torch_network(model), plan
        self.count = max(plan.batches)
        self.clean = self._pictures()
        T = len(bundle.schedule)
        self.knots = np.unique(np.round(np.linspace(T - 1, 0, plan.times)).astype(int))

    def labels(self) -> NDArray[np.int64]:
        """Every label in turn, the null label first."""
        classes = self.bundle.num_classes
        null = bool(self.bundle.labels and self.bundle.labels.null_trained)
        order = np.r_[[classes] if null else [], np.arange(classes)] if classes else np.zeros(1)
        return np.resize(order, self.count).astype(np.int64)

    def draw(self, stream: Stream, step: int) -> NDArray[np.float32]:
        return np.stack([noise(seed, stream, step, self.bundle.sample_shape) for seed in range(self.count)])

    def _pictures(self) -> NDArray[np.float32]:
        program = self.bundle.program("ddim", min(10, self.plan.steps, len(self.bundle.schedule)))
        found = run(
            program,
            self.network,
            np.float32(program.start) * self.draw(Stream.INITIAL, 0),
            label=self.labels() if self.bundle.labels else None,
        )
        # Without a clip an untrained network's reach sigma/alpha: what it is for, and what the bounds are for, is the data's range.
        low, high = self.bundle.sample_range
        return np.clip(found, low, high)

    def answer(self, x: NDArray[np.float32], time: float, guidance: float) -> NDArray[Any]:
        """PyTorch's F, guided where guidance is not 1."""
        times, label = np.full(len(x), time, np.float32), self.labels()
        F = self.network(x, times, label) if self.bundle.labels else self.network(x, times)
        if guidance == 1:
            return F
        return F + np.float32(guidance - 1) * (F - self.network(x, times, np.full_like(label, self.bundle.num_classes)))

    def at(self, knot: int, guidance: float) -> _Example:
        """One ancestral row from this knot to the one halfway down, or to the clean end."""
        schedule, eps = self.bundle.schedule, self.draw(Stream.ENCODE, knot)
        times = [schedule.time[knot]] + ([schedule.time[knot // 2]] if knot else [])
        program = self.bundle.program("ddim", grid=times, guidance=guidance, eta=1.0)
        call, M = program.call[0], program.update[0]
        state = np.zeros((self.count, R, *self.bundle.sample_shape), np.float32)
        state[:, 0] = schedule.alpha[knot] * self.clean + schedule.sigma[knot] * eps
        z = self.draw(Stream.STEP, knot)
        F = self.answer(np.float32(call[C_IN]) * state[:, 0], call[TIME], guidance)
        denoised = np.clip(call[C_SKIP] * state[:, 0] + call[C_OUT] * F.astype(np.float64), -call[CLIP], call[CLIP])
        known = np.concatenate([state.astype(np.float64), denoised[:, None], z[:, None]], axis=1)
        next_state = np.einsum("rs,bs...->br...", M, known)
        return _Example(
            schedule.time[knot],
            schedule.sigma[knot],
            state,
            z,
            self.labels(),
            program,
            F,
            next_state.astype(np.float32),
        )


def _step(
    buffers: Buffers, example: _Example, guided: bool, only_answer: bool
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """(next_state, denoised) of the exported graph on the first samples of an example. only_answer: read as D = F."""
    batch = len(buffers.label)
    buffers.state[:], buffers.noise[:], buffers.label[:] = (
        example.state[:batch],
        example.noise[:batch],
        example.label[:batch],
    )
    buffers.call[:], buffers.update[:] = example.program.call[0], example.program.update[0]
    if only_answer:
        buffers.call[:, [C_SKIP, C_OUT, CLIP]] = 0, 1, np.inf
    buffers.step(guided)
    return buffers.state.copy(), buffers.denoised.copy()


def check_steps(examples: Examples, backend: Any, guided: bool, bounds: Bounds, bar: Progress) -> dict[str, Any]:
    """One graph against PyTorch at every example, every batch size. Also whether a sample's bytes depend on its batch."""
    guidance = max(2.0, examples.bundle.defaults.guidance) if guided else 1.0
    graph = "step_guided.onnx" if guided else "step.onnx"
    bound = {batch: backend.bind(batch) for batch in examples.plan.batches}
    worst_answer, worst_state, invariant, not_finite, by_time = NONE, NONE, True, 0, []
    for knot in examples.knots:
        example = examples.at(int(knot), guidance)
        errors, first = [], []
        for batch in examples.plan.batches:
            where = f"{graph}, time {example.time:g}, batch {batch}"
            state, _ = _step(bound[batch], example, guided, only_answer=False)
            _, answer = _step(bound[batch], example, guided, only_answer=True)
            state_error, answer_error = (
                difference(state, example.next_state[:batch]),
                difference(answer, example.answer[:batch]),
            )
            worst_answer |= Worst(answer_error, bounds.answer, where)
            allowed = bounds.next_state * max(1.0, example.sigma) + example.share(answer_error)
            worst_state |= Worst(state_error, allowed, where)
            not_finite += int((~np.isfinite(answer)).sum())
            errors.append((answer_error, state_error))
            first.append(state[:1].tobytes() + answer[:1].tobytes())
            bar.advance()
        invariant &= len(set(first)) == 1
        answer_error, state_error = np.max(errors, axis=0)
        row = {"time": example.time, "sigma": example.sigma, "answer": answer_error, "next_state": state_error}
        by_time.append({name: float(value) for name, value in row.items()})
    return {
        "answer": vars(worst_answer),
        "next_state": vars(worst_state),
        "batch_invariant": invariant,
        "not_finite": not_finite,
        "guidance": guidance,
        "by_time": by_time,
    }


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
    """DDIM, DDPM, guided DDIM, and with its own options the solver that the bundle is sampled with by default."""
    steps, default = min(plan.steps, len(bundle.schedule)), bundle.defaults
    options = {"ddim": {}, "ddpm": {}, default.solver: default.options}
    ways = [Trajectory(solver, steps, 1.0, given) for solver, given in options.items()]
    if bundle.labels and bundle.labels.null_trained:
        ways.append(Trajectory("ddim", steps, max(2.0, bundle.defaults.guidance)))
    return ways


def check_trajectory(
    model: Model, sampler: Sampler, way: Trajectory, bound: float, pictures: int = PICTURES
) -> tuple[dict[str, Any], NDArray[Any], NDArray[Any]]:
    """One trajectory: the record, PyTorch's final samples and the step graph's, each [pictures, *S]."""
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
        pictures, 0, label=labels, guidance=guidance, solver=way.solver, steps=way.steps, **way.options
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
    """The final samples of sampler.onnx, or sampler_guided.onnx where the program is guided: one run() for the whole loop."""
    import onnxruntime

    B, K = len(x), len(program)
    noises = np.zeros((K, *x.shape), np.float32)
    for k in np.flatnonzero(program.noisy):
        noises[k] = z(int(k))
    guided = bool((program.call[:, GUIDANCE] != 1).any())
    # By path, as a user of the file alone would: ONNX Runtime takes weights from memory for a main graph only, not for a Loop's body.
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
        state = np.random.Generator(np.random.Philox(key=0)).standard_normal(buffers.state.shape).astype(np.float32)
        buffers.state[:] = state
        buffers.call[:] = (bundle.schedule.time[-1], 1, 0, 0, 1, 1)
        buffers.update[:] = np.eye(R, R + 2)
        buffers.step(g)
        if not np.array_equal(buffers.state, state):
            return False
    return True


def candidates(bundle: Bundle) -> list[Backend]:
    """Every precision of the bundle on every backend that this machine has, fp32 on ONNX Runtime first.

    GPU backends are left out: engines are built once the bundle is written (export.engines), and tests/runtime/test_gpu.py holds them against this.
    ONNX Runtime computes fp16 and int8-trt here in float32 where its CPU kernels lack them: that proves the graph, not what a GPU rounds.
    """
    found: list[Backend] = [OnnxRuntime(bundle, precision, None) for precision in bundle.precisions]
    for name, kind in ((name, kind) for name, kind in BACKENDS.items() if not kind.gpu):
        for precision in (
            p for p, folder in kind.folders.items() if name != "onnxruntime" and folder in bundle.precisions
        ):
            try:
                found.append(kind.open(bundle, precision, None))
            except BackendError as error:
                print(f"not checked: {precision} on {name}: {error}")
    return found


def check(
    model: Model,
    bundle: Bundle,
    bounds: Bounds | None = None,
    plan: Plan | None = None,
    made: Mapping[str, Any] | None = None,
) -> tuple[dict[str, Any], Mapping[str, NDArray[Any]]]:
    """Hold every precision of the bundle, on every backend there is, against the model it came from.

    made: how other precisions were made, which goes into the report.
    Returns the report and the pictures that it shows: "pytorch" and one entry a precision, each [plan.pictures, *S].
    Raises ExportError with the worst case where a bound is missed.
    """
    bounds, plan = bounds or Bounds(), plan or Plan()
    ways, pictures = trajectories(bundle, plan), {}
    report: dict[str, Any] = {
        "bounds": {**vars(bounds), "psnr": dict(bounds.psnr)},
        "plan": {**vars(plan), "batches": list(plan.batches), "ways": [list(way) for way in plan.ways]},
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
                    ("step_guided" if g else "step"): check_steps(examples, backend, g, bounds, bar) for g in graphs
                },
                "trajectories": [],
            }
            for way in ways:
                record, expected, found = check_trajectory(model, sampler, way, bounds.trajectory, plan.pictures)
                entry["trajectories"].append(record)
                pictures.setdefault("pytorch", expected)
                pictures.setdefault(backend.precision, found)
                bar.advance(10)
            entry["identity"] = identity_holds(bundle, backend)
            report["precisions"].setdefault(backend.precision, {})[backend.name] = entry
    _against_fp32(bundle, backends, plan, report["precisions"])
    refuse_misses(report)
    return report, pictures


def _against_fp32(bundle: Bundle, backends: list[Backend], plan: Plan, entries: Mapping[str, Any]) -> None:
    """Add to every entry the PSNR of its final pictures against fp32's of ONNX Runtime, and the time of a call."""
    n, classes, knots = plan.judged, bundle.num_classes, len(bundle.schedule)
    label = [i % classes for i in range(n)] if classes else None
    expected = {}
    for backend in backends:
        entry, sampler = entries[backend.precision][backend.name], Sampler(bundle, backend)
        entry["psnr_db"] = {}
        for solver, steps in plan.ways:
            found = sampler.sample(
                n, 500, label=label, guidance=1.0 if label else None, solver=solver, steps=min(steps, knots)
            )
            reference = expected.setdefault((solver, steps), found)
            entry["psnr_db"][f"{solver}, {steps} steps"] = median_psnr(found, reference, bundle.sample_range)
        entry["ms_a_call"] = {str(batch): _milliseconds(backend.bind(batch)) for batch in (1, max(plan.batches))}


def _milliseconds(buffers: Buffers, calls: int = 7) -> float:
    """Median time of one call of the plain step graph."""
    buffers.step(False)
    spent = []
    for _ in range(calls):
        begun = time.perf_counter()
        buffers.step(False)
        spent.append(time.perf_counter() - begun)
    return 1e3 * statistics.median(spent)


REFERENCE = "onnxruntime"
"""The backend whose misses fail the build. Where another one misses, it is not offered the precision, and the report says why."""


def refuse_misses(report: Mapping[str, Any]) -> None:
    """Note in every entry what it missed; raise ExportError with what ONNX Runtime did."""
    failures = [f"fp16: {miss}" for miss in report.get("headroom", {}).get("beyond", ())]
    for precision, entries in report["precisions"].items():
        for backend, entry in entries.items():
            found = (
                _misses_of_fp32(entry) if precision == "fp32" else _misses(entry, report["bounds"]["psnr"][precision])
            )
            entry["missed"] = found + _misses_of_any(entry)
            lines = [f"{precision} on {backend}: {miss}" for miss in entry["missed"]]
            if backend == REFERENCE:
                failures += lines
            else:
                for line in lines:
                    print(f"not offered: {line}")
    if failures:
        raise ExportError(
            "the export does not agree with PyTorch, and nothing was written:\n  " + "\n  ".join(failures)
        )


def _misses_of_fp32(entry: Mapping[str, Any]) -> list[str]:
    misses = []
    for kind in ("answer", "next_state"):
        for found in (step[kind] for step in entry["steps"].values()):
            if not found["error"] <= found["bound"]:
                misses.append(f"{kind}: {found['error']:.3g} > {found['bound']:.3g} at {found['where']}")
    for t in entry["trajectories"]:
        for kind in ("error", "loop_graph"):
            if kind in t and not t[kind] <= t["bound"]:
                misses.append(f"{kind} of the trajectory {t['trajectory']}: {t[kind]:.3g} > {t['bound']:.3g}")
    return misses


def _misses(entry: Mapping[str, Any], least: float) -> list[str]:
    worst = {name: found for name, found in entry["psnr_db"].items() if not found >= least}
    return [f"final pictures {found:.1f} dB from fp32's, {least:g} needed ({name})" for name, found in worst.items()]


def _misses_of_any(entry: Mapping[str, Any]) -> list[str]:
    misses = []
    if not all(step["batch_invariant"] for step in entry["steps"].values()):
        misses.append("a sample's bytes depend on the batch it stands in")
    if not entry["identity"]:
        misses.append("an identity row changes the state")
    lost = sum(step["not_finite"] for step in entry["steps"].values())
    if lost:
        misses.append(f"{lost} values of F are not finite")
    return misses


def headroom(step: ModelProto, bundle: Bundle, calibration: Calibration) -> dict[str, Any]:
    """How near the network's float32 values come to float16's largest, along trajectories: share of 65504, the nearest first."""
    largest: dict[str, float] = {}
    made = {output: node.name for node in step.graph.node for output in node.output}

    def see(name: str, value: NDArray[np.float32]) -> None:
        largest[name] = max(largest.get(name, 0.0), float(np.abs(value).max()))

    observe(step, bundle, list(tensors(step)), calibration, see)
    shares = sorted(((value / 65504, made[name]) for name, value in largest.items()), reverse=True)
    return {
        "tensors": len(shares),
        "nearest": {name: found for found, name in shares[:10]},
        "beyond": [f"{name} reaches {found:.2g} of float16's largest value" for found, name in shares if not found < 1],
    }


def summary(report: Mapping[str, Any]) -> dict[str, Any]:
    """The report in a few numbers, by precision and backend: the worst case of each kind, and the least PSNR against fp32."""

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
