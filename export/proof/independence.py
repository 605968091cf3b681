"""Whether a network computes each sample of a batch from that sample alone, and if not, why.

A seed gives the same bytes in any batch only if no sample reaches another. The outputs of the
samples that stay must then keep their bits if the other samples are replaced, so the check needs no
tolerance.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto, helper

from runtime.diffusion.arrays import Array
from runtime.errors.messages import described

from ..errors import ExportError
from ..graph.calibrate import session
from ..graph.edit import copy_of
from ..sources.model import Model

Float32 = NDArray[np.float32]
BATCH = 4
CAUSES = {
    "time": (
        "the times of other samples",
        "it uses one time for the whole batch, as in time[0], time.mean() or time[0].item(). "
        "Use the whole time [B], for example time[:, None, None, None]",
    ),
    "label": (
        "the labels of other samples",
        "it uses one label for the whole batch, as in label[0]. Use the whole label [B]",
    ),
    "x": (
        "other samples, its neighbours in the batch",
        "it reduces over axis 0, as in x[:1].mean(), x.mean(0), batch statistics, dynamic "
        "quantization or attention between samples. Reduce over the axes of one sample only, "
        "for example x.mean(dim=(1, 2, 3), keepdim=True)",
    ),
    "position": (
        "its position in the batch, or the size of the batch",
        "it computes with torch.arange(len(x)) or len(x), or a loop over the batch ends early",
    ),
}
"""For each dependency, what a sample depends on, and the likely cause and its remedy."""


@dataclass(frozen=True, eq=False)
class Inputs:
    """Inputs of a network: x [n, *S], time [n], and what it is conditioned on.

    Attributes:
        label: [n], or None without labels.
        conditions: By name, [n, …] each.
    """

    x: Float32
    time: Float32
    label: NDArray[np.int64] | None
    conditions: Mapping[str, Array] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, part: slice) -> Inputs:
        label = None if self.label is None else self.label[part]
        conditions = {name: array[part] for name, array in self.conditions.items()}
        return Inputs(self.x[part], self.time[part], label, conditions)

    @property
    def names(self) -> list[str]:
        """The names of all inputs, x last: what else mixes samples shows in x, too."""
        label = [] if self.label is None else ["label"]
        return ["time", *label, *self.conditions, "x"]

    def of(self, name: str) -> Array:
        """Return one of the inputs, [n, …]."""
        return self.conditions[name] if name in self.conditions else getattr(self, name)

    def having(self, name: str, array: Array) -> Inputs:
        """Return these inputs with another array [n, …] for one of them."""
        if name in self.conditions:
            return replace(self, conditions={**self.conditions, name: array})
        return replace(self, **{name: array})

    def arguments(self) -> tuple[NDArray[np.generic], ...]:
        """Return the network's positional arguments: x [n, *S], time [n], and label [n] if any."""
        return (self.x, self.time) if self.label is None else (self.x, self.time, self.label)

    def with_others(self, name: str, kept: NDArray[np.bool_], others: Inputs) -> Inputs:
        """Return these inputs; samples that are not kept [n] have `name` of the others."""
        own = self.of(name)
        mask = kept.reshape(-1, *[1] * (own.ndim - 1))
        return self.having(name, np.where(mask, own, others.of(name)))


Network = Callable[[Inputs], Float32]
"""F [n, *S] of inputs."""


def whole_inputs(model: Model, module: Callable[..., Float32]) -> Network:
    """Return a network of `runtime.run` as one of whole inputs.

    Args:
        module: Called with x [n, *S], time [n], the label [n] if there is one, and the conditions
            [n, …] by name; it returns F [n, *S].

    Returns:
        A network that raises ExportError where `module` fails, or returns another shape.
    """

    def network(inputs: Inputs) -> Float32:
        try:
            found = module(*inputs.arguments(), **inputs.conditions)
        except ExportError:
            raise
        except Exception as error:  # the module's own code may raise anything
            raise ExportError(
                f"{model.name}: the module fails on a batch of {_samples(len(inputs))} "
                f"({described(error)}), and a batch may have any size. Take it from "
                "x.shape[0], and name the axes: squeeze() also removes the batch."
            ) from error
        if found.shape != inputs.x.shape:
            raise ExportError(
                f"{model.name}: the module returns {list(found.shape)} for "
                f"{_samples(len(inputs))} of {list(inputs.x.shape[1:])}. Name the axes: squeeze() "
                "also removes the batch."
            )
        return found

    return network


def _samples(count: int) -> str:
    return "one sample" if count == 1 else f"{count} samples"


@dataclass(frozen=True)
class Dependency:
    """What a sample's output depends on besides its own inputs, and by how much it changes."""

    on: str
    change: float

    def __str__(self) -> str:
        what, cause = CAUSES.get(self.on) or _of_condition(self.on)
        return (
            f"the output of a sample depends on {what} (it changes by up to {self.change:.2g}). "
            f"Likely cause: {cause}."
        )


def _of_condition(name: str) -> tuple[str, str]:
    """Return what a sample depends on, and why, if it is a condition of other samples."""
    cause = f"it uses one {name} for the whole batch, as in {name}[0], or reduces over axis 0"
    return f"the condition {name} of other samples", cause


def draw(model: Model, key: int, count: int = BATCH) -> Inputs:
    """Return samples: noise of variance 1, times across the schedule, labels in turn.

    Args:
        model: Its description, which draws conditions.
        key: Another key gives every sample another x and another time, label and conditions.
        count: The number of samples.
    """
    schedule = model.schedule
    labels = model.num_labels
    generator = np.random.Generator(np.random.Philox(key=key))
    x = generator.standard_normal((count, *model.sample_shape), np.float32)
    # Every sample has a level of its own, and another one under another key.
    knots = (np.arange(count) * 5 + 3 * key + 1) % (2 * count) / (2 * count - 1)
    time = schedule.time[np.round(knots * (len(schedule) - 1)).astype(int)].astype(np.float32)
    label = (np.arange(count, dtype=np.int64) + key) % labels if labels else None
    return Inputs(x, time, label, model.draw_different(count, key * count))


def neighbours(
    network: Network, inputs: Inputs, others: Inputs, before: Float32 | None = None
) -> Dependency | None:
    """Return the dependency of samples on each other, or None if there is none.

    One half of the batch is replaced at a time, so every pair of samples is once on different
    sides. The outputs of the other half are compared bit for bit.

    before: The network's outputs [n, *S] for the inputs, if they are known.
    """
    before = network(inputs) if before is None else before
    place = np.arange(len(inputs))
    # One kind of input at a time, so that the message can name it.
    for name in inputs.names:
        change = 0.0
        for bit in range((len(inputs) - 1).bit_length()):
            for side in (0, 1):
                kept = (place >> bit & 1) == side
                after = network(inputs.with_others(name, kept, others))
                if not np.array_equal(before[kept], after[kept]):
                    change = max(change, largest(before[kept], after[kept]))
        if change:
            return Dependency(name, change)
    return None


def largest(a: NDArray[np.floating], b: NDArray[np.floating]) -> float:
    """Return the largest |a - b| of arrays of one shape; infinity if it is not finite."""
    with np.errstate(invalid="ignore"):
        change = float(np.abs(a.astype(np.float64) - b).max())
    return change if np.isfinite(change) else np.inf


def require_independent(
    model: Model, network: Network, tolerance: float, count: int = BATCH
) -> None:
    """Check the PyTorch module before anything is converted.

    Args:
        model: Its description.
        network: The module.
        tolerance: By how much a sample's output may differ alone and in a batch, because PyTorch
            rounds differently. It scales with the largest output if that is above 1.
        count: Samples of a batch.

    Raises:
        ExportError: The module mixes samples of a batch, or fails on a batch of some size.
    """
    first, second = (draw(model, key, count) for key in (0, 1))
    together = network(first)
    found = neighbours(network, first, second, together)
    # What depends on the size of the batch, or on all samples agreeing, shows in none of these
    # pairs: compare with each sample alone.
    if found is None:
        alone = np.concatenate([network(first[i : i + 1]) for i in range(len(first))])
        change = largest(alone, together)
        if change > tolerance * max(1.0, float(np.abs(together).max())):
            found = Dependency(_homogeneous(network, first, alone, change / 2), change)
    if found is not None:
        raise ExportError(
            f"{model.name}: {found} A network that mixes samples cannot give a seed the same image "
            "in any batch, so it is not exported."
        )


def _homogeneous(network: Network, inputs: Inputs, alone: Float32, tolerance: float) -> str:
    """Return the input that a whole batch must share for a sample to be computed as if alone.

    The result is "position" if sharing none is enough. This finds dependencies that replacing half
    of a batch does not, such as (time > 500).all().
    """
    for name in inputs.names:
        own = inputs.of(name)
        shared = [
            inputs.having(name, np.repeat(own[i : i + 1], len(inputs), 0))
            for i in range(len(inputs))
        ]
        found = np.stack([network(batch)[i] for i, batch in enumerate(shared)])
        if largest(found, alone) <= tolerance:
            return name
    return "position"


def unsteady_node(step: ModelProto, feeds: dict[str, NDArray[np.generic]]) -> str | None:
    """Return the first node whose output for a lone sample differs from that in a batch.

    Args:
        step: A step graph with its weights inside.
        feeds: Its inputs, [n, …] each: the batch.

    Returns:
        The operator, the node's name and by how much its output differs; None if no node shows it.
    """
    # Every value inside becomes an output, run in the batch and for each sample alone.
    probed = copy_of(step)
    names = list(dict.fromkeys(name for node in step.graph.node for name in node.output if name))
    del probed.graph.output[:]
    probed.graph.output.extend(map(helper.make_empty_tensor_value_info, names))
    running = session(probed)
    together = dict(zip(names, running.run(names, feeds), strict=True))
    count = len(feeds["state"])
    alone = [
        dict(
            zip(names, running.run(names, {k: v[i : i + 1] for k, v in feeds.items()}), strict=True)
        )
        for i in range(count)
    ]
    # In the graph's order, so that the first one found is the cause and not a consequence.
    for node in step.graph.node:
        for name in node.output:
            whole = together.get(name)
            if whole is None or whole.ndim == 0 or whole.dtype.kind != "f":
                continue
            parts = [part[name] for part in alone]
            change = _batch_difference(whole, parts)
            if change:
                return f"{node.op_type} {node.name} (by {change:.1g})"
    return None


def _batch_difference(whole: NDArray[np.floating], parts: list[NDArray[np.floating]]) -> float:
    """Return by how much a batch's values differ from those of its samples alone.

    The batch axis is the one along which the parts fill the whole. Without one, the result is 0.
    """
    axes = [a for a in range(whole.ndim) if whole.shape[a] == sum(p.shape[a] for p in parts)]
    for axis in axes:
        others = [n for a, n in enumerate(whole.shape) if a != axis]
        if all([n for a, n in enumerate(p.shape) if a != axis] == others for p in parts):
            joined = np.concatenate(parts, axis)
            return 0.0 if np.array_equal(joined, whole) else largest(joined, whole)
    return 0.0
