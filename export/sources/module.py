"""Any PyTorch module as a `Model`.

The module is called before anything is converted, so that faults are named early.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

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
    name: str | None = None,
    null_label: int | None = None,
    **settings: Any,
) -> TorchModel:
    """Describe module(x [B, *S], time [B], label [B], **conditions) → F [B, *S].

    Args:
        module: In evaluation mode, on the CPU, in float32. Without classes it takes no label.
        name: The bundle's name [the module's class].
        null_label: The label that means no label, if trained, in 0 … num_classes.
        settings: sample_shape, prediction, schedule, and what else
            `export.sources.settings.fields_of` takes.

    Raises:
        RequestError: An argument is invalid.
        ExportError: The module does not compute this.
    """
    check_module(module)
    name = bundle_name(type(module).__name__.lower()) if name is None else name
    fields = fields_of(name=name, null_label=null_label, **settings)
    return _checked(TorchModel(module=module, **fields), null_label)


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
