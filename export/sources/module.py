"""Any PyTorch module as a `Model`.

The module is called before anything is converted, so that faults are named early.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from runtime.bundle.conditions import Condition
from runtime.diffusion.arrays import Array
from runtime.diffusion.schedule import Schedule

from .checks import check_outputs, check_parameters
from .loading import check_module
from .model import bundle_name
from .settings import check_settings, fields_of, without_guidance
from .torch_model import TorchModel


class Reordered(nn.Module):
    """A module with its labels in a bundle's order: the classes, then the null label.

    It is module(x [B, *S], time [B], label [B], **conditions) → F [B, *S], as the module that it
    wraps.
    """

    def __init__(self, module: nn.Module, count: int, null_label: int) -> None:
        super().__init__()
        self.module = module
        order = [*(i for i in range(count) if i != null_label), null_label]
        self.register_buffer("order", torch.tensor(order))

    def forward(self, x: Tensor, time: Tensor, label: Tensor, **conditions: Tensor) -> Tensor:
        return self.module(x, time, self.get_buffer("order")[label], **conditions)


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
) -> TorchModel:
    """Describe module(x [B, *S], time [B], label [B], **conditions) → F [B, *S].

    Args:
        module: In evaluation mode, on the CPU, in float32. Without classes it takes no label.
        sample_shape: *S, 1 to 4 integers.
        prediction: What F is, see `runtime.diffusion.program.precondition`.
        schedule: A `Schedule` or the name of one.
        name: The bundle's name [the module's class].
        num_classes, label_names: The classes in the module's order, without the null label.
        null_label: The label that means no label, if trained, in 0 … num_classes.
        conditions: What the module takes by name besides, [B, *shape] each.
        nulls, examples: See `Model`; examples are random by default.
        clip: The bound on the denoised estimate [none]. Images in -1 … 1 need 1.
        sample_range: The least and the largest value of the data.
        solver, steps, grid, options, guidance: The bundle's defaults.
        provenance: What the model card says, such as {"data": {"name": …, "licence": …}}.

    Raises:
        RequestError: An argument is invalid.
        ExportError: The module does not compute this.
    """
    check_module(module)
    model = TorchModel(
        module=module,
        **fields_of(
            name=bundle_name(type(module).__name__.lower()) if name is None else name,
            sample_shape=sample_shape,
            prediction=prediction,
            schedule=schedule,
            num_classes=num_classes,
            null_label=null_label,
            label_names=label_names,
            conditions=conditions,
            nulls=nulls,
            examples=examples,
            clip=clip,
            sample_range=sample_range,
            solver=solver,
            steps=steps,
            grid=grid,
            options=options,
            guidance=guidance,
            provenance=provenance,
        ),
    )
    return _checked(model, null_label)


def _checked(model: TorchModel, null_label: int | None) -> TorchModel:
    """Return the model as it is exported, if its settings and its module pass.

    Args:
        model: The model as the caller describes it.
        null_label: The number of the null label in the caller's module, None without one.
    """
    check_settings(model)
    module = model.module
    check_parameters(model.name, module)
    check_outputs(model)
    if null_label is not None and null_label != model.num_classes:
        module = Reordered(module, model.num_labels, null_label).eval()
    model = without_guidance(model)
    source = f"a PyTorch module, {type(module).__qualname__}"
    provenance = {"source": source, **model.provenance}
    return replace(model, module=module, provenance=provenance)
