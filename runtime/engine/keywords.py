"""The keyword arguments of `Sampler`'s methods, for type checkers and editors.

Each class adds the keywords of some methods to those of another. Their meaning and range are
documented at `Sampler.sample` and `Request`.
"""

from __future__ import annotations

from collections.abc import Sequence

from ..backends.base import Float32
from ..bundle.sampling import SolverOptions
from .conditions import Conditions
from .loop import StepCallback

Labels = int | str | Sequence[int | str | None] | None
"""One label for all samples, or one each."""
Scales = float | Sequence[float | None] | None
"""One guidance scale for all samples, or one each."""


# Several classes, because a TypedDict may not repeat a named parameter of its function.
class ProgramKeywords(SolverOptions, total=False):
    """The program (solver, grid and guidance interval), and the conditions of its calls."""

    conditions: Conditions | None

    solver: str | None
    steps: int | None
    grid: str | Sequence[float] | None
    guidance_interval: tuple[float, float] | None


class GuidedKeywords(ProgramKeywords, total=False):
    """The program and its guidance scale; what the command line gives."""

    guidance: Scales


class LabelKeywords(GuidedKeywords, total=False):
    """The program, guidance and label; `animate`."""

    label: Labels


class RequestKeywords(LabelKeywords, total=False):
    """All fields of `Request` but the seed; `requests`."""

    convert: bool
    strength: float
    start: Float32 | None
    up: bool
    picture: Float32 | None
    known: Float32 | None
    mask: Float32 | None


class TranslateKeywords(ProgramKeywords, total=False):
    """`translate`, which names its labels and guidance itself."""

    on_step: StepCallback | None


class EditKeywords(LabelKeywords, total=False):
    """`stylize` and `inpaint`."""

    on_step: StepCallback | None


class WalkKeywords(EditKeywords, total=False):
    """`invert`, `interpolate` and `variations`. The first, and the second between images, may use a
    part of the grid.
    """

    strength: float


class SampleKeywords(WalkKeywords, total=False):
    """`pictures`: everything that `sample` takes."""

    convert: bool
    start: Float32 | None
