"""Walks over the graphs of torch.fx, and copies of them."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Any

import torch
from torch import Tensor, fx, nn


def copy_graph(graph: fx.Graph) -> tuple[fx.Graph, dict[fx.Node, fx.Node]]:
    """A copy of a graph, output included, and its node for each node of the graph."""
    copied, copies = fx.Graph(), dict[fx.Node, fx.Node]()
    copied.output(copied.graph_copy(graph, copies))
    return copied, copies


def upwards(node: fx.Node, until: Collection[fx.Node] = ()) -> Iterator[fx.Node]:
    """A node and what it is computed from, nearest first; what those of `until` are computed from is left out."""
    waiting, seen = [node], {node}
    for one in waiting:
        yield one
        if one not in until:
            waiting += (new := [source for source in one.all_input_nodes if source not in seen])
            seen.update(new)


def and_after(*nodes: fx.Node, without: Collection[fx.Node] = ()) -> set[fx.Node]:
    """Some nodes and all that depends on them, otherwise than by way of those that are left out."""
    reached, pending = set[fx.Node](), list(nodes)
    while pending:
        if (last := pending.pop()) not in reached and last not in without:
            reached.add(last)
            pending.extend(last.users)
    return reached


def only_user(node: fx.Node) -> fx.Node | None:
    """The node that alone reads a value; None if there are several or none."""
    return next(iter(node.users)) if len(node.users) == 1 else None


class Constants:
    """The values of nodes that are computed from modules and parameters alone, each when it is first asked for."""

    def __init__(self, interpreter: fx.Interpreter) -> None:
        """Take what runs the nodes of a graph."""
        self._interpreter, self._fixed, self._values = interpreter, set[fx.Node](), dict[fx.Node, Any]()
        for node in interpreter.graph.nodes:
            sources = node.all_input_nodes
            call = node.op in ("call_function", "call_method") and sources
            if node.op == "get_attr" or (call and self._fixed.issuperset(sources)):
                self._fixed.add(node)

    def get(self, node: Any) -> Any:
        """The value of a node, without history; None for a node that is no constant, or is computed from constants that
        are neither tensors nor modules."""
        if node not in self._fixed:
            return None
        if node not in self._values:
            known = {source: self.get(source) for source in node.all_input_nodes}
            value = None
            if all(isinstance(part, (Tensor, nn.Module)) for part in known.values()):
                args, kwargs = fx.map_arg((node.args, node.kwargs), known.__getitem__)
                with torch.no_grad():
                    value = getattr(self._interpreter, node.op)(node.target, args, kwargs)
            self._values[node] = value.detach() if isinstance(value, Tensor) else value
        return self._values[node]
