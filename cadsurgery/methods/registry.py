"""The methods: what commands know of each is in its own folder, and only here are they listed."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from cadsurgery.methods.anytime import exit_sides
from cadsurgery.methods.converted import ConvertedModel
from cadsurgery.methods.resampling import sample_sides
from cadsurgery.methods.sampling import gate_sides
from cadsurgery.methods.side import MethodSides
from cadsurgery.support.errors import InvalidInput

KINDS: tuple[MethodSides, ...] = (exit_sides.KIND, gate_sides.KIND, sample_sides.KIND)


def method_of(net: object) -> MethodSides | None:
    """Return the kind of a network made by a method, also by one of the user, which is run alone; None for others."""
    if not isinstance(net, ConvertedModel):
        return None
    refuse = _has_no_sides
    own = MethodSides(type(net), f"made by {net.converted_by}", refuse, refuse, refuse, _run, {})
    return next((kind for kind in KINDS if isinstance(net, kind.network)), own)


def _has_no_sides(*_: Any) -> Any:
    raise NotImplementedError


def _run(net: ConvertedModel, batch: Tensor, milliseconds: float) -> tuple[Any, dict[str, Any]]:
    return net(batch), {}


def need_kind(net: object) -> MethodSides:
    """Return the kind of a network made by a method.

    Raises:
        InvalidInput: no kind matches, e.g. for a method of the user.
    """
    kind = method_of(net)
    if kind is None or kind not in KINDS:
        raise InvalidInput(
            f"there are no sides by which a {type(net).__name__} is compared.",
            why=f"only networks {', '.join(kind.words for kind in KINDS)} have sides.",
            next="give sides of its own with a network by name: sides=[Side(...)], see docs/extending.md.",
        )
    return kind
