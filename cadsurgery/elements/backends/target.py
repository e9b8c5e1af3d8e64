"""What a graph is traced for: torch, or other engines, perhaps with this package's kernels."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from enum import Enum


class Kernels(Enum):
    """Which convolutions are one operation in graphs for other engines."""

    NONE, GROUPED, ALL = range(3)


_KERNELS: ContextVar[Kernels | None] = ContextVar(
    "which convolutions are one operation, while a graph for another engine is traced", default=None
)


def kernels_of_graph() -> Kernels | None:
    """Return which convolutions are one operation in the graph that is traced for another engine; None for torch."""
    return _KERNELS.get()


@contextmanager
def portable(kernels: Kernels = Kernels.NONE) -> Iterator[None]:
    """Enter a context in which graphs are traced for engines other than torch."""
    token = _KERNELS.set(kernels)
    try:
        yield
    finally:
        _KERNELS.reset(token)
