"""Carry out a plan: a graph whose region runs on elements."""

from __future__ import annotations

import operator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from cadsurgery import functional
from cadsurgery.surgery.facts import Facts
from cadsurgery.surgery.plan import Decision, Plan
from cadsurgery.surgery.rules import Attribute, Treatment, treat

# Extra input of a rewritten graph: a callable (image, fine map) -> Lattice.
MASKING = "masking"
# Notes on rewritten nodes: the node of the original whose value this is, and the name and module path of
# the one whose work it does.
ORIGIN, WORK = "origin", "work"


@dataclass
class Rewriter:
    """Copies a graph node by node, replacing those of the region.

    A value may exist dense, as elements, or both; the other form is made where it is first needed.
    """

    facts: Facts
    plan: Plan
    graph: fx.Graph = field(default_factory=fx.Graph)
    dense: dict[fx.Node, fx.Node] = field(default_factory=dict)
    elements: dict[fx.Node, fx.Node] = field(default_factory=dict)
    sources: dict[fx.Node, fx.Node] = field(default_factory=dict)  # broadcast node -> vector it repeats
    working: dict[fx.Node, fx.Node] = field(default_factory=dict)  # where the value is only wrapped
    lattice: fx.Node | None = None

    def run(self) -> fx.Graph:
        """The rewritten graph; it takes one input more, `masking`, and also returns the lattice."""
        decisions = {decision.node: decision for decision in self.plan.decisions}
        nodes = list(self.facts.graph.nodes)
        inputs = [node for node in nodes if node.op == "placeholder"]
        for node in inputs:
            self.dense[node] = self.graph.node_copy(node)
        with self.graph.inserting_before():
            self.masking = self.graph.placeholder(MASKING)
        self.image = self.dense[next(node for node in inputs if self.facts.is_map(node))]
        for node in nodes:
            if node in self.dense:
                continue
            decision, treatment = decisions[node.name], treat(node, self.facts)
            if node.op == "output":
                copied = self.graph.node_copy(node, self.as_dense)
                value = copied.args[0]
                self.graph.erase_node(copied)
                self.graph.output((value, self.lattice))
                break
            if decision.action in ("adapt", "keep"):
                self.emit(node, decision, treatment)
            else:
                self.copy(node, treatment)
            made = self.elements.get(node) or self.dense[node]
            made.meta[ORIGIN] = node.name
            self.working.get(node, made).meta[WORK] = (node.name, decision.path)
        self.graph.eliminate_dead_code(lambda node: node.op in ("placeholder", "output"))
        self.graph.lint()
        return self.graph

    # -- values in either form ---------------------------------------------------------------------

    def as_dense(self, node: fx.Node) -> fx.Node:
        """The value as a dense tensor, at the size the plan lets it leave the region with."""
        if node not in self.dense:
            decision = self.plan[node.name]
            spacing = 1 if decision.leaves == "fine" else decision.grid
            self.dense[node] = self.call(functional.to_dense, self.elements[node], spacing)
        return self.dense[node]

    def as_elements(self, node: fx.Node) -> fx.Node:
        """The value as elements; dense maps at the high output stride enter here."""
        if node not in self.elements:
            if self.lattice is None:
                self.lattice = self.call_value(self.masking, self.image, self.dense[node])
            self.elements[node] = self.call(functional.to_elements, self.dense[node], self.lattice)
        return self.elements[node]

    # -- emitting ----------------------------------------------------------------------------------

    def call(self, function: Any, *args: Any, **kwargs: Any) -> fx.Node:
        """A call of a function in the new graph."""
        return self.graph.call_function(function, args, kwargs)

    def call_value(self, callee: fx.Node, *args: Any) -> fx.Node:
        """A call of a value of the new graph."""
        return self.graph.call_function(operator.call, (callee, *args))

    def argument(self, value: Any) -> Any:
        """An argument of a treatment in the new graph."""
        if isinstance(value, Attribute):
            return self.graph.get_attr(value.path)
        return self.as_dense(value) if isinstance(value, fx.Node) else value

    def copy(self, node: fx.Node, treatment: Treatment) -> None:
        """A node that stays dense. What asks for the size of elements gets the network's own size."""
        source = node.args[0] if node.args else None
        if not isinstance(source, fx.Node):
            source = None
        if treatment.kind == "shape" and source in self.elements:
            self.dense[node] = self.shape_of(node, source)
            return
        if treatment.kind == "broadcast" and source is not None:
            self.sources[node] = source
        self.dense[node] = self.graph.node_copy(node, self.as_dense)

    def shape_of(self, node: fx.Node, source: fx.Node) -> fx.Node:
        """A size, dtype or device query on elements."""
        elements = self.elements[source]
        if node.target is getattr and node.args[1] in ("dtype", "device"):
            return self.call(getattr, self.call(getattr, elements, "rows"), node.args[1])
        size = self.call(functional.native_shape, elements, self.plan[source.name].grid)
        if node.target == "size" and len(node.args) > 1:
            return self.call(operator.getitem, size, node.args[1])
        if node.target == "dim" or node.args[1:] == ("ndim",):
            return self.call(len, size)
        return size

    def emit(self, node: fx.Node, decision: Decision, treatment: Treatment) -> None:
        """A node of the region."""
        arguments = {name: self.argument(value) for name, value in treatment.arguments}
        stage = decision.stages[1]
        if treatment.kind == "window":
            x = self.as_elements(node.args[0])  # type: ignore[arg-type]
            weights = [arguments.pop(name) for name in ("weight", "bias") if name in arguments]
            function = getattr(functional, treatment.call)
            out = self.call(function, x, *weights, window=decision.window, stage=stage, **arguments)
        elif treatment.kind == "global":
            x = self.as_elements(node.args[0])  # type: ignore[arg-type]
            self.dense[node] = self.call(getattr(functional, treatment.call), x, **arguments)
            return
        elif treatment.call:
            x = self.on_stage(node.args[0], stage)  # type: ignore[arg-type]
            out = self.working[node] = self.call(getattr(functional, treatment.call), x, **arguments)
            for path in treatment.then:
                rows = self.graph.call_module(path, (self.call(getattr, out, "rows"),))
                out = self.call(functional.Elements, rows, self.call(getattr, out, "lattice"))
        else:
            out = self.emit_on_rows(node, stage)
        self.elements[node] = out

    def on_stage(self, node: fx.Node, stage: int) -> fx.Node:
        """A value as elements of a stage."""
        x = self.as_elements(node)
        if self.plan[node.name].stages[1] == stage:
            return x
        lattice = self.call(functional.common_lattice, stage, x)
        return self.call(functional.Elements, self.call(functional.rows_on, x, lattice), lattice)

    def emit_on_rows(self, node: fx.Node, stage: int) -> fx.Node:
        """An operation that is the same on the rows of a lattice as on a map."""
        maps = [source for source in node.all_input_nodes if source in self.elements or self.enters(source)]
        values = [self.as_elements(source) for source in maps]
        if len(values) == 1 and self.plan[maps[0].name].stages[1] == stage:
            lattice = self.call(getattr, values[0], "lattice")
        else:
            lattice = self.call(functional.common_lattice, stage, *values)

        def rows(source: fx.Node) -> fx.Node:
            if source in maps:
                return self.call(functional.rows_on, self.elements[source], lattice)
            value = self.as_dense(self.sources.get(source, source))
            is_tensor = len(self.facts.shapes.get(source, ())) > 0
            return self.call(functional.rows_on, value, lattice) if is_tensor else value

        on_rows = self.working[node] = self.graph.node_copy(node, rows)
        if node.target in (torch.cat, torch.concat, torch.concatenate):
            on_rows.args, on_rows.kwargs = (
                (on_rows.args[0] if on_rows.args else on_rows.kwargs["tensors"], 1),
                {},
            )
        return self.call(functional.Elements, on_rows, lattice)

    def enters(self, source: fx.Node) -> bool:
        """Whether a dense map is read as elements by the region."""
        return self.plan[source.name].action == "enter"


def rewrite(facts: Facts, plan: Plan) -> fx.Graph:
    """The graph of the adaptive network; `facts.model` and its graph are left as they are."""
    return Rewriter(facts, plan).run()
