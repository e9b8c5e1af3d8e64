"""What an anytime network runs, as a value: steps in segments, one for each exit.

The graph has all exits; a segment is what an exit needs and no earlier one did. What is run are plain
values, no nodes, so that copies of a network share them.
"""

from __future__ import annotations

import inspect
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Literal, NamedTuple

from torch import fx
from torch.fx.node import map_aggregate

from cadsurgery.elements.kernel_map import Window
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
        manner: how it acts on positions, if its segment is computed at some of them.
        frees: names of values that no later step reads.
    """

    name: str
    op: str
    target: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    reads: tuple[str, ...]
    manner: Manner
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
        frees = _last_read(every, {*logits, *sizes})
        segments = tuple(tuple(self._step(node, frees[node]) for node in nodes) for nodes in every)
        tail, names = tuple(self._step(node) for node in behind), tuple(node.name for node in logits)
        self.__dict__.update(segments=segments, logits=names, tail=tail, final=final.name)

    def _step(self, node: fx.Node, frees: Iterable[fx.Node] = ()) -> Step:
        args, kwargs = (
            map_aggregate(part, lambda one: Ref(one.name) if isinstance(one, fx.Node) else one)
            for part in (node.args, node.kwargs)
        )
        reads = tuple(one.name for one in node.all_input_nodes)
        manner = self.manners.get(node.name, Manner())
        if node.target is resize_like:
            manner = Manner("resize")
        freed = tuple(one.name for one in frees)
        return Step(node.name, node.op, node.target, args, kwargs, reads, manner, freed)  # type: ignore[arg-type]

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


def _last_read(segments: Iterable[Iterable[fx.Node]], kept: set[fx.Node]) -> Mapping[fx.Node, list[fx.Node]]:
    """Of each node the values that no node after it reads, in the order of the segments."""
    frees, last = defaultdict[fx.Node, list[fx.Node]](list), dict[fx.Node, fx.Node]()
    for nodes in segments:
        for node in nodes:
            last.update(dict.fromkeys(node.all_input_nodes, node))
    for value, reader in last.items():
        if value not in kept:
            frees[reader].append(value)
    return frees
