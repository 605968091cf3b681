"""What any module must be before it is converted: its parameters, and its outputs for noise."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from runtime.errors.messages import described

from ..errors import ExportError
from .loading import type_name
from .torch_model import TorchModel


def check_parameters(name: str, module: nn.Module) -> None:
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


def check_outputs(model: TorchModel) -> None:
    """Call the module at both ends of the schedule, with its first and its last label.

    Its conditions are drawn, see `Model`.

    Raises:
        ExportError: It does not return F [B, *S] in float32, or not the same F twice.
    """
    name = model.name
    module = model.module
    count = model.num_labels
    # c_in keeps the input of every network near variance 1, at both ends.
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, *model.sample_shape, generator=generator)
    ends = [model.schedule.time[0], model.schedule.time[-1]]
    time = torch.tensor(ends, dtype=torch.float32)
    drawn = model.draw_conditions(2)
    named = {key: torch.from_numpy(value) for key, value in drawn.items()}
    arguments = [f"x {list(x.shape)}", "time [2]", *(["label [2]"] if count else [])]
    arguments += [f"{key} {list(value.shape)}" for key, value in drawn.items()]
    asked = f"module({', '.join(arguments)})"

    def ask(label: int, asked: str) -> Tensor:
        given = (x, time, torch.full((2,), label)) if count else (x, time)
        try:
            with torch.inference_mode():
                found = module(*given, **named)
        except Exception as error:  # the module's own code may raise anything
            hint = " Does it take as many inputs?" if isinstance(error, TypeError) else ""
            raise ExportError(f"{name}: {asked} fails with {described(error)}.{hint}") from error
        return _checked_output(name, found, x.shape, asked)

    # Twice: dropout and other draws, and state that a call changes, show in the second F.
    first = ask(0, asked)
    if not torch.equal(first, ask(0, asked)):
        raise ExportError(
            f"{name}: {asked} returns another F the second time. A forward must draw no random "
            "numbers and change no state."
        )
    # A module with fewer labels than were stated fails on the last one.
    if count > 1:
        ask(count - 1, f"{asked} with label {count - 1}, its labels being 0 to {count - 1},")


def _checked_output(name: str, found: object, shape: torch.Size, asked: str) -> Tensor:
    if not isinstance(found, Tensor):
        raise ExportError(
            f"{name}: {asked} returns {type(found).__name__}, a tensor expected. Wrap it in a "
            f"module that returns the tensor."
        )
    if found.shape != shape:
        raise ExportError(
            f"{name}: {asked} returns {list(found.shape)}, {list(shape)} expected: F has the "
            f"shape of x. "
            "A network that also predicts its variance returns twice the channels: return the "
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
