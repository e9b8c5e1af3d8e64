"""Nodes of a graph as plain values that are run one by one: what several methods are programs of.

Plain values, no nodes, so that copies of a network share them.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import fx, nn
from torch.fx.node import map_aggregate

from cadsurgery.surgery.hooks import child


class Ref(NamedTuple):
    """An argument: the value of another step."""

    name: str


@dataclass(frozen=True)
class Step:
    """A node as a plain value.

    Attributes:
        name: of the node.
        op: as in torch.fx, and so are target, args and kwargs, with `Ref`s for nodes.
        reads: names of the steps among the arguments.
        frees: names of values that no later step reads.
    """

    name: str
    op: str
    target: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    reads: tuple[str, ...]
    frees: tuple[str, ...] = ()

    def bind(self, value_of: Callable[[str], Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Its arguments, with values for steps."""

        def fill(part: Ref) -> Any:
            return value_of(part.name)

        return _map(self.args, fill), _map(self.kwargs, fill)


def _map(part: Any, change: Callable[[Ref], Any]) -> Any:
    if isinstance(part, Ref):
        return change(part)
    if isinstance(part, (tuple, list)):
        return type(part)(_map(one, change) for one in part)
    if isinstance(part, dict):
        return {key: _map(one, change) for key, one in part.items()}
    if isinstance(part, slice):
        return slice(*(_map(one, change) for one in (part.start, part.stop, part.step)))
    return part


def step_of(node: fx.Node, frees: Iterable[fx.Node] = ()) -> Step:
    """A node as a step, after which some values are not read any more."""
    args, kwargs = (
        map_aggregate(part, lambda one: Ref(one.name) if isinstance(one, fx.Node) else one)
        for part in (node.args, node.kwargs)
    )
    reads = tuple(one.name for one in node.all_input_nodes)
    freed = tuple(one.name for one in frees)
    return Step(node.name, node.op, node.target, args, kwargs, reads, freed)  # type: ignore[arg-type]


def last_read(segments: Iterable[Iterable[fx.Node]], kept: set[fx.Node]) -> Mapping[fx.Node, list[fx.Node]]:
    """Of each node the values that no node after it reads, in the order of the segments."""
    frees, last = defaultdict[fx.Node, list[fx.Node]](list), dict[fx.Node, fx.Node]()
    for nodes in segments:
        for node in nodes:
            last.update(dict.fromkeys(node.all_input_nodes, node))
    for value, reader in last.items():
        if value not in kept:
            frees[reader].append(value)
    return frees


def call(net: nn.Module, step: Step, value_of: Any, arguments: dict[str, Any]) -> Any:
    """What a step gives, as it is written in the graph.

    Args:
        net: whose modules and parameters the step names.
        step: one.
        value_of: value by name of a step.
        arguments: of the call of the network, by name.
    """
    if step.op == "placeholder":
        return arguments[step.target]
    if step.op == "get_attr":
        return attribute(net, step.target)
    args, kwargs = step.bind(value_of)
    if step.op == "call_module":
        module = child(net, step.target)
        assert module is not None
        return module(*args, **kwargs)
    if step.op == "call_method":
        return getattr(args[0], step.target)(*args[1:], **kwargs)
    return step.target(*args, **kwargs)


def attribute(net: nn.Module, path: str) -> Any:
    """A parameter, buffer, module, constant or the training flag, by qualified name."""
    parent, _, name = path.rpartition(".")
    module = child(net, parent)
    assert module is not None
    for values in (module._parameters, module._buffers, module._modules):
        if name in values:
            return values[name]
    constants = getattr(net, "constants", {})
    return constants[path] if path in constants else getattr(module, name)
