"""PyTorch → ONNX: a network, around which `export.graph.fuse` writes the step graphs."""

from __future__ import annotations

import contextlib
import hashlib
import io
import logging
import traceback
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from onnx import GraphProto, ModelProto, TensorProto, numpy_helper
from torch import Tensor, nn

from runtime.bundle.conditions import LABEL
from runtime.bundle.format import NETWORK
from runtime.errors.messages import described

from ..errors import ExportError
from ..sources.torch_model import TorchModel
from .adapt import IN, F
from .clean import clean
from .edit import with_inner

OPSET = 20
"""From 21 on, GroupNorm becomes an op that ONNX Runtime's CPU kernels lack."""
TRACED_BATCH = 63
"""The largest batch of the trace; the graph accepts any.

diffusers branches at 64: PyTorch does not meet the branch and traces once.
"""
UNSUPPORTED: dict[int, str] = {
    TensorProto.FLOAT16: "float16",
    TensorProto.BFLOAT16: "bfloat16",
    TensorProto.FLOAT8E4M3FN: "float8",
    TensorProto.FLOAT8E5M2: "float8",
}
"""Types that a network may not compute in."""


class Named(nn.Module):
    """A module by the name that its weights and nodes have in a step graph."""

    def __init__(self, model: TorchModel) -> None:
        super().__init__()
        self.network = model.module
        self.inputs = model.inputs

    def forward(self, x: Tensor, time: Tensor, *given: Tensor) -> Tensor:
        """Return F [B, *S] of x [B, *S], time [B] and the model's inputs [B, …], in their order."""
        named = {c.name: value for c, value in zip(self.inputs, given, strict=True)}
        label = [named.pop(LABEL)] if LABEL in named else []
        return self.network(x, time, *label, **named)


def traced(model: TorchModel) -> ModelProto:
    """Return the network as ONNX with a dynamic batch, and every weight inside.

    It is F [B, *S] of in.x [B, *S], in.time [B] and further inputs, as `adapt.adapted` returns it.
    Nothing in it reveals the machine that made it.

    Raises:
        ExportError: PyTorch cannot trace the module, or can at one size of the batch only.
    """
    # Not 1, which torch.export takes for a size that cannot vary.
    B = 2
    inputs = {"x": torch.randn(B, *model.sample_shape), "time": torch.rand(B)}
    for condition in model.inputs:
        zeros = np.zeros((B, *condition.shape), condition.kind)
        inputs[condition.port] = torch.from_numpy(zeros)
    batched = {0: torch.export.Dim("batch", max=TRACED_BATCH)}
    given = (batched,) * len(model.inputs)
    try:
        with _quiet():
            program = torch.onnx.export(
                Named(model).eval(),
                tuple(inputs.values()),
                dynamo=True,
                opset_version=OPSET,
                input_names=[f"{IN}{name}" for name in inputs],
                output_names=[F],
                dynamic_shapes=(batched, batched, *([given] if given else [])),
                external_data=False,
                verbose=False,
            )
        assert program is not None
        proto = program.model_proto
    except Exception as error:  # the module's own code may raise anything while it is traced
        raise ExportError(_why_not(model.name, error)) from error
    # A module that computes with Python numbers of the batch is traced, at one size.
    fixed = [i.name for i in proto.graph.input if i.type.tensor_type.shape.dim[0].dim_value]
    if fixed:
        name = fixed[0].removeprefix(IN)
        raise ExportError(
            f"{model.name}: the module works at one size of the batch only (its {name} was "
            f"traced at {B}). "
            "Take the batch from x.shape[0], and make no Python number of it."
        )
    clean(proto)
    _name_weights(proto.graph, model.module)
    _require_float32(model.name, proto)
    return proto


def _require_float32(name: str, proto: ModelProto) -> None:
    """Raises ExportError if the network computes in a type that ONNX Runtime's CPU kernels lack."""
    for node in proto.graph.node:
        to = (
            next((a.i for a in node.attribute if a.name == "to"), 0)
            if node.op_type == "Cast"
            else 0
        )
        if to in UNSUPPORTED:
            where = node.name.rpartition("/")[0].removeprefix(NETWORK) or "forward"
            raise ExportError(
                f"{name}: {where} converts to {UNSUPPORTED[to]}, and networks are exported in "
                f"float32. "
                "Remove .to(…), .half(), .bfloat16() and torch.autocast from forward; "
                "--fp16 and --int8 make other precisions of a float32 network."
            )


def _name_weights(graph: GraphProto, module: nn.Module) -> None:
    """Give parameters back the names that they lost when the exporter reshaped them.

    A bundle's weights can then be read from its graphs by name.
    """
    named = {f"{NETWORK}{name}": p for name, p in module.named_parameters()}
    # Parameters that lost their name, by the hash of their bytes, which reshaping keeps.
    taken = {i.name for i in graph.initializer}
    names: dict[bytes, list[str]] = {}
    for name, parameter in named.items():
        if name not in taken:
            names.setdefault(_hash(parameter.detach().numpy()), []).append(name)
    # A constant with the bytes of such a parameter is that parameter.
    renamed: dict[str, str] = {}
    for tensor in graph.initializer:
        if tensor.name not in named and tensor.data_type == TensorProto.FLOAT:
            same = names.get(_hash(numpy_helper.to_array(tensor)))
            if same:
                renamed[tensor.name] = tensor.name = same.pop(0)
    for node in graph.node:
        for reader in with_inner(node):
            for i, name in enumerate(reader.input):
                reader.input[i] = renamed.get(name, name)


def _hash(values: NDArray[np.generic]) -> bytes:
    return hashlib.sha256(values.tobytes()).digest()


def _why_not(name: str, error: BaseException) -> str:
    """Return the message of a failed trace: torch's first line, the user's code, the remedy."""
    # torch wraps what went wrong several times; the innermost error names it.
    chain = [error]
    while chain[-1].__cause__ is not None:
        chain.append(chain[-1].__cause__)
    first = chain[-1]
    place = next(filter(None, map(_line_of_user, reversed(chain))), "")
    return (
        f"{name}: PyTorch cannot trace the module{place} "
        f"({described(first)}). A forward that can be exported takes no branch on the values of "
        "its inputs and keeps them tensors: no .item(), no numpy. Write a branch as "
        "torch.where(condition, a, b)."
    )


def _line_of_user(error: BaseException) -> str:
    """Return the innermost line of a traceback that is neither torch's nor ours; "" for none."""
    ours = Path(__file__).parent
    theirs = Path(torch.__file__).parent
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        path = Path(frame.filename)
        if frame.line and not path.is_relative_to(ours) and not path.is_relative_to(theirs):
            return f" at {path.name}, line {frame.lineno}, `{frame.line}`"
    return ""


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep the exporter's progress, deprecations and dumps of traced graphs off the terminal.

    What a user can act on is in the error that it raises.
    """
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    nowhere = io.StringIO()
    try:
        with (
            warnings.catch_warnings(),
            contextlib.redirect_stdout(nowhere),
            contextlib.redirect_stderr(nowhere),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
