"""The program of a sampled network: steps, and of each gate the chain of those that it decides of.

In the graph a gate is a node `reconstruct` behind the operations it decides of, which reads them and the input of the
branch. Its chain goes on from there, over what may as well be done before gaps are filled.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, NamedTuple

from torch import Tensor, fx

from cadsurgery.elements.kernel_map import Window
from cadsurgery.methods.program import Program, Step, steps_of
from cadsurgery.methods.spatial import SpatialKind


def reconstruct(value: Tensor, source: Tensor, gate: int) -> Tensor:
    """Where a gate decides of a value: all of it, as it stands here; `run.py` fills where the gate is closed."""
    return value


class Gated(NamedTuple):
    """A convolution with a gate.

    Attributes:
        conv: name of its node.
        path: of its module.
        window: that it reads by.
        stride: of the gate's map relative to the branch's input.
        end: names of the affine operations that may come before gaps are filled.
        is_linear: True for a linear layer on channels, of maps that have them last.
    """

    conv: str
    path: str
    window: Window
    stride: int
    end: tuple[str, ...]
    is_linear: bool


class Block(NamedTuple):
    """A branch: its name, and the numbers of its gates."""

    name: str
    gates: tuple[int, ...]


class Chain(NamedTuple):
    """Steps that one gate decides of, each of which reads the one before.

    Attributes:
        before: the convolution and what follows on each position alone.
        fill: the filling.
        end: affine operations on each position, which therefore may come before the filling; a residual and an
            activation of a last one that is a kernel come after it.
        is_linear: True if the first is a linear layer.
    """

    before: tuple[Step, ...]
    fill: Step
    end: tuple[Step, ...]
    is_linear: bool

    @property
    def steps(self) -> tuple[Step, ...]:
        """All of them, in order."""
        return (*self.before, self.fill, *self.end)

    def is_channels_last(self, step: Step) -> bool:
        """True if the map that a step gives has its channels last."""
        permuted = [one.spatial.kind == "permute" for one in self.steps[: self.steps.index(step) + 1]]
        return self.is_linear != bool(sum(permuted) % 2)


@dataclass(frozen=True, eq=False, kw_only=True)
class SampledProgram(Program):
    """A graph with gates.

    Attributes:
        graph: with `reconstruct` nodes.
        gates: in order of execution; the keyword `gate` of a node is a place in it.
        blocks: name and gates of each branch.
        permutes: names of nodes that put the channels of a map first or last.
        chains: of each gate.
        output: what is returned.
        convs: the gate of a convolution, by name.
        follows: the gate of each further step of a chain, and the step before it, by name.
        readers: the gates that read a value, by its name.
    """

    gates: tuple[Gated, ...]
    blocks: tuple[Block, ...]
    permutes: frozenset[str]
    chains: tuple[Chain, ...] = field(repr=False)
    output: Step = field(repr=False)
    convs: dict[str, int] = field(repr=False)
    follows: dict[str, tuple[int, str]] = field(repr=False)
    readers: dict[str, tuple[int, ...]] = field(repr=False)


def gather(
    graph: fx.Graph,
    gates: tuple[Gated, ...],
    blocks: tuple[Block, ...],
    permutes: frozenset[str],
    signature: inspect.Signature,
    container: type,
    origins: Mapping[str, str] | None = None,
) -> SampledProgram:
    """The program of a graph with gates; see `SampledProgram`.

    Args:
        graph, gates, blocks, permutes, signature, container: as of the program.
        origins: of the nodes of a fused graph those they were made of, by name.
    """
    names = {node: (origins or {}).get(node.name, node.name) for node in graph.nodes}
    *nodes, output = graph.nodes
    kinds = dict.fromkeys(permutes, SpatialKind("permute"))
    steps = steps_of(nodes, output.all_input_nodes, kinds)
    chains, readers = dict[int, Chain](), dict[str, tuple[int, ...]]()
    for fill in nodes:
        if fill.target is not reconstruct:
            continue
        number: Any = fill.kwargs["gate"]
        node, source = fill.args[:2]
        before, end, last = list[fx.Node](), list[fx.Node](), fill
        while node not in before:
            before.insert(0, node)
            if names[node] != gates[number].conv:
                node = next(one for one in node.all_input_nodes if one.op != "get_attr")
        while len(last.users) == 1 and names[user := next(iter(last.users))] in gates[number].end:
            end.append(user)
            last = user
        parts = (tuple(steps[one] for one in some) for some in (before, end))
        chains[number] = Chain(next(parts), steps[fill], next(parts), gates[number].is_linear)
        readers[source.name] = tuple(sorted((*readers.get(source.name, ()), number)))
    every = sorted(chains.items())
    return SampledProgram(
        graph=graph,
        signature=signature,
        container=container,
        is_fused=origins is not None,
        steps=tuple(steps.values()),
        gates=gates,
        blocks=blocks,
        permutes=permutes,
        chains=tuple(chain for _, chain in every),
        output=steps_of([output])[output],
        convs={chain.steps[0].name: number for number, chain in every},
        follows={
            two.name: (number, one.name) for number, chain in every for one, two in pairwise(chain.steps)
        },
        readers=readers,
    )
