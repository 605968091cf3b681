"""Any PyTorch module as a `Model`.

The module is called before anything is converted, so that faults are named early.
"""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from runtime.bundle.spec import Defaults
from runtime.diffusion.program import PREDICTIONS
from runtime.diffusion.schedule import SCHEDULES, Schedule, make_schedule
from runtime.diffusion.solvers import make_program
from runtime.errors import RequestError, unknown
from runtime.errors.arguments import elements, integer, number, text
from runtime.errors.messages import described, shown
from runtime.files import from_json, to_json

from ..errors import ExportError
from .loading import check_module, type_name
from .model import Model, bundle_name, json_object, make_labels

MOST_VALUES = 2**26
"""The most values of a sample: 4,096 × 4,096 in four channels."""
MOST_CLASSES = 1_000_000
NOT_OPTIONS = frozenset(inspect.signature(make_program).parameters) - {"options"}
"""Arguments of `make_program`, which a solver's options may not replace."""


class Reordered(nn.Module):
    """A module with its labels in a bundle's order: the classes, then the null label."""

    def __init__(self, module: nn.Module, count: int, null_label: int) -> None:
        super().__init__()
        self.module = module
        order = [*(i for i in range(count) if i != null_label), null_label]
        self.register_buffer("order", torch.tensor(order))

    def forward(self, x: Tensor, time: Tensor, label: Tensor) -> Tensor:
        return self.module(x, time, self.get_buffer("order")[label])


def from_module(
    module: nn.Module,
    *,
    sample_shape: Sequence[int],
    prediction: str,
    schedule: Schedule | str,
    name: str | None = None,
    num_classes: int = 0,
    null_label: int | None = None,
    label_names: Sequence[str] | None = None,
    clip: float | None = None,
    sample_range: Sequence[float] = (-1.0, 1.0),
    solver: str = "ddim",
    steps: int | None = None,
    grid: str = "trailing",
    options: Mapping[str, Any] | None = None,
    guidance: float = 2.0,
    provenance: Mapping[str, Any] | None = None,
) -> Model:
    """Describe module(x [B, *S], time [B] float32[, label [B] int64]) → F [B, *S] float32.

    Args:
        module: In evaluation mode, on the CPU, in float32.
        sample_shape: *S, 1 to 4 integers.
        prediction: What F is, see `runtime.diffusion.program.precondition`.
        schedule: A `Schedule`, or the name of one with its defaults.
        name: The bundle's name [the module's class].
        num_classes: The number of classes, without the null label.
        null_label: The label that stands for no label, if one was trained, in 0 … num_classes.
        label_names: The names of the classes in the module's order, without the null label
            [their numbers].
        clip: The bound on the denoised estimate [none]. Images in -1 … 1 need 1.
        sample_range: The least and the largest value of the data.
        solver, steps, grid, options, guidance: The bundle's defaults. steps: [50 or the
            schedule's length].
        provenance: What the model card says, such as {"data": {"name": …, "licence": …}}.

    Raises:
        RequestError: An argument is invalid.
        ExportError: The module does not answer like this.
    """
    check_module(module)
    name = _name(bundle_name(type(module).__name__.lower()) if name is None else name)
    shape = _shape(sample_shape)
    schedule = schedule_of(schedule)
    steps = min(50, len(schedule)) if steps is None else integer("steps", steps, 1, len(schedule))
    classes = integer("num_classes", num_classes, 0, MOST_CLASSES)
    count = classes + (null_label is not None)
    labels = make_labels(count, null_label, label_names)
    bounds = _range(sample_range)
    guidance = number("guidance", guidance, -1e3, 1e3)
    clip = None if clip is None else number("clip", clip, 1e-6, 1e6)
    given = json_object("options", options)
    extra = json_object("provenance", provenance)
    _check_settings(prediction, schedule, solver, steps, grid, clip, given)
    _check_parameters(name, module)
    _check_answers(name, module, shape, schedule, count)
    if labels and null_label is not None and null_label != classes:
        module = Reordered(module, count, null_label).eval()
    null_trained = labels is not None and labels.null_trained
    return Model(
        name=name,
        module=module,
        sample_shape=shape,
        prediction=prediction,
        schedule=schedule,
        clip=clip,
        labels=labels,
        defaults=Defaults(solver, steps, grid, guidance if null_trained else 1.0, given),
        provenance={"source": f"a PyTorch module, {type(module).__qualname__}", **extra},
        sample_range=bounds,
    )


def schedule_of(value: object) -> Schedule:
    """Return a schedule, or the one of this name. Raises RequestError for anything else.

    A bundle stores a schedule by name and as numbers, so a schedule that its own name and
    parameters do not give again is refused here.
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


def _check_settings(
    prediction: object,
    schedule: Schedule,
    solver: object,
    steps: int,
    grid: object,
    clip: float | None,
    options: Mapping[str, Any],
) -> None:
    """Raises RequestError for names and numbers that no bundle can be sampled with."""
    solver = text("solver", solver, "ddim")
    grid = text("grid", grid, "trailing")
    prediction = text("prediction", prediction, "epsilon")
    if prediction not in PREDICTIONS:
        raise unknown("prediction", prediction, PREDICTIONS)
    if prediction == "epsilon" and schedule.alpha[-1] == 0:
        raise RequestError(
            f"an epsilon network says nothing at zero terminal SNR, where the schedule "
            f"{schedule.name!r} ends: such networks predict v, x0 or flow."
        )
    for key in options:
        if key in NOT_OPTIONS:
            raise RequestError(
                f"options must be the solver's own, got {key!r}. Pass {key} as an argument."
            )
    make_program(schedule, prediction, solver, steps, grid, clip=clip, **options)


def _check_parameters(name: str, module: nn.Module) -> None:
    """Raises ExportError for a module in training, off the CPU, or not in float32."""
    training = [
        key or type(module).__name__ for key, part in module.named_modules() if part.training
    ]
    if training:
        raise ExportError(
            f"{name}: {training[0]} is in training mode, which changes dropout and normalization. "
            f"Call module.eval()."
        )
    for key, tensor in [*module.named_parameters(), *module.named_buffers()]:
        if nn.parameter.is_lazy(tensor):
            raise ExportError(f"{name}: {key} has no shape yet. Run the lazy module once.")
        if tensor.device.type != "cpu":
            raise ExportError(
                f"{name}: {key} is on {tensor.device}; the export runs on the CPU. Call "
                f"module.cpu()."
            )
        if tensor.is_floating_point() and tensor.dtype != torch.float32:
            raise ExportError(
                f"{name}: {key} is {type_name(tensor.dtype)}, float32 expected. "
                "Call module.float()."
            )


def _check_answers(
    name: str, module: nn.Module, shape: tuple[int, ...], schedule: Schedule, count: int
) -> None:
    """Ask the module at both ends of the schedule, with its first and last label. Raises
    ExportError unless it answers F [B, *S], float32."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, *shape, generator=generator)
    time = torch.tensor([schedule.time[0], schedule.time[-1]], dtype=torch.float32)
    asked = f"module(x {list(x.shape)}, time [2]{', label [2]' if count else ''})"

    def ask(label: int, asked: str) -> Tensor:
        given = (x, time, torch.full((2,), label)) if count else (x, time)
        try:
            with torch.inference_mode():
                found = module(*given)
        except Exception as error:  # the module's own code may raise anything
            hint = " Does it take as many inputs?" if isinstance(error, TypeError) else ""
            raise ExportError(f"{name}: {asked} fails with {described(error)}.{hint}") from error
        return _checked_answer(name, found, x.shape, asked)

    first = ask(0, asked)
    if not torch.equal(first, ask(0, asked)):
        raise ExportError(
            f"{name}: {asked} answers otherwise the second time. A forward may draw nothing and "
            f"remember nothing."
        )
    if count > 1:
        ask(count - 1, f"{asked} with label {count - 1}, its labels being 0 to {count - 1},")


def _checked_answer(name: str, found: object, shape: torch.Size, asked: str) -> Tensor:
    if not isinstance(found, Tensor):
        raise ExportError(
            f"{name}: {asked} returns {type(found).__name__}, a tensor expected. Wrap it in a "
            f"module that returns the tensor."
        )
    if found.shape != shape:
        raise ExportError(
            f"{name}: {asked} returns {list(found.shape)}, {list(shape)} expected: F has the "
            f"shape of x. "
            "A network that predicts its variance too answers twice the channels: return the "
            "first half."
        )
    if found.dtype != torch.float32:
        raise ExportError(f"{name}: {asked} returns {type_name(found.dtype)}, float32 expected.")
    if not bool(torch.isfinite(found).all()):
        raise ExportError(
            f"{name}: {asked} returns NaN or infinity for noise of variance 1. Are its weights "
            f"loaded?"
        )
    return found
