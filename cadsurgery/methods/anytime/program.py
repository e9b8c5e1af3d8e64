"""The program of an anytime network: its steps in segments, one per exit.

The graph contains all exits. A segment is what an exit needs beyond the earlier exits.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import fx

from cadsurgery.following.graphs import downstream, upstream
from cadsurgery.methods.anytime.heads import resize_like
from cadsurgery.methods.program import ProgramStep, StepProgram, steps_of
from cadsurgery.surgery.spatial import SpatialKind


@dataclass(frozen=True, eq=False, kw_only=True)
class AnytimeProgram(StepProgram):
    """A graph with exits, cut into segments.

    Attributes:
        graph: its output is the logits of all exits followed by the network's output for the last exit.
        spatial: how nodes act on positions, by name; nodes that are missing are `whole`.
        segments: steps of each exit.
        logits: names of the class scores of each exit.
        tail: steps from the last class scores to the network's output, `final`.
        final: name of the network's output.
    """

    spatial: Mapping[str, SpatialKind]
    steps: tuple[ProgramStep, ...] = field(init=False, repr=False)
    segments: tuple[tuple[ProgramStep, ...], ...] = field(init=False, repr=False)
    logits: tuple[str, ...] = field(init=False)
    tail: tuple[ProgramStep, ...] = field(init=False, repr=False)
    final: str = field(init=False)

    def __post_init__(self) -> None:
        graph = self.graph
        output: Any = graph.output_node().args[0]
        *logits, final = output
        between = downstream(graph.nodes, lambda node: node is logits[-1]) & upstream(final) - {logits[-1]}
        behind = [node for node in graph.nodes if node in between]
        sizes = [
            source
            for node in behind
            for source in node.all_input_nodes
            if source not in (*behind, logits[-1])
        ]
        computed, every = set[fx.Node](), list[list[fx.Node]]()
        for number, exit in enumerate(logits):
            needed = upstream(exit, *(sizes if number == 0 else ())) - computed
            every.append([node for node in graph.nodes if node in needed])
            computed |= needed
        resizes = {node.name: SpatialKind("resize") for node in graph.nodes if node.target is resize_like}
        kept, nodes = {*logits, *sizes}, [node for nodes in every for node in nodes]
        steps = steps_of(nodes, kept, {**self.spatial, **resizes})
        self.__dict__.update(
            steps=tuple(steps.values()),
            segments=tuple(tuple(steps[node] for node in nodes) for nodes in every),
            logits=tuple(node.name for node in logits),
            tail=tuple(steps_of(behind).values()),
            final=final.name,
        )
