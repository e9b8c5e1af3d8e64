"""Works on level maps: the cells of a lattice, and where the taps of a window are read."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from torch import Tensor

from cadsurgery.elements.backends.choose import Work

if TYPE_CHECKING:
    from cadsurgery.elements.lattice import Lattice


@dataclass(frozen=True, eq=False)
class CellSearch(Work):
    """The cells of a lattice: their anchors (N,) int64 as pixel numbers, ascending, and 0 behind the last where only
    bounds are known; the row of the cell that holds each pixel (B*H*W,) int32; the number of cells of each image (B,).

    Attributes:
        rows: the levels (B, H, W) of the lattice.
    """

    lattice: Lattice
    task: ClassVar[str] = "find_cells"

    @property
    def is_counted(self) -> bool:
        """True if all cells are there and are counted; otherwise only bounds are known, or it is a part."""
        return self.lattice.part is None and self.lattice.capacity is None

    @property
    def is_bounded(self) -> bool:
        """True if all cells are there, of whose number bounds are known."""
        return self.lattice.part is None and self.lattice.capacity is not None

    @property
    def case(self) -> tuple[Hashable, ...]:
        """The device, and what is known of the number of cells."""
        return *super().case, self.is_counted, self.is_bounded


@dataclass(frozen=True, eq=False)
class TapSearch(Work):
    """The reading of points, or of taps so many fine pixels down and across from the anchors of a lattice, see
    `kernel_map`.

    Attributes:
        rows: the levels (B, H, W) of the source.
        source: the lattice that is read.
        target: the lattice of the anchors; None for points.
        points: numbers of fine pixels of the source, int64, of any shape; None for taps.
        steps: fine pixels from an anchor to its taps, down and across.
        has_outside: taps may lie outside the map.
    """

    source: Lattice
    target: Lattice | None = None
    points: Tensor | None = None
    steps: tuple[list[int], list[int]] = ([0], [0])
    has_outside: bool = False
    task: ClassVar[str] = "find_taps"

    @property
    def pixels(self) -> Tensor:
        """(n,) int64: the pixels that steps begin at."""
        if self.points is not None:
            return self.points.flatten()
        assert self.target is not None
        return self.target.anchors

    @property
    def size(self) -> tuple[int, int]:
        """Fine (height, width) of the maps in which these pixels are numbered."""
        return self.source.size if self.target is None else self.target.size

    def shaped(self, table: Tensor) -> Tensor:
        """Return a table (n, taps), or of points one of their shape."""
        return table if self.points is None else table.view(self.points.shape)

    @property
    def is_counted(self) -> bool:
        """True if the numbers of cells are known, not bounded."""
        return self.source.capacity is None and (self.target is None or self.target.capacity is None)

    @property
    def case(self) -> tuple[Hashable, ...]:
        """The device, and what is known of the numbers of cells."""
        return *super().case, self.is_counted, self.source.capacity is None
