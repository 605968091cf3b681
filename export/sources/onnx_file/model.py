"""An ONNX file as a `Model`: other inputs become conditions, and the file itself is the reference.

Nothing here imports PyTorch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import numpy as np
import onnxruntime
from numpy.typing import NDArray
from onnx import ModelProto

from runtime.bundle.conditions import Condition
from runtime.diffusion.program import Network
from runtime.diffusion.schedule import Schedule
from runtime.errors import RequestError
from runtime.errors.arguments import elements, file_path
from runtime.errors.keywords import check_options, option_names
from runtime.errors.messages import described, printable, refused
from runtime.terminal.output import say

from ...errors import ExportError
from ..conditions import declared_conditions
from ..model import ONNX_FILE, Model, bundle_name
from ..settings import check_settings, fields_of, without_guidance
from .ports import INTEGERS, Port, Ports, find_ports, shape_of
from .read import OnnxFile, read

HALF_BOUND = 0.05
"""The largest difference between a file that computes in float16 and its weights in float32, as a
share of the largest output: a float16 number has 11 bits, and errors add up over layers."""
Arrays = Mapping[str, NDArray[np.generic]]


@dataclass(frozen=True, eq=False, kw_only=True)
class OnnxModel(Model):
    """A network in an ONNX file, and its description.

    Attributes:
        file: The file, and its graph in float32.
        ports: Which input is what.
        order: The file's number of each label, the null label last; () if the order is the same.
    """

    file: OnnxFile
    ports: Ports
    order: tuple[int, ...] = ()

    @cached_property
    def _session(self) -> onnxruntime.InferenceSession:
        # By path, as its users run it. A file in float16 is compared as its float32 graph.
        return open_session(self.file.proto if self.file.computes_half else self.file.path)

    def reference(self) -> Network:
        """Return the file, run by ONNX Runtime on one sample at a time.

        A file may take one time or one sample, so this is what every user of it can compute.
        """
        session = self._session

        def run(feeds: Arrays) -> NDArray[np.float32]:
            return np.asarray(session.run([self.ports.output.name], feeds)[0])

        return self.alone(run)

    def alone(self, run: Callable[[Arrays], NDArray[np.float32]]) -> Network:
        """Return a network that runs each sample of its inputs alone.

        Args:
            run: F [1, *S] of the file's inputs by name.
        """

        def network(*inputs: NDArray[Any], **conditions: NDArray[Any]) -> NDArray[np.float32]:
            found = []
            for i in range(len(inputs[0])):
                one = slice(i, i + 1)
                named = {name: array[one] for name, array in conditions.items()}
                found.append(run(self._feeds([array[one] for array in inputs], named)))
            return np.concatenate(found)

        return network

    def _feeds(self, inputs: Sequence[NDArray[Any]], conditions: Arrays) -> Arrays:
        """Return the file's inputs of x, time and perhaps label, [1, …] each, and conditions."""
        ports = self.ports
        # As the graph rounds it, see `export.graph.adapt`.
        time = inputs[1] if ports.time.is_float else np.round(inputs[1])
        feeds: dict[str, NDArray[np.generic]] = {
            ports.x.name: inputs[0],
            ports.time.name: time.astype(ports.time.kind).reshape([1] * len(ports.time.dims)),
        }
        if ports.label is not None:
            label = np.array(self.order)[inputs[2]] if self.order else inputs[2]
            feeds[ports.label.name] = label.astype(ports.label.kind)
        for name, port in ports.conditions.items():
            feeds[port.name] = conditions[name].astype(port.kind)
        return feeds


def open_session(source: ModelProto | Path) -> onnxruntime.InferenceSession:
    """Open a graph or a file. Raises ExportError if ONNX Runtime cannot."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    where = "the graph in float32" if isinstance(source, ModelProto) else printable(source)
    try:
        plain = source.SerializeToString() if isinstance(source, ModelProto) else str(source)
        return onnxruntime.InferenceSession(plain, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # ONNX Runtime has errors of its own
        raise ExportError(
            f"{where}: ONNX Runtime cannot run it ({described(error)}). Export the network again."
        ) from error


def from_onnx(
    path: str | Path,
    *,
    prediction: str,
    schedule: Schedule | str,
    inputs: Mapping[str, str] | None = None,
    output: str | None = None,
    name: str | None = None,
    sample_shape: Sequence[int] | None = None,
    conditions: Sequence[Condition] = (),
    **settings: Any,
) -> OnnxModel:
    """Describe a network in an ONNX file, which takes x, a timestep, and perhaps more.

    Args:
        path: The file. Weights in further files are read, too.
        prediction, schedule: See `export.sources.module.from_module`.
        inputs: Names of the file's inputs by what they are: x, time, label, or the name of a
            condition [by their types, shapes and usual names].
        output: The name of the prediction among the outputs [the one with the shape of x].
        name: The bundle's name [the file's].
        sample_shape: *S [as in the file].
        conditions: What the bundle says of further inputs [their shapes in the file].
        settings: Further arguments of `from_module`.

    Raises:
        RequestError: An argument is invalid.
        ExportError: The file cannot be exported. The message says what would help.
    """
    check_options(
        "from_onnx", settings, option_names(fields_of, 0), option_names(from_onnx, 0)[:-1]
    )
    path = file_path("path", path)
    where = printable(path)
    declared = declared_conditions(conditions)
    file = read(path)
    classes = settings.get("num_classes", 0)
    ports = find_ports(file.proto.graph, where, _names(inputs), output, bool(classes))
    shape = None if sample_shape is None else elements("sample_shape", sample_shape, "integers")
    sizes = cast("tuple[int, ...] | None", shape)
    fields = fields_of(
        name=bundle_name(path.stem) if name is None else name,
        sample_shape=shape_of(ports.x, sizes, where, "--sample-shape"),
        prediction=prediction,
        schedule=schedule,
        conditions=_conditions(ports, declared, where),
        **settings,
    )
    source = {"source": f"an ONNX file, {printable(path.name)}", ONNX_FILE: {"opset": file.opset}}
    provenance = {**source, **fields.pop("provenance")}
    order = _order(classes, settings.get("null_label"))
    model = OnnxModel(file=file, ports=ports, order=order, provenance=provenance, **fields)
    _say_ports(model)
    check_settings(model)
    _check_outputs(model)
    return without_guidance(model)


def _names(inputs: object) -> dict[str, str]:
    if inputs is None:
        return {}
    if not isinstance(inputs, Mapping):
        raise refused("inputs", "a dict of the file's names, such as {'time': 't'}", inputs)
    return {str(role): str(name) for role, name in inputs.items()}


def _order(classes: int, null_label: int | None) -> tuple[int, ...]:
    """Return the file's numbers in a bundle's order: the classes, then the null label."""
    if null_label is None or null_label == classes:
        return ()
    return (*(i for i in range(classes + 1) if i != null_label), null_label)


def _conditions(ports: Ports, declared: Sequence[Condition], where: str) -> list[Condition]:
    """Return the conditions in the file's order: as declared, or as the file's inputs are."""
    given = {condition.name: condition for condition in declared}
    for name in given:
        if name not in ports.conditions:
            others = ", ".join(ports.conditions) or "none"
            raise RequestError(
                f"{where} has no input for the condition {name!r}. Its further inputs: {others}. "
                f"Name one: --input {name}=NAME."
            )
    return [
        _condition(name, port, given.get(name), where) for name, port in ports.conditions.items()
    ]


def _condition(name: str, port: Port, declared: Condition | None, where: str) -> Condition:
    dtype = "int64" if port.dtype in INTEGERS else "float32"
    remedy = f"--condition {name}:SIZES"
    shape = shape_of(port, None if declared is None else declared.shape, where, remedy)
    if declared is None and dtype == "int64":
        raise RequestError(
            f"{where}: {port} holds integers, so their range is needed: --condition "
            f"{name}:{','.join(map(str, shape))}:dtype=int64:range=LOW,HIGH, or --num-classes N "
            f"--input label={printable(port.name)} for class labels."
        )
    if declared is not None and declared.dtype != dtype:
        raise RequestError(f"{where}: {port} must be declared with dtype={dtype}.")
    return declared or Condition(name, shape)


def _say_ports(model: OnnxModel) -> None:
    """Print which input was taken for what, because a guess must be seen."""
    ports = model.ports
    parts = [f"x is {ports.x}", f"time is {ports.time}", f"F is {ports.output}"]
    parts += [f"label is {ports.label}"] if ports.label else []
    parts += [f"{name} is a condition" for name in ports.conditions]
    say("; ".join(parts))


def _check_outputs(model: OnnxModel) -> None:
    """Run the file at both ends of the schedule, twice.

    Raises:
        ExportError: It does not return one finite F [1, *S] for the same inputs.
    """
    name = model.name
    generator = np.random.Generator(np.random.Philox(key=0))
    x = generator.standard_normal((2, *model.sample_shape), np.float32)
    time = model.schedule.time[[0, -1]].astype(np.float32)
    label = [np.array([0, max(0, model.num_labels - 1)])] if model.labels else []
    conditions = model.draw_conditions(2)
    network = model.reference()
    try:
        first = network(x, time, *label, **conditions)
        again = network(x, time, *label, **conditions)
    except Exception as error:  # ONNX Runtime has errors of its own
        raise ExportError(
            f"{name}: the file fails on one sample ({described(error)}). Are the shapes and "
            "the inputs as stated?"
        ) from error
    if first.shape != x.shape:
        raise ExportError(
            f"{name}: {model.ports.output} is {list(first.shape[1:])} for a sample, "
            f"{list(model.sample_shape)} expected. Name another output: --output NAME."
        )
    if not np.isfinite(first).all():
        raise ExportError(f"{name}: the file returns NaN or infinity for noise of variance 1.")
    if not np.array_equal(first, again):
        raise ExportError(
            f"{name}: the file returns another F the second time. It must draw no random numbers: "
            "export it in evaluation mode."
        )
    if model.file.computes_half:
        wide = float(np.abs(first).max())
        change = float(np.abs(_in_half(model)(x, time, *label, **conditions) - first).max())
        _check_half(name, change, HALF_BOUND * max(1.0, wide))


def _in_half(model: OnnxModel) -> Network:
    """Return the file itself, which computes in float16."""
    session = open_session(model.file.path)
    half = {port.name for port in session.get_inputs() if port.type == "tensor(float16)"}

    def run(feeds: Arrays) -> NDArray[np.float32]:
        own = {k: v.astype(np.float16) if k in half else v for k, v in feeds.items()}
        return np.asarray(session.run([model.ports.output.name], own)[0]).astype(np.float32)

    return model.alone(run)


def _check_half(name: str, change: float, bound: float) -> None:
    """Raises ExportError if a file in float16 computes something else than its float32 graph."""
    if not change <= bound:
        raise ExportError(
            f"{name}: the file computes in float16, and differs by {change:.2g} from the same "
            f"weights in float32, at most {bound:.2g} expected. Export it in float32."
        )
    say(f"the file computes in float16; its float32 graph differs by {change:.1g}")
