"""Steps samples on a backend: those of a tick together, and each alone if that fails. For the
inference thread alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from ..backends.base import Backend, Float32
from ..backends.streams import Cut, bind, whole
from .batch import Batch
from .fair import Work
from .job import Job
from .ticket import Ticket


@dataclass(eq=False, slots=True)
class Sample:
    """One sample of a ticket.

    Attributes:
        ticket: Whose it is.
        index: Its position in the ticket's result.
        job: How it is made.
        work: The same for the policy.
        every: Rows between previews; 0 makes none.
        slot: Of the batch; None if it has not started, or is finished.
    """

    ticket: Ticket
    index: int
    job: Job
    work: Work
    every: int = 0
    slot: int | None = None


@dataclass(eq=False, slots=True)
class Outcome:
    """What a tick came to.

    Attributes:
        stepped: Samples that took their row.
        finished: Those of them that have no row left, with their x [*S].
        failed: Samples that failed alone, too, with their errors.
        dropped: Previews that were replaced before they were taken.
    """

    stepped: list[Sample] = field(default_factory=list)
    finished: list[tuple[Sample, Float32]] = field(default_factory=list)
    failed: list[tuple[Sample, Exception]] = field(default_factory=list)
    dropped: int = 0


class Runner:
    """Holds the batch. A whole-program backend is stepped row by row here, too."""

    def __init__(
        self,
        backend: Backend,
        sample_shape: tuple[int, ...],
        capacity: int,
        room: int,
        cut: Cut = whole,
    ) -> None:
        self._batch = Batch(bind(backend, room, cut), sample_shape, capacity, room)
        self._of_slot: dict[int, Sample] = {}

    def __len__(self) -> int:
        """Slots in use."""
        return len(self._batch)

    def free(self, samples: Sequence[Sample]) -> None:
        """Free the slots of samples that were cancelled."""
        for sample in samples:
            if sample.slot is not None:
                self._batch.cancel(sample.slot)
                self._forget(sample)

    def step(self, samples: Sequence[Sample], merged: bool) -> Outcome:
        """Run the next row of some samples.

        merged: whether plain rows run in the guided graph.
        """
        outcome = Outcome()
        try:
            self._run(samples, merged)
        except Exception:
            # No sample has moved, so each can take the same row again by itself.
            for sample in samples:
                try:
                    self._run([sample], merged)
                except Exception as error:
                    outcome.failed.append((sample, error))
                else:
                    # At once: the next run retires a sample that this one has finished.
                    self._note([sample], outcome)
        else:
            self._note(samples, outcome)
        for slot, x in self._batch.finished().items():
            sample = self._of_slot[slot]
            self._forget(sample)
            outcome.finished.append((sample, x))
        return outcome

    def _run(self, samples: Sequence[Sample], merged: bool) -> None:
        for sample in samples:
            if sample.slot is None:
                sample.slot = self._batch.admit(sample.job)
                self._of_slot[sample.slot] = sample
        self._batch.step([s.slot for s in samples if s.slot is not None], merged)

    def _note(self, samples: Sequence[Sample], outcome: Outcome) -> None:
        """Note samples that took their row, and deposit the previews that are due."""
        outcome.stepped += samples
        due = [sample for sample in samples if _due(sample)]
        if not due:
            return
        looks = self._batch.look([s.slot for s in due if s.slot is not None])
        for sample, denoised, x in zip(due, *looks, strict=True):
            step = sample.work.row + 1
            steps = len(sample.work.guided)
            # Copies: a view that nobody takes would keep the arrays of everybody's samples.
            own = denoised.copy(), x.copy()
            outcome.dropped += sample.ticket.deposit(sample.index, step, steps, *own)
        for ticket in dict.fromkeys(sample.ticket for sample in due):
            ticket.notify()

    def _forget(self, sample: Sample) -> None:
        if sample.slot is not None:
            del self._of_slot[sample.slot]
            sample.slot = None


def _due(sample: Sample) -> bool:
    """Whether a preview of the row that was just done is wanted."""
    if not sample.every:
        return False
    step = sample.work.row + 1
    return step % sample.every == 0 or step == len(sample.work.guided)
