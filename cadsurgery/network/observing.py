"""What every node of a program's graph gives, on shapes alone: its value, the lattice that it is on, and its work."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from cadsurgery.elements import functional
from cadsurgery.elements.elements import Elements
from cadsurgery.elements.lattice import Lattice
from cadsurgery.elements.operations import operation_of
from cadsurgery.following.graphs import sizes_in_tensors, takes_sizes
from cadsurgery.network.program import GraphInterpreter, Program
from cadsurgery.support.counting import MacCounter
from cadsurgery.support.meta_tensors import to_meta
from cadsurgery.support.torch_internals import tree_leaves, tree_map
from cadsurgery.surgery.rewrite import WORK

LatticeId = tuple[int, tuple[int, int]]  # stage and fine size


@dataclass
class Observation:
    """What the nodes of a graph gave in one run on shapes.

    Attributes:
        values: the value of each node: meta tensors, elements of these, lattices, sizes.
        macs: multiply-accumulates of each node that does work of the network.
        lattices: the lattice of elements, and of their rows on the way through modules.
        changed: for each node that changes values in place, the nodes of these.
        not_counted: operations that may multiply but have no counting rule.
    """

    values: dict[fx.Node, Any] = field(default_factory=dict)
    macs: dict[fx.Node, int] = field(default_factory=dict)
    lattices: dict[fx.Node, Lattice] = field(default_factory=dict)
    changed: dict[fx.Node, list[fx.Node]] = field(default_factory=dict)
    not_counted: set[str] = field(default_factory=set)

    @property
    def by_layer(self) -> dict[str, int]:
        """The multiply-accumulates of each original node that has any."""
        counts = defaultdict[str, int](int)
        for node, macs in self.macs.items():
            counts[node.meta[WORK][0]] += macs
        return counts

    @property
    def by_lattice(self) -> dict[str, dict[LatticeId | None, int]]:
        """The multiply-accumulates per element of each original node on each lattice, and under None all of its dense
        calls."""
        work: dict[str, dict[LatticeId | None, int]] = defaultdict(lambda: defaultdict(int))
        for node, macs in self.macs.items():
            lattice = self.lattices.get(node)
            key = None if lattice is None else (lattice.stage, lattice.size)
            work[node.meta[WORK][0]][key] += macs // (1 if lattice is None else max(lattice.count, 1))
        return work

    @property
    def rows(self) -> int:
        """The number of rows that operations with windows compute."""
        return sum(
            one.count for node, one in self.lattices.items() if node in self.macs and "window" in node.kwargs
        )

    @property
    def lattice_ids(self) -> dict[str, LatticeId]:
        """Stage and fine size of each node whose value is elements or a lattice, by node name."""
        found = ((node.name, getattr(value, "lattice", value)) for node, value in self.values.items())
        return {name: (one.stage, one.size) for name, one in found if isinstance(one, Lattice)}


def observe(
    program: Program, graph: fx.Graph, inputs: Sequence[Any], parts: Mapping[str, Lattice] | None = None
) -> Observation:
    """Run a graph on shapes alone.

    Args:
        program: a program on meta tensors, see `equivalence.meta_copy`.
        graph: its graph, or a part of it.
        inputs: the values of the graph's inputs in order.
        parts: reduced lattices, on which the nodes of these names run.
    """
    observer = _WithWork(program, graph, parts)
    # Inference tensors do not tell changes in place.
    with torch.inference_mode(False), torch.no_grad(), observer.counter:
        observer.run(*tree_map(to_meta, list(inputs)))
    observer.found.values = observer.env
    return observer.found


def tensors_in(value: Any) -> list[Tensor]:
    """Return the tensors of a value, and the rows of elements."""
    value = value.rows if isinstance(value, Elements) else value
    return [part for part in tree_leaves(value) if isinstance(part, Tensor)]


def _versions(value: Any) -> list[int]:
    """Return how often the tensors of a value were changed in place."""
    return [part._version for part in tensors_in(value) if not part.is_inference()]


class OnShapes(GraphInterpreter):
    """Runs a graph on shapes alone. Sizes that the network holds in tensors have values, where it reads these."""

    def __init__(self, program: Program, graph: fx.Graph, parts: Mapping[str, Lattice] | None = None) -> None:
        super().__init__(program, graph, parts)
        self._sizes = sizes_in_tensors(graph)

    def fetch_args_kwargs_from_env(self, n: fx.Node) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return the arguments of a node: sizes are computed on the CPU, all else has no values."""
        args, kwargs = super().fetch_args_kwargs_from_env(n)
        if n in self._sizes:
            return tree_map(_to_cpu, (args, kwargs))
        if takes_sizes(n) or self._sizes.isdisjoint(n.all_input_nodes):
            return args, kwargs
        return tree_map(to_meta, (args, kwargs))

    def run_node(self, n: fx.Node) -> Any:
        """Run one node."""
        value = super().run_node(n)  # perhaps created by the network, e.g. by torch.zeros
        return value if n in self._sizes else to_meta(value)


def _to_cpu(value: Any) -> Any:
    is_meta = isinstance(value, torch.device) and value.type == "meta"
    return torch.device("cpu") if is_meta else value


class _WithWork(OnShapes):
    """Notes what each node gives, and counts it."""

    def __init__(self, program: Program, graph: fx.Graph, parts: Mapping[str, Lattice] | None) -> None:
        super().__init__(program, graph, parts)
        self.garbage_collect_values = False
        self.counter, self.found = MacCounter(), Observation()

    def run_node(self, n: fx.Node) -> Any:
        """Run one node."""
        before = self.counter.macs
        self.counter.not_counted.clear()
        versions = {one: _versions(self.env[one]) for one in n.all_input_nodes}
        value = super().run_node(n)
        if changed := [one for one, known in versions.items() if known != _versions(self.env[one])]:
            self.found.changed[n] = changed
        if (lattice := self._lattice_of(n, value)) is not None:
            self.found.lattices[n] = lattice
        if n.meta.get(WORK, ("",))[0]:
            self.found.macs[n] = self._macs_of(n, value, self.counter.macs - before)
        return value

    def _lattice_of(self, n: fx.Node, value: Any) -> Lattice | None:
        if isinstance(value, Elements):
            return value.lattice
        known = self.found.lattices
        lattice: Lattice | None = next((known[x] for x in n.all_input_nodes if self._has_rows(x)), None)
        if n.target is functional.rows_on:
            lattice = self.fetch_args_kwargs_from_env(n)[0][1]
        elif n.target is getattr and n.args[1] == "rows":
            lattice = self.fetch_args_kwargs_from_env(n)[0][0].lattice
        if lattice is None or not isinstance(value, Tensor) or value.shape[:1] != (lattice.count,):
            return None
        return lattice

    def _has_rows(self, node: fx.Node) -> bool:
        return node in self.found.lattices and not isinstance(self.env[node], Elements)

    def _macs_of(self, n: fx.Node, value: Any, executed: int) -> int:
        operation = operation_of(n.target)
        if operation is not None and operation.macs is not None:
            args, kwargs = self.fetch_args_kwargs_from_env(n)
            return operation.macs(value, *args, **kwargs)
        self.found.not_counted.update(self.counter.not_counted)
        return 0 if operation is None and isinstance(value, Elements) else executed
