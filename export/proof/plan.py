"""How much the proof compares, and which differences pass."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field

from runtime.errors import unknown
from runtime.errors.arguments import elements, instance, integer, number
from runtime.errors.messages import refused

from ..sources.model import checked_ways

SIZES = ("batches", "sizes", "quantized_sizes")
"""Settings that are lists of batch sizes."""


@dataclass(frozen=True)
class Plan:
    """How much is compared.

    Args:
        batches: Batch sizes that are compared with PyTorch, in each of `times` shuffled batches.
        sizes: Further sizes, in one batch each, at which a sample is compared with itself alone.
        quantized_sizes: The same for int8, whose kernels libraries switch at more sizes.
        times: Levels across the schedule.
        pictures: Samples of every trajectory.
        steps: Grid intervals of every trajectory.
        samples: How many images the model card shows.
        judged: Images by which another precision is compared with fp32.
        ways: The (solver, steps) of these images.

    Raises:
        RequestError: A number is below 1, or there is none.
    """

    batches: tuple[int, ...] = (1, 3, 16)
    sizes: tuple[int, ...] = (2, 5, 8)
    quantized_sizes: tuple[int, ...] = (*range(2, 18), 24, 32, 33)
    times: int = 13
    pictures: int = 3
    steps: int = 50
    samples: int = 36
    judged: int = 16
    ways: tuple[tuple[str, int], ...] = (("dpmpp_2m", 20), ("ddim", 50))

    def __post_init__(self) -> None:
        # Frozen, so that checked values can only be set this way.
        for name, value in dict(vars(self)).items():
            if name == "ways":
                found: object = checked_ways(value)
            elif name in SIZES:
                entries = elements(name, value, "a list of batch sizes, not empty")
                found = tuple(integer(name, entry, 1) for entry in entries)
            else:
                found = integer(name, value, 1)
            if not found:
                raise refused(name, "a list of batch sizes, not empty", value)
            object.__setattr__(self, name, found)

    def to_json(self) -> dict[str, object]:
        """Return the plan as the report states it."""
        return asdict(self)


QUICK = Plan(
    batches=(1, 3),
    sizes=(2, 5),
    quantized_sizes=(2, 4, 5, 8, 16),
    times=5,
    pictures=1,
    steps=10,
    samples=4,
    judged=2,
    ways=(("dpmpp_2m", 10), ("ddim", 10)),
)
"""For large networks: about a twentieth of the work."""
LEAST = Plan(
    batches=(1, 2),
    sizes=(3,),
    quantized_sizes=(2, 3),
    times=2,
    pictures=1,
    steps=2,
    samples=1,
    judged=1,
    ways=(("ddim", 2),),
)
"""The least that compares every promise: both ends of the schedule, a sample alone and in batches
of two sizes, and every solver of a proof to its end."""
LADDER = (
    Plan(),
    Plan(
        batches=(1, 3, 8),
        quantized_sizes=(2, 4, 5, 8, 16),
        times=9,
        pictures=2,
        steps=25,
        samples=16,
        judged=8,
        ways=(("dpmpp_2m", 20), ("ddim", 25)),
    ),
    QUICK,
    Plan(
        batches=(1, 2),
        sizes=(3,),
        quantized_sizes=(2, 3, 5),
        times=3,
        pictures=1,
        steps=5,
        samples=4,
        judged=1,
        ways=(("ddim", 5),),
    ),
    LEAST,
)
"""Plans from the default to the least, for a proof that has a time."""


PSNR = {"fp16": 40.0, "bf16": 25.0, "int8": 35.0, "int8-trt": 35.0}
"""By precision, the least median PSNR in dB of final images compared with fp32's."""


@dataclass(frozen=True)
class Bounds:
    """The largest differences that pass, for data in the range -1 … 1.

    Args:
        answer: Of the network's prediction F, in fp32.
        next_state: Of the state after a row, in fp32, times max(1, sigma). What the difference and
            the rounding of F come to in that row is allowed for on top: the row multiplies F by up
            to sigma/alpha.
        trajectory: Of final samples, in fp32, times the largest value of PyTorch's samples if that
            is above 1, as it may be without a clip.
        psnr: By precision, the least median PSNR in dB of final images compared with fp32's.
            Differences at single steps are reported for these precisions and never fail an export.
            Precisions that are left out have the defaults.

    Raises:
        RequestError: A bound is not a number from 0 on, or the precision of one is unknown.
    """

    answer: float = 1e-4
    next_state: float = 1e-4
    trajectory: float = 2e-3
    psnr: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        # Frozen, so that checked values can only be set this way.
        for name in ("answer", "next_state", "trajectory"):
            object.__setattr__(self, name, number(name, getattr(self, name), 0.0, 1e30))
        psnr = instance("psnr", self.psnr, Mapping, "Pass decibels by precision.")
        for precision in psnr:
            if precision not in PSNR:
                raise unknown("precision in psnr", str(precision), PSNR)
        given = {name: number(f"psnr[{name!r}]", db, -1e3, 1e3) for name, db in psnr.items()}
        object.__setattr__(self, "psnr", {**PSNR, **given})

    def to_json(self) -> dict[str, object]:
        """Return the bounds as the report states them."""
        return {**vars(self), "psnr": dict(self.psnr)}
