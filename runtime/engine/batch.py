"""A batch of samples in slots: each is at its own row of its own program.

Samples join and leave between steps.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..backends.base import Buffers, Float32
from ..diffusion.noise import Stream, noise, noises
from ..diffusion.program import GUIDANCE, D, Program
from ..errors import RequestError
from ..errors.keywords import named


class Table(NamedTuple):
    """A program in float32, the type of the step graph."""

    call: Float32  # [K, 6]
    update: Float32  # [K, R, R+2]
    guided: NDArray[np.bool_]  # [K]
    noisy: NDArray[np.bool_]  # [K]
    start: np.float32  # x_T = start · eps
    level: Float32  # [2]: (alpha, sigma) of the first row

    @classmethod
    def of(cls, program: Program) -> Table:
        """Return the table of a program."""
        call = program.call.astype(np.float32)
        return cls(
            call=call,
            update=program.update.astype(np.float32),
            guided=call[:, GUIDANCE] != 1,
            noisy=program.noisy,
            start=np.float32(program.start),
            level=program.level[0].astype(np.float32),
        )

    def __len__(self) -> int:
        return len(self.call)


class Known(NamedTuple):
    """The part of an image that inpainting keeps.

    Attributes:
        picture: [*S].
        mask: [*S], 1 where the image is kept, 0 where it is painted; values between mix the two.
    """

    picture: Float32
    mask: Float32


@dataclass(frozen=True, eq=False)
class Job:
    """One sample: its program, and where it starts.

    Attributes:
        x: [*S] before the first row; None starts from the seed's noise.
    """

    seed: int
    label: int
    table: Table
    x: Float32 | None = None
    known: Known | None = None


def begin(job: Job, shape: tuple[int, ...]) -> Float32:
    """Return x [*S] before the job's first row."""
    return job.table.start * noise(job.seed, Stream.INITIAL, 0, shape) if job.x is None else job.x


class SlotPreview(NamedTuple):
    """How far the sample in a slot is, and what it would look like if it stopped now."""

    step: int  # rows done, 0 … steps
    steps: int  # rows of its program
    denoised: Float32  # [*S], the denoised estimate D of the last row; zeros before the first
    x: Float32  # [*S], the sample itself, as noisy as it is by now


@dataclass(eq=False)
class _Member:
    """A sample that is running, at a place in the buffers."""

    slot: int
    job: Job
    place: int
    row: int = 0
    quiet: bool = True  # whether its noise buffer is zero

    @property
    def done(self) -> bool:
        return self.row == len(self.job.table)


class Batch:
    """Up to `capacity` samples that run together. Use it from one thread at a time.

    A sample has the same bytes if others join or leave. Running samples lie side by side in the
    buffers: first those whose next row is plain, then those whose next row is guided, so that each
    graph runs once a step, on a slice.

        batch = Batch(buffers, sample_shape, capacity)
        slot = batch.admit(job)
        while slot not in (results := batch.finished()):
            batch.step()
        x = results[slot]
    """

    @named
    def __init__(self, buffers: Buffers, sample_shape: tuple[int, ...], capacity: int) -> None:
        """Make an empty batch; `buffers` hold `capacity` samples [*S], of this batch alone."""
        self.capacity = capacity
        self._shape = sample_shape
        self._buffers = buffers
        self._members: list[_Member] = []
        self._of_slot: dict[int, _Member] = {}
        self._free = list(reversed(range(capacity)))
        self._results: dict[int, Float32] = {}

    def __len__(self) -> int:
        """Return the number of slots in use, including those of finished samples."""
        return self.capacity - len(self._free)

    @property
    def live(self) -> int:
        """The number of samples that have rows left."""
        return sum(not member.done for member in self._members)

    def admit(self, job: Job) -> int:
        """Put a sample into a free slot; it starts with the next step.

        Returns:
            The slot, 0 … capacity - 1.

        Raises:
            RequestError: No slot is free.
        """
        if not self._free:
            raise RequestError(
                f"a batch holds at most {self.capacity} samples, and all its slots are in use. "
                "Call finished() or cancel(slot) first."
            )
        place = len(self._members)
        member = _Member(self._free.pop(), job, place)
        buffers = self._buffers
        # The last sample in this place left its own values: 0 · inf would be NaN.
        buffers.state[place] = 0
        buffers.state[place, 0] = begin(job, self._shape)
        buffers.noise[place] = 0
        buffers.denoised[place] = 0
        buffers.label[place] = job.label
        self._members.append(member)
        self._of_slot[member.slot] = member
        return member.slot

    def step(self) -> None:
        """Run the next row of every sample that has one."""
        self._retire()
        if not self._members:
            return
        plain = self._arrange()
        self._fill()
        count = len(self._members)
        if plain:
            self._buffers.run(False, 0, plain)
        if plain < count:
            self._buffers.run(True, plain, count - plain)
        self._buffers.turn()
        for member in self._members:
            member.row += 1
            if member.job.known is not None:
                _blend(self._buffers, member.place, member.job.known, last=member.done)

    def finished(self) -> dict[int, Float32]:
        """Return the samples that have finished, [*S] each, by slot, and free their slots."""
        self._retire()
        results = self._results
        self._results = {}
        self._free += results
        return results

    def cancel(self, slot: int) -> None:
        """Drop the sample in a slot, running or finished, and free the slot.

        Raises:
            RequestError: The slot is free.
        """
        if slot in self._results:
            del self._results[slot]
        else:
            self._remove(self._member(slot))
        self._free.append(slot)

    def clear(self) -> None:
        """Cancel every sample."""
        for slot in [*self._of_slot, *self._results]:
            self.cancel(slot)

    def preview(self, slot: int) -> SlotPreview:
        """Return a copy of the sample in a slot as it is now.

        A finished sample can be seen until `finished` or the next step.

        Raises:
            RequestError: No sample is running in the slot.
        """
        member = self._member(slot)
        denoised, x = self.look([slot])
        return SlotPreview(member.row, len(member.job.table), denoised[0], x[0])

    def look(self, slots: Sequence[int]) -> tuple[Float32, Float32]:
        """Return copies of the denoised estimates D and the samples x of some slots, [n, *S]."""
        places = [self._member(slot).place for slot in slots]
        return self._buffers.denoised[places], self._buffers.state[places, 0]

    def _member(self, slot: int) -> _Member:
        if slot not in self._of_slot:
            raise RequestError(f"no sample is running in slot {slot}.")
        return self._of_slot[slot]

    def _retire(self) -> None:
        """Copy out the samples that have finished, and close the gaps."""
        for member in [member for member in self._members if member.done]:
            self._results[member.slot] = self._buffers.state[member.place, 0].copy()
            self._remove(member)

    def _remove(self, member: _Member) -> None:
        """Take a sample out of the buffers; the last one takes its place."""
        last = self._members[-1]
        if last is not member:
            self._swap(member.place, last.place)
        self._members.pop()
        del self._of_slot[member.slot]

    def _arrange(self) -> int:
        """Move samples whose next row is guided behind the others. Returns how many come first."""
        guided = [bool(member.job.table.guided[member.row]) for member in self._members]
        plain = len(guided) - sum(guided)
        early = [place for place in range(plain) if guided[place]]
        late = [place for place in range(plain, len(guided)) if not guided[place]]
        for a, b in zip(early, late, strict=True):
            self._swap(a, b)
        return plain

    def _swap(self, a: int, b: int) -> None:
        pair = [a, b]
        for name in ("state", "noise", "denoised", "label"):
            array = getattr(self._buffers, name)
            array[pair] = array[pair[::-1]]
        members = self._members
        members[a], members[b] = members[b], members[a]
        members[a].place = a
        members[b].place = b

    def _fill(self) -> None:
        """Write every sample's row and its noise into the buffers."""
        buffers = self._buffers
        noisy: dict[int, list[_Member]] = {}
        for member in self._members:
            table = member.job.table
            buffers.call[member.place] = table.call[member.row]
            buffers.update[member.place] = table.update[member.row]
            if table.noisy[member.row]:
                noisy.setdefault(member.row, []).append(member)
                member.quiet = False
            elif not member.quiet:
                buffers.noise[member.place] = 0
                member.quiet = True
        # The noise of a row is drawn at once for all samples that are at the same row.
        for row, members in noisy.items():
            places = [member.place for member in members]
            seeds = [member.job.seed for member in members]
            buffers.noise[places] = noises(seeds, Stream.STEP, row, self._shape)


def _blend(buffers: Buffers, place: int, known: Known, last: bool) -> None:
    """Change a sample's row as if D had been the known image where it is known.

    A row is linear in D, so each register changes by its own weight of D. This needs no other
    graph, and works with every solver.
    """
    change = known.mask * (known.picture - buffers.denoised[place])
    weights = buffers.update[place, :, D]
    buffers.state[place] += weights.reshape(-1, *[1] * change.ndim) * change
    buffers.denoised[place] += change
    if last:  # bit-exact what was passed in
        np.copyto(buffers.state[place, 0], known.picture, where=known.mask == 1)
