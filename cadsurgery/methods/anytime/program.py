"""What an anytime network runs, as a value: steps in segments, one for each exit.

The graph has all exits; a segment is what an exit needs and no earlier one did. What is run are plain
values, no nodes, so that copies of a network share them.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Literal, NamedTuple

from torch import fx

from cadsurgery.elements.kernel_map import Window
from cadsurgery.methods import steps
from cadsurgery.methods.anytime.exits import ancestors
from cadsurgery.methods.anytime.heads import resize_like
from cadsurgery.surgery.rewrite import pack_graph, unpack_graph

Kind = Literal["conv", "pool", "resize", "point", "whole"]


class Manner(NamedTuple):
    """How a step acts on positions.

    Attributes:
        kind: `conv`, a convolution computed at chosen positions alone; `pool` and `resize`, computed as a whole, of
            which a position reads those around it; `point`, of each position alone; `whole`, anything else.
        window: of a convolution or a pool.
        origin: name of the module of a convolution, which has the width it is filled by.
    """

    kind: Kind = "whole"
    window: Window | None = None
    origin: str = ""


WHOLE = Manner()


@dataclass(frozen=True)
class Step(steps.Step):
    """A node as a plain value, and how it acts on positions, if its segment is computed at some of them."""

    manner: Manner = WHOLE


@dataclass(frozen=True, eq=False)
class Program:
    """A graph with exits, cut into segments.

    Attributes:
        graph: its output is the logits of all exits and, last, what the network returns of the last ones.
        manners: of the nodes that are no `whole` ones, by name.
        signature: of the network's forward.
        is_fused: whether its convolutions are kernels for inference.
    """

    graph: fx.Graph
    manners: Mapping[str, Manner]
    signature: inspect.Signature
    is_fused: bool = False
    segments: tuple[tuple[Step, ...], ...] = field(init=False, repr=False)
    logits: tuple[str, ...] = field(init=False, repr=False)
    tail: tuple[Step, ...] = field(init=False, repr=False)
    final: str = field(init=False, repr=False)

    def __post_init__(self) -> None:
        *logits, final = next(node for node in self.graph.nodes if node.op == "output").args[0]
        behind = _between(self.graph, logits[-1], final)
        sizes = [one for node in behind for one in node.all_input_nodes if one not in (*behind, logits[-1])]
        known, every = set[fx.Node](), []
        for number, exit in enumerate(logits):
            needed = ancestors(exit, *(sizes if number == 0 else ())) - known
            every.append([node for node in self.graph.nodes if node in needed])
            known |= needed
        frees = steps.last_read(every, {*logits, *sizes})
        segments = tuple(tuple(self._step(node, frees[node]) for node in nodes) for nodes in every)
        tail, names = tuple(self._step(node) for node in behind), tuple(node.name for node in logits)
        self.__dict__.update(segments=segments, logits=names, tail=tail, final=final.name)

    def _step(self, node: fx.Node, frees: Iterable[fx.Node] = ()) -> Step:
        manner = self.manners.get(node.name, Manner())
        if node.target is resize_like:
            manner = Manner("resize")
        return Step(**vars(steps.step_of(node, frees)), manner=manner)

    def __deepcopy__(self, memo: dict[int, Any]) -> Program:
        return self

    def __getstate__(self) -> dict[str, Any]:
        state = {one.name: getattr(self, one.name) for one in fields(self) if one.init}
        return state | {"graph": pack_graph(self.graph)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, graph=unpack_graph(state["graph"]))
        self.__post_init__()


def _between(graph: fx.Graph, first: fx.Node, last: fx.Node) -> list[fx.Node]:
    """The nodes after one by which another is computed from it, in order."""
    from_first = {first}
    for node in graph.nodes:
        if not from_first.isdisjoint(node.all_input_nodes):
            from_first.add(node)
    to_last = ancestors(last)
    return [node for node in graph.nodes if node in from_first & to_last and node is not first]
