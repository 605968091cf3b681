"""Converts a model: the step graphs of every precision, written into a bundle's folder."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from onnx import ModelProto

from runtime.backends.memory import trim
from runtime.bundle.format import STEP, step_file
from runtime.diffusion.program import Network

from ..sources.model import Model
from ..sources.onnx_file.model import OnnxModel
from . import fuse
from .adapt import adapted
from .calibrate import Calibration, ranges
from .folding import fold_upsampling
from .headroom import Headroom, headroom
from .pixels.rewrite import pixels_first
from .precision import to_float16
from .quantization import quantize
from .rounding.batches import same_in_any_batch
from .rounding.convolutions import same_alone
from .scales import fold_scales
from .sensitivity import Choice, Judge, choose
from .weights import Weights
from .write import write_all

INT8 = {"int8": False, "int8-trt": True}
"""The kinds of int8 and whether their activations are signed, as TensorRT asks."""


@dataclass(frozen=True)
class Conversion:
    """How the other precisions were made.

    Attributes:
        headroom: For fp16; None if it was not asked for.
        int8: Which layers stay float32, for each kind of int8.
    """

    headroom: Headroom | None = None
    int8: Mapping[str, Choice] = field(default_factory=dict)

    def to_json(self) -> dict[str, object]:
        """Return what report.json says, with keys only for precisions that were made."""
        value: dict[str, object] = {}
        if self.headroom is not None:
            value["headroom"] = self.headroom.to_json()
        if self.int8:
            value["int8"] = {name: choice.to_json() for name, choice in self.int8.items()}
        return value


def converted(
    folder: Path,
    model: Model,
    precisions: Collection[str],
    psnr: Mapping[str, float],
    calibration: Calibration | None,
    winograd: bool,
) -> tuple[Conversion, bool]:
    """Write every precision's graphs into a folder.

    Args:
        precisions: "fp16" and "int8", besides fp32.
        psnr: By kind of int8, the least PSNR in dB of final images compared with fp32's.
        calibration: How int8 is made; None for the default.
        winograd: Whether to write the CPU variant, if anything is large enough.

    Returns:
        How the graphs were made, and whether there is a CPU variant.
    """
    # Give back what the checks of the module freed.
    trim()
    outside = Weights()
    network = outside.take(_network(model))
    steps = {name: same_in_any_batch(step) for name, step in fuse.steps(model, network).items()}
    del network
    faster = _for_cpus(steps) if winograd else {}
    # Folding and groups hold for float32 only, so the other precisions start from `steps`.
    folded = {name: same_alone(fold_scales(fold_upsampling(step))) for name, step in steps.items()}
    write_all(folded, model.sample_shape, folder / "fp32", faster, outside)
    has_faster = bool(faster)
    del folded, faster
    if not precisions:
        del steps, outside
        trim()
        return Conversion(), has_faster
    # They change the weights, or run the graphs.
    steps = {name: outside.put_back(step) for name, step in steps.items()}
    del outside
    conversion = _other_precisions(folder, model, steps, precisions, psnr, calibration)
    del steps
    trim()
    return conversion, has_faster


def batched(model: Model) -> Network:
    """Return the model's network as it computes whole batches, to be checked for mixing samples."""
    return fuse.batched(model) if isinstance(model, OnnxModel) else model.reference()


def _network(model: Model) -> ModelProto:
    """Return the network of a PyTorch module or of an ONNX file, see `adapt.adapted`."""
    if isinstance(model, OnnxModel):
        return adapted(model)
    # Imports PyTorch, which the export of an ONNX file does without.
    from ..sources.torch_model import TorchModel
    from . import trace

    assert isinstance(model, TorchModel)
    return trace.traced(model)


def _for_cpus(steps: Mapping[str, ModelProto]) -> dict[str, ModelProto]:
    """Return the CPU variants of the step graphs by file name, if anything is large enough."""
    variants: dict[str, ModelProto] = {}
    for guided in (False, True):
        step = steps.get(step_file(guided))
        variant = pixels_first(step) if step else None
        if variant:
            variants[step_file(guided, pixels=True)] = same_alone(fold_upsampling(variant))
    return variants


def _other_precisions(
    folder: Path,
    model: Model,
    steps: Mapping[str, ModelProto],
    precisions: Collection[str],
    psnr: Mapping[str, float],
    calibration: Calibration | None,
) -> Conversion:
    """Write the step graphs in other precisions, and return how they were made."""
    calibration = calibration or Calibration()

    def write(name: str, change: Callable[[ModelProto], ModelProto]) -> None:
        changed = {file: change(proto) for file, proto in steps.items()}
        write_all(changed, model.sample_shape, folder / name)

    step = steps[STEP]
    room = None
    choices: dict[str, Choice] = {}
    if "fp16" in precisions:
        # float16 fails quietly beyond 65504: the report says how near the values come.
        room = headroom(step, model, calibration)
        write("fp16", to_float16)
    if "int8" in precisions:
        # One set of trajectories gives the ranges of both kinds, and one of reference images.
        pairs = ranges(step, model, calibration)
        judge = Judge(step, model, calibration)
        for name, signed in INT8.items():
            # The layers are chosen on the plain graph; both graphs hold the same ones.
            own = [pair[signed] for pair in pairs]
            chosen = choose(step, judge, own, signed, psnr[name])
            write(name, lambda proto, r=own, k=chosen.keep, s=signed: quantize(proto, r, k, s))
            choices[name] = chosen
    return Conversion(room, choices)
