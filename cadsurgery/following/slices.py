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
    source: Any = node.args[0]
    asked: Any = node.args[1]
    rank, parts = len(facts.shapes.get(source, ())), list(asked) if isinstance(asked, tuple) else [asked]
    if any(part is ... for part in parts):
        dots = next(i for i, part in enumerate(parts) if part is ...)
        parts[dots : dots + 1] = [slice(None)] * (rank - len(parts) + 1)
    parts += [slice(None)] * (rank - len(parts))
    return tuple(parts) if parts and all(isinstance(part, slice) for part in parts) else None


def _joined(inner: slice, outer: slice) -> slice | None:
    """Return the slice of an axis that two slices give one after the other; None if both take parts."""
    if _is_whole(outer):
        return inner
    return outer if _is_whole(inner) else None


def _is_whole(part: slice) -> bool:
    return part in (slice(None), slice(0, None), slice(None, None, 1), slice(0, None, 1))
