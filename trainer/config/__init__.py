"""The config of a run: one frozen record, checked when it is made, printed, and saved in the
run."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from runtime.diffusion.grid import make_grid
from runtime.diffusion.program import Program
from runtime.diffusion.schedule import Schedule, make_schedule
from runtime.diffusion.solvers import make_program
from runtime.errors import RequestError, unknown
from runtime.errors.messages import refused

from .distillation import Distillation, require_readable, with_lists
from .options import Options
from .validation import checked

OF_CONDITIONS = ("task", "factor", "condition_column", "condition_dropout")
"""Options that a run without conditions does not record, unless they were set."""


@dataclass(frozen=True)
class Config(Options):
    """Everything that decides what a run learns: its `Options`, checked.

    Two runs with equal configs on one machine end with equal weights.

    Attributes:
        distillation: None for a run that learns from the data alone.

    Raises:
        RequestError: A value has the wrong type, is out of range, or contradicts another.
    """

    distillation: Distillation | None = None

    def __post_init__(self) -> None:
        for name, value in checked(self).items():
            # The dataclass is frozen. NumPy's numbers become Python's here, which JSON needs.
            object.__setattr__(self, name, value)
        # At alpha = 0, x_t is the noise itself, and predicting it is trivial.
        if self.prediction == "epsilon" and self.make_schedule().alpha[-1] == 0:
            raise RequestError(
                "an epsilon network says nothing at zero terminal SNR: use --prediction v, x0 or "
                "flow, or another schedule."
            )
        if self.distillation is not None and not isinstance(self.distillation, Distillation):
            raise refused("distillation", "a Distillation", self.distillation)
        if self.distillation:
            self.distillation.require_fitting(self.T, len(self.ema_half_life))
            require_readable(self.prediction, self.make_schedule())
        # Now, because the first grid would find a wrong solver hours later.
        self.sample_program()

    @property
    def conditioned(self) -> bool:
        """Whether the network is conditioned on more than a class."""
        return bool(self.task or self.condition_column) or self.data.startswith("pairs:")

    def make_schedule(self) -> Schedule:
        """Return the runtime's schedule that this config names."""
        schedule = make_schedule(self.schedule, T=self.T)
        return schedule.zero_terminal_snr() if self.zero_terminal_snr else schedule

    def sample_program(self, solver: str = "", steps: int = 0) -> Program:
        """Return the program that samples for grids and measurements.

        Args:
            solver: By default sample_solver.
            steps: By default sample_steps; at most one for each noise level.

        Raises:
            RequestError: There is no such solver, or it has no such program; or the network is
                distilled for other numbers of steps.
        """
        schedule = self.make_schedule()
        solver = solver or self.sample_solver
        count = min(steps or self.sample_steps, self.T)
        if self.distillation:
            times = schedule.time[list(self.distillation.knots(count, self.T))]
            grid = make_grid(schedule, times.tolist())
            return make_program(schedule, self.prediction, solver, grid=grid, clip=1.0)
        return make_program(schedule, self.prediction, solver, count, clip=1.0)

    def to_json(self) -> dict[str, Any]:
        """Return what config.json holds: every option, tuples as lists."""
        value = dataclasses.asdict(self)
        # Runs that learn from the data alone keep the record that they always had.
        del value["distillation"]
        if not self.conditioned:
            for name in OF_CONDITIONS:
                if value[name] == getattr(Options, name):
                    del value[name]
        more = {"distillation": self.distillation.to_json()} if self.distillation else {}
        return with_lists(value) | more

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Config:
        """Return the config that `to_json` wrote.

        Raises:
            RequestError: A key is not an option.
        """
        known = {f.name for f in dataclasses.fields(cls)}
        for key in value:
            if key not in known:
                raise unknown("config key", key, sorted(known))
        given: dict[str, Any] = {
            k: tuple(v) if isinstance(v, list) else v for k, v in value.items()
        }
        if isinstance(distillation := given.get("distillation"), Mapping):
            given["distillation"] = Distillation.from_json(distillation)
        return cls(**given)
