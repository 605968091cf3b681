"""A batch of samples in slots: each runs on its own row of its own program, and joins and leaves
between steps."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..backends.base import Buffers, Float32
from ..diffusion.noise import Stream, noise, noises
from ..diffusion.program import GUIDANCE, D, Program
from ..errors import RequestError


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
    """The part of an image that is known: `mask` is 1 there, 0 where it is to be painted, and may
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


class SlotPreview(NamedTuple):
    """How far the sample in a slot is, and what it would look like if it stopped here."""

    step: int  # rows done, 0 … steps
    steps: int  # rows of its program
    denoised: Float32  # [*S], the denoised estimate D of the last row; zeros before the first
    x: Float32  # [*S], the sample itself, as noisy as it is by now


class _Parked(NamedTuple):
    """What the buffers held of a sample."""

    state: Float32  # [R, *S]
    denoised: Float32  # [*S]


@dataclass(eq=False)
class _Member:
    """A sample that is under way: at a place in the buffers, or parked outside of them."""

    slot: int
    job: Job
    place: int = -1
    row: int = 0
    quiet: bool = False  # whether its noise buffer is zero
    parked: _Parked | None = None

    @property
    def done(self) -> bool:
        return self.row == len(self.job.table)


class Batch:
    """Up to `capacity` samples under way together. Use it from one thread at a time.

    A sample has the same bytes if others join or leave. Samples that are under way lie side by
    side in the buffers: first those whose next row is plain, then those whose next row is guided,
    so that each graph runs once a step, on a slice. If only some of them step, the others are
    parked outside the buffers, so there can be more samples than the buffers have room for.

        batch = Batch(buffers, sample_shape, capacity)
        slot = batch.admit(job)
        while slot not in (results := batch.finished()):
            batch.step()
        x = results[slot]
    """

    def __init__(
        self,
        buffers: Buffers,
        sample_shape: tuple[int, ...],
        capacity: int,
        room: int | None = None,
    ) -> None:
        """Make an empty batch.

        Args:
            buffers: With room for `room` samples, for this batch alone.
            sample_shape: S.
            capacity: Number of slots.
            room: Most samples of one step, 1 … capacity; None is `capacity`.
        """
        self.capacity = capacity
        self.room = capacity if room is None else room
        self._shape = sample_shape
        self._buffers = buffers
        self._members: list[_Member] = []
        self._of_slot: dict[int, _Member] = {}
        self._free = list(reversed(range(capacity)))
        self._results: dict[int, Float32] = {}

    def __len__(self) -> int:
        """Slots in use, those of finished samples among them."""
        return self.capacity - len(self._free)

    @property
    def live(self) -> int:
        """Samples that have rows left."""
        return sum(not member.done for member in self._members)

    def admit(self, job: Job) -> int:
        """Put a sample into a free slot, to start with the next step.

        Returns:
            The slot, 0 … capacity - 1.

        Raises:
            RequestError: no slot is free.
        """
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
                _blend(self._buffers, member.place, member.job.known, last=member.done)

    def finished(self) -> dict[int, Float32]:
        """The samples that have finished, [*S] each, by slot. Their slots are free after this."""
        self._retire()
        results = self._results
        self._results = {}
        self._free += results
        return results

    def cancel(self, slot: int) -> None:
        """Drop the sample in a slot, under way or finished, and free the slot.

        Raises:
            RequestError: the slot is free.
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
        """The sample in a slot as it is by now; copies. After `finished` or the next step, that of
        a finished sample is gone.

        Raises:
            RequestError: no sample is under way there.
        """
        member = self._member(slot)
        denoised, x = self.look([slot])
        return SlotPreview(member.row, len(member.job.table), denoised[0], x[0])

    def look(self, slots: Sequence[int]) -> tuple[Float32, Float32]:
        """The denoised estimates D and the samples x of some slots, [n, *S] each; copies."""
        members = [self._member(slot) for slot in slots]
        shape = (len(members), *self._shape)
        denoised = np.zeros(shape, np.float32)
        x = np.zeros(shape, np.float32)
        for i, member in enumerate(members):
            if member.place >= 0:
                denoised[i] = self._buffers.denoised[member.place]
                x[i] = self._buffers.state[member.place, 0]
            elif member.parked is not None:
                denoised[i] = member.parked.denoised
                x[i] = member.parked.state[0]
            else:
                x[i] = begin(member.job, self._shape)
        return denoised, x

    def _member(self, slot: int) -> _Member:
        if slot not in self._of_slot:
            raise RequestError(f"no sample is under way in slot {slot}.")
        return self._of_slot[slot]

    def _retire(self) -> None:
        """Copy out what has finished, and close the gaps."""
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
            buffers.state[place] = 0
            buffers.state[place, 0] = begin(member.job, self._shape)
            buffers.denoised[place] = 0
        else:
            buffers.state[place] = member.parked.state
            buffers.denoised[place] = member.parked.denoised
            member.parked = None
        buffers.label[place] = member.job.label
        member.place = place
        member.quiet = False
        self._members.append(member)

    def _choose(self, slots: Collection[int]) -> None:
        """Bring the samples that step into the buffers, and park the others."""
        if len(slots) > self.room:
            raise RequestError(f"at most {self.room} samples can step together, got {len(slots)}.")
        chosen = [self._member(slot) for slot in slots]
        if len({*slots}) < len(slots):
            raise RequestError(f"a sample takes one step at a time, got slots {[*slots]}.")
        stepping = {*slots}
        for member in [m for m in self._members if m.slot not in stepping]:
            if member.row:
                state = self._buffers.state[member.place].copy()
                denoised = self._buffers.denoised[member.place].copy()
                member.parked = _Parked(state, denoised)
            self._vacate(member)
        for member in chosen:
            if member.place < 0:
                self._seat(member)

    def _arrange(self) -> int:
        """Bring samples whose next row is guided behind the others. Returns how many come
        before."""
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
        # The noise of a row is drawn for all samples at once that stand at the same one.
        for row, members in noisy.items():
            places = [member.place for member in members]
            seeds = [member.job.seed for member in members]
            buffers.noise[places] = noises(seeds, Stream.STEP, row, self._shape)


def _blend(buffers: Buffers, place: int, known: Known, last: bool) -> None:
    """A sample's row as if D had been the known image where it is known.

    Each register takes up the change of D by its own weight.
    """
    change = known.mask * (known.picture - buffers.denoised[place])
    weights = buffers.update[place, :, D]
    buffers.state[place] += weights.reshape(-1, *[1] * change.ndim) * change
    buffers.denoised[place] += change
    if last:  # bit-exact what was passed in
        np.copyto(buffers.state[place, 0], known.picture, where=known.mask == 1)
