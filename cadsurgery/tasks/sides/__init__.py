"""The kinds of sides, one module each; `KINDS` are the networks made by methods."""

from __future__ import annotations

from cadsurgery.support.errors import InvalidInput
from cadsurgery.tasks.side import MethodSides
from cadsurgery.tasks.sides import exit_sides, gate_sides, sample_sides

KINDS = (exit_sides.KIND, gate_sides.KIND, sample_sides.KIND)


def kind_of(net: object) -> MethodSides | None:
    """Return the kind of a network; None if none of `KINDS` matches."""
    return next((kind for kind in KINDS if isinstance(net, kind.network)), None)


def need_kind(net: object) -> MethodSides:
    """Return the kind of a network made by a method.

    Raises:
        InvalidInput: no kind matches, e.g. for a method of the user.
    """
    kind = kind_of(net)
    if kind is None:
        raise InvalidInput(
            f"there are no sides by which a {type(net).__name__} is compared.",
            why=f"only networks {', '.join(kind.words for kind in KINDS)} have sides.",
            next="give sides of its own with a network by name: sides=[Side(...)], see docs/extending.md.",
        )
    return kind
