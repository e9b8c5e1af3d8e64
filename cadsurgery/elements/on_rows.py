"""Operations of torch that act on each position alone, as targets of nodes: they act on the rows of elements."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor

from cadsurgery.elements.backends.works import select_rows
from cadsurgery.elements.elements import Elements, SmallMap, common_lattice, rows_on
from cadsurgery.elements.lattice import Lattice
from cadsurgery.elements.operations import Operation


def keep(rows: Tensor) -> Tensor:
    """Return rows unchanged; on another lattice those that it still has."""
    return rows


@dataclass(frozen=True)
class OnRows:
    """Applies an operation to rows: `OnRows(torch.add)(x, y, stage=1)` are elements of stage 1.

    A node states `stage` only if the lattice of its result is not that of its only operand.

    Attributes:
        operation: a function, the name of a method, or None: the first argument is a module, which is called.
        layout: axes of the maps to which tensors are broadcast, such as a vector per image; "" to pass tensors on.
        joint: see `check_joint`.
    """

    operation: Callable[..., Any] | str | None
    layout: str = ""
    joint: tuple[int, str] | None = None

    @property
    def __name__(self) -> str:
        """Name nodes, and the function in generated code."""
        name = getattr(self.operation, "__name__", self.operation or "module")
        return f"{str(name).strip('_')}_of_rows"

    @property
    def stated(self) -> Operation:
        """The facts about the operation, see `operation_of`."""
        return Operation(self, "element", macs=None)

    def __call__(self, *args: Any, stage: int | Lattice | None = None, **options: Any) -> Elements:
        """Compute elements on the given lattice, or of the given stage."""
        values = _elements_in((*args, *options.values()))
        lattice = next(values).lattice if stage is None else common_lattice(stage, *values, joint=self.joint)
        first, *others = (self._rows_of(part, lattice) for part in args)
        if options:  # rows have one memory layout, whatever that of a map would be
            named = {name: part for name, part in options.items() if name != "memory_format"}
            options = {name: self._rows_of(part, lattice) for name, part in named.items()}
        call = getattr(first, self.operation) if isinstance(self.operation, str) else self.operation
        if call is None:
            return Elements(first(*others, **options), lattice)
        operands = others if isinstance(self.operation, str) else (first, *others)
        return Elements(call(*operands, **options), lattice)

    def _rows_of(self, value: Any, lattice: Lattice) -> Any:
        """Return the rows of an operand."""
        if isinstance(value, Elements):
            return select_rows(value.rows, value.lattice, lattice)
        if isinstance(value, SmallMap) or (self.layout and isinstance(value, Tensor)):
            return rows_on(value, lattice, self.layout)
        if isinstance(value, (tuple, list)):
            return type(value)(map(partial(self._rows_of, lattice=lattice), value))
        return value


def _elements_in(parts: Iterable[Any]) -> Iterator[Elements]:
    for part in parts:
        if isinstance(part, Elements):
            yield part
        elif isinstance(part, (tuple, list)):
            yield from _elements_in(part)
