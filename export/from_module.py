"""Any PyTorch module as a `Model`: asked once before anything is converted, so that what does not fit is named early."""

from __future__ import annotations

import importlib
import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from runtime.arguments import integer, number
from runtime.bundle import Defaults, Labels
from runtime.errors import RequestError, unknown
from runtime.program import PREDICTIONS
from runtime.schedule import Schedule, make_schedule
from runtime.solvers import make_program

from .errors import ExportError
from .model import Model


class Reordered(nn.Module):
    """A module whose null label is not its last one, with the labels in a bundle's order: the classes, then the null label."""

    def __init__(self, module: nn.Module, count: int, null_label: int) -> None:
        super().__init__()
        self.module = module
        self.register_buffer("order", torch.tensor([*(i for i in range(count) if i != null_label), null_label]))

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
    """A module that answers module(x [B, *S], time [B] float32[, label [B] int64]) → F [B, *S] float32, in evaluation mode on the CPU.

    sample_shape: *S. prediction: what F is, see `runtime.program.precondition`. schedule: one, or the name of one with its defaults.
    num_classes: without the null label; null_label: the number that stands for "no label", if it was trained, among 0 … num_classes.
    label_names: of the classes in the module's order, without the null label [their numbers]. clip: bound on the denoised
    estimate; pictures in -1 … 1 want 1. solver, steps [50 or the schedule's length], grid, options, guidance: the bundle's defaults.
    provenance: what the model card says, such as {"data": {"name": …, "note": …, "licence": …}}.

    Raises RequestError for arguments that make no sense, ExportError for a module that does not answer like this.
    """
    name, shape = _name(type(module).__name__.lower() if name is None else name), _shape(sample_shape)
    schedule = make_schedule(schedule) if isinstance(schedule, str) else schedule
    steps = min(50, len(schedule)) if steps is None else steps
    count = integer("num_classes", num_classes, 0)
    labels = make_labels(count + (null_label is not None), null_label, label_names)
    low, high = (number("sample_range", v, -1e6, 1e6) for v in sample_range)
    if not low < high:
        raise RequestError(f"sample_range must be two rising numbers, found {sample_range!r}.")
    guidance = number("guidance", guidance, -1e3, 1e3)
    options = dict(options or {})
    _check_settings(prediction, schedule, solver, steps, grid, clip, options)
    _check_parameters(name, module)
    _check_answers(name, module, shape, schedule, count + (null_label is not None))
    if labels and null_label is not None and null_label != count:
        module = Reordered(module, count + 1, null_label).eval()
    null_trained = labels is not None and labels.null_trained
    return Model(
        name=name,
        module=module,
        sample_shape=shape,
        prediction=prediction,
        schedule=schedule,
        clip=clip,
        labels=labels,
        defaults=Defaults(solver, steps, grid, guidance if null_trained else 1.0, options),
        provenance={"source": f"a PyTorch module, {type(module).__qualname__}", **(provenance or {})},
        sample_range=(low, high),
    )


def make_labels(count: int, null_label: int | None, names: Sequence[str] | None) -> Labels | None:
    """The labels of a network that knows `count` of them, the null label included; None where it knows none.

    Raises RequestError for a null label that is none of them, and for names that are not one a class.
    """
    if count == 0 or (count == 1 and null_label is not None):
        if null_label is not None or names:
            raise RequestError("null_label and label_names need classes: give num_classes too.")
        return None
    if null_label is not None:
        null_label = integer("null_label", null_label, 0, count - 1)
    numbers = [i for i in range(count) if i != null_label]
    if names is None:
        # Where the null label is not the last one, a class's place in the bundle is not its number in the network.
        moved = numbers != list(range(len(numbers)))
        names = [f"class{i}" if moved else str(i) for i in numbers]
    if len(names) != len(numbers) or len(set(names)) != len(names) or not all(isinstance(n, str) for n in names):
        raise RequestError(f"label_names must be {len(numbers)} different names, one a class, found {list(names)!r}.")
    return Labels(tuple(names), null_label is not None)


def _name(name: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]*", name):
        raise RequestError(f"a bundle's name is letters, digits, '_', '-' and '.', found {name!r}.")
    return name


def _shape(shape: Sequence[int]) -> tuple[int, ...]:
    if isinstance(shape, str) or not 1 <= len(shape) <= 4:
        raise RequestError(f"sample_shape must be 1 to 4 integers, such as (3, 32, 32), found {shape!r}.")
    return tuple(integer("sample_shape", size, 1, 65536) for size in shape)


def _check_settings(
    prediction: str,
    schedule: Schedule,
    solver: str,
    steps: int,
    grid: str,
    clip: float | None,
    options: Mapping[str, Any],
) -> None:
    """Raises RequestError for names and numbers that no bundle can be sampled with."""
    if prediction not in PREDICTIONS:
        raise unknown("prediction", prediction, PREDICTIONS)
    if prediction == "epsilon" and schedule.alpha[-1] == 0:
        raise RequestError(
            f"an epsilon network says nothing at zero terminal SNR, where the schedule {schedule.name!r} ends: "
            "such networks predict v, x0 or flow."
        )
    if clip is not None:
        number("clip", clip, 1e-6, 1e6)
    make_program(schedule, prediction, solver, steps, grid, clip=clip, **options)


def _check_parameters(name: str, module: nn.Module) -> None:
    """Raises ExportError for a module in training, off the CPU, or not in float32."""
    if not isinstance(module, nn.Module):
        raise ExportError(f"{name}: a torch.nn.Module expected, found {type(module).__name__}. Wrap a function in one.")
    training = [key or type(module).__name__ for key, part in module.named_modules() if part.training]
    if training:
        raise ExportError(
            f"{name}: {training[0]} is in training mode, where dropout and normalization answer otherwise. Call module.eval()."
        )
    for key, tensor in [*module.named_parameters(), *module.named_buffers()]:
        if tensor.device.type != "cpu":
            raise ExportError(f"{name}: {key} is on {tensor.device}; the export runs on the CPU. Call module.cpu().")
        if tensor.is_floating_point() and tensor.dtype != torch.float32:
            raise ExportError(f"{name}: {key} is {_plain(tensor.dtype)}, float32 expected. Call module.float().")


def _check_answers(name: str, module: nn.Module, shape: tuple[int, ...], schedule: Schedule, count: int) -> None:
    """Ask the module at both ends of the schedule, with its first and last label. Raises ExportError unless it answers F [B, *S], float32."""
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
            raise ExportError(f"{name}: {asked} fails with {type(error).__name__}: {line[:300]}.{hint}") from error
        return _checked_answer(name, found, x.shape, asked)

    first = ask(0, asked)
    if not torch.equal(first, ask(0, asked)):
        raise ExportError(
            f"{name}: {asked} answers otherwise the second time. A forward may draw nothing and remember nothing."
        )
    if count > 1:
        ask(count - 1, f"{asked} with label {count - 1}, its labels being 0 to {count - 1},")


def _checked_answer(name: str, found: Any, shape: torch.Size, asked: str) -> Tensor:
    if not isinstance(found, Tensor):
        raise ExportError(
            f"{name}: {asked} returns {type(found).__name__}, a tensor expected. Wrap it in a module that returns the tensor."
        )
    if found.shape != shape:
        raise ExportError(
            f"{name}: {asked} returns {list(found.shape)}, {list(shape)} expected: F has the shape of x. "
            "A network that predicts its variance too answers twice the channels: return the first half."
        )
    if found.dtype != torch.float32:
        raise ExportError(f"{name}: {asked} returns {_plain(found.dtype)}, float32 expected.")
    if not bool(torch.isfinite(found).all()):
        raise ExportError(f"{name}: {asked} returns NaN or infinity for noise of variance 1. Are its weights loaded?")
    return found


def _plain(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def load_module(spec: str) -> nn.Module:
    """What the factory `package.file:factory` makes when called without arguments, in evaluation mode. Runs that code.

    Raises ExportError for a module or factory that is not there, and for one that fails or makes something else.
    """
    path, colon, attribute = spec.partition(":")
    if not (path and colon and attribute):
        raise ExportError(f"--module takes package.file:factory, found {spec!r}.")
    try:
        code = importlib.import_module(path)
    except ModuleNotFoundError as error:
        if not f"{path}.".startswith(f"{error.name}."):
            raise ExportError(f"--module {spec}: importing {path} needs {error.name!r}, which is not there.") from error
        raise ExportError(
            f"--module {spec}: there is no module {error.name!r}. Run this from the folder that {path.split('.')[0]!r} lies in, "
            "or put that folder into PYTHONPATH."
        ) from error
    except Exception as error:  # the module's own code
        raise ExportError(f"--module {spec}: importing {path} fails with {type(error).__name__}: {error}.") from error
    known = [key for key, value in vars(code).items() if callable(value) and not key.startswith("_")]
    if not callable(getattr(code, attribute, None)):
        raise unknown(f"factory of {path}", attribute, known, ExportError)
    made = _made(spec, getattr(code, attribute))
    return made.eval()


def _made(spec: str, factory: Callable[[], Any]) -> nn.Module:
    if isinstance(factory, nn.Module):
        return factory
    try:
        inspect.signature(factory).bind()
    except TypeError as error:
        raise ExportError(
            f"--module {spec}: the factory is called without arguments, but {error}. Write one that fills them in."
        ) from None
    try:
        made = factory()
    except Exception as error:  # the factory's own code
        raise ExportError(f"--module {spec}: the factory fails with {type(error).__name__}: {error}.") from error
    if not isinstance(made, nn.Module):
        raise ExportError(f"--module {spec}: the factory returns {type(made).__name__}, a torch.nn.Module expected.")
    return made


def load_weights(module: nn.Module, path: Path) -> None:
    """Fill the module with a safetensors file. Raises ExportError where the file cannot be read or the names and shapes do not match."""
    if path.suffix != ".safetensors":
        raise ExportError(
            f"{path}: weights are read from .safetensors only, because other formats can run code when they are opened. "
            "Where you trust the file: safetensors.torch.save_file(torch.load(path, weights_only=True), 'weights.safetensors')."
        )
    try:
        found = load_file(path)
    except FileNotFoundError:
        raise ExportError(f"{path}: there is no such file.") from None
    except (OSError, SafetensorError) as error:
        raise ExportError(f"{path} cannot be read as safetensors ({error}).") from error
    expected = module.state_dict()
    # Of tensors that share their memory safetensors stores one.
    given = {expected[key].data_ptr() for key in found if key in expected}
    faults = [f"{key!r} is missing" for key, tensor in expected.items() if tensor.data_ptr() not in given]
    faults += [f"{key!r} is unexpected" for key in found if key not in expected]
    faults += [
        f"{key!r} is {list(found[key].shape)}, {list(tensor.shape)} expected"
        for key, tensor in expected.items()
        if key in found and found[key].shape != tensor.shape
    ]
    if faults:
        raise ExportError(mismatch(str(path), faults))
    module.load_state_dict(found, strict=False)


def mismatch(where: str, faults: Sequence[str], most: int = 5) -> str:
    """The message for weights that are not the module's: the first faults, and how many more."""
    more = f" and {len(faults) - most} more" if len(faults) > most else ""
    return f"{where} does not fit the module: {'; '.join(faults[:most])}{more}."
