"""Level adapters put into a rewritten graph: one behind each layer of the region below full resolution."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from torch import Tensor, fx, nn

from cadsurgery.elements import functional
from cadsurgery.elements.adapters import LevelAdapter
from cadsurgery.network.program import GraphInterpreter, Program
from cadsurgery.surgery.hooks import acts_as

# Where the graphs find them in the network that runs them. Its state dict leaves them out, as it does the mask.
ADAPTERS = "_adapters"


def make_adapters(program: Program) -> nn.ModuleDict:
    """An adapter that changes nothing for each layer of a program that can have one, by the name of the layer."""
    levels = program.geometry.max_level
    places = _places(program)
    return nn.ModuleDict(
        {name: LevelAdapter(levels, like.shape[0], like) for name, (_, like) in places.items()}
    )


def with_adapters(program: Program, names: set[str]) -> Program:
    """The program with a call of each adapter behind its layer; of another way through the network those it has."""
    graph = fx.Graph()
    copies: dict[fx.Node, Any] = {}
    graph.output(graph.graph_copy(program.graph, copies))
    for name, (tail, _) in _places(program).items():
        if name in names:
            after = copies[tail]
            users = list(after.users)
            with graph.inserting_after(after):
                adapter = graph.get_attr(f"{ADAPTERS}.{name}")
            with graph.inserting_after(adapter):
                adapted = graph.call_function(functional.adapt, (after, adapter))
            for user in users:
                user.replace_input_with(after, adapted)
    graph.lint()
    return replace(program, graph=graph)


def _places(program: Program) -> dict[str, tuple[fx.Node, Tensor]]:
    """By name: the node behind which an adapter stands, elements, and a tensor of the layer (C, ...).

    Behind convolutions below the finest stage and linear layers on rows; behind the batch norm that alone follows.
    """
    places: dict[str, tuple[fx.Node, Tensor]] = {}
    for node, path, like in _layers(program):
        tail = node
        while len(tail.users) == 1 and (user := next(iter(tail.users))).target is functional.batch_norm:
            tail = user
        stem = path.replace(".", "_") or node.name
        number = sum(name == stem or name.startswith(f"{stem}__") for name in places)
        places[f"{stem}__{number}" if number else stem] = tail, like
    return places


def _layers(program: Program) -> Iterator[tuple[fx.Node, str, Tensor]]:
    """Elements that a layer gives, its name, and its weight (C, ...)."""
    constants = _constants(program)
    for node in program.graph.nodes:
        if node.target is functional.conv2d and node.kwargs.get("stage") != 0:
            weight = constants.get(node.args[1])
            if isinstance(weight, Tensor):
                yield node, _path_of(node.args[1]), weight
        elif node.target is functional.Elements:
            rows = node.args[0]
            if rows.op == "call_module" and rows.args[0].target is functional.rows_on:
                module = program.net.get_submodule(str(rows.target))
                if acts_as(module, nn.Linear):
                    yield node, str(rows.target), module.weight


def _constants(program: Program) -> dict[fx.Node, Any]:
    """The values of nodes that are made of modules and parameters alone."""
    interpreter, values = GraphInterpreter(program, program.graph), dict[fx.Node, Any]()
    for node in program.graph.nodes:
        sources = node.all_input_nodes
        if node.op == "get_attr" or (
            sources and node.op.startswith("call") and values.keys() >= set(sources)
        ):
            args, kwargs = fx.map_arg((node.args, node.kwargs), values.__getitem__)
            values[node] = getattr(interpreter, node.op)(node.target, args, kwargs)
    return values


def _path_of(node: Any) -> str:
    """Name of the first module or parameter that a constant is made of."""
    while node.op != "get_attr":
        node = node.all_input_nodes[0]
    return str(node.target)
