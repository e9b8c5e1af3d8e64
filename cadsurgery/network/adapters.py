"""Level adapters put into a rewritten graph: one behind each layer of the region below full resolution."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, fx, nn

from cadsurgery.elements import functional
from cadsurgery.elements.adapters import LevelAdapter
from cadsurgery.elements.operations import operation_of
from cadsurgery.network.program import GraphInterpreter, Program
from cadsurgery.surgery.hooks import acts_as

# Where the graphs find them in the network that runs them. Its state dict leaves them out, as it does the mask.
ADAPTERS = "_adapters"


@dataclass(frozen=True)
class _Place:
    """Where an adapter stands.

    Attributes:
        behind: the node whose value it changes: elements, or a vector per image.
        layer: name of the layer that gives it.
        like: the weight (C, ...) of the layer.
        image: of a vector the elements that it was made of.
    """

    behind: fx.Node
    layer: str
    like: Tensor
    image: fx.Node | None = None


def make_adapters(program: Program) -> nn.ModuleDict:
    """An adapter that changes nothing for each layer of a program that can have one, by the name of the layer."""
    levels = program.geometry.max_level
    adapters = {
        name: LevelAdapter(levels, place.like.shape[0], place.like) for name, place in _named(program).items()
    }
    return nn.ModuleDict(adapters)


def with_adapters(program: Program, names: set[str]) -> Program:
    """The program with a call of each adapter behind its layer; of another way through the network those it has."""
    graph = fx.Graph()
    copies: dict[fx.Node, Any] = {}
    graph.output(graph.graph_copy(program.graph, copies))
    for name, place in _named(program).items():
        if name in names:
            behind = copies[place.behind]
            users = list(behind.users)
            with graph.inserting_after(behind):
                adapter = graph.get_attr(f"{ADAPTERS}.{name}")
            with graph.inserting_after(adapter):
                if place.image is None:
                    adapted = graph.call_function(functional.adapt, (behind, adapter))
                else:
                    adapted = graph.call_function(
                        functional.adapt_vector, (copies[place.image], behind, adapter)
                    )
            for user in users:
                user.replace_input_with(behind, adapted)
    graph.lint()
    return replace(program, graph=graph)


def _named(program: Program) -> dict[str, _Place]:
    """The places by names that say the layer; one that is used more than once has several."""
    named: dict[str, _Place] = {}
    for place in _places(program):
        stem = place.layer.replace(".", "_")
        number = sum(name == stem or name.startswith(f"{stem}__") for name in named)
        named[f"{stem}__{number}" if number else stem] = place
    return named


def _places(program: Program) -> Iterator[_Place]:
    """Behind convolutions below the finest stage and linear layers on rows, or the batch norm that alone follows; and
    behind layers that read a mean over the elements of an image."""
    constants = _constants(program)
    for node in program.graph.nodes:
        if node.target is functional.conv2d and node.kwargs.get("stage") != 0:
            weight, behind = constants.get(node.args[1]), node
            if isinstance(weight, Tensor):
                while len(behind.users) == 1 and _is_norm(user := next(iter(behind.users))):
                    behind = user
                yield _Place(behind, _path_of(node.args[1]), weight)
        elif node.op == "call_module" and node.args and isinstance(source := node.args[0], fx.Node):
            module = program.net.get_submodule(str(node.target))
            operation = operation_of(source.target)
            if not acts_as(module, nn.Conv2d, nn.Linear):
                continue
            if operation is not None and operation.gives == "vector":
                image: Any = source.args[0]
                yield _Place(node, str(node.target), module.weight, image)
            elif source.target is functional.rows_on and acts_as(module, nn.Linear):
                users = list(node.users)
                if len(users) == 1 and users[0].target is functional.Elements:
                    yield _Place(users[0], str(node.target), module.weight)


def _is_norm(node: fx.Node) -> bool:
    return node.target is functional.batch_norm


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
