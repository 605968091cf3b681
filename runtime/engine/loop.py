"""The loop: runs jobs to their end on any backend, in slots of a `Batch` or as whole programs."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..backends.base import Backend, Float32, Rows, Timing, WholeLoop
from ..backends.forks import ForkGuard
from ..backends.pool import BufferPool
from ..backends.streams import Cut, whole
from ..bundle.conditions import LABEL
from ..diffusion.arrays import Array
from ..diffusion.noise import Stream, noises
from ..diffusion.program import R
from ..errors import BackendError, UnnoiseError
from .batch import Batch
from .job import Job, begin


class Cancelled(UnnoiseError):
    """The step callback asked to stop."""


class Preview(NamedTuple):
    """What a step callback receives: the samples that are running, and how far they are."""

    samples: NDArray[np.int64]  # [b], positions in the call's result
    step: int  # rows done, 1 … steps
    steps: int  # rows of the longest program
    denoised: Float32  # [b, *S], the denoised estimates D; a copy
    x: Float32  # [b, *S], the samples themselves, as noisy as they are by now; a copy


StepCallback = Callable[[Preview], object]
"""A function that is called after every step. If it returns False, the call raises `Cancelled`."""


class Result(NamedTuple):
    """The samples of a call, and how a device ran them.

    Attributes:
        samples: [n, *S].
        timings: One for each batch that a device ran as a whole.
    """

    samples: Float32
    timings: tuple[Timing, ...]


class Loop:
    """Runs jobs on a backend, at most `max_batch` at a time.

    May be used from many threads at once.

    A backend that is a `WholeLoop` runs whole programs by itself. If `on_step` looks at the steps,
    or `Known` changes D between them, every backend is stepped row by row.
    """

    def __init__(
        self,
        backend: Backend,
        sample_shape: tuple[int, ...],
        max_batch: int,
        cut: Cut = whole,
    ) -> None:
        largest = getattr(backend, "largest", None)
        self.backend = backend
        self.shape = sample_shape
        self.max_batch = min(max_batch, largest or max_batch)
        self._pool = BufferPool(backend, cut)
        self._guard = ForkGuard(backend.name, self)
        self._closed = False

    def run(self, jobs: list[Job], on_step: StepCallback | None = None) -> Result:
        """Run every job to the end of its program.

        Raises:
            BackendError: After `close`, and in a process forked from the one that loaded the
                backend.
            Cancelled: on_step returned False.
        """
        # Every use of a sampler passes here, on every backend.
        self._guard.check()
        if self._closed:
            raise BackendError("the sampler was closed. Load the bundle again.")
        samples = np.empty((len(jobs), *self.shape), np.float32)
        if on_step is not None:
            for first in range(0, len(jobs), self.max_batch):
                self._watch(jobs, slice(first, first + self.max_batch), samples, on_step)
            return Result(samples, ())
        # The device keeps the state between rows, so the host cannot change D there.
        whole = [i for i, job in enumerate(jobs) if job.known is None]
        timings: list[Timing] = []
        if not isinstance(self.backend, WholeLoop):
            whole = []
        for first in range(0, len(whole), self.max_batch):
            timings += self._run_whole(jobs, whole[first : first + self.max_batch], samples)
        by_row = sorted({*range(len(jobs))} - {*whole})
        if by_row:
            self._run(jobs, by_row, samples)
        return Result(samples, tuple(timings))

    def close(self) -> None:
        """Drop the buffers and close a GPU's backend. A second call does nothing.

        In a forked child it does nothing, because the objects belong to the parent.
        """
        if self._guard.forked:
            return
        self._closed = True
        self._pool.clear()
        if isinstance(self.backend, WholeLoop):
            self.backend.close()

    def _run_whole(self, jobs: list[Job], who: list[int], samples: Float32) -> list[Timing]:
        """Run some jobs as whole programs, in as few batches as possible."""
        assert isinstance(self.backend, WholeLoop)
        # One graph runs for all samples of a row. Grouping jobs that are guided in the same rows
        # keeps unguided samples off the guided graph, which would cost twice as much.
        timings = []
        for group in alike([jobs[i] for i in who]):
            members = [who[i] for i in group]
            found, timing = self.backend.run_rows(rows([jobs[i] for i in members], self.shape))
            samples[members] = found
            timings.append(timing)
        return timings

    def _run(self, jobs: list[Job], who: list[int], samples: Float32) -> None:
        """Run some jobs in a batch whose slots are filled again as they become free."""
        capacity = min(self.max_batch, len(who))
        waiting = iter(who)
        with self._pool.lend(capacity) as buffers:
            batch = Batch(buffers, self.shape, capacity)
            index: dict[int, int] = {}
            while True:
                # Full slots keep the batch large when programs have different lengths.
                while len(batch) < capacity and (i := next(waiting, None)) is not None:
                    index[batch.admit(jobs[i])] = i
                if not len(batch):
                    return
                batch.step()
                for slot, x in batch.finished().items():
                    samples[index.pop(slot)] = x

    def _watch(self, jobs: list[Job], part: slice, samples: Float32, on_step: StepCallback) -> None:
        """Run a part of the jobs in step with each other, and call `on_step` after every row."""
        chunk = jobs[part]
        steps = max(len(job.table) for job in chunk)
        with self._pool.lend(len(chunk)) as buffers:
            batch = Batch(buffers, self.shape, len(chunk))
            index = {batch.admit(job): part.start + i for i, job in enumerate(chunk)}
            for step in range(1, steps + 1):
                batch.step()
                slots = sorted(index, key=index.__getitem__)
                denoised, x = batch.look(slots)
                who = np.array([index[slot] for slot in slots])
                # None, from a callback without a return, continues.
                if on_step(Preview(who, step, steps, denoised, x)) is False:
                    raise Cancelled(f"cancelled after step {step} of {steps}.")
                for slot, found in batch.finished().items():
                    samples[index.pop(slot)] = found


def alike(jobs: list[Job]) -> list[list[int]]:
    """Return the positions of the jobs, in groups whose programs are guided in the same rows.

    A shorter program may join a longer one if they agree up to its end.
    """
    groups: list[tuple[NDArray[np.bool_], list[int]]] = []
    # The longest come first, so that a group's pattern covers all of its members.
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
    """Return the programs of jobs [B] as one, padded to the length of the first, the longest.

    Returns:
        x [B, *S], the label and conditions [B, …], call [K, B, 6], update [K, B, R, R+2], and the
        noise of each row.
    """
    K = len(jobs[0].table)
    B = len(jobs)
    call = np.empty((K, B, 6), np.float32)
    update = np.empty((K, B, R, R + 2), np.float32)
    noisy = np.zeros((K, B), bool)
    for i, job in enumerate(jobs):
        own = len(job.table)
        call[:own, i] = job.table.call
        # Identity rows keep a finished sample bit-exact; the call is repeated to stay in range.
        call[own:, i] = job.table.call[-1]
        update[:own, i] = job.table.update
        update[own:, i] = np.eye(R, R + 2)
        noisy[:own, i] = job.table.noisy

    def draw(k: int, out: Float32) -> None:
        out[:] = 0
        taking = np.flatnonzero(noisy[k])
        if len(taking):
            out[taking] = noises([jobs[i].seed for i in taking], Stream.STEP, k, shape)

    x = np.stack([begin(job, shape) for job in jobs])
    conditions: dict[str, Array] = {LABEL: np.array([job.label for job in jobs], np.int64)}
    for name in jobs[0].conditions:
        conditions[name] = np.stack([job.conditions[name] for job in jobs])
    return Rows(x, conditions, call, update, jobs[0].table.guided, np.any(noisy, axis=1), draw)
