"""The dependency cone of some results: which elements of every operation they are computed from, and nothing else.

A rewritten graph is walked backwards from the elements that are wanted. An operation that reads a window wants what its
kernel map names; one that acts on each element alone, or joins elements, wants the same places; whatever looks at a
whole image wants all of it. Run on lattices cut to these parts, the wanted elements are the same bit for bit.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from cadsurgery.elements import functional
from cadsurgery.elements.functional import Elements
from cadsurgery.elements.kernel_map import Reading, kernel_map
from cadsurgery.elements.lattice import Lattice, Part
from cadsurgery.elements.operations import Operation, operation_of
from cadsurgery.elements.windows import drops
from cadsurgery.network.program import GraphInterpreter, Program

Size = tuple[int, int]
Place = tuple[int, Size]  # stage and fine size of a lattice


class _Places(GraphInterpreter):
    """Runs a graph and notes where its nodes have elements or lattices."""

    def __init__(self, program: Program, graph: fx.Graph) -> None:
        super().__init__(program, graph)
        self.places: dict[str, Place] = {}

    def run_node(self, n: fx.Node) -> Any:
        """Run one node and note its place."""
        value = super().run_node(n)
        lattice = value.lattice if isinstance(value, Elements) else value
        if isinstance(lattice, Lattice):
            self.places[n.name] = lattice.stage, lattice.size
        return value


def places_of(
    program: Program, graph: fx.Graph, lattice: Lattice, values: tuple[Any, ...]
) -> dict[str, Place]:
    """Where each node of a graph that gives elements or a lattice has them, by its name.

    Args:
        program: on shapes without values, see `macs.ghost`.
        graph: behind the place where the mask is asked for.
        lattice: any of the fine map's size.
        values: what enters the graph, as meta tensors.
    """
    interpreter = _Places(program, graph)
    interpreter.run(lambda *_: lattice, *values)
    return interpreter.places


def reached(lattice: Lattice, reading: Reading) -> Tensor:
    """(B*H*W,) bool: anchors of the elements of a whole lattice that a reading names."""
    count, table = len(lattice), reading.table.flatten().long()
    named = torch.zeros(count + 1 + reading.sources.shape[0], dtype=torch.bool, device=table.device)
    named[table] = True
    mixed = reading.sources[named[count + 1 :]].flatten().long()
    named[mixed] = True
    pixels = torch.zeros(lattice.index.shape[0], dtype=torch.bool, device=table.device)
    pixels[lattice.anchors[named[:count]]] = True
    return pixels


class Cone:
    """What of a graph some elements depend on.

    Attributes:
        lattices: of each operation that makes elements of its own, by its name: cut to what is needed.
    """

    def __init__(
        self, graph: fx.Graph, places: Mapping[str, Place], lattice: Lattice, exit: fx.Node, wanted: Tensor
    ) -> None:
        """Walk backwards.

        Args:
            graph: a rewritten graph, or a part of it.
            places: see `places_of`.
            lattice: of the run, all cells there.
            exit: the node whose elements are wanted.
            wanted: (B*H*W,) bool, anchors of these elements on its fine map.
        """
        self._places, self._whole = places, lattice
        self._needed: dict[fx.Node, Tensor] = {exit: wanted}
        self._rows: dict[fx.Node, tuple[Tensor, Size]] = {}
        self._row_valued = _row_valued(graph)
        self.lattices: dict[str, Lattice] = {}
        for node in reversed(list(graph.nodes)):
            self._visit(node)

    def _visit(self, node: fx.Node) -> None:
        if node in self._rows:
            self._visit_rows(node, *self._rows[node])
            return
        needed, target = self._needed.get(node), node.target
        operation = operation_of(target)
        reads = operation.reads if operation is not None else ""
        if reads == "nothing" or (target is getattr and node.args[1] in ("rows", "lattice")):
            if target is functional.common_lattice and needed is not None:
                self.lattices[node.name] = self._part(node, needed)
        elif needed is None or node.name not in self._places:
            self._need_all_of(node)
        elif operation is not None and "window" in node.kwargs:
            self._visit_window(node, operation, needed)
        elif target is Elements:
            size = self._places[node.name][1]
            rows, lattice = node.args
            self._need_rows(rows, needed, size)
            if isinstance(lattice, fx.Node) and lattice.target is functional.common_lattice:
                self._need(lattice, needed, size)
        elif reads == "element":  # statistics of a batch are of networks that are trained
            for read in node.all_input_nodes:
                if read.name in self._places:
                    self._need(read, needed, self._places[node.name][1])
        else:
            self._need_all_of(node)

    def _visit_window(self, node: fx.Node, operation: Operation, needed: Tensor) -> None:
        target = self._part(node, needed)
        self.lattices[node.name] = target
        read: Any = node.args[0]
        source = self._lattice(read)
        window: Any = node.kwargs["window"]
        window = window.fit(source.size)
        if window.is_pointwise:
            self._need(read, needed, target.size)
        else:
            drop = operation.drops and drops(target, window)
            pixels = reached(source, kernel_map(source, target, window, drop=drop))
            self._need(read, pixels, source.size)
        for other in node.args[1:]:  # a residual, element by element; it may be what the window reads, too
            if isinstance(other, fx.Node) and other.name in self._places:
                self._need(other, needed, target.size)

    def _visit_rows(self, node: fx.Node, needed: Tensor, size: Size) -> None:
        """An operation on rows: each row of the result is made of those of the same place."""
        if node.target is getattr or node.target is functional.rows_on:
            if isinstance(read := node.args[0], fx.Node) and read.name in self._places:
                self._need(read, needed, size)
            return
        for read in node.all_input_nodes:
            if read in self._row_valued:
                self._need_rows(read, needed, size)

    def _need_all_of(self, node: fx.Node) -> None:
        """Everything that is read, by an operation that is not known to read less."""
        for read in node.all_input_nodes:
            if read.name in self._places and node.op != "output":
                stage, size = self._places[read.name]
                self._need(read, self._whole.at(stage, size).index >= 0, size)

    def _need(self, node: Any, pixels: Tensor, size: Size) -> None:
        """Note that these places of a node's elements are needed."""
        own = self._places[node.name][1]
        pixels = _move(pixels, size, own, self._whole.batch)
        known = self._needed.get(node)
        self._needed[node] = pixels if known is None else known | pixels

    def _need_rows(self, node: Any, pixels: Tensor, size: Size) -> None:
        known = self._rows.get(node)
        if known is not None:
            pixels = pixels | _move(known[0], known[1], size, self._whole.batch)
        self._rows[node] = pixels, size

    def _lattice(self, node: fx.Node) -> Lattice:
        return self._whole.resample(*self._places[node.name])

    def _part(self, node: fx.Node, needed: Tensor) -> Lattice:
        whole = self._lattice(node)
        if bool(needed[whole.anchors].all()):
            return whole
        return Lattice(whole.pyramid, whole.stage, whole.size, Part(needed))


class WithinCone:
    """Runs a graph on the parts of a cone: to be mixed into an interpreter, before it."""

    def __init__(self, cone: Cone | None, *args: Any, **kwargs: Any) -> None:
        """Take a cone, or None to run everything, and what the interpreter takes."""
        super().__init__(*args, **kwargs)
        self._lattices = cone.lattices if cone is not None else {}

    def fetch_args_kwargs_from_env(self, node: fx.Node) -> tuple[Any, Any]:
        """The arguments of a node, with its lattice instead of its stage."""
        args, kwargs = super().fetch_args_kwargs_from_env(node)  # type: ignore[misc]
        lattice = self._lattices.get(node.name)
        if lattice is None:
            return args, kwargs
        if node.target is functional.common_lattice:
            return (lattice, *args[1:]), kwargs
        return args, {**kwargs, "stage": lattice}


def _row_valued(graph: fx.Graph) -> set[fx.Node]:
    """Nodes that give rows, or something made of rows alone."""
    row_valued: set[fx.Node] = set()
    for node in graph.nodes:
        source = node.target is functional.rows_on or (node.target is getattr and node.args[1] == "rows")
        if source or (node.target is not Elements and row_valued & set(node.all_input_nodes)):
            row_valued.add(node)
    return row_valued


def _move(pixels: Tensor, size: Size, to: Size, batch: int) -> Tensor:
    """Flags of the pixels of one fine map on one of another size."""
    if size == to:
        return pixels
    shown = pixels.view(batch, *size)[:, : to[0], : to[1]]
    missing = (0, to[1] - shown.shape[2], 0, to[0] - shown.shape[1])
    return F.pad(shown, missing).flatten()
