"""Emulate cells densely: the network's own graph, in which each map is interpolated inside its coarse cells.

It shares nothing with the elements but the level map: after every operation of the region, values inside a cell are
replaced by the linear interpolation, or the copy, of the values at the anchors. What the region computes at the anchors
must be equal to it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence, Set
from typing import Any

import torch
from torch import Tensor, fx, nn

from cadsurgery.elements.axes import NCHW, channel_dims
from cadsurgery.elements.functional import resize
from cadsurgery.elements.lattice import Geometry
from cadsurgery.elements.operations import operation_of
from cadsurgery.elements.sizes import divide_up
from cadsurgery.following.graphs import Interpreter, pads
from cadsurgery.support.torch_internals import BatchNorm
from cadsurgery.support.torch_operations import name_of
from cadsurgery.surgery.plan import Decision, Plan

# Reductions whose result depends on the number of samples, which is that of the network's own grid at every level.
_BY_NUMBER = ("sum", "norm", "vector_norm", "std", "var", "std_mean", "var_mean")


class CannotEmulate(Exception):
    """A reduction reads a map whose axes are not batch, channels, height and width, or bins or windows of its size, or
    its result depends on the number of samples."""


class Emulator(Interpreter):
    """Runs a network's own graph with all maps of the region in cells that are no finer than its own grid.

    Args:
        model: the network.
        graph: its own graph.
        plan: plan of a conversion whose finest cells are those of the network's own grid.
        geometry: geometry of the conversion.
        levels: (B, H, W) legal level map, one level per pixel of the fine map.
        sizes: height and width in fine pixels of maps whose mean is taken, by name: the last sample may cover less than
            others, as where a finer map was cropped.
        padded: names of paddings that are elements of their map, and no window's.
    """

    def __init__(
        self,
        model: nn.Module,
        graph: fx.Graph,
        plan: Plan,
        geometry: Geometry,
        levels: Tensor,
        sizes: Mapping[str, tuple[int, int]],
        padded: Set[str] = frozenset(),
    ) -> None:
        """Prepare a run; see the class."""
        super().__init__(model, graph=graph)
        self.padded = padded
        self.decisions = {decision.node: decision for decision in plan.decisions}
        self.geometry, self.levels, self.sizes = geometry, levels, sizes

    def run_node(self, n: fx.Node) -> Any:
        """Compute a node; maps of the region are interpolated, and means read cells by their area."""
        decision = self.decisions[n.name]
        if decision.on_elements and not decision.layout and n.op != "output":
            return self._reduced(n)
        module = self.module.get_submodule(str(n.target)) if n.op == "call_module" else None
        if isinstance(module, BatchNorm) and module.running_mean is None:
            raise CannotEmulate(n.name)
        value = super().run_node(n)
        if pads(module or n.target) and n.name not in self.padded:
            return value  # the windows that read it apply the padding
        if decision.stages[1] == 0 or not decision.on_elements:
            return value
        if isinstance(value, Tensor) and any(
            self._holds(value, decision, read) for read in n.all_input_nodes
        ):
            value = value.clone()  # where it ends, its cells are filled by other values than the whole map's
        if isinstance(value, tuple) and isinstance(value[0], Tensor) and not value[-1].is_floating_point():
            return self._fill(value[0], decision), self._places(n)  # a pooling with the places of its maxima
        return self._fill(value, decision) if isinstance(value, Tensor) else value

    def _holds(self, value: Tensor, decision: Decision, read: fx.Node) -> bool:
        """True if the map that a node gives holds another one: a crop, in the same memory, with fewer lines or columns.

        Other views have the samples of the map in another order and stay views: what is written in place shows in both.
        """
        whole = self.env[read]
        return (
            isinstance(whole, Tensor)
            and self.decisions[read.name].layout == decision.layout
            and whole.shape[2:] != value.shape[2:]
            and whole.untyped_storage().data_ptr() == value.untyped_storage().data_ptr()
        )

    def _reduced(self, n: fx.Node) -> Any:
        """Compute a node that reduces maps to a vector per image: every cell weighs as much as it covers."""
        if name_of(n.target).removeprefix("linalg_") in _BY_NUMBER:
            raise CannotEmulate(n.name)

        called = self.module.get_submodule(str(n.target)) if n.op == "call_module" else n.target
        name = name_of(type(called) if isinstance(called, nn.Module) else called).lower()
        is_extreme = "max" in name or "min" in name

        def by_cell(source: fx.Node) -> Any:
            value, decision = self.env[source], self.decisions[source.name]
            if not isinstance(value, Tensor) or not decision.layout or not decision.stages[1]:
                return value
            if decision.layout != NCHW:
                raise CannotEmulate(source.name)
            height, width = self.sizes.get(source.name, self.levels.shape[1:])  # of a map that was cropped
            cut = self.levels[:, :height, :width].long()
            levels = self.geometry.levels_at(cut, decision.stages[1]).flatten(1)
            if (levels == levels[0, 0]).all():
                step = max(1, self.geometry.sides[int(levels[0, 0])] // decision.spacing)
                return value[:, :, ::step, ::step]
            if (
                levels.amin(1) == levels.amax(1)
            ).any():  # in such an image alone cells weigh the same, cropped or not
                raise CannotEmulate(source.name)
            places, _ = self._cells(value.shape[2:], decision)
            at_anchors = _at(value, *places)
            return at_anchors if is_extreme else at_anchors * self._shares(source, value.shape[2:]).to(value)

        args, kwargs = (fx.map_arg(part, by_cell) for part in (n.args, n.kwargs))
        try:
            value = getattr(self, n.op)(n.target, args, kwargs)
        except RuntimeError as error:  # a window of the map's size, which has fewer samples here
            raise CannotEmulate(n.name) from error
        if isinstance(value, Tensor) and value.dim() == 4 and value.shape[2:].numel() > 1:
            raise CannotEmulate(n.name)  # bins, of which cells may cover parts
        return value

    def _shares(self, source: fx.Node, size: Sequence[int]) -> Tensor:
        """Return what each sample (h, w) of a map covers of it, relative to the mean of all."""
        if source.name not in self.sizes:
            raise CannotEmulate(source.name)
        grid = self.decisions[source.name].spacing
        down, across = (
            (length - torch.arange(count, device=self.levels.device) * grid).clamp(max=grid).double()
            for count, length in zip(size, self.sizes[source.name], strict=True)
        )
        areas = down.unsqueeze(1) * across
        return areas / areas.mean()

    def _places(self, n: fx.Node) -> Tensor:
        """Return the places of a pooling's maxima. Where the border continues, samples of a cell are equal but for
        rounding: the first of them counts."""
        source = n.all_input_nodes[0]
        value = self.env[source]
        falling = torch.linspace(
            0, 1e-10, value.shape[2] * value.shape[3], dtype=value.dtype, device=value.device
        ).view(value.shape[2:])
        self.env[source] = value - falling * value.abs().max()
        places: Tensor = super().run_node(n)[-1]
        self.env[source] = value
        return places

    def _cells(self, size: Sequence[int], decision: Decision) -> tuple[tuple[Tensor, Tensor], Tensor]:
        """Return the anchor (y, x) of the cell that holds each sample (B, h, w) of a map, and the cell's side, in
        samples."""
        levels = self.levels.long()
        for axis, count in enumerate(size, 1):  # a map that is larger than the image continues its border
            places = (torch.arange(count, device=levels.device) * decision.spacing).clamp(
                max=levels.shape[axis] - 1
            )
            levels = levels.index_select(axis, places)
        levels = self.geometry.levels_at(levels, decision.stages[1])
        side = (torch.tensor(self.geometry.sides, device=levels.device)[levels] // decision.spacing).clamp(
            min=1
        )
        y, x = _grid(size, levels.device)
        return (y - y % side, x - x % side), side

    def _fill(self, value: Tensor, decision: Decision) -> Tensor:
        """Interpolate a map of any layout inside its cells."""
        layout = decision.layout
        if not value.is_floating_point() or len(layout) != value.dim() or layout[0] != "b":
            return value
        places = (layout.index(axis) for axis in ("p" if "p" in layout else "hw"))
        order = [*channel_dims(layout), *places]
        image = value.permute(0, *order)
        if "p" in layout:
            size = [divide_up(length, decision.spacing) for length in self.levels.shape[1:]]
            if image.shape[-1] != math.prod(size):
                return value
            image = image.unflatten(-1, size)
        shape = image.shape
        filled = self._filled(image.reshape(shape[0], -1, *shape[-2:]), decision).reshape(shape)
        if "p" in layout:
            filled = filled.flatten(-2)
        back = sorted(range(1, value.dim()), key=lambda dim: order[dim - 1])
        return _in_memory_of(value, filled.permute(0, *back))

    def _filled(self, value: Tensor, decision: Decision) -> Tensor:
        """Return a map (B, C, h, w), interpolated inside its cells."""
        (top, left), side = self._cells(value.shape[2:], decision)
        held = _at(value, top, left)  # the value of the cell that holds each sample
        if self.geometry.fill == "nearest":
            return held
        height, width = value.shape[2:]
        y, x = _grid((height, width), top.device)
        down, across = ((at - start).double() / side for at, start in ((y, top), (x, left)))
        bottom, right = (top + side).clamp(max=height - 1), (left + side).clamp(max=width - 1)
        filled = torch.zeros_like(held)
        for row, of_row in ((top, 1 - down), (bottom, down)):
            for column, of_column in ((left, 1 - across), (right, across)):
                share = (of_row * of_column).unsqueeze(1).to(value)
                filled += torch.where(share > 0, share * _at(held, row, column), 0)
        return filled


def _grid(size: Sequence[int], device: torch.device) -> tuple[Tensor, Tensor]:
    """Return the numbers of lines (1, h, 1) and columns (1, 1, w)."""
    y, x = (torch.arange(length, device=device) for length in size)
    return y.view(1, -1, 1), x.view(1, 1, -1)


def _in_memory_of(value: Tensor, filled: Tensor) -> Tensor:
    """Write a map into the memory of the one that it replaces, which views of it share; a repeated map has none."""
    return filled if 0 in value.stride() else value.copy_(filled)


def _at(value: Tensor, y: Tensor, x: Tensor) -> Tensor:
    """Return the samples of a map (B, C, h, w) at places (B, h, w)."""
    image = torch.arange(value.shape[0], device=value.device).view(-1, 1, 1)
    y, x = y.expand(value.shape[0], *y.shape[1:]), x.expand(value.shape[0], *x.shape[1:])
    return value.permute(0, 2, 3, 1)[image, y, x].permute(0, 3, 1, 2)


def can_emulate(adapted: fx.Graph, geometry: Geometry) -> bool:
    """True if values between anchors depend on those at the anchors alone, and no operation of a rewritten graph mixes
    the positions of a map other than by windows, resizing, and reductions to a vector: their statistics weigh elements
    by area, dense maps do not."""
    if geometry.fill == "guided" or geometry.anchor == "center":
        return False
    operations = (operation_of(node.target) for node in adapted.nodes if node.target is not resize)
    return not any(
        known is not None and known.reads == "image" and known.gives == "elements" for known in operations
    )
