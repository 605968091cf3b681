"""What a model is: its samples, its prediction and schedule, and how it is sampled by default."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from types import MappingProxyType
from typing import Any, Unpack

from ..diffusion.grid import Grid, make_grid, spacing_of
from ..diffusion.guidance import interval_of
from ..diffusion.program import Program
from ..diffusion.schedule import Schedule
from ..diffusion.solvers import SOLVERS, make_program, options_of
from ..diffusion.tuned import TUNED, Tuned
from ..errors import RequestError, nearest
from ..errors.arguments import choice, flag, integer, number
from ..errors.keywords import check_options
from ..errors.messages import refused, shown, unwrapped
from .conditioned import Conditioned
from .distilled import Distilled
from .labels import Labels as Labels
from .sampling import ResolvedOptions, SamplingOptions, SolverOptions

ARGUMENTS = ("solver", "steps", "grid", "guidance", "guidance_interval", "strength", "up")
"""Arguments of `ModelSpec.program`, apart from a solver's own options."""


@dataclass(frozen=True)
class Defaults:
    """How a model is sampled unless the caller says otherwise."""

    solver: str = "ddim"
    steps: int = 50
    grid: str = "trailing"
    guidance: float = 1.0
    options: Mapping[str, object] = field(default_factory=dict)


@dataclass(frozen=True, eq=False, kw_only=True)
class ModelSpec(Conditioned):
    """A diffusion model without its weights. `runtime.Bundle` and `export.Model` add theirs.

    Attributes:
        sample_shape: *S, the shape of one sample, without the batch.
        sample_range: The smallest and the largest value of the data.
        prediction: What the network predicts, see `runtime.diffusion.program.precondition`.
        clip: The bound on |D|, the denoised estimate; None for no bound.
        tuned: Solvers fitted to the network, by their number of network calls.
        distilled: The numbers of calls that the network was distilled for; None if it was not.
    """

    sample_shape: tuple[int, ...]
    sample_range: tuple[float, float] = (-1.0, 1.0)
    prediction: str
    schedule: Schedule
    clip: float | None
    defaults: Defaults
    tuned: Mapping[int, Tuned] = field(default_factory=lambda: MappingProxyType({}))
    distilled: Distilled | None = None

    def spec_fields(self) -> dict[str, Any]:
        """Return the fields of `ModelSpec` alone, by name, for a class that adds to them."""
        return {f.name: getattr(self, f.name) for f in fields(ModelSpec)}

    @property
    def location(self) -> str:
        """What a command line calls this model: its name; for a bundle, its path."""
        return self.name

    @property
    def solvers(self) -> list[str]:
        """The names of the solvers that `program` accepts."""
        return [*SOLVERS, TUNED]

    def check_options(
        self, solver: object, options: Iterable[object], arguments: Iterable[str]
    ) -> None:
        """Check that a solver takes these options.

        Args:
            solver: None for the model's default.
            options: Their names, or a mapping by name.
            arguments: Names that the caller's function takes besides options. A misspelled option
                may have meant one of these.

        Raises:
            RequestError: The solver does not take an option; the message names the nearest one.
        """
        if not options:
            return
        name = self.defaults.solver if solver is None else choice("solver", solver, self.solvers)
        if name == TUNED:
            # Misspelled arguments only; `resolve` refuses the rest with a better reason.
            mistaken = [option for option in options if nearest(str(option), arguments)]
            check_options(f"solver {name!r}", mistaken, [], arguments)
        else:
            check_options(f"solver {name!r}", options, options_of(name), arguments)

    def resolve(self, asked: SamplingOptions) -> ResolvedOptions:
        """Check sampling options and fill in the model's defaults. Nothing else knows a default.

        Raises:
            RequestError: An option is unknown, out of range, or does not go with the others.
        """
        if not isinstance(asked.options, Mapping):
            rule = "a dict of the solver's options"
            raise refused("options", rule, asked.options, "Pass {} for none.")
        # Python's own numbers: JSON and the keys of cached programs know no others.
        options = {name: unwrapped(value) for name, value in asked.options.items()}
        solver = self.defaults.solver
        # The default options belong to the default solver: another one need not know them.
        if asked.solver is None:
            options = {**self.defaults.options, **options}
        else:
            solver = choice("solver", asked.solver, self.solvers)
        self.check_options(solver, options, ARGUMENTS)
        # `make_program` checks guidance.
        up = flag("up", asked.up)
        strength = number("strength", asked.strength, 0.0, 1.0)
        guidance = asked.guidance
        if guidance is None:
            # A default that the model cannot follow is dropped; only the caller's own is an error.
            guidance = self.defaults.guidance if self.can_guide else 1.0
        interval = asked.guidance_interval
        interval = None if interval is None else interval_of(interval)
        steps = unwrapped(asked.steps)
        grid: str | tuple[float, ...] | None = None
        if solver == TUNED:
            changed = {
                "a grid": asked.grid is not None,
                "strength": strength != 1,
                "a way up": up,
            }
            unsupported = [name for name, given in changed.items() if given] + list(options)
            steps = self._tuned_steps(steps, unsupported)
        else:
            steps, grid = self._spaced(steps, asked.grid, up)
        return ResolvedOptions(
            solver=solver,
            steps=steps,
            grid=grid,
            guidance=guidance,
            guidance_interval=interval,
            strength=strength,
            up=up,
            options=options,
        )

    def _spaced(
        self, steps: int | None, asked: object, up: bool
    ) -> tuple[int | None, str | tuple[float, ...]]:
        """Fill in the number of steps and the grid of a solver that takes one.

        Raises RequestError if a network that was distilled does not know them.
        """
        if self.distilled:
            return self.distilled.spaced(steps, asked, up, self.defaults.steps, self.name)
        grid = spacing_of(self.defaults.grid if asked is None else asked)
        # A grid that is given by its times has its own number of steps.
        if steps is None and isinstance(grid, str):
            steps = min(self.defaults.steps, len(self.schedule))
        return steps, grid

    def program_of(self, resolved: ResolvedOptions) -> Program:
        """Return the program of resolved options.

        Raises:
            RequestError: See `make_program`.
        """
        if resolved.grid is None:
            tuned = self.tuned[resolved.steps or 0]
            return tuned.program(
                self.schedule,
                self.prediction,
                clip=self.clip,
                guidance=resolved.guidance,
                guidance_interval=resolved.guidance_interval,
            )
        grid = make_grid(self.schedule, resolved.grid, resolved.steps).tail(resolved.strength)
        # On the way up D is never the final image, and a clip would lose what inversion needs.
        clip = None if resolved.up else self.clip
        options: dict[str, Any] = dict(resolved.options)
        program = make_program(
            self.schedule,
            self.prediction,
            resolved.solver,
            grid=grid.climbing() if resolved.up else grid,
            clip=clip,
            guidance=resolved.guidance,
            guidance_interval=resolved.guidance_interval,
            **options,
        )
        if self.distilled and resolved.grid in self.distilled.levels.values():
            self.distilled.require_learned(program, resolved.solver, self.name)
        return program

    def allowed_steps(self, steps: int) -> int:
        """Return the number of steps nearest to `steps` that a program of this model may have."""
        if self.distilled:
            return min(self.distilled.levels, key=lambda count: abs(count - steps))
        return min(steps, len(self.schedule))

    def grid(self, steps: int | None = None, grid: str | Sequence[float] | None = None) -> Grid:
        """Return a grid on the model's schedule; None selects the model's default.

        Raises:
            RequestError: See `make_grid`.
        """
        # Any solver that takes a grid serves: the default one may be tuned, and takes none.
        found = self.resolve(SamplingOptions(solver="ddim", steps=steps, grid=grid))
        assert found.grid is not None
        return make_grid(self.schedule, found.grid, found.steps)

    def program(
        self,
        solver: str | None = None,
        steps: int | None = None,
        grid: str | Sequence[float] | None = None,
        guidance: float = 1.0,
        guidance_interval: tuple[float, float] | None = None,
        strength: float = 1.0,
        up: bool = False,
        **options: Unpack[SolverOptions],
    ) -> Program:
        """Return the program of a solver for this model.

        The arguments are the fields of `SamplingOptions`, and the solver's own options; guidance is
        1 unless given.

        Raises:
            RequestError: See `resolve` and `make_program`.
        """
        asked = SamplingOptions(
            solver=solver,
            steps=steps,
            grid=grid,
            guidance=guidance,
            guidance_interval=guidance_interval,
            strength=strength,
            up=up,
            options=options,
        )
        return self.program_of(self.resolve(asked))

    def _tuned_steps(self, steps: int | None, unsupported: Sequence[object]) -> int:
        """Return a number of network calls that a solver was fitted for.

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
        return count
