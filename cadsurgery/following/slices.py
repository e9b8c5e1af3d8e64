"""Join slices of a map that are taken one axis after the other, as exporters write them.

`x[:, :, ::2][:, :, :, 1::2]` is `x[:, :, ::2, 1::2]`, which elements read as a window of one tap with a stride.
"""

from __future__ import annotations

import operator
from typing import Any

from torch import fx

from cadsurgery.following.facts import Facts

Slices = tuple[slice, ...]


def join_slices(facts: Facts) -> bool:
    """Join such slices in the graph of a network, in place; return True if there were any."""
    changed = False
    for node in facts.graph.nodes:
        outer = slices_of(node, facts)
        inner = slices_of(node.args[0], facts) if outer is not None else None
        if outer is None or inner is None:
            continue
        joined = [_joined(*pair) for pair in zip(inner, outer, strict=True)]
        has_steps = any(part.step not in (None, 1) for part in (*inner, *outer))
        if has_steps and None not in joined:
            node.args = (node.args[0].args[0], tuple(joined))
            changed = True
    for node in reversed(list(facts.graph.nodes) if changed else ()):
        if node.target is operator.getitem and not node.users:
            facts.graph.erase_node(node)
    return changed


def slices_of(node: Any, facts: Facts) -> Slices | None:
    """Return the slices that an index takes of a tensor, one for each axis; None for any other operation."""
    if not isinstance(node, fx.Node) or node.target is not operator.getitem:
        return None
    rank = len(facts.shapes.get(node.args[0], ()))  # type: ignore[arg-type]
    parts = parts_of_index(node.args[1], rank)
    parts += [slice(None)] * (rank - len(parts))
    return tuple(parts) if parts and all(isinstance(part, slice) for part in parts) else None


def parts_of_index(asked: Any, axes: int) -> list[Any]:
    """Return the parts of an index of a tensor of so many axes, with slices in place of an ellipsis."""
    index: list[Any] = list(asked) if isinstance(asked, tuple) else [asked]
    if any(part is Ellipsis for part in index):
        at = next(i for i, part in enumerate(index) if part is Ellipsis)
        used = sum(part is not None for part in index) - 1
        index[at : at + 1] = [slice(None)] * (axes - used)
    return index


def is_whole(part: Any) -> bool:
    """True for a slice that takes all of an axis."""
    is_slice = isinstance(part, slice) and part.stop is None
    return is_slice and part.start in (None, 0) and part.step in (None, 1)


def _joined(inner: slice, outer: slice) -> slice | None:
    """Return the slice of an axis that two slices give one after the other; None if both take parts."""
    if is_whole(outer):
        return inner
    return outer if is_whole(inner) else None
