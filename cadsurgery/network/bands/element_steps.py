"""The operations of the region on bands of elements: which fine rows each reads, and how it computes those of some.

A band of elements holds whole cells. What a window reads of a band lies in cells further up or down, so it is computed
on the lattice of these rows, at the elements of the band alone.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, fx

from cadsurgery.elements import functional
from cadsurgery.elements.borders import onto_border
from cadsurgery.elements.elements import Elements, rows_on
from cadsurgery.elements.kernel_map import Window
from cadsurgery.elements.lattice import Lattice, Pyramid
from cadsurgery.elements.resizing import Resizing, Scaling, read_at, resize_onto
from cadsurgery.elements.sizes import divide_up
from cadsurgery.elements.whole_image import areas_in_bins
from cadsurgery.network.bands.steps import entries
from cadsurgery.network.bands.walk import SAME, RowsRead, Stream

_MOST_KNOWN = 2  # the cells of so many ranges of rows are known at a time; of others, their kernel maps alone
# Bytes for each fine pixel of these, as measured: elements of each pixel, and what is needed to make kernel maps.
LATTICE = 28 * _MOST_KNOWN
_TAP, _HALO = 4, 12  # bytes of a kernel map for each element: of a tap, and of what is interpolated
Call = Callable[..., Any]  # with the rows of maps by node, and perhaps further options of the operation


@dataclass(frozen=True)
class Grid:
    """The lattices of a map of the region.

    Attributes:
        stage: stage of its lattice.
        size: fine size (height, width).
    """

    stage: int
    size: tuple[int, int]


@dataclass(eq=False)
class Cells:
    """The cells of one picture, in rows.

    Attributes:
        pyramid: the levels of the whole picture.
        side: fine rows that are computed at a time: of the largest cell, or of several.
        counts: what `elements_above` has found of the picture.
        level: the highest that a cell has, where that is known: what is read then ends between cells of it.
    """

    pyramid: Pyramid
    side: int
    counts: dict[Grid, list[int]] = field(default_factory=dict)
    level: int | None = None
    _rows: dict[tuple[int, int], Pyramid] = field(default_factory=dict)
    _parts: dict[tuple[int, int], dict[Any, Lattice]] = field(default_factory=dict)
    _known: list[tuple[int, int]] = field(default_factory=list)

    def lattice(self, grid: Grid, first: int, end: int, within: tuple[int, int] | None = None) -> Lattice:
        """Return the lattice of the fine rows [first, end) of a map, or of the rows [begin, stop) `within` which they
        lie, with these cells alone. Lattices of the same rows share their kernel maps."""
        begin, stop = within or (first, end)
        key = self._key(begin, stop)
        if key not in self._rows:
            self._rows[key], self._parts[key] = self._pyramid(*key), {}
        if key not in self._known:
            self._known.append(key)
            if len(self._known) > _MOST_KNOWN:
                self._forget(self._known.pop(0))
        of_rows, (height, width) = self._rows[key], grid.size
        whole = of_rows.lattice(grid.stage, (min(key[1], height) - begin, width))
        whole.derive("count", lambda: self._count(grid, *key))
        if (begin, stop) == (first, end):
            return whole
        parts, part = self._parts[key], (grid, first, end)
        if part not in parts:
            own = self._key(first, end)
            before, count = self._count(grid, begin, first), self._count(grid, *own)
            parts[part] = whole.of_rows(slice(before, before + count))
            parts[part].derive("count", lambda: count)
        return parts[part]

    def _pyramid(self, first: int, end: int) -> Pyramid:
        """Return the pyramid of fine rows, which begin and end between cells, or at the lower border."""
        return Pyramid(self.pyramid.levels[:, first:end], self.pyramid.geometry)

    def _count(self, grid: Grid, first: int, end: int) -> int:
        above = self.elements_above(grid)
        return above[min(end, grid.size[0])] - above[first]

    def _key(self, first: int, end: int) -> tuple[int, int]:
        return first, -(-end // self.side) * self.side

    def forget_table(self, grid: Grid, within: tuple[int, int], window: Window) -> None:
        """Forget the kernel maps by which a window reads the fine rows `within` of a map."""
        if (of_rows := self._rows.get(self._key(*within))) is not None:
            size = min(self._key(*within)[1], grid.size[0]) - within[0], grid.size[1]
            of_rows.lattice(grid.stage, size).forget_tables(window)

    def _forget(self, key: tuple[int, int]) -> None:
        """Forget the cells of some rows; lattices are made again without what they have read of them."""
        self._rows[key].forget_cells()
        self._parts[key] = {part: replace(lattice) for part, lattice in self._parts[key].items()}

    def drop(self, row: int) -> None:
        """Forget kernel maps of rows before one, which nothing computes any more."""
        for key in [key for key in self._rows if key[1] <= row]:
            del self._rows[key], self._parts[key]
        self._known = [key for key in self._known if key in self._rows]

    def are_equal(self, grid: Grid) -> bool:
        """True if all cells of a map have one level, so that they weigh the same; see `Lattice.weights`."""
        return self.pyramid.lattice(grid.stage, grid.size).uniform_level is not None

    def finest(self, grid: Grid) -> int:
        """Return the side of the smallest cells of a map."""
        geometry = self.pyramid.geometry
        return geometry.sides[geometry.level_at(0, grid.stage)]

    def elements_above(self, grid: Grid) -> list[int]:
        """Return for each fine row how many elements of a map have their anchors above it: height + 1 numbers."""
        if grid not in self.counts and (cell := self.pyramid.lattice(grid.stage, grid.size).uniform_side):
            anchors = torch.arange(1, grid.size[0] + 1).add_(cell - 1).floor_divide_(cell)
            self.counts[grid] = [0, *(anchors * divide_up(grid.size[1], cell)).tolist()]
        if grid not in self.counts:
            (height, width), side = grid.size, self.pyramid.geometry.sides[-1]
            found = [torch.zeros(1, dtype=torch.int64)]
            for first in range(0, height, side):
                rows = self._pyramid(first, first + side)
                found.append(_anchors_on(rows.lattice(grid.stage, (min(side, height - first), width))))
            self.counts[grid] = torch.cat(found).cumsum(0).tolist()
        return self.counts[grid]

    def cell(self, grid: Grid, finer: int = 1) -> int:
        """Return the fine rows in whose multiples a map is read, by what gives so many times as many samples."""
        if self.level is None or finer > 1:  # which reads samples of the network's own grid
            return self.side
        geometry = self.pyramid.geometry
        return geometry.sides[geometry.level_at(self.level, grid.stage)]

    def reached(self, grid: Grid, above: int, below: int, step: int = 1, finer: int = 1) -> RowsRead:
        """Return the rows of whole cells of a map that are read by points so many fine rows above and below an element,
        which lies on a multiple of `step`; points within a cell read the next one, too."""
        side = self.cell(grid, finer)

        def last(row: int) -> int:
            place = row // step * step + below
            more = side if place % side == 0 else 2 * side
            return place // side * side + more - 1

        return RowsRead(lambda row: (row - above) // side * side, last)


def _anchors_on(lattice: Lattice) -> Tensor:
    """Return how many anchors lie on each fine row of a lattice of one image."""
    geometry, found = lattice.geometry, torch.zeros(lattice.size[0], dtype=torch.int64)
    for level in {geometry.level_at(level, lattice.stage) for level in range(geometry.max_level + 1)}:
        side = geometry.sides[level]
        found[::side] += (lattice.levels[0, ::side, ::side] == level).count_nonzero(1)
    return found


def _of_elements(
    cells: Cells,
    node: fx.Node,
    rows: RowsRead,
    grid: Grid,
    find: Callable[[Elements, Lattice, int], Elements],
) -> Stream:
    """An operation whose elements read other cells: found among these, at the elements of a band alone.

    Args:
        cells: of the picture.
        node: the node whose map it reads.
        rows: the fine rows that it reads; those of the result are read, too.
        grid: the lattices of the result.
        find: computes the operation on elements, given the lattice of the result and the first row that is read.
    """

    def compute(found: list[Any], first: int, end: int, begin: int) -> Elements:
        x = found[0]
        stage = cells.lattice(grid, first, end, (begin, max(begin + x.lattice.size[0], end)))
        return Elements(find(x, stage, begin).rows, cells.lattice(grid, first, end))

    both = RowsRead(lambda row: min(rows.first(row), row), lambda row: max(rows.last(row), row))
    return Stream([(node, both)], compute)


def window_of_elements(
    cells: Cells,
    node: fx.Node,
    residual: fx.Node | None,
    window: Window,
    grids: tuple[Grid, Grid, Grid | None],
    call: Call,
) -> Stream:
    """A convolution or pooling, in place of its call: with the window fitted to the whole map.

    Args:
        cells: of the picture.
        node: the node whose map it reads.
        residual: node of a map that is added, if any.
        window: the window, fitted to the whole map.
        grids: of what it reads, of its result and of the residual.
        call: calls the operation with rows of maps by node and further options.
    """
    source, target, added = grids
    reads = _rows_of_window(cells, window, grids)

    def within(first: int, end: int) -> tuple[int, int]:
        """Return the fine rows that are read, those of the result among them."""
        begin, stop = reads.within(first, end, source.size[0])
        return begin, max(stop, end)

    def compute(found: list[Any], first: int, end: int, begin: int) -> Elements:
        rows = {node: found[0]}
        stage = cells.lattice(target, first, end, within(first, end))
        options: dict[str, Any] = {"window": window, "stage": stage}
        if residual is node:  # of all rows that it reads, those of the result are added
            options["joint"] = None
        elif residual is not None:
            # Of an earlier stage, or of another size, the elements that the result has.
            more = found[1]
            more = more.rows if added == target else rows_on(more, cells.lattice(target, first, end))
            rows[residual] = Elements(more, stage)
        return Elements(call(rows, **options).rows, cells.lattice(target, first, end))

    step = Stream([(node, reads)], compute)
    step.reads += [(residual, SAME)] if residual not in (None, node) else []
    if not window.is_pointwise:
        step.table = (*grids[:2], window), _TAP * window.taps + _HALO
        step.forget_table = lambda first, end: cells.forget_table(source, within(first, end), window)
    return step


def _rows_of_window(cells: Cells, window: Window, grids: tuple[Grid, Grid, Grid | None]) -> RowsRead:
    """Return the fine rows of the cells under the taps, those of the result among them."""
    height, side = grids[0].size[0], cells.cell(grids[0], window.finer)
    if window.reads_one_sample:
        if side == cells.cell(grids[0]):
            return SAME
        return RowsRead(lambda row: row // side * side, lambda row: row // side * side + side - 1)
    if window.finer > 1:
        down = [window.output_spacing * (window.padding[0] - tap) for tap in range(window.kernel[0])]
    else:
        down = window.offsets[0]
    finest, finer = cells.finest(grids[1]), window.finer
    rows = cells.reached(grids[0], max(0, -min(down)), max(0, max(down)), finest, finer)
    if window.mode == "zeros":
        return rows
    pads = [
        window.spacing * pad for pad in window.padding[:2]
    ]  # what is reflected lies in front of the border
    top, bottom = max(0, height - 1 - 2 * pads[1]) // side * side, (2 * pads[0] // side + 2) * side - 1
    return rows.with_rows(top, bottom)


def resized_elements(
    cells: Cells,
    node: fx.Node,
    grids: tuple[Grid, Grid],
    spacings: tuple[int, int],
    mode: str,
    align_corners: bool,
) -> Stream:
    """A resize within the region, onto the lattice of an earlier stage."""
    (coarse, fine), (source, target), side = spacings, grids, cells.cell(grids[0])
    before = divide_up(source.size[0], coarse), divide_up(source.size[1], coarse)
    after = divide_up(target.size[0], fine), divide_up(target.size[1], fine)
    is_aligned = align_corners and mode != "nearest"
    # A sample reads its neighbours; a place moves by less than a sample for each cell, and by the rest of a size.
    ratio = before[0] / after[0]

    def place(row: int) -> float:
        number = row // fine
        if mode == "nearest" or align_corners:
            return number * ((before[0] - 1) / max(after[0] - 1, 1) if is_aligned else ratio)
        return (number + 0.5) * ratio - 0.5

    def last(row: int) -> int:
        reached = (int((place(row) + 1e-6) // 1) + 1) * coarse
        return (reached // side + (1 if reached % side == 0 else 2)) * side - 1

    rows = RowsRead(lambda row: int((place(row) - 1e-6) // 1) * coarse // side * side, last)
    stretch = coarse / fine * (place(fine) - place(0))
    if not cells.pyramid.geometry.floors:
        # Between cells, at most a cell before and behind the place of an element, and its own cell.
        stretch, bottom = before[0] * coarse / (after[0] * fine), (source.size[0] - 1) // side * side
        if align_corners:
            stretch = (before[0] - 1) * coarse / (max(after[0] - 1, 1) * fine)
        rows = RowsRead(
            lambda row: min(row // side * side, int((row * stretch - 1.5 * side) // side) * side, bottom),
            lambda row: max(row // side, int(((row + side / 2) * stretch + side) // side)) * side + side - 1,
        )

    def find(x: Elements, stage: Lattice, begin: int) -> Elements:
        return resize_onto(
            x, stage, Resizing(spacings, before, after, mode, align_corners), begin, source.size
        )

    step = _of_elements(cells, node, rows, target, find)
    step.places = lambda first, end: torch.arange(first, end, dtype=torch.float64) * stretch
    return step


def border_of_elements(
    cells: Cells, node: fx.Node, grids: tuple[Grid, Grid], spacing: int, value: float | None
) -> Stream:
    """A map of the region that is cut or padded at its lower and right border; `value` as of `functional.pad`."""
    source, side = grids[0], cells.side
    last = max(source.size[0] - spacing, 0) // side * side  # the cells of the last samples
    if source == grids[1]:
        return Stream([(node, SAME)], lambda rows, *_: rows[0])
    own = RowsRead(lambda row: min(row // side * side, last), lambda row: row // side * side + side - 1)
    return _of_elements(cells, node, own, grids[1], lambda x, stage, _: onto_border(x, stage, spacing, value))


def of_neighbours(cells: Cells, node: fx.Node, grids: tuple[Grid, Grid], call: Call) -> Stream:
    """An operation whose elements read no further than the next cells: it is called on these, too."""
    grid = grids[1]

    def compute(rows: list[Any], first: int, end: int, begin: int) -> Elements:
        found: Elements = call({node: rows[0]})
        above, lattice = cells.elements_above(grid), cells.lattice(grid, first, end)
        return Elements(found.rows.narrow(0, above[first] - above[begin], lattice.count), lattice)

    side = cells.side
    return Stream([(node, cells.reached(grids[0], side, side, finer=side))], compute)


def entering(cells: Cells, node: fx.Node, grid: Grid, layout: str) -> Stream:
    """The dense map at the beginning of the region, as elements."""

    def compute(rows: list[Any], first: int, end: int, begin: int) -> Elements:
        return functional.to_elements(rows[0], cells.lattice(grid, first, end), layout)

    return Stream([(node, SAME)], compute)


def dense_map(cells: Cells, node: fx.Node, grid: Grid, spacing: int, call: Call, axis: int) -> Stream:
    """The dense map at the exit of the region: rows of the network's own grid, along an axis, read from elements."""

    def compute(rows: list[Any], first: int, end: int, begin: int) -> Tensor:
        dense: Tensor = call({node: rows[0]})
        return dense.narrow(axis, first - begin // spacing, end - first)

    reached = cells.reached(grid, 0, 0)
    rows = RowsRead(lambda row: reached.first(row * spacing), lambda row: reached.last(row * spacing))
    return Stream([(node, rows)], compute)


def resized_at_exit(
    cells: Cells, node: fx.Node, grid: Grid, spacing: int, scaling: Scaling, dtype: torch.dtype
) -> Stream:
    """A resize at the exit of the region, see `functional.resize_to_dense`."""
    places, across = scaling.places(grid.size, spacing, dtype, torch.device("cpu"))
    (low, high), reached = entries(places, grid.size[0]), cells.reached(grid, 0, 0)

    def compute(rows: list[Any], first: int, end: int, begin: int) -> Tensor:
        x, down = rows[0], places[first:end] - begin
        if scaling.mode != "bilinear":
            cell = x.lattice.index.view(x.lattice.size).index_select(0, down).index_select(1, across)
            return x.rows.index_select(0, cell.flatten()).view(1, *cell.shape, -1).permute(0, 3, 1, 2)
        return read_at(functional.to_dense(x, 1), [down, across])

    rows = RowsRead(lambda row: reached.first(low(row)), lambda row: reached.last(high(row)))
    step = Stream([(node, rows)], compute)
    step.places = lambda first, end: places[first:end].double()
    return step


def bins_of_elements(
    x: Elements,
    first: int,
    size: tuple[int, int],
    bins: tuple[int, int],
    is_largest: bool,
    spacing: int,
    are_equal: bool,
) -> list[Tensor]:
    """Return what `bins_of_rows` does for the elements of a band from a fine row on, see `functional.pool_to_bins`."""
    _, y, column = x.lattice.coordinates
    shares = areas_in_bins(x.lattice, (y + first, column), size, bins, spacing, are_equal)
    if is_largest:
        inside = (shares > 0).unsqueeze(2).unbind(1)
        found = torch.stack([torch.where(own, x.rows, -torch.inf).amax(0) for own in inside], 1)
        return [found.view(1, -1, *bins)]
    return [(x.rows.double().T @ shares).view(1, -1, *bins), shares.sum(0).view(bins)]
