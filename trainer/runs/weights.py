"""The weights of another run or of a bundle, by the names that the network gives them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from runtime.bundle.bundle import MANIFEST, Bundle
from runtime.bundle.conditions import Condition, read_conditions
from runtime.bundle.format import NETWORK
from runtime.bundle.shipped import named_folder

from ..errors import CheckpointError
from ..parallel.sharding import whole
from . import checkpoint as checkpoints
from .folder import CONDITIONS, read_run
from .starts import read_starts

if TYPE_CHECKING:  # which only the weights of bundles need
    import onnx

STEP = "fp32/step.onnx"
WEIGHTS = "fp32/weights.bin"
LABELS = "label.weight"
FIRST = "first.weight"
"""Its second axis is what the network sees: x, and then the images that it is conditioned on."""
VECTORS = "vectors."
"""The layers of conditions that are vectors."""
LAST_OF_VECTOR = "2"
SHA256 = "start_sha256"
"""The entry of starts.json that identifies the weights that a run began with."""


class Other(NamedTuple):
    """A network to start from.

    Attributes:
        weights: By name; each has the shape that the network gives it.
        classes: Their names.
        conditions: What else it is conditioned on.
    """

    weights: dict[str, Tensor]
    classes: tuple[str, ...]
    conditions: tuple[Condition, ...]


def start_of(place: Path) -> Other:
    """Return the network at `place`, with its averaged weights.

    Args:
        place: A run, whose newest checkpoint's `ema` is taken; a bundle, or a shipped one's name.

    Raises:
        CheckpointError: It is neither, or onnx is missing, which reads a bundle's weights.
        BundleError: The bundle is damaged.
    """
    folder = named_folder(place)
    if (folder / MANIFEST).is_file():
        bundle = Bundle.load(folder)
        classes = bundle.labels.names if bundle.labels else ()
        return Other(weights_of(bundle), classes, bundle.conditions)
    checkpoint = checkpoints.required(
        place / "checkpoints",
        f"{place} is neither a run with a checkpoint nor a bundle: there is nothing to start from.",
    )
    rest = read_run(place)[1]
    conditions, faults = read_conditions(rest.get(CONDITIONS, []))
    if faults:
        raise CheckpointError(f"{place / 'config.json'} is damaged: {'; '.join(faults)}.")
    return Other(checkpoint.ema, tuple(rest["classes"]), conditions)


def started_from(run: Path) -> list[str]:
    """Return the identities of the weights that a run began with; none if nothing says so.

    A start at step 0 is a beginning: the starts before it have left nothing in the weights.
    """
    try:
        starts = read_starts(run)
    except CheckpointError:  # the next start moves the damaged file aside, with a warning
        return []
    known = [entry for entry in starts if SHA256 in entry]
    begun = max((i for i, entry in enumerate(known) if entry["step"] == 0), default=0)
    return [entry[SHA256] for entry in known[begun:]]


def weights_of(bundle: Bundle) -> dict[str, Tensor]:
    """Return every float32 constant of a bundle's float32 step graph, by name.

    The network's weights have the names that the network gives them. The shape of one may differ
    from the network's by axes of 1; see `as_like`.

    Raises:
        CheckpointError: onnx is missing, or the graph cannot be read.
        BundleError: The bundle is damaged.
    """
    try:
        import onnx
    except ImportError:
        raise CheckpointError(
            "a bundle's weights are read with onnx: pip install 'unnoise[export]'."
        ) from None
    step = bundle.read(STEP)
    blob = bundle.read(WEIGHTS)
    try:
        tensors = onnx.load_model_from_string(step).graph.initializer
        return {
            tensor.name.removeprefix(NETWORK): torch.from_numpy(_array(tensor, blob))
            for tensor in tensors
            if tensor.data_type == onnx.TensorProto.FLOAT
        }
    except Exception as error:  # onnx, protobuf and numpy raise a dozen kinds
        raise CheckpointError(
            f"{STEP} of the bundle cannot be read ({type(error).__name__}: {error}). Fetch or "
            "export the bundle again."
        ) from error


def _array(tensor: onnx.TensorProto, blob: bytes) -> NDArray[np.float32]:
    """Return a float32 constant of a graph. blob: The file of those that are not in the graph."""
    import onnx

    if tensor.data_location != onnx.TensorProto.EXTERNAL:
        return onnx.numpy_helper.to_array(tensor).copy()
    offset = next((int(entry.value) for entry in tensor.external_data if entry.key == "offset"), 0)
    array = np.frombuffer(blob, np.float32, math.prod(tensor.dims), offset)
    return array.reshape(tuple(tensor.dims)).copy()


def as_like(value: Tensor | None, like: Tensor) -> Tensor | None:
    """Return the value in the shape of `like`, from which it may differ by axes of 1.

    None means no value, and is returned for one of another shape.
    """
    if value is None or [n for n in value.shape if n != 1] != [n for n in like.shape if n != 1]:
        return None
    return value.reshape(like.shape)


def widened(
    other: Other, wanted: Mapping[str, Tensor], channels: int, conditions: Sequence[Condition]
) -> dict[str, Tensor]:
    """Return the other network's weights, with zeros for the conditions that it lacks.

    The network then begins as the other one: its answers do not depend on these conditions yet.

    Args:
        other: The network to begin as.
        wanted: The weights of the network that begins; its first layer's are [width, channels, …].
        channels: Of an image without conditions.
        conditions: Of the network that begins.

    Raises:
        CheckpointError: The other network has a condition that this one lacks.
    """
    has = {c.name: _seen(c) for c in conditions}
    lost = [c.name for c in other.conditions if has.get(c.name) != _seen(c)]
    if lost:
        raise CheckpointError(
            f"the network of --start-from is conditioned on {', '.join(lost)}, and this run is "
            "not. Start from another one, or train with the same conditions."
        )
    more = dict(other.weights)
    first = more.get(FIRST)
    if first is not None and FIRST in wanted:
        # A transformer sees each channel as the pixels of a patch.
        pixels = wanted[FIRST].shape[1] // (channels + sum(has.values()))
        more[FIRST] = _by_condition(first, channels, pixels, other.conditions, conditions)
    for name, weight in wanted.items():
        if name.startswith(VECTORS) and name not in more:
            # The last of a vector's layers is 0; those before it keep their first values.
            is_last = name.split(".")[-2] == LAST_OF_VECTOR
            more[name] = torch.zeros(weight.shape) if is_last else whole(weight)
    return more


def _seen(condition: Condition) -> int:
    """Return how many channels a condition adds to what the first layer sees."""
    return condition.shape[0] if len(condition.shape) == 3 else 0


def _by_condition(
    first: Tensor,
    channels: int,
    pixels: int,
    before: Sequence[Condition],
    after: Sequence[Condition],
) -> Tensor:
    """Return the first layer's weights [width, channels · pixels, …] for other conditions."""
    sizes = [channels, *(_seen(c) for c in before)]
    if first.shape[1] != pixels * sum(sizes):
        return first  # of another network, which `fitting` says
    parts = torch.split(first, [pixels * size for size in sizes], dim=1)
    known = dict(zip((c.name for c in before), parts[1:], strict=True))
    return torch.cat(
        [
            parts[0],
            *(
                known.get(c.name, first.new_zeros(len(first), pixels * _seen(c), *first.shape[2:]))
                for c in after
            ),
        ],
        dim=1,
    )


def fitting(
    found: Mapping[str, Tensor],
    wanted: Mapping[str, Tensor],
    place: Path,
    same_classes: bool = True,
) -> dict[str, Tensor]:
    """Return those of the weights `found` that a network needs, in its shapes.

    Args:
        found: Weights by name.
        wanted: The network's own.
        place: Their origin, for the error.
        same_classes: If not, the table of labels is left out.

    Raises:
        CheckpointError: Anything else is missing or has another shape.
    """
    taken = {}
    # In the network's order and names: a bundle has more constants than the network has weights.
    for name, weight in wanted.items():
        value = found.get(name) if same_classes or name != LABELS else None
        if (fits := as_like(value, weight)) is not None:
            taken[name] = fits
        elif name != LABELS:
            what = (
                "is not there"
                if value is None
                else f"is {tuple(value.shape)} and not {tuple(weight.shape)}"
            )
            raise CheckpointError(
                f"{place} has another network: its {name} {what}. Give the options of the network "
                f"that it was trained with."
            )
    return taken
