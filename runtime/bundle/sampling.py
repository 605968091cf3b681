"""How a sample is made: the options as a caller gives them, and with every default filled in."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Self, TypedDict

from ..errors.keywords import check_options


class SolverOptions(TypedDict, total=False):
    """The options of all solvers, by name. `runtime.diffusion.solvers` says which takes which."""

    churn: float
    corrector: bool
    eta: float
    jump: int
    order: int
    r: float
    resample: int
    s_max: float
    s_min: float
    s_noise: float
    sigma_data: float
    timestep_scaling: float
    variance: str
    variant: str


@dataclass(frozen=True, eq=False, kw_only=True)
class SamplingOptions:
    """How a sample is made. None selects the model's default.

    Attributes:
        solver: The name of a solver, see `runtime.diffusion.solvers`.
        steps: The number of grid intervals.
        grid: The name of a grid, or its times.
        guidance: The classifier-free guidance scale; 1 is none.
        guidance_interval: (low, high], in sigma/alpha, where guidance holds.
        strength: The share of the grid that is used, counted from its clean end.
        up: Run the grid upwards and without the clip, which inverts a sample.
        options: The solver's own options.
    """

    solver: str | None = None
    steps: int | None = None
    grid: str | Sequence[float] | None = None
    guidance: float | None = None
    guidance_interval: tuple[float, float] | None = None
    strength: float = 1.0
    up: bool = False
    options: Mapping[str, object] = field(default_factory=dict)

    def __new__(cls, *_: object, **given: object) -> Self:
        # Python's own TypeError for a misspelled field would not suggest the nearest name.
        check_options(cls.__name__, given, [entry.name for entry in fields(cls)])
        return super().__new__(cls)


@dataclass(frozen=True, eq=False, kw_only=True)
class ResolvedOptions:
    """`SamplingOptions` with every default filled in; what `ModelSpec.program_of` runs.

    Attributes:
        steps: None if the caller gave the grid by its times.
        grid: None for a tuned solver, which uses its own levels.
    """

    solver: str
    steps: int | None
    grid: str | tuple[float, ...] | None
    guidance: float
    guidance_interval: tuple[float, float] | None
    strength: float
    up: bool
    options: Mapping[str, object]

    def to_json(self) -> dict[str, object]:
        """Return the JSON value."""
        return {**vars(self), "options": dict(self.options)}
