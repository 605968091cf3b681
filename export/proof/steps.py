"""One step graph compared with PyTorch at every level, and each sample with itself in other
batches."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from runtime.backends.base import Backend, Buffers
from runtime.backends.streams import StreamBuffers, fixed
from runtime.bundle.bundle import Bundle
from runtime.bundle.conditions import PREFIX
from runtime.bundle.format import inside, step_file
from runtime.diffusion.program import C_OUT, C_SKIP, CLIP, R
from runtime.diffusion.schedule import Schedule
from runtime.engine.probe import HEAVY_S
from runtime.terminal.progress import Progress

from .examples import Example, Examples
from .explain import PORTS, explained
from .plan import Bounds
from .report import NONE, LevelError, StepCheck, Worst

ALONE = 3
"""Samples of a batch that are also run alone, except at the first level, where all are."""


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


@dataclass(frozen=True)
class _Turns:
    """Which samples run together, drawn once for all sizes.

    Attributes:
        orders: For each level all samples [n] in another order; a batch takes the first ones.
        further: Samples of batches of further sizes, at the first level.
    """

    orders: list[NDArray[np.int64]]
    further: list[NDArray[np.int64]]


def _turns(examples: Examples, sizes: Sequence[int]) -> _Turns:
    generator = np.random.Generator(np.random.Philox(key=0))

    def order() -> NDArray[np.int64]:
        return generator.permutation(examples.count)

    first = order()
    further = [np.resize(order(), size) for size in sizes]
    return _Turns([first, *(order() for _ in range(len(examples) - 1))], further)


def check_steps(
    examples: Examples, backend: Backend, guided: bool, bounds: Bounds, bar: Progress
) -> StepCheck:
    """Compare one graph with PyTorch, and every sample with itself alone, in shuffled batches.

    One size of batches at a time: a library may hold the weights once for each size.
    """
    plan = examples.plan
    comparison = _Comparison(step_file(guided), bounds, examples.bundle.schedule)
    turns = _turns(examples, plan.quantized_sizes if "int8" in backend.precision else plan.sizes)
    room = _Room(backend)
    alone, cut = _check_alone(examples, room, guided, turns, comparison)
    first = examples.at(0, guided)

    def check_cuts(who: NDArray[np.int64]) -> None:
        # Of a call that is never cut, there is only the whole.
        for streams in _cuts(room.of(len(who)), guided, len(who)) if cut else [1]:
            output = _run(room.of(len(who)), first, who, guided)
            comparison.same(who, output, alone[0], streams)

    for batch in plan.batches:
        for turn, order in enumerate(turns.orders):
            example = examples.at(turn, guided)
            who = order[:batch]
            output = _run(room.of(batch), example, who, guided)
            comparison.compare(example, who, output)
            comparison.same(who, output, alone[turn])
            bar.advance()
        if cut:
            check_cuts(turns.orders[0][:batch])
    # Libraries switch kernels at sizes and thread counts that are not known, so more sizes at one
    # level, and every batch cut into streams as well.
    for who in turns.further:
        check_cuts(who)
    check = comparison.result(float(examples.guidances(guided).max()))
    return check if check.batch_invariant else explained(check, examples, backend, guided)


class _Room:
    """Buffers of one size at a time."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self._size = 0
        self._buffers: Buffers | None = None

    def of(self, size: int) -> Buffers:
        """Return buffers of a size. Those of another size are freed first, so keep none."""
        if self._buffers is None or size != self._size:
            self._buffers = None
            self._buffers = self._backend.bind(size)
            self._size = size
        return self._buffers


def _check_alone(
    examples: Examples, room: _Room, guided: bool, turns: _Turns, comparison: _Comparison
) -> tuple[list[dict[int, Output]], bool]:
    """Run samples alone, and compare them with PyTorch.

    Returns:
        For each level what the graph computes for a sample alone, and whether calls are cut into
        streams.
    """
    found: list[dict[int, Output]] = []
    spent: list[float] = []
    for turn, order in enumerate(turns.orders):
        example = examples.at(turn, guided)
        # Batches of one are slow: all samples run alone at the first level, then a few.
        lone = order[:ALONE] if turn else np.arange(examples.count)
        found.append({})
        for i in lone.tolist():
            begun = time.perf_counter()
            found[turn][i] = _run(room.of(1), example, np.array([i]), guided)
            spent.append(time.perf_counter() - begun)
            comparison.compare(example, np.array([i]), found[turn][i])
    # `_run` makes two calls; one that is heavy is never cut.
    return found, min(spent) <= 2 * HEAVY_S


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


def filled(buffers: Buffers, bundle: Bundle) -> Buffers:
    """Return buffers with conditions, because a network need not take zeros."""
    for condition in bundle.conditions:
        array = buffers.conditions[condition.port]
        array[:] = bundle.draw_conditions(len(array))[condition.name]
    return buffers


def identity_holds(bundle: Bundle, backend: Backend) -> bool:
    """Whether an identity row returns every register bit for bit, in every graph."""
    for guided in graphs_of(bundle):
        buffers = filled(backend.bind(3), bundle)
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
