"""The settings that describe a network of any kind: checked, and as fields of a `Model`."""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeVar, cast

from runtime.bundle.conditions import Condition
from runtime.bundle.sampling import SolverOptions
from runtime.bundle.spec import Defaults
from runtime.diffusion.arrays import Array
from runtime.diffusion.program import PREDICTIONS
from runtime.diffusion.schedule import SCHEDULES, Schedule, make_schedule
from runtime.diffusion.solvers import make_program
from runtime.errors import RequestError, unknown
from runtime.errors.arguments import elements, integer, number, text
from runtime.errors.messages import described, shown
from runtime.files import from_json, to_json

from .conditions import conditioned
from .model import Model, json_object, make_labels

MOST_VALUES = 2**26
"""The most values of a sample: 4,096 × 4,096 in four channels."""
MOST_CLASSES = 1_000_000
NOT_OPTIONS = frozenset(inspect.signature(make_program).parameters) - {"options"}
"""Arguments of `make_program`, which a solver's options may not replace."""
AnyModel = TypeVar("AnyModel", bound=Model)


def fields_of(
    *,
    name: str,
    sample_shape: Sequence[int],
    prediction: str,
    schedule: Schedule | str,
    num_classes: int = 0,
    null_label: int | None = None,
    label_names: Sequence[str] | None = None,
    conditions: Sequence[Condition] = (),
    nulls: Mapping[str, Array] | None = None,
    examples: Mapping[str, Array] | None = None,
    clip: float | None = None,
    sample_range: Sequence[float] = (-1.0, 1.0),
    solver: str = "ddim",
    steps: int | None = None,
    grid: str = "trailing",
    options: Mapping[str, Any] | None = None,
    guidance: float = 2.0,
    provenance: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Return the fields of `Model` that these settings are.

    Args:
        name: The bundle's name.
        sample_shape: *S, 1 to 4 integers.
        prediction: What F is, see `runtime.diffusion.program.precondition`.
        schedule: A `Schedule` or the name of one.
        num_classes, label_names: The classes in the network's order, without the null label.
        null_label: The label that means no label, if trained, in 0 … num_classes.
        conditions: What the network takes by name besides, [B, *shape] each.
        nulls, examples: See `Model`; examples are random by default.
        clip: The bound on the denoised estimate [none]. Images in -1 … 1 need 1.
        sample_range: The least and the largest value of the data.
        solver, steps, grid, options, guidance: The bundle's defaults.
        provenance: What the model card says, such as {"data": {"name": …, "licence": …}}.

    Raises:
        RequestError: A setting is invalid.
    """
    schedule = schedule_of(schedule)
    count = integer("num_classes", num_classes, 0, MOST_CLASSES) + (null_label is not None)
    return {
        "name": _name(name),
        "sample_shape": _shape(sample_shape),
        "prediction": prediction,
        "schedule": schedule,
        "clip": None if clip is None else number("clip", clip, 1e-6, 1e6),
        "labels": make_labels(count, null_label, label_names),
        **conditioned(conditions, nulls, examples),
        "sample_range": _range(sample_range),
        "defaults": _defaults(schedule, solver, steps, grid, guidance, options),
        "provenance": json_object("provenance", provenance),
    }


def without_guidance(model: AnyModel) -> AnyModel:
    """Return the model; without a null value it is not guided by default."""
    if model.can_guide:
        return model
    return replace(model, defaults=replace(model.defaults, guidance=1.0))


def _defaults(
    schedule: Schedule,
    solver: str,
    steps: int | None,
    grid: str,
    guidance: float,
    options: Mapping[str, Any] | None,
) -> Defaults:
    steps = min(50, len(schedule)) if steps is None else integer("steps", steps, 1, len(schedule))
    guidance = number("guidance", guidance, -1e3, 1e3)
    return Defaults(solver, steps, grid, guidance, json_object("options", options))


def schedule_of(value: object) -> Schedule:
    """Return a schedule, or the one of this name. Raises RequestError for anything else.

    A bundle stores a schedule by name and as numbers. A schedule must therefore follow from its
    own name and parameters.
    """
    if isinstance(value, str):
        return make_schedule(value)
    if not isinstance(value, Schedule):
        raise RequestError(
            f"schedule must be a runtime.Schedule or the name of one, got {shown(value)} "
            f"({type(value).__name__}). Pass one of {', '.join(SCHEDULES)}."
        )
    try:
        Schedule.from_json(from_json(to_json(value.to_json())))
    except RequestError as error:
        raise RequestError(
            f"{error} Make the schedule with make_schedule or from_betas."
        ) from error
    except (TypeError, ValueError, KeyError) as error:
        raise RequestError(
            f"schedule {value.name!r} must have parameters that JSON can hold "
            f"({described(error)}). Make it with make_schedule or from_betas."
        ) from error
    return value


def _name(name: object) -> str:
    name = text("name", name, "mynet")
    if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]*", name) or len(name) > 200:
        raise RequestError(
            "name must be at most 200 letters, digits, '_', '-' and '.', and start with none of "
            f"'-' and '.': a bundle's name is a folder's. Got {shown(name)}."
        )
    return name


def _shape(shape: object) -> tuple[int, ...]:
    rule = "1 to 4 integers, such as (3, 32, 32)"
    sizes = elements("sample_shape", shape, rule)
    if not 1 <= len(sizes) <= 4:
        raise RequestError(f"sample_shape must be {rule}, got {shown(shape)}.")
    found = tuple(integer("sample_shape", size, 1, 65536) for size in sizes)
    # A size beyond all images is nearly always a swapped axis.
    if math.prod(found) > MOST_VALUES:
        raise RequestError(
            f"sample_shape must be at most {MOST_VALUES} values, got {found}: "
            f"{math.prod(found)}. Check the order, which is channels first."
        )
    return found


def _range(sample_range: object) -> tuple[float, float]:
    rule = "two rising numbers, such as (-1, 1)"
    ends = elements("sample_range", sample_range, rule)
    if len(ends) != 2:
        raise RequestError(f"sample_range must be {rule}, got {shown(sample_range)}.")
    low, high = (number("sample_range", end, -1e6, 1e6) for end in ends)
    if not low < high:
        raise RequestError(f"sample_range must be {rule}, got {shown(sample_range)}.")
    return low, high


def check_settings(model: Model) -> None:
    """Raises RequestError for names and numbers that no bundle can be sampled with."""
    schedule = model.schedule
    defaults = model.defaults
    solver = text("solver", defaults.solver, "ddim")
    grid = text("grid", defaults.grid, "trailing")
    prediction = text("prediction", model.prediction, "epsilon")
    if prediction not in PREDICTIONS:
        raise unknown("prediction", prediction, PREDICTIONS)
    if prediction == "epsilon" and schedule.alpha[-1] == 0:
        raise RequestError(
            f"an epsilon network says nothing at zero terminal SNR, where the schedule "
            f"{schedule.name!r} ends: such networks predict v, x0 or flow."
        )
    for key in defaults.options:
        if key in NOT_OPTIONS:
            raise RequestError(
                f"options must be the solver's own, got {key!r}. Pass {key} as an argument."
            )
    # The program proves itself when it is made, and names the setting that does not fit.
    options = cast(SolverOptions, dict(defaults.options))
    make_program(schedule, prediction, solver, defaults.steps, grid, clip=model.clip, **options)
