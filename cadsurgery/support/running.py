"""For whom operations run now: their caller, a graph that torch traces, another engine, or a tool that sees each."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import NamedTuple

import torch

from cadsurgery.support import torch_internals


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


class Running:
    """For whom operations run now; whatever depends on it asks `running`."""

    @property
    def in_graph(self) -> bool:
        """True while torch traces a graph, to compile or to export it."""
        return torch.compiler.is_compiling()

    @property
    def is_exported(self) -> bool:
        """True inside torch.export."""
        return torch_internals.is_exporting()

    @property
    def is_compiled(self) -> bool:
        """True inside torch.compile."""
        return torch.compiler.is_compiling() and not torch_internals.is_exporting()

    @property
    def target(self) -> Target | None:
        """What the graph that is traced is for; None for torch."""
        return _TARGET.get()

    @property
    def is_recorded(self) -> bool:
        """True if a mode of torch's dispatcher sees each operation, to count or record it."""
        return torch_internals.current_dispatch_mode() is not None

    @property
    def is_observed(self) -> bool:
        """True if torch counts, records, compiles or transforms (`torch.func`) the called operations; it would not see
        compiled kernels."""
        return self.in_graph or self.is_recorded or torch_internals.interpreters() is not None

    @property
    def is_profiled(self) -> bool:
        """True inside torch's profiler."""
        return torch_internals.is_profiled()


running = Running()


@contextmanager
def portable(target: Target | None = None) -> Iterator[None]:
    """Enter a context in which graphs are traced for engines other than torch."""
    token = _TARGET.set(target or Target())
    try:
        yield
    finally:
        _TARGET.reset(token)
