"""The program of a sampled network: its steps, and for each gate the chain of steps that the gate controls.

In the graph a gate is a node `reconstruct` after the operations that it controls. The node reads their result and the
input of the branch. The chain continues after the node with steps that may be computed before gaps are filled.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, NamedTuple

from torch import Tensor, fx

from cadsurgery.elements.kernel_map import Window
from cadsurgery.methods.program import ProgramStep, StepProgram, steps_of
from cadsurgery.surgery.spatial import SpatialKind


def reconstruct(value: Tensor, source: Tensor, gate: int) -> Tensor:
    """Mark a value that a gate controls and return it unchanged; `run.py` fills it where the gate is closed."""
    return value


class Gated(NamedTuple):
    """A convolution with a gate.

    Attributes:
        conv: name of the convolution's node.
        path: path of the convolution's module.
        window: window of the convolution.
        stride: stride of the gate's map relative to the branch's input.
        end: names of the affine operations that may be computed before gaps are filled.
        is_linear: True for a linear layer on the last axis of channels-last maps.
    """

    conv: str
    path: str
    window: Window
    stride: int
    end: tuple[str, ...]
    is_linear: bool


class Block(NamedTuple):
    """The name of a branch and the numbers of its gates."""

    name: str
    gates: tuple[int, ...]


class Chain(NamedTuple):
    """The steps that one gate controls; each step reads the previous one.

    Attributes:
        before: the convolution and the pointwise operations after it.
        fill: the step that fills gaps.
        end: affine pointwise operations, which may be computed before the filling; a residual and activation fused
            into the last operation are applied after the filling.
        is_linear: True if the first step is a linear layer.
    """

    before: tuple[ProgramStep, ...]
    fill: ProgramStep
    end: tuple[ProgramStep, ...]
    is_linear: bool

    @property
    def steps(self) -> tuple[ProgramStep, ...]:
        """All steps of the chain, in order."""
        return (*self.before, self.fill, *self.end)

    def is_channels_last(self, step: ProgramStep) -> bool:
        """Return True if the result of a step is channels-last."""
        permuted = [
            step_before.spatial.kind == "permute" for step_before in self.steps[: self.steps.index(step) + 1]
        ]
        return self.is_linear != bool(sum(permuted) % 2)


@dataclass(frozen=True, eq=False, kw_only=True)
class SampledProgram(StepProgram):
    """A graph with gates.

    Attributes:
        graph: the graph with `reconstruct` nodes.
        gates: gated convolutions in order of execution; the keyword `gate` of a node is an index into them.
        blocks: name and gates of each branch.
        permutes: names of nodes that move the channels of a map to the front or the end.
        chains: the chain of each gate.
        output: step that returns the output.
        convs: gate number of each gated convolution, by node name.
        follows: gate number and previous step of each further step of a chain, by step name.
        readers: numbers of the gates that read a value, by name of the value.
    """

    gates: tuple[Gated, ...]
    blocks: tuple[Block, ...]
    permutes: frozenset[str]
    chains: tuple[Chain, ...] = field(repr=False)
    output: ProgramStep = field(repr=False)
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
    """Build the program of a graph with gates; see `SampledProgram`.

    Args:
        graph, gates, blocks, permutes, signature, container: fields of the program.
        origins: original node names of the nodes in a fused graph.
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
                node = next(source for source in node.all_input_nodes if source.op != "get_attr")
        while len(last.users) == 1 and names[user := next(iter(last.users))] in gates[number].end:
            end.append(user)
            last = user
        parts = (tuple(steps[node] for node in some) for some in (before, end))
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
