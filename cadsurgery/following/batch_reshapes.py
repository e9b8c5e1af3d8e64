"""Rewrite chains of reshapes that merge the batch with other axes, as in some channel shuffles.

`x.view(b * c // 2, 2, h * w).permute(1, 0, 2).reshape(2, -1, c // 2, h, w)` is `x.reshape(b, c // 2, 2, h, w)` with its
axes permuted. Elements have no batch or image axes, so only the second form can run on them. A chain is followed
through the factors of its axes. As soon as no axis combines the batch or the image with channels, the result is written
in the second form.
"""

from __future__ import annotations

import math
import operator
from dataclasses import dataclass
from typing import Any

from torch import fx

from cadsurgery.following.facts import Facts
from cadsurgery.following.graphs import axes_order

_RESHAPES = ("view", "reshape", "flatten", "unflatten")
_SAME = ("contiguous", "clone")


@dataclass(frozen=True)
class _Factor:
    """A factor of an axis: the whole batch, height or width, or a part of the channels with a step between them."""

    kind: str
    size: int
    step: int = 1


Axes = list[list[_Factor]]


def write_without_batch(facts: Facts) -> bool:
    """Rewrite such chains in the graph of a network, in place; return True if there were any."""
    chains: dict[fx.Node, tuple[fx.Node, Axes]] = {}
    changed = False
    for node in list(facts.graph.nodes):
        source: Any = node.args[0] if node.args else None
        if node.op != "call_method" or source not in facts.shapes or node not in facts.shapes:
            continue
        start, axes = chains.get(source) or (source, _axes_of(source, facts))
        after = _follow(node, axes, facts) if axes else None
        if after is None:
            continue
        if not _is_mixed(after):
            if source in chains:
                node.replace_all_uses_with(_emit(node, start, after))
                chains[node] = (start, after)
                changed = True
        elif source in chains or node.target in _RESHAPES:
            chains[node] = (start, after)
    for node in reversed(list(chains) if changed else ()):
        if not node.users:
            facts.graph.erase_node(node)
    return changed


def _axes_of(node: fx.Node, facts: Facts) -> Axes:
    """Return the axes of a floating-point map (B, C, H, W); an empty list for any other value."""
    shape = tuple(facts.shapes[node])
    if len(shape) != 4 or shape[0] != len(facts.example) or node not in facts.floating:
        return []
    return [[_Factor(kind, size)] for kind, size in zip("bchw", shape, strict=True)]


def _is_mixed(axes: Axes) -> bool:
    """True if an axis combines the batch or the image with other factors."""
    kinds = ["".join(factor.kind for factor in axis) for axis in axes]
    return any(len(set(kind)) > 1 and kind != "hw" for kind in kinds)


def _follow(node: fx.Node, axes: Axes, facts: Facts) -> Axes | None:
    """Return the axes after one operation of a chain; None if the operation ends the chain."""
    if node.target in _SAME:
        return axes
    if node.target in _RESHAPES:
        return _regroup([factor for axis in axes for factor in axis], tuple(facts.shapes[node]))
    order = axes_order(node, len(axes))
    return None if order is None else [axes[axis] for axis in order]


def _regroup(factors: list[_Factor], shape: tuple[int, ...]) -> Axes | None:
    """Distribute the factors over the axes of a shape, splitting channels if needed; None if that is impossible."""
    waiting, axes = list(factors), list[list[_Factor]]()
    for size in shape:
        axis, filled = list[_Factor](), 1
        if size == 1 and waiting and waiting[0].size == 1:
            axis.append(waiting.pop(0))
        while filled < size:
            if not waiting:
                return None
            factor, room = waiting.pop(0), size // filled
            if factor.size > room:
                if factor.kind != "c" or factor.size % room:
                    return None
                inner = _Factor("c", factor.size // room, factor.step)
                waiting.insert(0, inner)
                factor = _Factor("c", room, inner.step * inner.size)
            filled *= factor.size
            axis.append(factor)
        if filled != size:
            return None
        axes.append(axis)
    return None if waiting else axes


def _emit(node: fx.Node, start: fx.Node, axes: Axes) -> fx.Node:
    """Insert the rewritten chain: split the channels, permute the axes, merge the channels."""
    graph = node.graph
    with graph.inserting_before(node):
        lengths: dict[str, Any] = {
            kind: graph.call_method("size", (start, axis)) for kind, axis in {"b": 0, "h": 2, "w": 3}.items()
        }
        factors = [factor for axis in axes for factor in axis]
        channels = sorted((f for f in factors if f.kind == "c"), key=lambda f: -f.step)
        split_shape = (lengths["b"], *(factor.size for factor in channels), lengths["h"], lengths["w"])
        result = graph.call_method("reshape", (start, *split_shape))
        fixed = {"b": 0, "h": len(channels) + 1, "w": len(channels) + 2}
        order = [channels.index(f) + 1 if f.kind == "c" else fixed[f.kind] for f in factors]
        if order != sorted(order):
            result = graph.call_method("permute", (result, *order))
        if any(len(axis) != 1 for axis in axes):
            shape = []
            for axis in axes:
                length: Any = math.prod(factor.size for factor in axis if factor.kind == "c")
                for factor in axis:
                    if factor.kind != "c":
                        known = lengths[factor.kind]
                        length = known if length == 1 else graph.call_function(operator.mul, (length, known))
                shape.append(length)
            result = graph.call_method("reshape", (result, *shape))
    for new in (result, *result.all_input_nodes):
        if new is not start:
            new.meta.update(node.meta)
    return result
