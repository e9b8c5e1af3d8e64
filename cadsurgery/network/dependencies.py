"""Find the dependency cone of some results: the elements of every operation from which they are computed.

A rewritten graph is walked backwards from the requested elements. A window needs the inputs in its kernel map; a
pointwise operation or a join needs the same positions; an operation on the whole image needs all elements. Run on
lattices reduced to these parts, the requested elements are the same bit for bit.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from cadsurgery.elements.kernel_map import Reading, kernel_map
from cadsurgery.elements.lattice import Lattice
from cadsurgery.elements.on_rows import OnRows
from cadsurgery.elements.operations import Operation, operation_of
from cadsurgery.elements.windows import drops
from cadsurgery.network.observing import LatticeId

Size = tuple[int, int]


def reached(lattice: Lattice, reading: Reading) -> Tensor:
    """Return the anchors of the lattice's elements that a reading uses, (B*H*W,) bool."""
    count, table = lattice.count, reading.table.flatten().long()
    named = torch.zeros(count + 1 + reading.sources.shape[0], dtype=torch.bool, device=table.device)
    named[table] = True
    mixed = reading.sources[named[count + 1 :]].flatten().long()
    named[mixed] = True
    pixels = torch.zeros(lattice.index.shape[0], dtype=torch.bool, device=table.device)
    pixels[lattice.anchors[named[:count]]] = True
    return pixels


class Cone:
    """The elements of each operation that the requested elements depend on.

    Attributes:
        lattices: for each operation that creates new elements, by name: its lattice reduced to the needed elements.
    """

    def __init__(
        self,
        graph: fx.Graph,
        lattice_ids: Mapping[str, LatticeId],
        lattice: Lattice,
        exit: fx.Node,
        anchors: Tensor,
    ) -> None:
        """Walk the graph backwards.

        Args:
            graph: a rewritten graph, or a part of it.
            lattice_ids: stage and fine size of the nodes' lattices, see `Observation.lattice_ids`.
            lattice: complete lattice of the run.
            exit: the node whose elements are requested.
            anchors: anchors of the requested elements on its fine map, (B*H*W,) bool.
        """
        self._lattice_ids, self._whole = lattice_ids, lattice
        self._needed: dict[fx.Node, Tensor] = {exit: anchors}
        self.lattices: dict[str, Lattice] = {}
        for node in reversed(list(graph.nodes)):
            self._visit(node, operation_of(node.target), self._needed.get(node))

    def _visit(self, node: fx.Node, operation: Operation | None, needed: Tensor | None) -> None:
        if operation is None or operation.reads == "nothing":  # a size query
            if needed is not None:
                self._need_inputs(node, needed)
        elif needed is None:  # its result is not elements
            self._need_inputs(node)
        elif "window" in node.kwargs:
            self._visit_window(node, operation, needed)
        elif operation.reads == "element":  # batch statistics occur only in training
            if isinstance(node.target, OnRows) and "stage" in node.kwargs:
                self.lattices[node.name] = self._part(node, needed)
            self._need_inputs(node, needed)
        else:
            self._need_inputs(node)

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
        for other in node.args[1:]:  # a residual, read element by element; perhaps also the window's input
            if isinstance(other, fx.Node) and other.name in self._lattice_ids:
                self._need(other, needed, target.size)

    def _need_inputs(self, node: fx.Node, needed: Tensor | None = None) -> None:
        """Mark the same positions of all inputs as needed; by default all positions."""
        for read in node.all_input_nodes:
            if read.name in self._lattice_ids:
                stage, size = self._lattice_ids[read.name]
                if needed is None:
                    self._need(read, self._whole.resample(stage, size).index >= 0, size)
                else:
                    self._need(read, needed, self._lattice_ids[node.name][1])

    def _need(self, node: Any, pixels: Tensor, size: Size) -> None:
        """Mark these positions of a node's elements as needed."""
        own = self._lattice_ids[node.name][1]
        pixels = _move(pixels, size, own, self._whole.batch)
        needed = self._needed.get(node)
        self._needed[node] = pixels if needed is None else needed | pixels

    def _lattice(self, node: fx.Node) -> Lattice:
        return self._whole.resample(*self._lattice_ids[node.name])

    def _part(self, node: fx.Node, needed: Tensor) -> Lattice:
        whole = self._lattice(node)
        return whole if bool(needed[whole.anchors].all()) else whole.choose(needed)


def _move(pixels: Tensor, size: Size, to: Size, batch: int) -> Tensor:
    """Crop or pad the flags of a fine map's pixels to another size."""
    if size == to:
        return pixels
    cropped = pixels.view(batch, *size)[:, : to[0], : to[1]]
    missing = (0, to[1] - cropped.shape[2], 0, to[0] - cropped.shape[1])
    return F.pad(cropped, missing).flatten()
