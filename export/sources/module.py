"""Any PyTorch module as a `Model`.

The module is called before anything is converted, so that faults are named early.
"""

from __future__ import annotations

import importlib
import inspect
import math
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from runtime.arguments import elements, file_path, integer, number, text
from runtime.diffusion.program import PREDICTIONS
from runtime.diffusion.schedule import SCHEDULES, Schedule, make_schedule
from runtime.diffusion.solvers import make_program
from runtime.errors import RequestError, unknown
from runtime.files import from_json, to_json
from runtime.messages import described, printable, shown
from runtime.spec import Defaults, Labels

from ..errors import ExportError
from .model import Model, bundle_name, json_object

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
    _check_module(module)
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


def make_labels(count: int, null_label: int | None, names: Sequence[str] | None) -> Labels | None:
    """Return the labels of a network with `count` of them, the null label included; None for 0.

    Raises RequestError for a null label that is not one of them, and unless `names` has a
    different name for each class.
    """
    if names is not None:
        names = elements("label_names", names, "a list of names, one for each class")
    if count == 0 or (count == 1 and null_label is not None):
        if null_label is not None or names:
            raise RequestError("null_label and label_names need classes: give num_classes too.")
        return None
    if null_label is not None:
        null_label = integer("null_label", null_label, 0, count - 1)
    numbers = [i for i in range(count) if i != null_label]
    if names is None:
        # If the null label is not the last one, a class has another number in the bundle.
        moved = numbers != list(range(len(numbers)))
        names = [f"class{i}" if moved else str(i) for i in numbers]
    rule = f"label_names must be {len(numbers)} different names, one for each class, got"
    if not all(isinstance(n, str) and n and printable(n) == n for n in names):
        raise RequestError(f"{rule} {shown(names)}. Each must be a string, not empty, in Unicode.")
    if len(names) != len(numbers) or len(set(names)) != len(names):
        raise RequestError(f"{rule} {len(names)}: {shown(list(names))}.")
    return Labels(tuple(names), null_label is not None)


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


def _check_module(module: object) -> None:
    if not isinstance(module, nn.Module):
        raise ExportError(
            f"module must be a torch.nn.Module, got {type(module).__name__}. Wrap a function in "
            f"one."
        )


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
                f"{name}: {key} is {_plain(tensor.dtype)}, float32 expected. Call module.float()."
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
        except Exception as error:  # whatever the module's own code raises
            line = str(error).splitlines()[0] if str(error) else ""
            hint = " Does it take as many inputs?" if isinstance(error, TypeError) else ""
            raise ExportError(
                f"{name}: {asked} fails with {type(error).__name__}: {line[:300]}.{hint}"
            ) from error
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
        raise ExportError(f"{name}: {asked} returns {_plain(found.dtype)}, float32 expected.")
    if not bool(torch.isfinite(found).all()):
        raise ExportError(
            f"{name}: {asked} returns NaN or infinity for noise of variance 1. Are its weights "
            f"loaded?"
        )
    return found


def _plain(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def load_module(spec: str) -> nn.Module:
    """Return what the factory `package.file:factory` makes without arguments, in evaluation mode.

    Runs that code. Raises ExportError if the module or the factory is missing or fails, or if the
    factory makes something else; RequestError for a `spec` that is no string.
    """
    path, colon, attribute = text("spec", spec, "mynet:net").rpartition(":")
    spec = printable(spec)
    # A Windows path has a colon of its own, so `path` may end in one.
    if not (path and colon and attribute) or re.search(r"[/\\]", attribute):
        raise ExportError(
            f"--module must be package.file:factory, got {spec!r}. "
            "Name the function that makes the network, such as mynet:net."
        )
    if re.search(r"[/\\:]|\.py$|^\.|\.\.|\.$", path):
        raise ExportError(_not_dotted(spec, path, attribute))
    code = _imported(spec, path)
    found = getattr(code, attribute, None)
    if not callable(found):
        known = [k for k, value in vars(code).items() if callable(value) and not k.startswith("_")]
        raise unknown(f"factory of {path}", attribute, known, ExportError)
    return _made(spec, found).eval()


def _not_dotted(spec: str, path: str, attribute: str) -> str:
    """Return the message for a file's path in place of a dotted name, with the dotted name."""
    parts = [part for part in re.split(r"[/\\]+", path) if part not in ("", ".")]
    stem = parts[-1].removesuffix(".py") if parts else ""
    stem = printable(stem.strip(".")) or "mynet"
    folder = printable(re.sub(r"[/\\]*[^/\\]*$", "", path))
    # The folders in front, which importing must be told of: none for ./mynet.
    if folder in ("", "."):
        return (
            f"--module must be a dotted name, not a path, got {spec!r}. "
            f"Write --module {stem}:{attribute} and run this from the file's folder."
        )
    return (
        f"--module must be a dotted name, not a path, got {spec!r}. "
        f"Write --module {stem}:{attribute} and put the folder {folder} into PYTHONPATH."
    )


def _imported(spec: str, path: str) -> ModuleType:
    try:
        return importlib.import_module(path)
    except KeyboardInterrupt:
        raise
    except ModuleNotFoundError as error:
        if not f"{path}.".startswith(f"{error.name}."):
            raise ExportError(
                f"--module {spec}: importing {printable(path)} needs {error.name!r}, which is not "
                f"installed."
            ) from error
        raise ExportError(
            f"--module {spec}: there is no module {error.name!r}. Run this from the folder that "
            f"{path.split('.')[0]!r} is in, or put that folder into PYTHONPATH."
        ) from error
    except BaseException as error:  # the module's own code, which may call sys.exit()
        raise ExportError(
            f"--module {spec}: importing {printable(path)} fails with {described(error)}."
        ) from error


def _made(spec: str, factory: Callable[[], object]) -> nn.Module:
    if isinstance(factory, nn.Module):
        return factory
    try:
        inspect.signature(factory).bind()
    except TypeError as error:
        raise ExportError(
            f"--module {spec}: the factory is called without arguments, but {error}. Write one "
            f"that fills them in."
        ) from None
    except ValueError:  # a builtin without a signature
        pass
    try:
        made = factory()
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # the factory's own code, which may call sys.exit()
        raise ExportError(f"--module {spec}: the factory fails with {described(error)}.") from error
    if not isinstance(made, nn.Module):
        raise ExportError(
            f"--module {spec}: the factory returns {type(made).__name__}, a torch.nn.Module "
            f"expected."
        )
    return made


def load_weights(module: nn.Module, path: str | Path) -> None:
    """Fill the module with a safetensors file.

    Raises ExportError if the file cannot be read, or if names, shapes or kinds of numbers do not
    match; RequestError for a `path` that is no path.
    """
    _check_module(module)
    path = file_path("path", path)
    where = printable(path)
    found = _read_weights(path)
    expected = {k: t for k, t in module.state_dict().items() if isinstance(t, Tensor)}
    lazy = [key for key, tensor in expected.items() if nn.parameter.is_lazy(tensor)]
    if lazy:
        raise ExportError(f"{lazy[0]} of the module has no shape yet. Run the lazy module once.")
    # Of tensors that share their memory safetensors stores one.
    given = {expected[key].data_ptr() for key in found if key in expected}
    faults = [f"{key!r} is missing" for key, t in expected.items() if t.data_ptr() not in given]
    faults += [f"{key!r} is unexpected" for key in found if key not in expected]
    for key, tensor in expected.items():
        if key not in found:
            continue
        stored = found[key]
        if stored.shape != tensor.shape:
            faults.append(f"{key!r} is {list(stored.shape)}, {list(tensor.shape)} expected")
        elif _numbers(stored) != _numbers(tensor):
            # load_state_dict would cast: integers of a quantized file are not the weights.
            faults.append(f"{key!r} is {_plain(stored.dtype)}, {_plain(tensor.dtype)} expected")
    if faults:
        raise ExportError(mismatch(where, faults))
    try:
        module.load_state_dict(found, strict=False)
    except Exception as error:  # the module may load its state with code of its own
        raise ExportError(f"{where} cannot be loaded ({described(error)}).") from error


def _numbers(tensor: Tensor) -> str:
    """Return "float" for every floating-point type, which can be cast; else the type itself."""
    return "float" if tensor.is_floating_point() else _plain(tensor.dtype)


def _read_weights(path: Path) -> dict[str, Tensor]:
    where = printable(path)
    if path.suffix != ".safetensors":
        raise ExportError(
            f"{where}: weights are read from .safetensors only, because other formats can run code "
            "when they are opened. If you trust the file: safetensors.torch.save_file("
            "torch.load(path, weights_only=True), 'weights.safetensors')."
        )
    try:
        if path.is_dir():
            raise ExportError(f"{where} is a folder. Pass the .safetensors file in it.")
        return load_file(path)
    except ExportError:
        raise
    except FileNotFoundError:
        raise ExportError(f"{where}: there is no such file.") from None
    except Exception as error:  # safetensors has errors of its own, and passes on PyTorch's
        raise ExportError(
            f"{where} cannot be read as safetensors ({described(error)}). Save or copy the file "
            f"again."
        ) from error


def mismatch(where: str, faults: Sequence[str], most: int = 5) -> str:
    """The message for weights that are not the module's: the first faults, and how many more."""
    more = f" and {len(faults) - most} more" if len(faults) > most else ""
    return f"{where} does not fit the module: {'; '.join(faults[:most])}{more}."
