"""What a graph is traced for: torch, or other engines, perhaps with this package's kernels, or in 8 bits."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import NamedTuple


class Target(NamedTuple):
    """What a graph for other engines is for.

    Attributes:
        has_kernels: engines have this package's kernels, and convolutions are one operation.
        in_8_bits: the file will be quantised.
        has_8_bit_depthwise: the engine's depthwise convolutions in 8 bits are faster than products by tap in float32.
    """

    has_kernels: bool = False
    in_8_bits: bool = False
    has_8_bit_depthwise: bool = False


_TARGET: ContextVar[Target | None] = ContextVar(
    "what the graph is for, while a graph for another engine is traced", default=None
)


target_of_graph = _TARGET.get  # what the graph that is traced is for; None for torch


@contextmanager
def portable(target: Target | None = None) -> Iterator[None]:
    """Enter a context in which graphs are traced for engines other than torch."""
    token = _TARGET.set(target or Target())
    try:
        yield
    finally:
        _TARGET.reset(token)
