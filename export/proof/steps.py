"""One step graph compared with PyTorch at every level, and each sample with itself in other
batches."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace

import numpy as np
import onnx
from numpy.typing import NDArray

from runtime.backends.base import Backend, Buffers
from runtime.backends.streams import StreamBuffers, fixed
from runtime.bundle.bundle import Bundle
from runtime.bundle.conditions import PREFIX
from runtime.bundle.format import inside, step_file
from runtime.diffusion.program import C_OUT, C_SKIP, CLIP, TIME, R
from runtime.diffusion.schedule import Schedule
from runtime.engine.probe import HEAVY_S
from runtime.terminal.progress import Progress

from .examples import Example, Examples
from .independence import BATCH, Dependency, Inputs, neighbours, unsteady_node
from .plan import Bounds
from .report import NONE, LevelError, StepCheck, Worst
from .verdict import REFERENCE

ALONE = 3
"""Samples of a batch that are also run alone, except at the first level, where all are."""
PORTS = ("state", "noise", "label", "call", "update")


@dataclass(frozen=True, eq=False)
class Output:
    """What a graph computes for b samples: the registers [b, R, *S], and F [b, *S]."""

    state: NDArray[np.float32]
    answer: NDArray[np.float32]


def difference(a: NDArray[np.floating], b: NDArray[np.floating]) -> float:
    """Return the largest |a - b| of arrays of one shape; NaN if either is not finite."""
    return float(np.abs(a.astype(np.float64) - b.astype(np.float64)).max())


def graphs_of(bundle: Bundle) -> list[bool]:
    """Return which step graphs each precision has: False for the plain one, True for the guided."""
    return [guided for guided in (False, True) if inside("fp32", step_file(guided)) in bundle.files]


@dataclass
class _Comparison:
    """The findings about one graph so far."""

    graph: str
    bounds: Bounds
    schedule: Schedule
    answer: Worst = NONE
    next_state: Worst = NONE
    not_finite: int = 0
    by_knot: dict[int, tuple[float, float]] = field(default_factory=dict)
    unlike: str = ""

    def compare(self, example: Example, who: NDArray[np.int64], output: Output) -> None:
        """Compare each of the samples `who` [b] with PyTorch's result."""
        self.not_finite += int((~np.isfinite(output.answer)).sum())
        for place, i in enumerate(who):
            knot = int(example.knots[i])
            where = f"{self.graph}, time {self.schedule.time[knot]:g}, batch {len(who)}"
            answer_error = difference(output.answer[place], example.answer[i])
            state_error = difference(output.state[place], example.next_state[i])
            self.answer |= Worst(answer_error, self.bounds.answer, where)
            allowed = self.bounds.next_state * max(1.0, float(example.sigma[i]))
            # The part that no float32 program avoids: F's own difference, as the row multiplies it.
            allowed += example.share(int(i), answer_error)
            self.next_state |= Worst(state_error, allowed, where)
            answer, state = self.by_knot.get(knot, (0.0, 0.0))
            self.by_knot[knot] = (max(answer, answer_error), max(state, state_error))

    def same(
        self,
        who: NDArray[np.int64],
        output: Output,
        alone: Mapping[int, Output],
        streams: int = 1,
    ) -> None:
        """Compare the bytes of each sample with those of the sample alone, if that was run."""
        for place, i in enumerate(who):
            if self.unlike or i not in alone:
                continue
            lone = alone[i]
            same_state = output.state[place].tobytes() == lone.state[0].tobytes()
            same_answer = output.answer[place].tobytes() == lone.answer[0].tobytes()
            if not (same_state and same_answer):
                change = difference(output.answer[place], lone.answer[0])
                cut = f" in {streams} streams" if streams > 1 else ""
                self.unlike = (
                    f"{self.graph}: at place {place} of a batch of {len(who)}{cut}, F differs by "
                    f"{change:.2g} from F of the same sample alone"
                )

    def result(self, guidance: float) -> StepCheck:
        """Return the findings in the form of the report."""
        levels = [
            LevelError(
                float(self.schedule.time[knot]), float(self.schedule.sigma[knot]), answer, state
            )
            for knot, (answer, state) in sorted(self.by_knot.items())
        ]
        return StepCheck(
            answer=self.answer,
            next_state=self.next_state,
            not_finite=self.not_finite,
            guidance=guidance,
            by_time=tuple(levels),
            unlike_alone=self.unlike,
        )


def check_steps(
    examples: Examples, backend: Backend, guided: bool, bounds: Bounds, bar: Progress
) -> StepCheck:
    """Compare one graph with PyTorch, and every sample with itself alone, in shuffled batches."""
    plan = examples.plan
    buffers = {size: backend.bind(size) for size in {1, *plan.batches}}
    comparison = _Comparison(step_file(guided), bounds, examples.bundle.schedule)
    generator = np.random.Generator(np.random.Philox(key=0))
    everyone = np.arange(examples.count)
    for turn in range(len(examples)):
        example = examples.at(turn, guided)
        order = generator.permutation(examples.count)
        # Batches of one are slow: all samples run alone at the first level, then a few.
        lone = everyone if turn == 0 else order[:ALONE]
        alone: dict[int, Output] = {}
        spent: list[float] = []
        for i in lone.tolist():
            begun = time.perf_counter()
            alone[i] = _run(buffers[1], example, np.array([i]), guided)
            spent.append(time.perf_counter() - begun)
        for i, output in alone.items():
            comparison.compare(example, np.array([i]), output)
        for batch in plan.batches:
            who = order[:batch]
            output = _run(buffers[batch], example, who, guided)
            comparison.compare(example, who, output)
            comparison.same(who, output, alone)
            bar.advance()
        # Libraries switch kernels at sizes and thread counts that are not known, so more sizes at
        # one level, and every batch cut into streams as well.
        if turn == 0:
            # `_run` makes two calls; one that is heavy is never cut.
            cut = min(spent) <= 2 * HEAVY_S
            sizes = plan.quantized_sizes if "int8" in backend.precision else plan.sizes
            shuffled = [np.resize(generator.permutation(examples.count), size) for size in sizes]
            for who in [*shuffled, *(order[:batch] for batch in plan.batches)]:
                lent = backend.bind(len(who))
                for streams in _cuts(lent, guided, len(who)) if cut else [1]:
                    comparison.same(who, _run(lent, example, who, guided), alone, streams)
    check = comparison.result(float(examples.guidances(guided).max()))
    return check if check.batch_invariant else _explained(check, examples, backend, guided)


def _cuts(buffers: Buffers, guided: bool, size: int) -> Iterator[int]:
    """Cut the calls of buffers in every way that is tried here; yield the numbers of streams."""
    if not isinstance(buffers, StreamBuffers):
        yield 1
        return
    for streams in buffers.choices(guided, size):
        buffers.cut = fixed(streams)
        yield streams


def _run(buffers: Buffers, example: Example, who: NDArray[np.int64], guided: bool) -> Output:
    """Return what the graph computes for the samples `who` [b]: the row's next state, and F."""

    def fill() -> None:
        for name in PORTS:
            getattr(buffers, name)[:] = getattr(example, name)[who]
        for name, array in buffers.conditions.items():
            array[:] = example.conditions[name.removeprefix(PREFIX)][who]

    fill()
    buffers.step(guided)
    state = buffers.state.copy()
    # The graph has no output F, but a row with c_skip 0, c_out 1 and no clip has D = F.
    fill()
    buffers.call[:, [C_SKIP, C_OUT, CLIP]] = 0, 1, np.inf
    buffers.step(guided)
    return Output(state, buffers.denoised.copy())


def _explained(check: StepCheck, examples: Examples, backend: Backend, guided: bool) -> StepCheck:
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
    return unsteady_node(graph, {name: feeds[name] for name in feeds if name in inputs})


def identity_holds(bundle: Bundle, backend: Backend) -> bool:
    """Whether an identity row returns every register bit for bit, in every graph."""
    for guided in graphs_of(bundle):
        buffers = backend.bind(3)
        generator = np.random.Generator(np.random.Philox(key=0))
        # Random registers, because zeros would survive many faults.
        state = generator.standard_normal(buffers.state.shape).astype(np.float32)
        buffers.state[:] = state
        buffers.call[:] = (bundle.schedule.time[-1], 1, 0, 0, 1, 1)
        buffers.update[:] = np.eye(R, R + 2)
        buffers.step(guided)
        if not np.array_equal(buffers.state, state):
            return False
    return True
