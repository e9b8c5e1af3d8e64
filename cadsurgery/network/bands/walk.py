"""A walk down the picture: which rows of each map are computed in which band.

A band of the results asks each map for the rows that it lacks. They are computed in the order of the graph, as soon as
the maps that they read have the rows for it, and a map keeps the rows that a later band reads. So nothing is computed
twice, and what is kept follows from the width of the picture and the reach of the windows, not from its height.

Planning and running are the same walk: its storage counts the bytes of rows (`Bytes`), or computes and holds them.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any, NamedTuple, Protocol

from torch import Tensor, fx

_FAR = 2**10 * 3**2 * 5 * 7  # rows: a multiple of strides, and of the sides of cells


class RowsRead(NamedTuple):
    """The rows of a map that rows of a result read, as two functions of the number of a row, which never fall. Rows
    outside the map may be among them."""

    first: Callable[[int], int]
    last: Callable[[int], int]

    def within(self, first: int, end: int, height: int) -> tuple[int, int]:
        """Return the rows [first, end) of a map of a height that rows [first, end) of the result read."""
        return max(self.first(first), 0), min(self.last(end - 1) + 1, height)

    @property
    def rate(self) -> Fraction:
        """How many rows further down the map is read for each row of the result, far above it, where nothing ends."""
        return Fraction(self.first(-_FAR) - self.first(-2 * _FAR), _FAR)

    def with_rows(self, most: int, least: int) -> RowsRead:
        """Return the same with a first row of at most `most` and a last row of at least `least`, where windows that lie
        in the padding read something. Rows above the result still read above the map: they tell how far ahead results
        read, see `Walk`."""
        return RowsRead(
            lambda row: min(self.first(row), most),
            lambda row: max(self.last(row), least) if row >= 0 else self.last(row),
        )


def _same(row: int) -> int:
    return row


SAME = RowsRead(_same, _same)


@dataclass(eq=False)
class Stream:
    """A map that is computed in bands.

    Attributes:
        reads: the nodes whose maps, or values of the whole image, it reads, and which rows of them.
        compute: returns rows [first, end) of the map from the rows of each of these, given `first`, `end` and the
            number of the first row that is read of the first map.
        table: what its kernel map depends on, and the bytes of that for each element; None if it has none.
        forget_table: frees the kernel map of rows [first, end).
        places: where rows [first, end) of a resized map lie on the map that it reads, as its sizes say.
        name: of its node, for messages.
        height: rows.
        row: bytes of a row, or of an element.
        chunk: rows are computed in multiples of so many, and elements in blocks of exactly so many.
        elements: how many elements lie above each row, where rows have different numbers of them.
        lattice: bytes of lattices, for each row that is computed or read for it.
        sources: the streams among what it reads, and which rows of them.
    """

    reads: list[tuple[fx.Node, RowsRead]] = field(default_factory=list)
    compute: Callable[[list[Any], int, int, int], Any] | None = None
    table: tuple[Any, int] | None = None
    forget_table: Callable[[int, int], None] | None = None
    places: Callable[[int, int], Tensor] | None = None
    name: str = ""
    height: int = 0
    row: int = 0
    chunk: int = 1
    elements: Sequence[float] | None = None
    lattice: int = 0
    sources: list[tuple[Stream, RowsRead]] = field(default_factory=list)

    def count(self, first: int, end: int) -> float:
        """Return the number of rows, or elements, in rows [first, end)."""
        return end - first if self.elements is None else self.elements[end] - self.elements[first]


class Storage(Protocol):
    """Where the rows of a walk are."""

    def compute(self, one: Stream, first: int, end: int) -> Any:
        """Compute and hold rows [first, end) of a map; return them."""

    def drop(self, one: Stream, row: int) -> None:
        """Free what was computed of a map before a row; what reaches beyond it stays."""

    def forget_table(self, one: Stream, first: int, end: int) -> None:
        """Free the kernel map of rows [first, end) of a map."""

    def forget_cells(self, row: int) -> None:
        """Free what is known of cells before a row."""


_SOON = 3  # rows of cells


class Walk:
    """A walk down the picture.

    Attributes:
        streams: the maps in the order of the graph.
        known: those that are there as a whole from the beginning.
        used: those that are computed, in order.
    """

    def __init__(
        self,
        streams: Sequence[Stream],
        ends: Collection[Stream],
        band: int,
        known: Collection[Stream],
        kept: Collection[Stream] = (),
        rows: Mapping[Stream, tuple[int, int]] | None = None,
    ) -> None:
        """Take the maps in graph order, those that are asked for, rows of the tallest map in a band, the maps
        that are there as a whole from the beginning, those that stay as a whole once they are computed, and the rows
        [first, end) of those asked for, if not all; of the others those are left out that nothing reads then."""
        self._rows = rows or {}
        self.streams, self.band, self.known, self._ends, self._kept = streams, band, known, ends, kept
        self.used = used_by(streams, ends, known)
        self._readers = defaultdict[Stream, list[tuple[Stream, RowsRead]]](list)
        self._leaving = defaultdict[Stream, list[Stream]](list)
        for one in self.used:
            for source, read in one.sources:
                self._readers[source].append((one, read))
        for one in self.used:
            self._leaving[self._readers[one][-1][0] if self._readers[one] else one].append(one)
        self._whole = max((one.height for one in self.used), default=0)
        self._begin = dict.fromkeys(self.used, 0)
        for one in reversed(self.used) if self._rows else ():
            first = [window.first(self._begin[reader]) for reader, window in self._readers[one]]
            first += [self._rows.get(one, (0, 0))[0]] if one in ends else []
            self._begin[one] = max(min(first, default=0), 0) // one.chunk * one.chunk

    def carry_out(self, storage: Storage) -> Iterator[tuple[Stream, int, Any]]:
        """Yield what is computed: the map, the number of the first row, and what the storage returns for the rows."""
        done = dict(self._begin)
        cells = {one: row for one, row in done.items() if one.elements is not None}
        # The first bands lie above the picture by as much as results read further down, so that no band has more rows
        # to compute than another one.
        above = max((rows * self._whole // one.height for one, rows in self._asked(0).items()), default=0)
        for bottom in range(
            self.band - -(-max(above, 0) // self.band) * self.band, self._whole + self.band, self.band
        ):
            need = {one: max(rows, done[one]) for one, rows in self._asked(bottom).items()}
            for one in self.used:
                chunk = one.chunk if one.elements is not None else max(one.height, 1)
                for first in range(done[one], need[one], chunk):
                    end = min(first + chunk, need[one])
                    yield one, first, storage.compute(one, first, end)
                    if one in cells:
                        cells[one] = end
                        if one.table is not None and not _is_table_kept(one, end, cells):
                            storage.forget_table(one, first, end)
                for left in self._leaving[one]:
                    storage.drop(left, self._still_read(left, need))
            if cells:
                storage.forget_cells(min((row for one, row in cells.items() if row < one.height), default=0))
            done = need

    def measured(self) -> Bytes:
        """Return what the walk takes."""
        storage = Bytes(self)
        for _ in self.carry_out(storage):
            pass
        return storage

    def _asked(self, bottom: int) -> dict[Stream, int]:
        """How many rows of each map must be there for those of a band that ends at a row of the tallest map."""
        asked = dict[Stream, int]()
        for one in reversed(self.used):
            rows = -one.height
            if one in self._ends:
                rows = -(-min(bottom, self._whole) * one.height // self._whole)
                rows = min(rows, self._rows.get(one, (0, rows))[1])
            for reader, window in self._readers[one]:
                rows = max(rows, window.last(asked[reader] - 1) + 1)
            asked[one] = min(-(-rows // one.chunk) * one.chunk, one.height)
        return asked

    def _still_read(self, one: Stream, need: Mapping[Stream, int]) -> int:
        """The first row of a map that is read after a band."""
        if one in self._kept:
            return 0
        read = (
            max(0, window.first(need[reader]))
            for reader, window in self._readers[one]
            if need[reader] < reader.height
        )
        return min((need[one], *read))


class Bytes:
    """Counts the bytes of the rows of a walk.

    Attributes:
        peak: the most bytes of maps at once, those that it begins with included.
        largest: the maps that hold the most at that moment, by name, with what copies of rows take.
        computed: rows that are computed, each times its bytes.
    """

    def __init__(self, walk: Walk) -> None:
        """Take a walk."""
        self.peak, self.largest, self.computed = 0.0, dict[str, float](), 0
        self._total = 0.0
        self._tables = dict[tuple[Any, int, int], float]()
        # End and bytes of what was computed at once, and the bytes that are held, by map.
        self._parts: dict[Stream, list[tuple[int, float]]] = defaultdict(list)
        self._bytes: dict[Stream, float] = defaultdict(float)
        for one in walk.known:
            self._hold(one, 0, one.height)

    def compute(self, one: Stream, first: int, end: int) -> None:
        """Count rows that are computed and held, and what is copied meanwhile."""
        self._hold(one, first, end)
        self.computed += (end - first) * one.row
        if one.table is not None and (key := (one.table[0], first, end)) not in self._tables:
            self._tables[key] = one.count(first, end) * one.table[1]
            self._total += self._tables[key]
        copies, top, bottom = 0.0, first, end
        for source, rows in one.sources:
            if rows is not SAME:  # the parts that they lie in are copied while it runs
                begin, stop = rows.within(first, end, source.height)
                copies += source.count(min(begin, stop), stop) * source.row
                top, bottom = min(top, begin), max(bottom, stop)
        copies += one.lattice * (bottom - top)
        if self._total + copies > self.peak:
            self.peak = self._total + copies
            self.largest = {held.name: size for held, size in self._bytes.items()} | {
                "copies of rows": copies
            }

    def drop(self, one: Stream, row: int) -> None:
        """Count rows that are freed. What was computed at once is freed as a whole."""
        self._parts[one] = [part for part in self._parts[one] if part[0] > row]
        self._set(one, sum(taken for _, taken in self._parts[one]))

    def forget_table(self, one: Stream, first: int, end: int) -> None:
        """Count a kernel map that is freed."""
        if one.table is not None:
            self._total -= self._tables.pop((one.table[0], first, end), 0.0)

    def forget_cells(self, row: int) -> None:
        """Count the kernel maps before a row, which are freed."""
        for of_rows in [of_rows for of_rows in self._tables if of_rows[2] <= row]:
            self._total -= self._tables.pop(of_rows)

    def _hold(self, one: Stream, first: int, end: int) -> None:
        taken = one.count(first, end) * one.row
        self._parts[one].append((end, taken))
        self._set(one, self._bytes[one] + taken)

    def _set(self, one: Stream, size: float) -> None:
        self._total += size - self._bytes[one]
        self._bytes[one] = size


def _is_table_kept(one: Stream, row: int, done: Mapping[Stream, int]) -> bool:
    """True if a map that is to be computed soon has the kernel map of the rows before `row` of another one; `done` says
    up to which row each is computed."""
    soon = row - _SOON * one.chunk
    return any(
        other.table == one.table and soon <= at < row for other, at in done.items() if other is not one
    )


def used_by(streams: Sequence[Stream], ends: Collection[Stream], known: Collection[Stream]) -> list[Stream]:
    """Return the maps that have to be computed for some, in order."""
    used, left = set[Stream](), list(ends)
    while left:
        one = left.pop()
        if one not in used and one not in known:
            used.add(one)
            left += [source for source, _ in one.sources]
    return [one for one in streams if one in used]
