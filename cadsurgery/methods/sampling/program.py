"""The program of a sampled network: its steps, and for each gate the chain of steps that the gate controls.

In the graph a gate is a node `reconstruct` after the operations that it controls. The node reads their result and the
input of the branch. The chain continues after the node with steps that may be computed before gaps are filled.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, NamedTuple

from torch import Tensor, fx

from cadsurgery.elements.kernel_map import Window
from cadsurgery.following.graphs import only_user
from cadsurgery.methods.program import ProgramStep, StepProgram, steps_of
from cadsurgery.surgery.spatial import SpatialKind


def reconstruct(value: Tensor, source: Tensor, gate: int) -> Tensor:
    """Mark a value that a gate controls and return it unchanged; `run.py` fills it where the gate is closed."""
    return value


class Gated(NamedTuple):
    """A convolution, or a linear layer on channels, with a gate.

    Attributes:
        conv: name of the convolution's node.
        path: path of the convolution's module.
        window: window of the convolution.
        stride: positions of the gate's input per position of the convolution's output, along an axis.
        tail: name of the last of the following pointwise operations; gaps are filled after it.
        end: names of affine pointwise operations after the tail, which may be computed before the filling; a residual
            and activation fused into the last one are applied after the filling.
        is_linear: True for a linear layer on the last axis of channels-last maps.
    """

    conv: str
    path: str
    window: Window
    stride: int
    tail: str
    end: tuple[str, ...] = ()
    is_linear: bool = False


class Chain(NamedTuple):
    """The steps that one gate controls; each step reads the previous one.

    Attributes:
        steps: the convolution, the pointwise operations after it, the step that fills gaps, and those of the end.
        is_channels_last: True if the map whose gaps are filled is channels-last.
    """

    steps: tuple[ProgramStep, ...]
    is_channels_last: bool


@dataclass(frozen=True, eq=False, kw_only=True)
class SampledProgram(StepProgram):
    """A graph with gates.

    Attributes:
        graph: the graph with `reconstruct` nodes.
        gates: gated convolutions in order of execution; the keyword `gate` of a node is an index into them.
        permutes: names of nodes that move the channels of a map to the front or the end.
        origins: original node names of the nodes in a fused graph.
        chains: the chain of each gate.
        output: step that returns the output.
        convs: gate number of each gated convolution, by node name.
        follows: name of the previous step of each further step of a chain, by step name.
        readers: numbers of the gates that read a value, by name of the value.
    """

    gates: tuple[Gated, ...]
    permutes: frozenset[str]
    origins: Mapping[str, str] = field(default_factory=dict, repr=False)
    steps: tuple[ProgramStep, ...] = field(init=False, repr=False)
    chains: tuple[Chain, ...] = field(init=False, repr=False)
    output: ProgramStep = field(init=False, repr=False)
    convs: dict[str, int] = field(init=False, repr=False)
    follows: dict[str, str] = field(init=False, repr=False)
    readers: dict[str, tuple[int, ...]] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        *nodes, output = self.graph.nodes
        kinds = dict.fromkeys(self.permutes, SpatialKind("permute"))
        steps = steps_of(nodes, output.all_input_nodes, kinds)
        names = {node: self.origins.get(node.name, node.name) for node in nodes}
        chains, readers = dict[int, Chain](), dict[str, tuple[int, ...]]()
        for fill in (node for node in nodes if node.target is reconstruct):
            number: Any = fill.kwargs["gate"]
            source: Any = fill.args[1]
            chains[number] = _chain(fill, self.gates[number], steps, names)
            readers[source.name] = tuple(sorted((*readers.get(source.name, ()), number)))
        every = [chains[number] for number in sorted(chains)]
        self.__dict__.update(
            steps=tuple(steps.values()),
            chains=tuple(every),
            output=steps_of([output])[output],
            convs={chain.steps[0].name: number for number, chain in enumerate(every)},
            follows={two.name: one.name for chain in every for one, two in pairwise(chain.steps)},
            readers=readers,
        )


def _chain(
    fill: fx.Node, gated: Gated, steps: Mapping[fx.Node, ProgramStep], names: Mapping[fx.Node, str]
) -> Chain:
    """Return the chain around a node that fills gaps, in a graph whose nodes have these original names."""
    node: Any = fill.args[0]
    before, end = list[fx.Node](), [fill]
    while node not in before:
        before.insert(0, node)
        if names[node] != gated.conv:
            node = next(source for source in node.all_input_nodes if source.op != "get_attr")
    while (user := only_user(end[-1])) is not None and names.get(user) in gated.end:
        end.append(user)
    permutes = sum(steps[node].spatial.kind == "permute" for node in before)
    chain = tuple(steps[node] for node in (*before, *end))
    return Chain(chain, gated.is_linear != bool(permutes % 2))
