"""A step graph in three parts: the network, and what stays in float32 before and after it.

    head     state, call, label → c_in·x, and values that depend on time and label only
    network  those → F
    tail     F, state, noise, call, update → D and the next state

The cut needs no names. Among the operations that depend on the state, the network spans from the
first to the last that reads weights.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple, cast

import numpy as np

from .openvino_api import Manager, Model, Node, OpenVinoLibrary, Operations

PARTS = ("head", "network", "tail")


class Cut(NamedTuple):
    """A value that passes into the network, or out of it."""

    inward: bool
    result: Node
    parameter: Node


def split(model: Model) -> list[Model]:
    """Split a model whose inputs have known shapes into `PARTS`.

    The values that one part passes to the next are called cut0, cut1, … in both. A graph without
    weights stays in one part. Constants are folded, so quantized graphs, whose weights would become
    float32, must not be split.
    """
    import openvino
    from openvino import passes

    # Weights may be computed from constants. Folded, they are constants, which `_network` finds.
    manager = cast(Manager, passes.Manager())
    manager.register_pass(passes.ConstantFolding())
    manager.run_passes(model)
    nodes = model.get_ordered_ops()
    network = _network(nodes, model.input("state").get_node().get_name())
    if not network:
        return [model]
    results = model.get_results()
    parameters = model.get_parameters()
    cuts = list(_cuts(nodes, network))
    # A part is what its results depend on: the head ends where the network begins, and so on.
    into = [cut.result for cut in cuts if cut.inward]
    out_of = [cut.result for cut in cuts if not cut.inward]
    inputs = [*parameters, *(cut.parameter for cut in cuts)]
    library = cast(OpenVinoLibrary, openvino)
    return [
        library.Model(ends, _needed(ends, inputs), name)
        for name, ends in zip(PARTS, (into, out_of, results), strict=True)
    ]


def _cuts(nodes: Sequence[Node], network: set[str]) -> Iterator[Cut]:
    """Cut every value that passes into the network or out of it."""
    from openvino import opset13

    operations = cast(Operations, opset13)
    names = (f"cut{i}" for i in range(len(nodes)))
    values = [
        v for n in nodes if n.get_type_name() not in ("Constant", "Parameter") for v in n.outputs()
    ]
    for value in values:
        inside = value.get_node().get_name() in network
        readers = [
            r for r in value.get_target_inputs() if (r.get_node().get_name() in network) != inside
        ]
        if readers:
            # The value ends the one part as a result, and begins the other as a parameter.
            result = operations.result(value)
            parameter = operations.parameter(value.get_partial_shape(), value.get_element_type())
            name = next(names)
            for port in (result, parameter):
                port.output(0).set_names({name})
            for reader in readers:
                reader.replace_source_output(parameter.output(0))
            yield Cut(not inside, result, parameter)


def _network(nodes: Sequence[Node], state: str) -> set[str]:
    """The names of the network's nodes, from nodes in topological order.

    state: The name of the parameter `state`.
    """
    # Downward: what depends on the state and reads weights, and everything after that.
    from_state = {state}
    weighted = set[str]()
    after = set[str]()
    before = set[str]()
    for node in nodes:
        name = node.get_name()
        sources = [i.get_source_output().get_node() for i in node.inputs()]
        names = {source.get_name() for source in sources}
        if names & from_state:
            from_state.add(name)
            if any(map(_is_weights, sources)):
                weighted.add(name)
        if name in weighted or names & after:
            after.add(name)
    # Upward: what reads weights, and everything before that. The network is in both.
    for node in reversed(nodes):
        readers = {i.get_node().get_name() for o in node.outputs() for i in o.get_target_inputs()}
        if node.get_name() in weighted or readers & before:
            before.add(node.get_name())
    return after & before


def _is_weights(node: Node) -> bool:
    """Whether a node is a constant of several real numbers; a formula's constant is only one."""
    constant = node.get_type_name() == "Constant" and node.get_element_type().is_real()
    return constant and bool(np.prod(node.get_output_shape(0)) > 1)


def _needed(results: Sequence[Node], parameters: Sequence[Node]) -> list[Node]:
    """The parameters that the results depend on."""
    seen = set[str]()
    waiting = list(results)
    while waiting:
        node = waiting.pop()
        if node.get_name() not in seen:
            seen.add(node.get_name())
            waiting += [i.get_source_output().get_node() for i in node.inputs()]
    return [p for p in parameters if p.get_name() in seen]
