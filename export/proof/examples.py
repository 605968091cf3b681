"""What every graph is compared on: noised images in shuffled batches, and PyTorch's results."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from runtime.bundle.bundle import Bundle
from runtime.diffusion.arrays import Array
from runtime.diffusion.noise import Stream, noise
from runtime.diffusion.program import (
    C_OUT,
    C_SKIP,
    CLIP,
    GUIDANCE,
    D,
    R,
    advance,
    column,
    denoise,
    run,
)

from ..sources.model import Model, steps_of
from .plan import Plan

ROUNDING = 4 * 2.0**-24
"""The relative rounding error in float32 of the four factors in c_skip·x + c_out·F."""


@dataclass(frozen=True, eq=False)
class Example:
    """A shuffled batch of n samples, each at its own level, and what PyTorch computes for it.

    Attributes:
        knots: [n], the level of each sample.
        sigma: [n], its noise level.
        call: [n, 6] and
        update: [n, R, R+2], its row of a program.
        label: [n].
        conditions: [n, …] each, by name.
        state: [n, R, *S], the registers before the row.
        noise: [n, *S].
        answer: [n, *S], PyTorch's F under the row's guidance.
        next_state: [n, R, *S], the registers after the row.
    """

    knots: NDArray[np.int64]
    sigma: NDArray[np.float64]
    call: NDArray[np.float64]
    update: NDArray[np.float64]
    label: NDArray[np.int64]
    conditions: Mapping[str, Array]
    state: NDArray[np.float32]
    noise: NDArray[np.float32]
    answer: NDArray[np.float32]
    next_state: NDArray[np.float32]

    def share(self, i: int, answer_error: float) -> float:
        """Return what an error of F comes to in the next state of sample i.

        The row multiplies by its gain the error of F, and the rounding of F and x to float32.
        The result is 0 if that is not finite, so that no infinite bound passes everything.
        """
        # M multiplies D by update[0, D], and D multiplies F by c_out.
        gain = abs(self.update[i, 0, D] * self.call[i, C_OUT])
        largest = max(np.abs(self.answer[i]).max(), np.abs(self.state[i, 0]).max())
        share = float(gain * (answer_error + ROUNDING * largest))
        return share if np.isfinite(share) else 0.0


class Examples:
    """Rows across the whole schedule on the model's own images, noised, in shuffled batches.

    In example k, each sample is at another level than its neighbours. Over all examples, every
    sample is at every level. All graphs are compared on the same examples.
    """

    def __init__(self, model: Model, bundle: Bundle, plan: Plan) -> None:
        self.model = model
        self.bundle = bundle
        self.plan = plan
        self.network = model.reference()
        self.count = max(plan.batches)
        self._conditions = model.draw_conditions(self.count)
        # The first sample has the null values, as it has the null label at turn 0.
        for name, null in model.null_conditions().items():
            self._conditions[name][0] = null
        self.clean = self._images()
        last = len(bundle.schedule) - 1
        # np.unique, because a short schedule has fewer knots than the plan has levels.
        self.knots = np.unique(np.round(np.linspace(last, 0, plan.times)).astype(int))
        self._answers: dict[tuple[int, bool], NDArray[np.float32]] = {}

    def __len__(self) -> int:
        return len(self.knots)

    def labels(self, turn: int = 0) -> NDArray[np.int64]:
        """Return a label for each sample [n]: all in turn, the null label first at turn 0."""
        null = self.bundle.null_label
        order = [*([] if null is None else [null]), *range(self.bundle.num_classes)] or [0]
        return np.roll(np.resize(order, self.count), turn).astype(np.int64)

    def conditions(self, turn: int = 0) -> dict[str, Array]:
        """Return conditions [n, …] by name, for another sample each turn."""
        return {name: np.roll(found, turn, axis=0) for name, found in self._conditions.items()}

    def draw(self, stream: Stream, step: int) -> NDArray[np.float32]:
        """Return noise [n, *S] of the seeds 0 … n-1."""
        shape = self.bundle.sample_shape
        return np.stack([noise(seed, stream, step, shape) for seed in range(self.count)])

    def _images(self) -> NDArray[np.float32]:
        """Return samples [n, *S] of the model itself, in the data's range."""
        program = self.bundle.program("ddim", steps_of(self.bundle, min(10, self.plan.steps)))
        samples = run(
            program,
            self.network,
            np.float32(program.start) * self.draw(Stream.INITIAL, 0),
            label=self.labels() if self.bundle.labels else None,
            conditions=self.conditions(),
        )
        # Without a clip, samples of an untrained network reach sigma/alpha. A network is used on,
        # and the bounds are meant for, values in the data's range.
        low, high = self.bundle.sample_range
        return np.clip(samples, low, high)

    def guidances(self, guided: bool) -> NDArray[np.float64]:
        """Return a guidance scale for each sample [n]; the largest is the default one, or 2."""
        if not guided:
            return np.ones(self.count)
        largest = max(2.0, self.bundle.defaults.guidance)
        # Also 1, where the guided graph must return F_c, and 0, where it must return F_u.
        return np.resize([largest, 1.5, 1.0, 0.0, largest / 2], self.count)

    def prepare(self, guided: bool) -> None:
        """Compute what PyTorch returns in all examples, and keep it."""
        for turn in range(len(self)):
            self.at(turn, guided)

    def at(self, turn: int, guided: bool) -> Example:
        """Return example `turn`: for each sample an ancestral row, halfway down from its level."""
        schedule = self.bundle.schedule
        # Neighbours are three levels from each other, so that a mix-up of neighbours shows.
        knots = self.knots[(turn + 3 * np.arange(self.count)) % len(self.knots)]
        rows = [self._row(int(k), g) for k, g in zip(knots, self.guidances(guided), strict=True)]
        call = np.stack([row[0] for row in rows])
        update = np.stack([row[1] for row in rows])

        # Noise the clean images, each to its level.
        rank = self.clean.ndim
        alpha = column(schedule.alpha[knots], rank)
        sigma = column(schedule.sigma[knots], rank)
        state = np.zeros((self.count, R, *self.bundle.sample_shape), np.float32)
        state[:, 0] = alpha * self.clean + sigma * self.draw(Stream.ENCODE, turn)
        z = self.draw(Stream.STEP, turn)
        label = self.labels(turn)

        # F in float32, as the graph computes it. F_u is that of all samples, not of the guided ones
        # as in `denoise`, because PyTorch rounds a smaller batch differently.
        x = state[:, 0]
        F = self._answer(turn, False, x, call, label)
        if guided:
            null = self._answer(turn, True, x, call, label)
            beyond = column(call[:, GUIDANCE] - 1, rank).astype(np.float32)
            F = (F + beyond * (F - null)).astype(np.float32)

        # The rest of the row in float64, so that the reference adds no rounding of its own. Without
        # a label `denoise` takes F as it is, because guidance has been applied.
        denoised = denoise(call, lambda *_: F, x.astype(np.float64))
        next_state = advance(update, state.astype(np.float64), denoised, z)
        return Example(
            knots=knots,
            sigma=schedule.sigma[knots],
            call=call,
            update=update,
            label=label,
            conditions=self.conditions(turn),
            state=state,
            noise=z,
            answer=F,
            next_state=next_state.astype(np.float32),
        )

    def _row(self, knot: int, guidance: float) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Return (call [6], update [R, R+2]) from this knot halfway down, or to the clean end."""
        # eta = 1 draws fresh noise, so that every column of M has something to do.
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
    ) -> NDArray[np.float32]:
        """Return PyTorch's F [n, *S] under each sample's inputs, or under the null values.

        The result is kept for the next graph. The first example is computed sample by sample and
        the others as a batch: `independence` has already checked bit for bit that the module
        computes a batch like its samples alone.
        """
        if (turn, null) not in self._answers:
            # D of rows that read D = F, so that the network's inputs are those of any row.
            reading = call.copy()
            reading[:, [C_SKIP, C_OUT, CLIP, GUIDANCE]] = 0, 1, np.inf, 1
            null_label = self.bundle.null_label
            conditions = self.conditions(turn)
            if null:
                label = label if null_label is None else np.full_like(label, null_label)
                for name, value in self.model.null_conditions().items():
                    conditions[name] = np.broadcast_to(value, conditions[name].shape)
            size = 1 if turn == 0 else len(x)
            answers = []
            for i in range(0, len(x), size):
                part = slice(i, i + size)
                labels = label[part] if self.bundle.labels else None
                named = {name: array[part] for name, array in conditions.items()}
                answers.append(
                    denoise(reading[part], self.network, x[part], labels, conditions=named)
                )
            self._answers[turn, null] = np.concatenate(answers)
        return self._answers[turn, null]
