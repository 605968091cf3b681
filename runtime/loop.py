"""The reverse loop over a batch: every sample on its own row of its own program, on whatever
backend."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from threading import local
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from .backends.base import Backend, BufferPool, Buffers, Float32, Rows, Timing, WholeLoop
from .backends.forks import ForkGuard
from .diffusion.noise import Stream, noise, noises
from .diffusion.program import GUIDANCE, D, Program, R
from .errors import BackendError, UnnoiseError


class Cancelled(UnnoiseError):
    """The step callback asked to stop."""


class Preview(NamedTuple):
    """What a step callback gets: which samples of the call are under way, how far, and what each
    would look like if it stopped here."""

    samples: NDArray[np.int64]  # [b], positions in the call's result
    step: int  # rows done, 1 … steps
    steps: int  # rows of the longest program
    denoised: Float32  # [b, *S], the denoised estimates D; a copy
    x: Float32  # [b, *S], the samples themselves, as noisy as they are by now; a copy


StepCallback = Callable[[Preview], object]
"""Called after every step. Returning False cancels the call, which then raises `Cancelled`."""


class Table(NamedTuple):
    """A program in the step graph's own type."""

    call: Float32  # [K, 6]
    update: Float32  # [K, R, R+2]
    guided: NDArray[np.bool_]  # [K]
    noisy: NDArray[np.bool_]  # [K]
    start: np.float32  # x_T = start · eps
    level: Float32  # [2]: (alpha, sigma) of the first row

    @classmethod
    def of(cls, program: Program) -> Table:
        call, level = program.call.astype(np.float32), program.level[0].astype(np.float32)
        start, update = np.float32(program.start), program.update.astype(np.float32)
        return cls(call, update, call[:, GUIDANCE] != 1, program.noisy, start, level)


class Known(NamedTuple):
    """The part of a picture that is known: `mask` is 1 there, 0 where it is to be painted, and may
    lie between. Both [*S]."""

    picture: Float32
    mask: Float32


@dataclass(frozen=True, eq=False)
class Job:
    """One sample: where it starts (None: from the seed's noise), and the program that it runs."""

    seed: int
    label: int
    table: Table
    x: Float32 | None = None
    known: Known | None = None


def begin(job: Job, shape: tuple[int, ...]) -> Float32:
    """x [*S] before the job's first row."""
    return job.table.start * noise(job.seed, Stream.INITIAL, 0, shape) if job.x is None else job.x


class Loop:
    """Runs jobs on a backend, at most `max_batch` at a time. May be used from many threads at once.

    A backend that can runs whole programs by itself; not where somebody looks at the steps
    (`on_step`) or D is changed between them (`Known`): these run row by row from here, on every
    backend.
    """

    def __init__(self, backend: Backend, sample_shape: tuple[int, ...], max_batch: int) -> None:
        most = getattr(backend, "largest", None)
        self.backend, self.shape, self.max_batch = (
            backend,
            sample_shape,
            min(max_batch, most or max_batch),
        )
        self._pool, self._own = BufferPool(backend), local()
        self._guard = ForkGuard(backend.name, self)
        self._closed = False

    @property
    def timings(self) -> tuple[Timing, ...]:
        """How the batches of this thread's last call ran, where the backend ran whole programs."""
        return tuple(getattr(self._own, "timings", ()))

    def run(self, jobs: list[Job], on_step: StepCallback | None = None) -> Float32:
        """x at the end of each job's program, [n, *S].

        Raises BackendError after `close`, and in a process forked from the one that loaded the
        backend. Every use of a sampler passes here, on every backend.
        """
        self._guard.check()
        if self._closed:
            raise BackendError("the sampler was closed. Load the bundle again.")
        result = np.empty((len(jobs), *self.shape), np.float32)
        self._own.timings = []
        for first in range(0, len(jobs), self.max_batch):
            chunk = jobs[first : first + self.max_batch]
            whole = (
                isinstance(self.backend, WholeLoop)
                and not on_step
                and all(job.known is None for job in chunk)
            )
            found = self._run_whole(chunk) if whole else self._run(chunk, first, on_step)
            result[first : first + self.max_batch] = found
        return result

    def close(self) -> None:
        """Drop the buffers and close a GPU's backend. A second call does nothing.

        In a forked child it does nothing either: the objects belong to the parent.
        """
        if self._guard.forked:
            return
        self._closed = True
        self._pool.clear()
        if isinstance(self.backend, WholeLoop):
            self.backend.close()

    def _run_whole(self, jobs: list[Job]) -> Float32:
        """One chunk in as few batches as have, row for row, one guidance: a row without never runs
        the graph with."""
        result = np.empty((len(jobs), *self.shape), np.float32)
        assert isinstance(self.backend, WholeLoop)
        for members in alike(jobs):
            result[members], timing = self.backend.run_rows(
                rows([jobs[i] for i in members], self.shape)
            )
            self._own.timings.append(timing)
        return result

    def _run(self, jobs: list[Job], first: int, on_step: StepCallback | None) -> Float32:
        """One chunk, its first sample the call's number `first`."""
        lengths = np.array([len(job.table.call) for job in jobs])
        longest = int(lengths.max())
        with self._pool.lend(len(jobs)) as buffers:
            self._begin(jobs, buffers)
            quiet = np.ones(len(jobs), bool)
            for k in range(longest):
                active = np.flatnonzero(lengths > k)
                guided = np.zeros(len(jobs), bool)
                for i in active:
                    table = jobs[i].table
                    buffers.call[i], buffers.update[i], guided[i] = (
                        table.call[k],
                        table.update[k],
                        table.guided[k],
                    )
                self._draw(jobs, buffers, quiet, active, k)
                for scaled in (False, True):
                    rows = active[guided[active] == scaled]
                    if len(rows) == len(jobs):
                        buffers.step(scaled)
                    elif len(rows):
                        self._step_some(buffers, rows, scaled)
                for i in active:
                    if (known := jobs[i].known) is not None:
                        _blend(buffers, i, known, last=k + 1 == lengths[i])
                if on_step:
                    seen = buffers.denoised[active], buffers.state[active, 0]
                    if on_step(Preview(first + active, k + 1, longest, *seen)) is False:
                        raise Cancelled(f"cancelled after step {k + 1} of {longest}.")
            return buffers.state[:, 0].copy()

    def _draw(
        self,
        jobs: list[Job],
        buffers: Buffers,
        quiet: NDArray[np.bool_],
        active: NDArray[np.intp],
        k: int,
    ) -> None:
        """Fill the noise of row k, and clear what an earlier row left (`quiet` tells whose buffer
        is zero)."""
        noisy = [i for i in active if jobs[i].table.noisy[k]]
        stale = [i for i in active if not (jobs[i].table.noisy[k] or quiet[i])]
        if noisy:
            buffers.noise[noisy], quiet[noisy] = (
                noises([jobs[i].seed for i in noisy], Stream.STEP, k, self.shape),
                False,
            )
        if stale:
            buffers.noise[stale], quiet[stale] = 0, True

    def _begin(self, jobs: list[Job], buffers: Buffers) -> None:
        buffers.state[:] = 0
        buffers.noise[:] = 0
        for i, job in enumerate(jobs):
            buffers.state[i, 0], buffers.label[i] = begin(job, self.shape), job.label

    def _step_some(self, buffers: Buffers, rows: NDArray[np.int64], guided: bool) -> None:
        """One step of some of the batch's samples: the others are finished, or run the other graph."""
        with self._pool.lend(len(rows)) as part:
            part.state[:] = buffers.state[rows]
            for name in ("noise", "call", "update", "label"):
                getattr(part, name)[:] = getattr(buffers, name)[rows]
            part.step(guided)
            buffers.state[rows] = part.state
            buffers.denoised[rows] = part.denoised


def alike(jobs: list[Job]) -> list[list[int]]:
    """Positions of the jobs, in groups that can run together: their programs have guidance in the
    same rows, as far as they go."""
    groups: list[tuple[NDArray[np.bool_], list[int]]] = []
    for i in sorted(range(len(jobs)), key=lambda i: -len(jobs[i].table.guided)):
        own = jobs[i].table.guided
        for pattern, members in groups:
            if np.array_equal(pattern[: len(own)], own):
                members.append(i)
                break
        else:
            groups.append((own, [i]))
    return [members for _, members in groups]


def rows(jobs: list[Job], shape: tuple[int, ...]) -> Rows:
    """The jobs' programs as one, the longest first in the list; a finished sample gets identity
    rows."""
    K, B = len(jobs[0].table.call), len(jobs)
    call, update = np.empty((K, B, 6), np.float32), np.empty((K, B, R, R + 2), np.float32)
    noisy = np.zeros((K, B), bool)
    for i, job in enumerate(jobs):
        own = len(job.table.call)
        call[:own, i], call[own:, i] = job.table.call, job.table.call[-1]
        update[:own, i], update[own:, i] = job.table.update, np.eye(R, R + 2)
        noisy[:own, i] = job.table.noisy

    def draw(k: int, out: Float32) -> None:
        out[:] = 0
        taking = np.flatnonzero(noisy[k])
        if len(taking):
            out[taking] = noises([jobs[i].seed for i in taking], Stream.STEP, k, shape)

    x = np.stack([begin(job, shape) for job in jobs])
    labels = np.array([job.label for job in jobs], np.int64)
    return Rows(x, labels, call, update, jobs[0].table.guided, np.any(noisy, axis=1), draw)


def _blend(buffers: Buffers, i: np.integer[Any], known: Known, last: bool) -> None:
    """Sample i's row as if D had been the known picture where it is known: each register takes up
    the change of D by its own weight."""
    change = known.mask * (known.picture - buffers.denoised[i])
    weights = buffers.update[i, :, D]
    buffers.state[i] += weights.reshape(-1, *[1] * change.ndim) * change
    buffers.denoised[i] += change
    if last:  # to the bit what was handed in
        np.copyto(buffers.state[i, 0], known.picture, where=known.mask == 1)
