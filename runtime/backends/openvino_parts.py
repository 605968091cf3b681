"""A step graph in three: what stays in float32 before the network, the network, what stays in
float32 after it.

    head     state, call, label → c_in·x, and all that depends on time and label alone
    network  those → F
    tail     F, state, noise, call, update → D and the next state

The cut needs no names: of what depends on the state, the network begins with the first operation
that reads weights and ends with the last.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

PARTS = ("head", "network", "tail")


def split(model: Any) -> list[Any]:
    """The `PARTS` of a model whose inputs' shapes are known, which is taken apart. What one hands
    to the next is called cut0, cut1, … in both.

    A graph without weights stays in one part. Constants are folded: not for quantized graphs, whose
    weights would become float32.
    """
    import openvino
    from openvino import passes

    manager = passes.Manager()
    manager.register_pass(passes.ConstantFolding())
    manager.run_passes(model)
    nodes = model.get_ordered_ops()
    network = _network(nodes, model.input("state").get_node().get_name())
    if not network:
        return [model]
    results = model.get_results()
    parameters = model.get_parameters()
    cuts = list(_cuts(nodes, network))
    into, out_of = (
        [result for inward, result, _ in cuts if inward == way] for way in (True, False)
    )
    made = [*parameters, *(parameter for _, _, parameter in cuts)]
    Model: Any = openvino.Model
    return [
        Model(ends, _needed(ends, made), name)
        for name, ends in zip(PARTS, (into, out_of, results), strict=True)
    ]


def _cuts(nodes: list[Any], network: set[str]) -> Iterator[tuple[bool, Any, Any]]:
    """Cut every value that passes into the network or out of it. (whether into it, the result, the
    parameter) of each."""
    from openvino import opset13

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
            result = opset13.result(value)
            parameter = opset13.parameter(value.get_partial_shape(), value.get_element_type())
            name = next(names)
            for port in (result, parameter):
                port.output(0).set_names({name})
            for reader in readers:
                reader.replace_source_output(parameter.output(0))
            yield not inside, result, parameter


def _network(nodes: list[Any], state: str) -> set[str]:
    """Names of the network's nodes, of nodes in topological order; `state` is that parameter's
    name."""
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
    for node in reversed(nodes):
        readers = {i.get_node().get_name() for o in node.outputs() for i in o.get_target_inputs()}
        if node.get_name() in weighted or readers & before:
            before.add(node.get_name())
    return after & before


def _is_weights(node: Any) -> bool:
    """Whether a node is a constant of several real numbers."""
    constant = node.get_type_name() == "Constant" and node.get_element_type().is_real()
    return constant and np.prod(node.get_output_shape(0)) > 1


def _needed(results: list[Any], parameters: list[Any]) -> list[Any]:
    """Those of the parameters that the results depend on."""
    seen = set[str]()
    waiting = list(results)
    while waiting:
        node = waiting.pop()
        if node.get_name() not in seen:
            seen.add(node.get_name())
            waiting += [i.get_source_output().get_node() for i in node.inputs()]
    return [p for p in parameters if p.get_name() in seen]
