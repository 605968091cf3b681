"""Whole trajectories: PyTorch, the step graph and the loop graph from the same noise."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from runtime.backends.base import Buffers
from runtime.backends.memory import is_heavy
from runtime.bundle.bundle import Bundle
from runtime.bundle.conditions import LABEL
from runtime.bundle.format import sampler_file
from runtime.diffusion.arrays import Array
from runtime.diffusion.noise import Stream, noise
from runtime.diffusion.program import GUIDANCE, Program, run
from runtime.sampler import Sampler

from ..graph.sensitivity import median_psnr
from ..sources.model import Model, steps_of, ways_of
from .plan import Plan
from .report import TrajectoryCheck
from .steps import difference

FIRST_JUDGED = 500
"""The first seed of the images by which precisions are compared with fp32."""
TIMED_CALLS = 7
TIMED_S = 2.0
"""Calls are timed so many times, or until so many seconds have passed."""

Float32 = NDArray[np.float32]


@dataclass(frozen=True)
class Trajectory:
    """One run of a solver, the same for PyTorch, the step graph and the loop graph."""

    solver: str
    steps: int
    guidance: float
    options: Mapping[str, Any] = field(default_factory=dict)

    def program(self, bundle: Bundle) -> Program:
        """Return the program that it runs."""
        given = {"guidance": self.guidance, **self.options}
        return bundle.program(self.solver, self.steps, **given)

    def __str__(self) -> str:
        return f"{self.solver}, {self.steps} steps, guidance {self.guidance:g}"


def trajectories(bundle: Bundle, plan: Plan) -> list[Trajectory]:
    """Return DDIM, DDPM, the default solver with its own options, and guided DDIM.

    A network that was distilled also runs its own solver with each number of steps.
    """
    # DDIM adds up errors without noise to hide them; DDPM checks the noise itself.
    steps = steps_of(bundle, plan.steps)
    default = bundle.defaults
    options = {"ddim": {}, "ddpm": {}, default.solver: default.options}
    runs = [Trajectory(solver, steps, 1.0, given) for solver, given in options.items()]
    if bundle.distilled:
        fewer = [count for count in sorted(bundle.distilled.levels) if count != steps]
        runs += [Trajectory(default.solver, count, 1.0, default.options) for count in fewer]
    if bundle.can_guide:
        runs.append(Trajectory("ddim", steps, max(2.0, default.guidance)))
    return runs


@dataclass(frozen=True, eq=False)
class Compared:
    """A trajectory's check, and the final samples [n, *S] of PyTorch and of the step graph."""

    check: TrajectoryCheck
    expected: Float32
    samples: Float32


def check_trajectory(
    model: Model,
    sampler: Sampler,
    trajectory: Trajectory,
    bound: float,
    expected: Float32,
) -> Compared:
    """Compare the final samples of the seeds 0 … n-1 with PyTorch's.

    Args:
        bound: The largest difference that passes, see `Bounds.trajectory`.
        expected: PyTorch's samples [n, *S], see `by_pytorch`.
    """
    count = len(expected)
    bundle = sampler.bundle
    given = _given(model, bundle, trajectory, count)
    labels = None if given.label is None else given.label.tolist()
    # The same start and the same noise on both sides: what differs is rounding.
    samples = sampler.sample(
        count,
        0,
        label=labels,
        conditions=given.conditions,
        guidance=trajectory.guidance,
        solver=trajectory.solver,
        steps=trajectory.steps,
        **trajectory.options,
    )
    # Unclipped samples may be larger than the data, and so may their rounding errors.
    largest = float(np.abs(expected).max())
    check = TrajectoryCheck(
        trajectory=str(trajectory),
        error=difference(samples, expected),
        bound=bound * (max(1.0, largest) if np.isfinite(largest) else 1.0),
        psnr_db=median_psnr(samples[None], expected[None], bundle.sample_range),
    )
    return Compared(check, expected, samples)


@dataclass(frozen=True, eq=False)
class _Given:
    """What a trajectory starts from, see `run_loop_graph`."""

    program: Program
    x: Float32
    z: Callable[[int], Float32]
    label: NDArray[np.int64] | None
    conditions: Mapping[str, Array]


def _given(model: Model, bundle: Bundle, trajectory: Trajectory, count: int) -> _Given:
    program = trajectory.program(bundle)
    classes = bundle.num_classes
    seeds = range(count)
    shape = bundle.sample_shape
    start = np.stack([noise(seed, Stream.INITIAL, 0, shape) for seed in seeds])

    def z(k: int) -> Float32:
        return np.stack([noise(seed, Stream.STEP, k, shape) for seed in seeds])

    return _Given(
        program,
        np.float32(program.start) * start,
        z,
        np.arange(count) % classes if classes else None,
        model.draw_conditions(count),
    )


def by_pytorch(model: Model, bundle: Bundle, runs: list[Trajectory], count: int) -> list[Float32]:
    """Return the module's samples [count, *S] of each trajectory."""
    found: list[Float32] = []
    for trajectory in runs:
        given = _given(model, bundle, trajectory, count)
        found.append(
            run(
                given.program,
                model.reference(),
                given.x,
                given.z,
                label=given.label,
                null_label=model.null_label,
                conditions=given.conditions,
                null_conditions=model.null_conditions(),
            )
        )
    return found


def with_loop_graphs(
    model: Model, bundle: Bundle, precision: str, runs: list[Trajectory], compared: list[Compared]
) -> list[Compared]:
    """Return compared trajectories with the loop graph's differences from their samples.

    A loop graph holds the weights too, so this comes when the step graph is closed.
    """
    found: list[Compared] = []
    for trajectory, one in zip(runs, compared, strict=True):
        given = _given(model, bundle, trajectory, len(one.samples))
        looped = run_loop_graph(
            bundle, precision, given.program, given.x, given.z, given.label, given.conditions
        )
        check = replace(one.check, loop_graph=difference(looped, one.samples))
        found.append(replace(one, check=check))
    return found


def run_loop_graph(
    bundle: Bundle,
    precision: str,
    program: Program,
    x: Float32,
    z: Callable[[int], Float32],
    label: NDArray[np.int64] | None,
    conditions: Mapping[str, Array] | None = None,
) -> Float32:
    """Run the loop graph that the program needs, plain or guided, in one call.

    Args:
        x: [B, *S], the state before the first row.
        z: The noise [B, *S] of a row.
        label: [B]; None for a model without labels.
        conditions: [B, …] each, by name.

    Returns:
        The final samples [B, *S].
    """
    batch = len(x)
    # Rows without fresh noise multiply theirs by zero, so it need not be drawn.
    noises = np.zeros((len(program), *x.shape), np.float32)
    for k in np.flatnonzero(program.noisy):
        noises[k] = z(int(k))
    guided = bool((program.call[:, GUIDANCE] != 1).any())
    # By path, as a user of the file alone would: ONNX Runtime takes weights from memory for a main
    # graph only, not for a Loop's body.
    path = bundle.path / precision / sampler_file(guided)
    options = onnxruntime.SessionOptions()
    options.enable_mem_pattern = not is_heavy(bundle, precision)
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    feeds: dict[str, NDArray[np.generic]] = {
        "x": x,
        "noise": noises,
        "call": np.repeat(program.call.astype(np.float32)[:, None], batch, axis=1),
        "update": np.repeat(program.update.astype(np.float32)[:, None], batch, axis=1),
    }
    feeds |= {c.port: (conditions or {})[c.name] for c in bundle.conditions}
    if label is not None:
        feeds[LABEL] = label
    return np.asarray(session.run(["sample"], feeds)[0])


def judged_images(model: Model, sampler: Sampler, plan: Plan) -> dict[str, Float32]:
    """Return the images [plan.judged, *S] by which precisions are compared, by solver and steps."""
    classes = sampler.bundle.num_classes
    label = [i % classes for i in range(plan.judged)] if classes else None
    return {
        f"{solver}, {steps} steps": sampler.sample(
            plan.judged,
            FIRST_JUDGED,
            label=label,
            conditions=model.draw_conditions(plan.judged, FIRST_JUDGED),
            guidance=1.0,
            solver=solver,
            steps=steps,
        )
        for solver, steps in ways_of(sampler.bundle, plan.ways)
    }


def milliseconds(buffers: Buffers) -> float:
    """Return the median time of one call of the plain step graph."""
    # The first call allocates and tunes.
    buffers.step(False)
    spent: list[float] = []
    while len(spent) < TIMED_CALLS and sum(spent) < TIMED_S:
        begun = time.perf_counter()
        buffers.step(False)
        spent.append(time.perf_counter() - begun)
    return 1e3 * statistics.median(spent)
