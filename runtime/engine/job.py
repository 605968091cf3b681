"""Jobs: what a batch runs. A job is one sample, its program and where it starts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..backends.base import Buffers, Float32
from ..diffusion.arrays import Array
from ..diffusion.noise import Stream, noise
from ..diffusion.program import GUIDANCE, D, Program


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


CLEAN = np.array([1.0, 0.0], np.float32)
"""The level (alpha, sigma) of an image without noise."""


def lifted(x: Float32 | None, low: Float32, high: Float32, seed: int) -> Float32 | None:
    """Return x [*S] of one level (alpha, sigma) with the seed's noise up to a noisier one."""
    if x is None or (low == high).all():
        return x
    ratio = high[0] / low[0]
    missing = np.sqrt(high[1] ** 2 - (ratio * low[1]) ** 2)
    return ratio * x + missing * noise(seed, Stream.ENCODE, 0, x.shape)


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
        conditions: [*shape] each, by the names of the graphs' inputs.
    """

    seed: int
    label: int
    table: Table
    x: Float32 | None = None
    known: Known | None = None
    conditions: Mapping[str, Array] = field(default_factory=dict)


class Parked(NamedTuple):
    """What the buffers held of a sample that does not step."""

    state: Float32  # [R, *S]
    denoised: Float32  # [*S]


def begin(job: Job, shape: tuple[int, ...]) -> Float32:
    """Return x [*S] before the job's first row."""
    return job.table.start * noise(job.seed, Stream.INITIAL, 0, shape) if job.x is None else job.x


def blend(buffers: Buffers, place: int, known: Known, last: bool) -> None:
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
