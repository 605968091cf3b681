"""A batch of samples in slots: each is at its own row, and they join and leave between steps."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from ..backends.base import Buffers, Float32
from ..diffusion.noise import Stream, noises
from ..errors import RequestError
from ..errors.arguments import instance, integer
from ..errors.keywords import named
from .job import Job, Parked, begin, blend


class SlotPreview(NamedTuple):
    """How far the sample in a slot is, and what it would look like if it stopped now."""

    step: int  # rows done, 0 … steps
    steps: int  # rows of its program
    denoised: Float32  # [*S], the denoised estimate D of the last row; zeros before the first
    x: Float32  # [*S], the sample itself, as noisy as it is by now


@dataclass(eq=False)
class _Member:
    """A sample that is running: at a place in the buffers, or parked outside of them."""

    slot: int
    job: Job
    place: int = -1
    row: int = 0
    quiet: bool = False  # whether its noise buffer is zero
    parked: Parked | None = None
    rows: int = field(init=False)

    def __post_init__(self) -> None:
        self.rows = len(self.job.table)

    @property
    def done(self) -> bool:
        return self.row == self.rows


class Batch:
    """Up to `capacity` samples that run together. Use it from one thread at a time.

    A sample has the same bytes if others join or leave. Running samples lie side by side in the
    buffers: first those whose next row is plain, then those whose next row is guided, so that each
    graph runs once a step, on a slice. Samples that do not step are parked outside the buffers.

        batch = Batch(buffers, sample_shape, capacity)
        slot = batch.admit(job)
        while slot not in (results := batch.finished()):
            batch.step()
        x = results[slot]
    """

    @named
    def __init__(
        self,
        buffers: Buffers,
        sample_shape: tuple[int, ...],
        capacity: int,
        room: int | None = None,
    ) -> None:
        """Make an empty batch.

        Args:
            buffers: With room for `room` samples [*S], for this batch alone.
            sample_shape: S.
            capacity: Number of slots.
            room: Most samples of one step, 1 … capacity; None is `capacity`.

        Raises:
            RequestError: `capacity` or `room` is out of range.
        """
        self.capacity = integer("capacity", capacity, 1)
        self.room = self.capacity if room is None else integer("room", room, 1, self.capacity)
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
        return sum(not member.done for member in self._of_slot.values())

    def admit(self, job: Job) -> int:
        """Put a sample into a free slot; it starts with the next step.

        Returns:
            The slot, 0 … capacity - 1.

        Raises:
            RequestError: No slot is free, or `job` is none.
        """
        instance("job", job, Job, "Planner.job makes one of a Request.")
        if not self._free:
            raise RequestError(
                f"a batch holds at most {self.capacity} samples, and all its slots are in use. "
                "Call finished() or cancel(slot) first."
            )
        member = _Member(self._free.pop(), job)
        self._of_slot[member.slot] = member
        if len(self._members) < self.room:
            self._seat(member)
        return member.slot

    def step(self, slots: Sequence[int] | None = None, merged: bool = False) -> None:
        """Run the next row of samples that are under way.

        If the network raises, no sample has moved.

        Args:
            slots: The samples, each once, at most `room`; None is every sample that has a row left.
            merged: Run plain rows in the guided graph, too, which then runs once for all.

        Raises:
            RequestError: No sample is under way in one of the slots, or there are too many.
        """
        self._retire()
        self._choose(self._of_slot if slots is None else slots)
        if not self._members:
            return
        plain = 0 if merged else self._arrange()
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
                blend(self._buffers, member.place, member.job.known, last=member.done)

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
        if self._results.pop(slot, None) is None:
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
        return SlotPreview(member.row, member.rows, denoised[0], x[0])

    def look(self, slots: Sequence[int]) -> tuple[Float32, Float32]:
        """Return copies of the denoised estimates D and the samples x of some slots, [n, *S]."""
        denoised = np.zeros((len(slots), *self._shape), np.float32)
        x = np.zeros_like(denoised)
        for i, member in enumerate(map(self._member, slots)):
            if member.place >= 0:
                denoised[i] = self._buffers.denoised[member.place]
                x[i] = self._buffers.state[member.place, 0]
            elif member.parked:
                denoised[i] = member.parked.denoised
                x[i] = member.parked.state[0]
            else:
                x[i] = begin(member.job, self._shape)
        return denoised, x

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
        """Forget a sample."""
        if member.place >= 0:
            self._vacate(member)
        del self._of_slot[member.slot]

    def _vacate(self, member: _Member) -> None:
        """Take a sample out of the buffers; the last one takes its place."""
        last = self._members[-1]
        if last is not member:
            self._swap(member.place, last.place)
        self._members.pop()
        member.place = -1

    def _seat(self, member: _Member) -> None:
        """Put a sample behind the others in the buffers, as it was when it was parked."""
        place = len(self._members)
        buffers = self._buffers
        if member.parked is None:
            # The last sample in this place left its own values: 0 · inf would be NaN.
            buffers.state[place] = 0
            buffers.state[place, 0] = begin(member.job, self._shape)
            buffers.denoised[place] = 0
        else:
            buffers.state[place], buffers.denoised[place] = member.parked
            member.parked = None
        buffers.label[place] = member.job.label
        for name, value in member.job.conditions.items():
            buffers.conditions[name][place] = value
        member.place = place
        member.quiet = False  # nobody has cleared the noise of the last sample here
        self._members.append(member)

    def _choose(self, slots: Collection[int]) -> None:
        """Bring the samples that step into the buffers, and park the others."""
        if len(slots) > self.room:
            raise RequestError(f"at most {self.room} samples can step together, got {len(slots)}.")
        chosen = [self._member(slot) for slot in slots]
        if len(wanted := set(slots)) < len(slots):
            raise RequestError(f"a sample takes one step at a time, got slots {[*slots]}.")
        buffers = self._buffers
        for member in [m for m in self._members if m.slot not in wanted]:
            place = member.place
            if member.row:
                member.parked = Parked(buffers.state[place].copy(), buffers.denoised[place].copy())
            self._vacate(member)
        for member in chosen:
            if member.place < 0:
                self._seat(member)

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
        buffers = self._buffers
        arrays = (buffers.state, buffers.noise, buffers.denoised, buffers.label)
        for array in (*arrays, *buffers.conditions.values()):
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
