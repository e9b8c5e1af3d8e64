"""The kinds of sides, a file each; `KINDS` are those that methods make of networks."""

from __future__ import annotations

from cadsurgery.tasks.side import Kind
from cadsurgery.tasks.sides import exits, gates, samples

KINDS = (exits.KIND, gates.KIND, samples.KIND)


def kind_of(net: object) -> Kind | None:
    """The kind of a network; None if no method of `KINDS` made it."""
    return next((kind for kind in KINDS if isinstance(net, kind.network)), None)
