"""The kinds of sides, a file each; `KINDS` are those that methods make of networks."""

from __future__ import annotations

from cadsurgery.support.errors import InvalidInput
from cadsurgery.tasks.side import Kind
from cadsurgery.tasks.sides import exits, gates, samples

KINDS = (exits.KIND, gates.KIND, samples.KIND)


def kind_of(net: object) -> Kind | None:
    """The kind of a network; None if no method of `KINDS` made it."""
    return next((kind for kind in KINDS if isinstance(net, kind.network)), None)


def need_kind(net: object) -> Kind:
    """The kind of a network that a method made.

    Raises:
        InvalidInput: `KINDS` does not have it, as of a method of a user's own.
    """
    kind = kind_of(net)
    if kind is None:
        raise InvalidInput(
            f"there are no sides by which a {type(net).__name__} is compared.",
            why=f"those of networks {', '.join(kind.words for kind in KINDS)} are known.",
            next="give sides of its own with a network by name: sides=[Side(...)], see docs/extending.md.",
        )
    return kind
