"""Which input of an ONNX network is what, and which output is F."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from onnx import GraphProto, TensorProto, ValueInfoProto

from runtime.bundle.conditions import LABEL, Condition
from runtime.errors import RequestError, unknown
from runtime.errors.messages import printable, refused

from ...errors import ExportError

X = "x"
TIME = "time"
ROLES = (X, TIME, LABEL)
"""What an input may be besides a condition."""
X_NAMES = ("x", "sample", "x_t", "latent", "latents", "noisy", "image", "input")
TIME_NAMES = ("time", "timestep", "timesteps", "t", "step", "noise_labels")
FLOATS = (TensorProto.FLOAT, TensorProto.FLOAT16)
INTEGERS: Mapping[int, type[np.generic]] = {
    TensorProto.INT64: np.int64,
    TensorProto.INT32: np.int32,
}


@dataclass(frozen=True)
class Port:
    """An input or an output of a network.

    Attributes:
        name: In the file.
        dtype: Of ONNX's types.
        dims: The size of each axis, 0 for one that may have any.
    """

    name: str
    dtype: int
    dims: tuple[int, ...]

    @property
    def is_float(self) -> bool:
        """Whether it holds floating-point numbers."""
        return self.dtype in FLOATS

    @property
    def kind(self) -> type[np.generic]:
        """The numpy type of its arrays, as the graph in float32 takes them."""
        return INTEGERS.get(self.dtype, np.float32)

    def fits(self, other: Port) -> bool:
        """Whether both may have one shape."""
        pairs = zip(self.dims, other.dims, strict=False)
        same = all(a == b or not a or not b for a, b in pairs)
        return len(self.dims) == len(other.dims) and same

    def __str__(self) -> str:
        sizes = ", ".join(str(size) if size else "?" for size in self.dims)
        return f"{printable(self.name)} [{sizes}] {TensorProto.DataType.Name(self.dtype).lower()}"


@dataclass(frozen=True)
class Ports:
    """The inputs of a network by what they are, and its output F.

    Attributes:
        x: The noisy sample [B, *S].
        time: One number for each sample [B] or [B, 1], or one for all, [] or [1].
        label: [B]; None for a network without.
        output: F [B, *S].
        conditions: By the name of the condition, [B, …] each.
    """

    x: Port
    time: Port
    label: Port | None
    output: Port
    conditions: Mapping[str, Port] = field(default_factory=dict)

    @property
    def fixed_batch(self) -> bool:
        """Whether the file takes one sample at a time."""
        return self.x.dims[0] == 1

    @property
    def one_time(self) -> bool:
        """Whether the file takes one time for all samples of a batch."""
        return len(self.time.dims) == 0 or self.time.dims[0] == 1


def find_ports(
    graph: GraphProto, where: str, inputs: Mapping[str, str], output: str | None, labelled: bool
) -> Ports:
    """Return which input is what: as the caller says, else by type, shape and usual names.

    Args:
        graph: Of the network.
        where: The file, for messages.
        inputs: Names of the file's inputs by what they are: x, time, label, or a condition's name.
        output: The name of F [the one output that has the shape of x].
        labelled: Whether the network has classes, so that an input may be their label.

    Raises:
        RequestError: The file has no input or output of a name.
        ExportError: The inputs or outputs are not those of a network, or it is not clear which.
    """
    stored = {tensor.name for tensor in graph.initializer}
    ports = {p.name: p for p in map(_port, graph.input) if p.name not in stored}
    outputs = {p.name: p for p in map(_port, graph.output)}
    chosen = _chosen(inputs, ports)
    free = [p for p in ports.values() if p not in chosen.values()]
    if X not in chosen:
        chosen[X] = _find_x(free, list(outputs.values()), where)
    free = [p for p in free if p != chosen[X]]
    if TIME not in chosen:
        chosen[TIME] = _find_time(free, where)
    free = [p for p in free if p != chosen[TIME]]
    if labelled and LABEL not in chosen:
        chosen[LABEL] = _find_label(free, where)
    if LABEL in chosen and not labelled:
        raise RequestError(
            f"{where}: {chosen[LABEL]} is the class label, so say how many classes there are: "
            "--num-classes N."
        )
    others = {name: port for name, port in chosen.items() if name not in ROLES}
    for port in free:
        if port not in chosen.values():
            name = re.sub(r"\W+", "_", port.name).strip("_")
            if name in others:
                raise ExportError(
                    f"{where}: the inputs {others[name].name!r} and {port.name!r} would both be "
                    f"the condition {name!r}. Name one of them: --input NAME={port.name}."
                )
            _check_name(name, port, where)
            others[name] = port
    found = Ports(
        x=chosen[X],
        time=chosen[TIME],
        label=chosen.get(LABEL),
        output=_find_output(chosen[X], outputs, output, where),
        conditions=others,
    )
    _check(found, where)
    return found


def _check_name(name: str, port: Port, where: str) -> None:
    """Raises ExportError if an input's name cannot be that of a condition."""
    try:
        Condition(name)
    except RequestError as error:
        raise ExportError(
            f"{where}: the input {printable(port.name)!r} would be the condition {name!r}, a name "
            f"that none may have. Give another: --input NAME={printable(port.name)}."
        ) from error


def _port(value: ValueInfoProto) -> Port:
    kind = value.type.tensor_type
    dims = tuple(d.dim_value for d in kind.shape.dim)
    return Port(value.name, kind.elem_type, dims)


def _chosen(inputs: Mapping[str, str], ports: Mapping[str, Port]) -> dict[str, Port]:
    chosen: dict[str, Port] = {}
    for role, name in inputs.items():
        if name not in ports:
            raise unknown("input of the file", name, list(ports))
        if ports[name] in chosen.values():
            raise refused("inputs", "each input of the file once", name)
        chosen[role] = ports[name]
    return chosen


def _listed(ports: Sequence[Port]) -> str:
    return "; ".join(map(str, ports)) or "none"


def _find_x(ports: Sequence[Port], outputs: Sequence[Port], where: str) -> Port:
    fitting = [
        p for p in ports if p.is_float and len(p.dims) > 1 and any(p.fits(o) for o in outputs)
    ]
    named = [p for p in fitting if p.name.lower() in X_NAMES]
    for found in (fitting, named):
        if len(found) == 1:
            return found[0]
    raise ExportError(
        f"{where}: which input is the noisy sample is not clear. Name it: --input x=NAME. The "
        f"inputs are {_listed(ports)}; the outputs are {_listed(outputs)}."
    )


def _find_time(ports: Sequence[Port], where: str) -> Port:
    named = [p for p in ports if p.name.lower() in TIME_NAMES]
    small = [p for p in ports if len(p.dims) < 2]
    for found in (named, small):
        if len(found) == 1:
            return found[0]
    raise ExportError(
        f"{where}: which input is the timestep is not clear. Name it: --input time=NAME. The "
        f"other inputs are {_listed(ports)}."
    )


def _find_label(ports: Sequence[Port], where: str) -> Port:
    found = [p for p in ports if p.dtype in INTEGERS and len(p.dims) == 1]
    if len(found) == 1:
        return found[0]
    raise ExportError(
        f"{where}: which input is the class label is not clear. Name it: --input label=NAME. The "
        f"other inputs are {_listed(ports)}."
    )


def _find_output(x: Port, outputs: Mapping[str, Port], output: str | None, where: str) -> Port:
    if output is not None:
        if output not in outputs:
            raise unknown("output of the file", output, list(outputs))
        return outputs[output]
    fitting = [p for p in outputs.values() if p.is_float and p.fits(x)]
    if len(fitting) == 1:
        return fitting[0]
    advice = (
        "A network that also predicts its variance returns twice the channels: export it again "
        "with the first half alone."
    )
    which = "Name it: --output NAME." if fitting else f"F has the shape of x. {advice}"
    raise ExportError(
        f"{where}: {len(fitting)} outputs have the shape of {x}, so which one is the prediction "
        f"is not clear. {which} The outputs are {_listed(list(outputs.values()))}."
    )


def _check(ports: Ports, where: str) -> None:
    """Raises ExportError for an input that is not as a network's is."""
    if not ports.x.is_float or len(ports.x.dims) < 2:
        raise ExportError(
            f"{where}: x must be float32 or float16 with the batch as its first axis of several, "
            f"got {ports.x}. Name another input, --input x=NAME, or export it again with its shape."
        )
    batch = ports.x.dims[0]
    if batch > 1:
        raise ExportError(
            f"{where}: {ports.x} has a fixed batch of {batch}. Export it with a batch that may "
            "vary (dynamic_axes or dynamic_shapes of torch.onnx.export), or with one sample."
        )
    if len(ports.time.dims) > 2 or ports.time.dims[1:] not in ((), (1,)):
        raise ExportError(f"{where}: the timestep must be [], [1], [B] or [B, 1]: {ports.time}.")
    for name, port in {TIME: ports.time, LABEL: ports.label, **ports.conditions}.items():
        if port is not None and not (port.is_float or port.dtype in INTEGERS):
            raise ExportError(
                f"{where}: {name} must be float32, float16, int64 or int32, got {port}. Export it "
                "again with another type."
            )
    for name, port in {LABEL: ports.label, **ports.conditions}.items():
        if port is not None and (not port.dims or port.dims[0] > 1):
            raise ExportError(
                f"{where}: {name} must have the batch as its first axis, got {port}. Every sample "
                "has its own value. Export it again with one."
            )


def shape_of(port: Port, given: Sequence[int] | None, where: str, remedy: str) -> tuple[int, ...]:
    """Return the shape of a port without its batch; sizes that may vary are the caller's.

    Args:
        given: The caller's shape; None if the file must say it.
        remedy: The option that says it.

    Raises:
        RequestError: The file has another shape, or leaves a size open that is not given.
    """
    own = port.dims[1:]
    if given is None:
        if not all(own):
            raise RequestError(
                f"{where}: {port} may have any size along some axes, so say which: {remedy}."
            )
        return own
    if len(given) != len(own) or any(a and a != b for a, b in zip(own, given, strict=True)):
        raise RequestError(
            f"{where}: {port} does not take [B, {', '.join(map(str, given))}]. Change {remedy}."
        )
    return tuple(given)
