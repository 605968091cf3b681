"""What a model is: its samples, its prediction and schedule, and how it is sampled by default."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from difflib import get_close_matches
from types import MappingProxyType
from typing import Any

from .arguments import check_options, choice, flag, integer, number, refused, shown, unwrapped
from .diffusion.grid import Grid, make_grid, spacing_of
from .diffusion.program import Program
from .diffusion.schedule import Schedule
from .diffusion.solvers import SOLVERS, make_program, options_of
from .diffusion.tuned import TUNED, Tuned
from .errors import RequestError

ARGUMENTS = ("solver", "steps", "grid", "guidance", "guidance_interval", "strength", "up")
"""Arguments of `ModelSpec.program`, apart from a solver's own options."""


@dataclass(frozen=True)
class Defaults:
    """How a model is sampled unless the caller says otherwise."""

    solver: str = "ddim"
    steps: int = 50
    grid: str = "trailing"
    guidance: float = 1.0
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Labels:
    """The names of the classes, in the network's order.

    Attributes:
        null_trained: Whether the null label, number len(names), was trained.
    """

    names: tuple[str, ...]
    null_trained: bool


@dataclass(frozen=True, eq=False, kw_only=True)
class ModelSpec:
    """A diffusion model without its weights. `runtime.Bundle` and `export.Model` add theirs.

    Attributes:
        sample_shape: *S, the shape of one sample, without the batch.
        sample_range: The smallest and the largest value of the data.
        prediction: What the network predicts, see `runtime.diffusion.program.precondition`.
        clip: The bound on |D|, the denoised estimate; None for no bound.
        labels: The classes; None for a model without labels.
        tuned: Solvers fitted to the network, by their number of network calls.
    """

    name: str
    sample_shape: tuple[int, ...]
    sample_range: tuple[float, float] = (-1.0, 1.0)
    prediction: str
    schedule: Schedule
    clip: float | None
    labels: Labels | None
    defaults: Defaults
    tuned: Mapping[int, Tuned] = field(default_factory=lambda: MappingProxyType({}))

    def spec_fields(self) -> dict[str, Any]:
        """The fields of `ModelSpec` alone, by name: what a bundle takes over from a model."""
        return {f.name: getattr(self, f.name) for f in fields(ModelSpec)}

    @property
    def num_classes(self) -> int:
        """The number of classes, 0 without labels. Also the number of the null label."""
        return len(self.labels.names) if self.labels else 0

    @property
    def can_guide(self) -> bool:
        """Whether guidance has a prediction to contrast with: the null label was trained."""
        return self.labels is not None and self.labels.null_trained

    @property
    def null_label(self) -> int | None:
        """The number of the null label; None if there is none or it was not trained."""
        return self.num_classes if self.can_guide else None

    @property
    def num_labels(self) -> int:
        """The number of labels that the network knows, a trained null label included."""
        return self.num_classes + self.can_guide

    @property
    def location(self) -> str:
        """What a command line calls this model: its name; for a bundle, its path."""
        return self.name

    def label_number(self, label: int | str | None) -> int:
        """Return the number of a label.

        Args:
            label: A name, a number, or None for the null label.

        Raises:
            RequestError: There is no such label.
        """
        label = unwrapped(label)
        if self.labels is None:
            if label is not None:
                raise RequestError(
                    f"{self.name} has no labels, got label={shown(label)}. Leave `label` out."
                )
            return 0
        names = self.labels.names
        count = self.num_classes
        if label is None:
            if not self.labels.null_trained:
                raise RequestError(
                    f"{self.name} was trained with labels only: give one of {', '.join(names)}."
                )
            return count
        if isinstance(label, str):
            if label in names:
                return names.index(label)
            if not re.fullmatch("-?[0-9]{1,18}", label):
                choice("label", label, names)  # raises, with the nearest name
            label = int(label)
        try:
            return integer("label", label, 0, count - 1)
        except RequestError:
            pass
        if isinstance(label, int) and not isinstance(label, bool):
            raise RequestError(
                f"label {shown(label)} is out of range: "
                f"{self.name} has labels 0 to {count - 1} ({names[0]} … {names[-1]})."
            )
        raise refused("label", f"a name or a number from 0 to {count - 1}", label)

    @property
    def solvers(self) -> list[str]:
        """The names of the solvers that `program` accepts."""
        return [*SOLVERS, TUNED]

    def check_options(
        self, solver: str | None, options: Mapping[Any, Any], arguments: Iterable[str]
    ) -> None:
        """Check that a solver takes these options.

        Args:
            solver: None for the model's default.
            options: By name.
            arguments: Names that the caller's function takes besides options. A misspelled option
                may have meant one of these.

        Raises:
            RequestError: The solver does not take an option; the message names the nearest one.
        """
        if not options:
            return
        name = self.defaults.solver if solver is None else choice("solver", solver, self.solvers)
        if name == TUNED:
            mistaken = [option for option in options if get_close_matches(str(option), arguments)]
            check_options(f"solver {name!r}", dict.fromkeys(mistaken), [], arguments)
        else:
            check_options(f"solver {name!r}", options, options_of(name), arguments)

    def grid(self, steps: int | None = None, grid: str | Sequence[float] | None = None) -> Grid:
        """Return a grid on the model's schedule; None selects the model's default.

        Raises:
            RequestError: See `make_grid`.
        """
        spacing = spacing_of(self.defaults.grid if grid is None else grid)
        if steps is None and isinstance(spacing, str):
            steps = min(self.defaults.steps, len(self.schedule))
        return make_grid(self.schedule, spacing, steps)

    def program(
        self,
        solver: str | None = None,
        steps: int | None = None,
        grid: str | Sequence[float] | None = None,
        guidance: float = 1.0,
        guidance_interval: tuple[float, float] | None = None,
        strength: float = 1.0,
        up: bool = False,
        **options: Any,
    ) -> Program:
        """Return the program of a solver for this model; None selects the model's default.

        Args:
            strength: The share of the grid that is used, counted from its clean end.
            up: Run the grid upwards and without the clip, which inverts a sample.

        Raises:
            RequestError: See `make_program`.
        """
        if solver is None:
            solver = self.defaults.solver
            options = {**self.defaults.options, **options}
        solver = choice("solver", solver, self.solvers)
        self.check_options(solver, options, ARGUMENTS)
        up = flag("up", up)
        strength = number("strength", strength, 0.0, 1.0)
        if solver == TUNED:
            changed = {"a grid": grid is not None, "strength": strength != 1, "a way up": up}
            unsupported = [name for name, given in changed.items() if given] + list(options)
            return self._tuned_solver(steps, unsupported).program(
                self.schedule,
                self.prediction,
                clip=self.clip,
                guidance=guidance,
                guidance_interval=guidance_interval,
            )
        used = self.grid(steps, grid).tail(strength)
        return make_program(
            self.schedule,
            self.prediction,
            solver,
            grid=used.climbing() if up else used,
            clip=None if up else self.clip,
            guidance=guidance,
            guidance_interval=guidance_interval,
            **options,
        )

    def _tuned_solver(self, steps: int | None, unsupported: Sequence[object]) -> Tuned:
        """Return the solver fitted for `steps` network calls.

        None selects the default number of calls if a solver was fitted for it, else the largest.
        Raises RequestError if anything is `unsupported`, or if no solver has so many calls.
        """
        if unsupported:
            raise RequestError(
                f"solver {TUNED!r} uses its own levels, from pure noise down, and takes no "
                f"options, got {', '.join(str(name)[:60] for name in unsupported)}. Leave it out, "
                "or use another solver."
            )
        if not self.tuned:
            raise RequestError(
                f"{self.name} has no tuned solver. To fit one: python -m export.tune "
                f"{self.location}"
            )
        if steps is None:
            default = self.defaults.steps
            steps = default if default in self.tuned else max(self.tuned)
        fitted = ", ".join(map(str, sorted(self.tuned)))
        count = integer("steps", steps, 1, None, f"Pass one of {fitted}.")
        if count not in self.tuned:
            raise RequestError(
                f"`steps` must be one of {fitted}, for which solver {TUNED!r} of {self.name} was "
                f"fitted, got {shown(steps)}."
            )
        return self.tuned[count]
