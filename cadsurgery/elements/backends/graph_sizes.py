"""Sizes in a graph that is traced: quotients, and equalities that must hold in every call."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import NamedTuple, cast

import torch
from torch import Tensor

from cadsurgery.elements.backends.operators import define
from cadsurgery.elements.sizes import is_statically_true
from cadsurgery.support.running import running

define(
    "quotients(Tensor numbers, SymInt by) -> Tensor",
    lambda numbers, by: torch.empty_like(numbers),
    lambda numbers, by: numbers // by,
)


def quotients(numbers: Tensor, by: int) -> Tensor:
    """Return integers that are not negative divided by a size, rounded down: in an engine one operation, where torch's
    division, which knows no signs, is nine."""
    if running.target is None:
        return numbers // by
    return cast(Tensor, torch.ops.cadsurgery.quotients(numbers, by))


class Condition(NamedTuple):
    """Two sizes that must be equal in every call of a graph for images of any size.

    Attributes:
        one: the first size.
        other: the second size.
        reason: what the sizes are of, in words for the message of an engine.
    """

    one: int
    other: int
    reason: str


_CONDITIONS: ContextVar[list[Condition] | None] = ContextVar(
    "conditions on sizes, while a graph for images of any size is traced", default=None
)


@contextmanager
def recorded_conditions() -> Iterator[list[Condition]]:
    """Enter a context in which conditions on symbolic sizes are recorded in the list that it gives."""
    conditions: list[Condition] = []
    token = _CONDITIONS.set(conditions)
    try:
        yield conditions
    finally:
        _CONDITIONS.reset(token)


def require_equal(one: int, other: int, reason: str) -> bool:
    """Return whether two sizes are equal; if they are symbols that need not be, record that they must be.

    Without a context that records conditions, torch itself adds the condition to the graph that it traces.
    """
    condition = cast("bool | torch.SymBool", one == other)
    if isinstance(condition, bool) or is_statically_true(condition):
        return bool(condition)
    conditions = _CONDITIONS.get()
    if conditions is None:
        return bool(condition)
    conditions.append(Condition(one, other, reason))
    return True
