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


def places_of(
    program: Program, graph: fx.Graph, lattice: Lattice, values: tuple[Any, ...]
) -> dict[str, Place]:
    """Where each node of a graph that gives elements, their rows or a lattice has them, by its name.

    Args:
        program: on shapes without values, see `macs.meta_copy`.
        graph: behind the place where the mask is asked for.
        lattice: any of the fine map's size.
        values: what enters the graph, as meta tensors.
    """
    interpreter = GraphInterpreter(program, graph)
    interpreter.garbage_collect_values = False
    interpreter.run(lambda *_: lattice, *values)
    places, rows = dict[str, Place](), set[fx.Node]()
    for node, value in interpreter.env.items():
        own = value.lattice if isinstance(value, Elements) else value
        sources: list[Any] = [read for read in node.all_input_nodes if read in rows]
        if node.target is functional.rows_on:
            sources = [node.args[1]]
        elif node.target is getattr and node.args[1] == "rows":
            sources = [node.args[0]]
        if isinstance(own, Lattice):
            places[node.name] = own.stage, own.size
        elif sources:
            places[node.name] = places[sources[0].name]
            rows.add(node)
    return places


def reached(lattice: Lattice, reading: Reading) -> Tensor:
    """(B*H*W,) bool: anchors of the elements of a whole lattice that a reading names."""
    count, table = lattice.count, reading.table.flatten().long()
    named = torch.zeros(count + 1 + reading.sources.shape[0], dtype=torch.bool, device=table.device)
    named[table] = True
    mixed = reading.sources[named[count + 1 :]].flatten().long()
    named[mixed] = True
    pixels = torch.zeros(lattice.index.shape[0], dtype=torch.bool, device=table.device)
    pixels[lattice.anchors[named[:count]]] = True
    return pixels


class Cone:
    """Parts of a graph that some elements depend on.

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
        self.lattices: dict[str, Lattice] = {}
        for node in reversed(list(graph.nodes)):
            self._visit(node, operation_of(node.target), self._needed.get(node))

    def _visit(self, node: fx.Node, operation: Operation | None, needed: Tensor | None) -> None:
        if node.target is functional.common_lattice:
            if needed is not None:
                self.lattices[node.name] = self._part(node, needed)
        elif operation is None or operation.reads == "nothing":  # rows, or a question that no values answer
            if needed is not None:
                self._need_same(node, needed)
        elif needed is None:  # it gives something else than elements
            self._need_all_of(node)
        elif "window" in node.kwargs:
            self._visit_window(node, operation, needed)
        elif operation.reads == "element":  # statistics of a batch are of networks that are trained
            self._need_same(node, needed)
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

    def _need_same(self, node: fx.Node, needed: Tensor) -> None:
        """The same places of everything that is read."""
        for read in node.all_input_nodes:
            if read.name in self._places:
                self._need(read, needed, self._places[node.name][1])

    def _need_all_of(self, node: fx.Node) -> None:
        """Everything that is read, by an operation that is not known to read less."""
        for read in node.all_input_nodes:
            if read.name in self._places:
                stage, size = self._places[read.name]
                self._need(read, self._whole.at(stage, size).index >= 0, size)

    def _need(self, node: Any, pixels: Tensor, size: Size) -> None:
        """Note that these places of a node's elements are needed."""
        own = self._places[node.name][1]
        pixels = _move(pixels, size, own, self._whole.batch)
        known = self._needed.get(node)
        self._needed[node] = pixels if known is None else known | pixels

    def _lattice(self, node: fx.Node) -> Lattice:
        return self._whole.resample(*self._places[node.name])

    def _part(self, node: fx.Node, needed: Tensor) -> Lattice:
        whole = self._lattice(node)
        if bool(needed[whole.anchors].all()):
            return whole
        return whole.pyramid.lattice(whole.stage, whole.size, Part(needed))


def _move(pixels: Tensor, size: Size, to: Size, batch: int) -> Tensor:
    """Flags of the pixels of one fine map on one of another size."""
    if size == to:
        return pixels
    shown = pixels.view(batch, *size)[:, : to[0], : to[1]]
    missing = (0, to[1] - shown.shape[2], 0, to[0] - shown.shape[1])
    return F.pad(shown, missing).flatten()
