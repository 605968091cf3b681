"""The keyword arguments of `Sampler`'s methods, for type checkers and editors.

Each class adds the keywords of some methods to those of another. Their meaning and range are
documented at `Sampler.sample` and `Request`.
"""

from __future__ import annotations

from collections.abc import Sequence

from ..backends.base import Float32
from ..bundle.sampling import SolverOptions
from .loop import StepCallback

Labels = int | str | Sequence[int | str | None] | None
"""One label for all samples, or one each."""
Scales = float | Sequence[float | None] | None
"""One guidance scale for all samples, or one each."""


class ProgramKeywords(SolverOptions, total=False):
    """How the grid is walked."""

    solver: str | None
    steps: int | None
    grid: str | Sequence[float] | None
    guidance_interval: tuple[float, float] | None


class GuidedKeywords(ProgramKeywords, total=False):
    """... with guidance."""

    guidance: Scales


class LabelKeywords(GuidedKeywords, total=False):
    """... under a label."""

    label: Labels


class RequestKeywords(LabelKeywords, total=False):
    """All fields of `Request` but the seed."""

    strength: float
    start: Float32 | None
    up: bool
    picture: Float32 | None
    known: Float32 | None
    mask: Float32 | None


class TranslateKeywords(ProgramKeywords, total=False):
    """... whose steps a callback sees."""

    on_step: StepCallback | None


class EditKeywords(LabelKeywords, total=False):
    """... whose steps a callback sees."""

    on_step: StepCallback | None


class WalkKeywords(EditKeywords, total=False):
    """... along a part of the grid."""

    strength: float


class SampleKeywords(WalkKeywords, total=False):
    """... from a given start."""

    start: Float32 | None
