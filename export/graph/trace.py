"""PyTorch → ONNX: the step graphs and the whole loop in one graph, with one shared file of weights."""

from __future__ import annotations

import ast
import contextlib
import hashlib
import io
import logging
import math
import traceback
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import onnx
import torch
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, helper, numpy_helper
from torch import Tensor, nn

from runtime.diffusion.program import C_IN, C_OUT, C_SKIP, CLIP, GUIDANCE, TIME, R
from trainer.runs.start import NETWORK

from ..errors import ExportError
from ..sources.model import Model
from .dims import Dims

OPSET = 20
"""From 21 on, GroupNorm becomes an op that ONNX Runtime's CPU kernels lack."""
WEIGHTS = "weights.bin"
STEP = "step"
"""The first part of a node's name outside the network."""
INLINE = 1024
"""Constants smaller than this many bytes stay in the graph."""
TRACED_BATCH = 31
"""Largest batch of the trace, whose graph takes any. diffusers branches at 64, which a guided batch
of twice this stays below: without a bound PyTorch meets the branch, and traces a second time with
one."""
UNSUPPORTED: dict[int, str] = {
    TensorProto.FLOAT16: "float16",
    TensorProto.BFLOAT16: "bfloat16",
    TensorProto.FLOAT8E4M3FN: "float8",
    TensorProto.FLOAT8E5M2: "float8",
}
"""Types that a network may not compute in."""
ALIGNMENT = 4096
"""Of each tensor in the weights file: a page, so that a runtime may map it."""


class Step(nn.Module):
    """One row of any program: network, denoised estimate, update. `guided` adds the null label's
    half (see DESIGN: the step graph)."""

    def __init__(self, model: Model, guided: bool) -> None:
        super().__init__()
        self.network, self.shape, self.guided = model.module, model.sample_shape, guided
        self.null_label, self.size = model.num_classes, math.prod(model.sample_shape)

    def _column(self, call: Tensor, i: int) -> Tensor:
        return call[:, i : i + 1].reshape(-1, *[1] * len(self.shape))

    def answer(self, x: Tensor, call: Tensor, label: tuple[Tensor, ...]) -> Tensor:
        time = call[:, TIME]
        if not self.guided:
            return self.network(x, time, *label)
        labels = torch.cat([label[0], label[0] * 0 + self.null_label])
        both = self.network(torch.cat([x, x]), torch.cat([time, time]), labels).reshape(
            2, -1, *self.shape
        )
        return both[0] + (self._column(call, GUIDANCE) - 1) * (both[0] - both[1])

    def forward(
        self, state: Tensor, noise: Tensor, call: Tensor, update: Tensor, *label: Tensor
    ) -> tuple[Tensor, Tensor]:
        x = state[:, 0]
        F = self.answer(self._column(call, C_IN) * x, call, label)
        D = self._column(call, C_SKIP) * x + self._column(call, C_OUT) * F
        bound = self._column(call, CLIP)
        D = torch.maximum(torch.minimum(D, bound), -bound)
        known = torch.cat(
            [
                state.reshape(-1, R, self.size),
                D.reshape(-1, 1, self.size),
                noise.reshape(-1, 1, self.size),
            ],
            dim=1,
        )
        return (update @ known).reshape(-1, R, *self.shape), D


def trace(model: Model, guided: bool) -> ModelProto:
    """The step graph as ONNX with a dynamic batch, every weight inside, nothing of the build
    machine in it.

    Raises ExportError for a module that PyTorch cannot trace, or only at one size of the batch.
    """
    B = 2
    shape = model.sample_shape
    inputs = {
        "state": torch.randn(B, R, *shape),
        "noise": torch.randn(B, *shape),
        "call": torch.rand(B, 6),
        "update": torch.randn(B, R, R + 2),
    }
    if model.labels:
        inputs["label"] = torch.zeros(B, dtype=torch.int64)
    batched = {0: torch.export.Dim("batch", max=TRACED_BATCH)}
    try:
        with _quiet():
            program = torch.onnx.export(
                Step(model, guided).eval(),
                tuple(inputs.values()),
                dynamo=True,
                opset_version=OPSET,
                input_names=list(inputs),
                output_names=["next_state", "denoised"],
                dynamic_shapes=(*[batched] * 4, (batched,)) if model.labels else (batched,) * 4,
                external_data=False,
                verbose=False,
            )
        assert program is not None
        proto = program.model_proto
    except Exception as error:  # whatever the module's own code raises while it is traced
        raise ExportError(_why_not(model.name, error)) from error
    fixed = [i.name for i in proto.graph.input if i.type.tensor_type.shape.dim[0].dim_value]
    if fixed:
        raise ExportError(
            f"{model.name}: the module works at one size of the batch only (its {fixed[0]} was "
            f"traced at {B}). "
            "Take the batch from x.shape[0], and make no Python number of it."
        )
    clean(proto)
    _name_weights(proto.graph, model.module)
    _require_float32(model.name, proto)
    return proto


def _require_float32(name: str, proto: ModelProto) -> None:
    """Raises ExportError for a network that computes in a type that ONNX Runtime's CPU kernels
    lack."""
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
    """Give back their names to parameters that the exporter reshaped, and so renamed: a bundle's
    weights can be read from its graphs."""
    named = {
        f"{NETWORK}{name}": p.detach().numpy().tobytes() for name, p in module.named_parameters()
    }
    taken = {i.name for i in graph.initializer}
    names: dict[bytes, list[str]] = {}
    for name, raw in named.items():
        if name not in taken:
            names.setdefault(raw, []).append(name)
    renamed: dict[str, str] = {}
    for tensor in graph.initializer:
        if tensor.name not in named and tensor.data_type == TensorProto.FLOAT:
            same = names.get(numpy_helper.to_array(tensor).tobytes())
            if same:
                renamed[tensor.name] = tensor.name = same.pop(0)
    for node in graph.node:
        for reader in _with_inner(node):
            for i, name in enumerate(reader.input):
                reader.input[i] = renamed.get(name, name)


def _why_not(name: str, error: BaseException) -> str:
    """The error of a failed trace: torch's first line, the user's line of code, and the remedy."""
    chain = [error]
    while chain[-1].__cause__ is not None:
        chain.append(chain[-1].__cause__)
    first = chain[-1]
    line = next((line.strip() for line in str(first).splitlines() if line.strip()), "")
    place = next(filter(None, map(_line_of_user, reversed(chain))), "")
    return (
        f"{name}: PyTorch cannot trace the module{place} "
        f"({type(first).__name__}: {line[:300]}). A forward that can be exported takes no branch "
        f"on "
        "the values of its inputs and keeps them tensors: no .item(), no numpy. Write a branch as "
        "torch.where(condition, a, b)."
    )


def _line_of_user(error: BaseException) -> str:
    """The innermost line of an error's traceback that is neither torch's nor ours; "" for none."""
    ours, theirs = Path(__file__).parent, Path(torch.__file__).parent
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


def clean(proto: ModelProto) -> ModelProto:
    """The same computation without stack traces, paths, and shapes computed at run time that are
    known but for the batch.

    A node is called after the module that it came from: network.down.0.residual.conv1/Conv_12; what
    is not the network's, step/Add_3.
    """
    proto.doc_string, proto.producer_name, proto.producer_version = "", "unnoise", ""
    del proto.metadata_props[:]
    graph = proto.graph
    graph.name, graph.doc_string = "step", ""
    del graph.metadata_props[:]
    _freeze_shapes(proto)
    drop_unused(graph)
    for i, (node, module) in enumerate(zip(graph.node, _modules(graph), strict=True)):
        node.name = f"{module}/{node.op_type}_{i}"
    for item in [*graph.node, *graph.input, *graph.output, *graph.initializer]:
        item.doc_string = ""
        del item.metadata_props[:]
    del graph.value_info[:]
    return proto


def _modules(graph: GraphProto) -> list[str]:
    """For each node the path of the module that it came from, as the exporter notes it; "step"
    outside the network.

    Of some nodes it notes nothing: those between two of the network's are the network's, and of the
    module before them.
    """
    found = []
    for node in graph.node:
        noted = next(
            (p.value for p in node.metadata_props if p.key == "pkg.torch.onnx.name_scopes"), "[]"
        )
        inside = [
            scope
            for scope in ast.literal_eval(noted)[:-1]
            if scope and f"{scope}.".startswith(NETWORK)
        ]
        found.append(inside[-1] if inside else STEP)
    made: dict[str, str] = {}
    for node, module in zip(graph.node, found, strict=True):
        before = next((made[name] for name in node.input if name in made), None)
        if module != STEP or before:
            made.update(dict.fromkeys(node.output, before if module == STEP and before else module))
    wanted: set[str] = set()
    for i, node in reversed(list(enumerate(graph.node))):
        if found[i] != STEP or wanted.intersection(node.output):
            wanted.update(node.input)
            if found[i] == STEP and node.output[0] in made:
                found[i] = made[node.output[0]]
    return found


def _freeze_shapes(proto: ModelProto) -> None:
    """Shapes that are computed become constants, the batch as -1; a factor of ones in the batch's
    size goes."""
    graph = proto.graph
    dims = Dims(proto)
    stored = {t.name: t for t in graph.initializer}
    constants: dict[str, TensorProto] = {}
    ones = {
        n.output[0]
        for n in graph.node
        if n.op_type == "Expand" and _all_ones(stored.get(n.input[0]))
    }
    instead: dict[str, str] = {}
    for node in graph.node:
        for reader in _with_inner(node):
            for i, name in enumerate(reader.input):
                reader.input[i] = instead.get(name, name)
        if node.op_type == "Reshape" and node.input[1] not in stored and not _zero_is_zero(node):
            shape = dims.but_for_the_batch(node.output[0])
            if shape:
                name = "shape_" + "_".join("batch" if d == -1 else str(d) for d in shape)
                constants[name] = numpy_helper.from_array(np.array(shape, np.int64), name)
                node.input[1] = name
        elif node.op_type == "Mul":
            kept = [name for name in node.input if name not in ones]
            if len(kept) == 1 and dims.same(kept[0], node.output[0]):
                instead[node.output[0]] = kept[0]
    graph.initializer.extend(constants.values())


def _all_ones(tensor: TensorProto | None) -> bool:
    return tensor is not None and bool((numpy_helper.to_array(tensor) == 1).all())


def _zero_is_zero(reshape: NodeProto) -> bool:
    return any(a.name == "allowzero" and a.i for a in reshape.attribute)


def _with_inner(node: NodeProto) -> Iterator[NodeProto]:
    """A node and, where it is a branch or a loop, those inside it, which read the outer graph's
    values by name."""
    yield node
    for attribute in node.attribute:
        for inner in attribute.g.node:
            yield from _with_inner(inner)


def drop_unused(graph: GraphProto) -> None:
    """Remove nodes and constants that no output needs."""
    needed = {o.name for o in graph.output}
    kept: list[NodeProto] = []
    for node in reversed(graph.node):
        if needed.intersection(node.output):
            kept.append(node)
            needed.update(name for reader in _with_inner(node) for name in reader.input)
    del graph.node[:]
    graph.node.extend(reversed(kept))
    used = [i for i in graph.initializer if i.name in needed]
    del graph.initializer[:]
    graph.initializer.extend(used)


def loop(step: ModelProto, sample_shape: tuple[int, ...]) -> ModelProto:
    """The whole reverse loop in one graph around a step graph: an ONNX Loop whose body holds the
    weights.

    Inputs: x [B, *S] float32 (x_T), noise [K, B, *S], call [K, B, 6], update [K, B, R, R+2], and
    label [B] where the step has one. Output: sample [B, *S]. K, the number of rows, is dynamic like
    B.
    """
    rows = ("noise", "call", "update")
    body = GraphProto()
    body.CopyFrom(step.graph)
    for node in body.node:
        for i, name in enumerate(node.input):
            if name in rows:
                node.input[i] = f"{name}_row"
    gathers = [
        helper.make_node("Gather", [name, "k"], [f"{name}_row"], axis=0, name=f"row_{name}")
        for name in rows
    ]
    nodes = [*gathers, *body.node, helper.make_node("Identity", ["more"], ["go_on"], name="go_on")]
    del body.node[:]
    body.node.extend(nodes)
    state = next(i for i in step.graph.input if i.name == "state")
    next_state = next(o for o in step.graph.output if o.name == "next_state")
    del body.input[:], body.output[:]
    body.input.extend(
        [
            helper.make_tensor_value_info("k", TensorProto.INT64, []),
            helper.make_tensor_value_info("more", TensorProto.BOOL, []),
            state,
        ]
    )
    body.output.extend([helper.make_tensor_value_info("go_on", TensorProto.BOOL, []), next_state])
    body.name = "row"

    S, rank = list(sample_shape), len(sample_shape)
    pads = [0] * (rank + 2) + [0, R - 1] + [0] * rank
    constants = {
        "one": np.array([1], np.int64),
        "zero": np.array(0, np.int64),
        "pads": np.array(pads, np.int64),
        "nothing": np.array(0, np.float32),
        "always": np.array(True),
        "scalar": np.array([], np.int64),
    }
    outer = [
        helper.make_node("Shape", ["call"], ["K_vector"], start=0, end=1),
        helper.make_node("Reshape", ["K_vector", "scalar"], ["K"]),
        helper.make_node("Unsqueeze", ["x", "one"], ["x_register"]),
        helper.make_node("Pad", ["x_register", "pads", "nothing"], ["start"]),
        helper.make_node("Loop", ["K", "always", "start"], ["end"], body=body),
        helper.make_node("Gather", ["end", "zero"], ["sample"], axis=1),
    ]
    value = helper.make_tensor_value_info
    inputs = [
        value("x", TensorProto.FLOAT, ["batch", *S]),
        value("noise", TensorProto.FLOAT, ["rows", "batch", *S]),
        value("call", TensorProto.FLOAT, ["rows", "batch", 6]),
        value("update", TensorProto.FLOAT, ["rows", "batch", R, R + 2]),
        *[i for i in step.graph.input if i.name == "label"],
    ]
    outputs = [value("sample", TensorProto.FLOAT, ["batch", *S])]
    graph = helper.make_graph(
        outer,
        "sampler",
        inputs,
        outputs,
        [numpy_helper.from_array(v, k) for k, v in constants.items()],
    )
    for i, node in enumerate(graph.node):
        node.name = f"{node.op_type}_{i}"
    return helper.make_model(
        graph, producer_name="unnoise", opset_imports=step.opset_import, ir_version=step.ir_version
    )


def write(models: Mapping[str, ModelProto], folder: Path) -> None:
    """Write each model under its name; large constants go into one weights file, each once however
    many graphs hold it.

    The models given stay as they are. Raises ExportError for one that ONNX's own checker refuses.
    """
    folder.mkdir(parents=True, exist_ok=True)
    models = {name: copy_of(model) for name, model in models.items()}
    offsets: dict[bytes, int] = {}
    end = 0
    with (folder / WEIGHTS).open("wb") as weights:
        for model in models.values():
            for tensor in _constants(model.graph):
                raw = numpy_helper.to_array(tensor).tobytes()
                if len(raw) < INLINE:
                    continue
                key = hashlib.sha256(raw).digest()
                if key not in offsets:
                    offsets[key] = -(-end // ALIGNMENT) * ALIGNMENT
                    weights.write(b"\0" * (offsets[key] - end) + raw)
                    end = offsets[key] + len(raw)
                _make_external(tensor, offsets[key], len(raw))
    for name, model in models.items():
        path = folder / name
        path.write_bytes(model.SerializeToString(deterministic=True))
        try:
            onnx.checker.check_model(str(path))
        except onnx.checker.ValidationError as error:
            raise ExportError(f"{name} is not valid ONNX: {error}") from error


def copy_of(model: ModelProto) -> ModelProto:
    """The same model, to be changed."""
    copy = ModelProto()
    copy.CopyFrom(model)
    return copy


def _constants(graph: GraphProto) -> Iterator[TensorProto]:
    """The initializers of a graph and of the graphs inside its nodes."""
    yield from graph.initializer
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.GRAPH:
                yield from _constants(attribute.g)


def _make_external(tensor: TensorProto, offset: int, length: int) -> None:
    for name in ("raw_data", "float_data", "int32_data", "int64_data", "double_data"):
        tensor.ClearField(name)
    tensor.data_location = TensorProto.EXTERNAL
    del tensor.external_data[:]
    for key, value in (("location", WEIGHTS), ("offset", offset), ("length", length)):
        tensor.external_data.add(key=key, value=str(value))


def steps(model: Model) -> dict[str, ModelProto]:
    """The step graphs by file name: step.onnx, and for models with a null label that was trained
    step_guided.onnx."""
    guided = (False, True) if model.labels and model.labels.null_trained else (False,)
    return {"step_guided.onnx" if g else "step.onnx": trace(model, g) for g in guided}


def write_all(
    steps: Mapping[str, ModelProto],
    sample_shape: tuple[int, ...],
    folder: Path,
    beside: Mapping[str, ModelProto] | None = None,
) -> None:
    """Write each step graph, as sampler*.onnx the loop around it, and the models `beside`, into
    `folder` with their shared weights."""
    models = dict(beside or {})
    for name, step in steps.items():
        models[name] = step
        models[name.replace("step", "sampler")] = loop(step, sample_shape)
    write(models, folder)
