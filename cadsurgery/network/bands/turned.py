"""A network for pictures that are turned, columns for rows: bands of rows of a turned picture are bands of columns."""

from __future__ import annotations

import copy
import operator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx, nn

from cadsurgery.elements.backends.packed import PackedConv
from cadsurgery.elements.kernel_map import Window
from cadsurgery.elements.lattice import Lattice, Pyramid
from cadsurgery.network.program import Program
from cadsurgery.support.torch_internals import tree_leaves, tree_map
from cadsurgery.surgery.guards import is_guard

# Attributes of torch's modules with a number for each axis, or two for the ends of each.
_BOTH_AXES = {
    "kernel_size",
    "stride",
    "padding",
    "dilation",
    "output_padding",
    "output_size",
    "scale_factor",
    "size",
}
_BOTH_AXES |= {"_reversed_padding_repeated_twice"}
_ROUNDING = {torch.bfloat16: 5e-2, torch.float16: 5e-3}  # relative to the largest value; else 1e-3


def turned_program(program: Program) -> Program | None:
    """Return the program of an inference copy with weights and windows turned. Its code is the same, so that it gives
    the turned results if nothing else in it tells rows from columns, which has to be tried; see `agree`.

    None if the code decides by sizes, or cuts maps at a place that it names.
    """
    graphs = [graph for graph in (program.graph, program.unchanged) if graph is not None]
    if any(is_guard(node) or _cuts(node) for graph in graphs for node in graph.nodes):
        return None
    net, seen = copy.deepcopy(program.net), set[int]()
    for module in net.modules():
        _turn(module, seen)
    graph, *own = map(_turned_graph, graphs)
    return replace(program, graph=graph, unchanged=own[0] if own else None, watched=()).bind_to(net)


def turned_lattice(lattice: Lattice) -> Lattice:
    """Return the lattice of a turned picture."""
    levels = lattice.pyramid.levels.transpose(1, 2)
    return Pyramid(levels, lattice.geometry).lattice(lattice.stage, lattice.size[::-1])


def turned_maps(output: Any) -> Any:
    """Turn each map (B, C, H, W) of an output."""
    return tree_map(
        lambda one: one.transpose(2, 3) if isinstance(one, Tensor) and one.dim() == 4 else one, output
    )


def agree(one: Any, other: Any) -> bool:
    """True if two outputs are the same up to rounding."""
    pairs = list(zip(tree_leaves(one), tree_leaves(other), strict=True))
    return all(
        torch.equal(a, b) if not a.is_floating_point() else _is_close(a, b)
        for a, b in pairs
        if isinstance(a, Tensor)
    )


def _is_close(a: Tensor, b: Tensor) -> bool:
    if a.shape != b.shape:
        return False
    most = _ROUNDING.get(a.dtype, 1e-3) * a.abs().amax() if a.numel() else 0.0
    return bool(((a - b).abs() <= most).all())


def _cuts(node: fx.Node) -> bool:
    """True for an index along an axis of the image that begins or ends at a number."""
    index: Any = node.args[1] if node.target is operator.getitem else None
    along = index[2:] if isinstance(index, tuple) else ()
    return any(
        isinstance(part, int) or (isinstance(part, slice) and (part.start or isinstance(part.stop, int)))
        for part in along
    )


def _turned_graph(graph: fx.Graph) -> fx.Graph:
    turned = copy.deepcopy(graph)
    for node in turned.nodes:
        node.args = tuple(map(_turned_window, node.args))
        node.kwargs = {name: _turned_window(value) for name, value in node.kwargs.items()}
    return turned


def _turned_window(value: Any) -> Any:
    if not isinstance(value, Window):
        return value
    top, bottom, left, right = value.padding
    sides = value.kernel[::-1], value.dilation[::-1]
    return value._replace(kernel=sides[0], dilation=sides[1], padding=(left, right, top, bottom))


def _turn(module: nn.Module, seen: set[int]) -> None:
    """Turn the weights and the windows of a module."""
    for value in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
        if value.dim() == 4 and id(value) not in seen:
            seen.add(id(value))
            layout = torch.channels_last if value.is_contiguous(memory_format=torch.channels_last) else None
            turned = value.data.transpose(2, 3)
            value.data = turned.contiguous(memory_format=layout or torch.contiguous_format)
    for name in _BOTH_AXES & vars(module).keys():
        value = getattr(module, name)
        if isinstance(value, (tuple, list)) and len(value) in (2, 4):
            half = len(value) // 2
            setattr(module, name, value[half:] + value[:half])  # type: ignore[operator]
    if isinstance(module, PackedConv):
        module._packed = None
        if module.window is not None:
            stride, padding, dilation = (pair[::-1] for pair in module.window)
            module.window = stride, padding, dilation
