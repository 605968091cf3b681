"""What runtime.bench measures of a backend in a precision."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field

import numpy as np

from ..backends.base import Float32


@dataclass(frozen=True)
class Cold:
    """The first image of a fresh process; medians of several processes.

    Attributes:
        first_picture_s: From the start of the process. Importing, loading and sampling are parts.
        peak_mib: The process's peak memory; None if the system does not report it.
    """

    first_picture_s: float
    import_s: float
    load_s: float
    sample_s: float
    peak_mib: float | None


@dataclass(frozen=True)
class Speed:
    """One batch size.

    Attributes:
        timed: The number of timed calls.
        latency_ms: Percentiles of a whole call of `Sampler.sample`, as "p50".
        call_ms: The median of one call of the network.
        loop: The share of the latency that is not spent in calls of the network.
    """

    batch: int
    timed: int
    latency_ms: Mapping[str, float]
    samples_per_s: float
    call_ms: float
    loop: float


@dataclass
class Result:
    """A backend in a precision.

    Attributes:
        psnr_db: Of its samples against the reference's, the median; None for the reference itself.
        rms: Of the differences from the reference's samples; None for the reference itself.
        samples: [n, *S].
    """

    backend: str
    precision: str
    speeds: list[Speed] = field(default_factory=list)
    cold: Cold | None = None
    psnr_db: float | None = None
    rms: float | None = None
    samples: Float32 | None = None

    @property
    def name(self) -> str:
        """The backend and the precision."""
        return f"{self.backend} {self.precision}"

    @property
    def nearness(self) -> str:
        """How close the samples are to the reference's, in a few characters."""
        if self.psnr_db is None:
            return "reference"
        if not math.isfinite(self.psnr_db):
            return "not finite"
        return "the same" if self.rms == 0 else f"{self.psnr_db:.1f} dB"

    def to_json(self) -> dict[str, object]:
        """Return the JSON value, without the samples.

        A distance from or to samples that are not finite is null.
        """
        finite = self.samples is None or bool(np.isfinite(self.samples).all())
        return {
            "backend": self.backend,
            "precision": self.precision,
            "finite": finite,
            "psnr_db": _number(self.psnr_db),
            "rms": _number(self.rms),
            "cold": self.cold and asdict(self.cold),
            "batches": [asdict(speed) for speed in self.speeds],
        }


def _number(value: float | None) -> float | None:
    """A value that JSON can hold."""
    return value if value is not None and math.isfinite(value) else None
