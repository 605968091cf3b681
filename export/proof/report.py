"""The result of a proof as dataclasses: what report.json, the card and bundle.json say of it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import numpy as np

from ..graph.convert import Conversion
from ..tuning.record import TunedCheck, checks_to_json
from .plan import Bounds, Plan


@dataclass(frozen=True)
class Worst:
    """The largest difference of one kind, its bound, and where it occurred."""

    error: float
    bound: float
    where: str

    def __or__(self, other: Worst) -> Worst:
        """Return the one that is nearer to its bound or further beyond it; NaN is beyond all."""
        return max(self, other, key=Worst._share)

    def _share(self) -> float:
        """Return the share of the bound that the error takes; NaN is beyond all."""
        if np.isnan(self.error):
            return np.inf
        # A bound of 0 is for equal numbers.
        if not self.bound:
            return np.inf if self.error else 0.0
        return self.error / self.bound

    @property
    def passes(self) -> bool:
        """Whether the error is within the bound; NaN never is."""
        return self.error <= self.bound


LOST = 1e9
"""The figure that stands for NaN and infinity, which JSON lacks."""
NONE = Worst(0.0, 1.0, "nowhere")


@dataclass(frozen=True)
class LevelError:
    """The largest differences at one level of the schedule."""

    time: float
    sigma: float
    answer: float
    next_state: float


@dataclass(frozen=True)
class StepCheck:
    """How one step graph compares with PyTorch, and a sample with itself in other batches.

    Attributes:
        answer: The largest difference of the network's prediction F.
        next_state: The largest difference of the state after a row.
        not_finite: How many values of F were NaN or infinite.
        guidance: The largest guidance scale that was compared.
        by_time: The differences at each level, the least noisy first.
        unlike_alone: The first place that made the bytes of a sample depend on its batch, and why;
            "" if there is none.
        mixes_samples: Whether they depend on the other samples, not only on rounding.
    """

    answer: Worst
    next_state: Worst
    not_finite: int = 0
    guidance: float = 1.0
    by_time: tuple[LevelError, ...] = ()
    unlike_alone: str = ""
    mixes_samples: bool = False

    @property
    def batch_invariant(self) -> bool:
        """Whether every sample had the same bytes in every batch."""
        return not self.unlike_alone

    def to_json(self) -> dict[str, object]:
        """Return the check as report.json has it."""
        return {
            "answer": vars(self.answer),
            "next_state": vars(self.next_state),
            "batch_invariant": self.batch_invariant,
            "unlike_alone": self.unlike_alone,
            "mixes_samples": self.mixes_samples,
            "not_finite": self.not_finite,
            "guidance": self.guidance,
            "by_time": [vars(level) for level in self.by_time],
        }


@dataclass(frozen=True)
class TrajectoryCheck:
    """How the final samples of one trajectory compare with PyTorch's.

    Attributes:
        trajectory: Solver, steps and guidance in words.
        error: The largest difference of the step graph's samples.
        psnr_db: The median PSNR of these samples.
        loop_graph: The largest difference between the loop graph's samples and the step graph's;
            None on backends that do not run the loop graph.
    """

    trajectory: str
    error: float
    bound: float
    psnr_db: float
    loop_graph: float | None = None

    def to_json(self) -> dict[str, object]:
        """Return the check as report.json has it."""
        return {name: value for name, value in vars(self).items() if value is not None}


@dataclass(frozen=True)
class PrecisionCheck:
    """Everything that was compared for one precision on one backend.

    Attributes:
        steps: By the name of the step graph, "step" or "step_guided".
        identity: Whether an identity row returns the state bit for bit.
        psnr_db: Median PSNR of final images compared with fp32's, by solver and steps.
        ms_a_call: Milliseconds of one network call, by batch size.
        missed: What the check missed, in words; see `verdict`.
    """

    precision: str
    backend: str
    steps: Mapping[str, StepCheck]
    trajectories: tuple[TrajectoryCheck, ...]
    identity: bool
    psnr_db: Mapping[str, float] = field(default_factory=dict)
    ms_a_call: Mapping[str, float] = field(default_factory=dict)
    missed: tuple[str, ...] = ()

    def to_json(self) -> dict[str, object]:
        """Return the check as report.json has it."""
        return {
            "steps": {name: step.to_json() for name, step in self.steps.items()},
            "trajectories": [trajectory.to_json() for trajectory in self.trajectories],
            "identity": self.identity,
            "psnr_db": dict(self.psnr_db),
            "ms_a_call": dict(self.ms_a_call),
            "missed": list(self.missed),
        }

    @property
    def largest_answer(self) -> float:
        """The largest difference of F over all step graphs."""
        return max(step.answer.error for step in self.steps.values())

    def summary(self) -> dict[str, object]:
        """Return the worst case of each kind, which bundle.json states."""
        return {
            "answer": self.largest_answer,
            "next_state": max(step.next_state.error for step in self.steps.values()),
            "trajectory": max(trajectory.error for trajectory in self.trajectories),
            "psnr_db": min(self.psnr_db.values()),
            "ms_a_call": dict(self.ms_a_call),
            "missed": len(self.missed),
        }


@dataclass(frozen=True)
class Report:
    """The result of a proof.

    Attributes:
        checks: One for each precision and backend, fp32 on ONNX Runtime first.
        versions: The versions of the libraries that made and checked the export.
        tuned: The tuned solvers by their number of calls, if the bundle has any.
    """

    bounds: Bounds
    plan: Plan
    checks: tuple[PrecisionCheck, ...]
    conversion: Conversion = field(default_factory=Conversion)
    versions: Mapping[str, str] = field(default_factory=dict)
    tuned: Mapping[int, TunedCheck] = field(default_factory=dict)

    @property
    def same_bytes(self) -> bool:
        """Whether a sample has the same bytes in any batch, on every offered backend."""
        # A backend that missed its bounds is not offered, so no user meets its bytes.
        offered = (check for check in self.checks if not check.missed)
        return all(step.batch_invariant for check in offered for step in check.steps.values())

    @property
    def precisions(self) -> tuple[str, ...]:
        """The precisions that were checked."""
        return tuple(dict.fromkeys(check.precision for check in self.checks))

    def to_json(self) -> dict[str, object]:
        """Return the value of report.json."""
        value = {
            "bounds": self.bounds.to_json(),
            "plan": self.plan.to_json(),
            "precisions": _by_backend((check, check.to_json()) for check in self.checks),
            **self.conversion.to_json(),
            "same_bytes": self.same_bytes,
            "versions": dict(self.versions),
            **({"tuned": checks_to_json(self.tuned)} if self.tuned else {}),
        }
        return {name: _finite(entry) for name, entry in value.items()}

    def summary(self) -> dict[str, dict[str, dict[str, object]]]:
        """Return the report in a few numbers by precision and backend, for bundle.json."""
        figures = ((check, check.summary()) for check in self.checks)
        return _by_backend(
            (check, {name: _finite(figure) for name, figure in entry.items()})
            for check, entry in figures
        )


def _finite(value: object) -> object:
    """Return a JSON value with numbers for NaN and infinities, which a backend may compute."""
    if isinstance(value, float):
        return value if math.isfinite(value) else math.copysign(LOST, value)
    if isinstance(value, Mapping):
        return {name: _finite(entry) for name, entry in value.items()}
    return [*map(_finite, value)] if isinstance(value, (list, tuple)) else value


def _by_backend(
    entries: Iterable[tuple[PrecisionCheck, dict[str, object]]],
) -> dict[str, dict[str, dict[str, object]]]:
    """Return {precision: {backend: value}}."""
    nested: dict[str, dict[str, dict[str, object]]] = {}
    for check, value in entries:
        nested.setdefault(check.precision, {})[check.backend] = value
    return nested
