"""Which rows of each map are computed in which band, and the memory that this takes: arithmetic on sizes alone.

A band of the results asks each map for the rows that it lacks. They are computed in the order of the graph, as soon as
the maps that they read have the rows for it, and a map keeps the rows that a later band reads. So nothing is computed
twice, and what is kept follows from the width of the picture and the reach of the windows, not from its height.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any, NamedTuple


class RowsRead(NamedTuple):
    """The rows of a map that rows of a result read, as two functions of the number of a row, which never fall. Rows
    outside the map may be among them."""

    first: Callable[[int], int]
    last: Callable[[int], int]

    def within(self, first: int, end: int, height: int) -> tuple[int, int]:
        """Return the rows [first, end) of a map of a height that rows [first, end) of the result read."""
        return max(self.first(first), 0), min(self.last(end - 1) + 1, height)

    def with_rows(self, most: int, least: int) -> RowsRead:
        """Return the same with a first row of at most `most` and a last row of at least `least`, where windows that lie
        in the padding read something. Rows above the result still read above the map: they tell how far ahead results
        read, see `walk`."""
        return RowsRead(
            lambda row: min(self.first(row), most),
            lambda row: max(self.last(row), least) if row >= 0 else self.last(row),
        )


def _same(row: int) -> int:
    return row


SAME = RowsRead(_same, _same)


@dataclass(eq=False)
class BandMap:
    """A map that is computed in bands.

    Attributes:
        name: of its node, for messages.
        height: rows.
        row: bytes of a row, or of an element.
        reads: the maps that it is computed from, by number, and the rows of them that a row reads.
        step: rows are computed in multiples of so many, and elements in blocks of exactly so many.
        copied: numbers of the maps whose rows are copied while it is computed, unless they lie together; see `joined`.
        elements: how many elements lie above each row, where rows have different numbers of them.
        lattice: bytes of lattices, for each row that is computed or read for it.
        table: what its kernel map depends on, and the bytes of that for each element; see `is_table_kept`.
    """

    name: str
    height: int
    row: int
    reads: list[tuple[int, RowsRead]] = field(default_factory=list)
    step: int = 1
    copied: list[int] = field(default_factory=list)
    elements: Sequence[float] | None = None
    lattice: int = 0
    table: tuple[Any, int] | None = None

    def taken(self, first: int, end: int) -> float:
        """Return the bytes of rows [first, end)."""
        if self.elements is None:
            return (end - first) * self.row
        return (self.elements[end] - self.elements[first]) * self.row


class Task(NamedTuple):
    """Rows [first, end) of a map that are computed, and what is no longer needed then.

    Attributes:
        number: number of the map.
        first, end: the rows.
        drops: maps whose rows before another one are read by nothing that follows, as pairs of number and row.
    """

    number: int
    first: int
    end: int
    drops: tuple[tuple[int, int], ...]


@dataclass
class Pass:
    """A walk down the picture.

    Attributes:
        bands: for each band of rows, what is computed, in order.
        tables: for each band, the bytes of the kernel maps that are kept.
        known: maps that are there as a whole from the beginning.
        peak: the most bytes of maps at once, those that it begins with included.
        largest: the maps that hold the most at that moment, by number.
    """

    bands: list[list[Task]]
    tables: list[float] = field(default_factory=list)
    known: Collection[int] = ()
    peak: int = 0
    largest: dict[int, float] = field(default_factory=dict)

    def measured(self, maps: Sequence[BandMap], spare: float) -> Pass:
        """Return the walk with its peak, where maps that are `joined` have so much more memory than their elements
        take."""
        meter = _Meter(maps, self.known, spare)
        for tasks, meter.tables in zip(self.bands, self.tables, strict=True):
            for task in tasks:
                meter.carry_out(task)
        return replace(self, peak=int(meter.peak), largest=meter.largest)


SPARE = 4 / 3  # maps that are `joined` have at least so much more memory than their elements take
TOO_MUCH = 1.125  # times that, before their memory is made smaller
_SOON = 3  # rows of cells


class _Meter:
    """Counts the bytes of maps while tasks are carried out."""

    def __init__(self, maps: Sequence[BandMap], known: Collection[int], spare: float) -> None:
        self.spare = spare
        self.maps, self.total, self.peak, self.largest = maps, 0.0, 0.0, dict[int, float]()
        self.tables = 0.0
        self.joined = joined(maps)
        # End and bytes of what each task computed, by map.
        self.held: dict[int, list[tuple[int, float]]] = defaultdict(list)
        self.bytes: dict[int, float] = defaultdict(float)
        for number in known:
            self._hold(number, 0, maps[number].height)

    def _hold(self, number: int, first: int, end: int) -> None:
        taken = self.maps[number].taken(first, end)
        self.held[number].append((end, taken))
        if number not in self.joined:
            self._set(number, self.bytes[number] + taken)
        elif (live := sum(taken for _, taken in self.held[number])) > self.bytes[number]:
            self._set(number, self.spare * live)

    def _set(self, number: int, size: float) -> None:
        self.total += size - self.bytes[number]
        self.bytes[number] = size

    def _drop(self, number: int, row: int) -> None:
        self.held[number] = parts = [part for part in self.held[number] if part[0] > row]
        sizes = [taken for _, taken in parts]
        if number not in self.joined or not parts:
            self._set(number, sum(sizes))
        elif has_too_much(self.bytes[number], sizes, self.spare):
            self._set(number, self.spare * (sum(sizes) + max(sizes)))

    def carry_out(self, task: Task) -> None:
        """Count a task. What another one computed is freed as a whole."""
        self._hold(task.number, task.first, task.end)
        one, copies, top, bottom = self.maps[task.number], 0.0, task.first, task.end
        for source, rows in one.reads:
            if source in one.copied:
                first, end = rows.within(task.first, task.end, self.maps[source].height)
                if source not in self.joined:
                    copies += self.maps[source].taken(min(first, end), end)
                top, bottom = min(top, first), max(bottom, end)
        copies += one.lattice * (bottom - top) + self.tables
        if self.total + copies > self.peak:
            self.peak = self.total + copies
            self.largest = {**self.bytes, -1: copies}
        for number, row in task.drops:
            self._drop(number, row)


def walk(
    maps: Sequence[BandMap],
    ends: Collection[int],
    band: int,
    known: Collection[int],
    kept: Collection[int] = (),
    start: int = 0,
) -> Pass:
    """Plan a walk down a picture.

    Args:
        maps: the maps in the order of the graph.
        ends: the maps that are asked for.
        band: rows of the tallest map in a band.
        known: maps that are there as a whole from the beginning.
        kept: maps that stay as a whole once they are computed.
        start: the first row of those asked for; of the others those are left out that nothing reads then.

    Returns:
        The walk, measured with the least spare memory.
    """
    used = used_by(maps, ends, known)
    if not used:
        return Pass([])
    readers, leaving = defaultdict[int, list[tuple[int, RowsRead]]](list), defaultdict[int, list[int]](list)
    tables = defaultdict[tuple[Any, int], list[int]](list)  # the maps that have a kernel map in common
    for number in used:
        for source, rows in maps[number].reads:
            readers[source].append((number, rows))
        if (table := maps[number].table) is not None:
            tables[table].append(number)
    for number in used:
        leaving[max((reader for reader, _ in readers[number]), default=number)].append(number)
    whole, done = max(maps[number].height for number in (*used, *ends)), dict.fromkeys((*used, *ends), start)
    for number in reversed(used) if start else ():
        first = [window.first(done[reader]) for reader, window in readers[number]]
        first += [start] if number in ends else []
        done[number] = max(min(first, default=0), 0) // maps[number].step * maps[number].step

    def asked_by(bottom: int) -> dict[int, int]:
        """How many rows of each map must be there for those of a band that ends at a row of the tallest map."""
        asked = {end: -(-min(bottom, whole) * maps[end].height // whole) for end in ends}
        for number in reversed(used):
            step, rows = maps[number].step, asked.get(number, -maps[number].height)
            for reader, window in readers[number]:
                rows = max(rows, window.last(asked[reader] - 1) + 1)
            asked[number] = min(-(-rows // step) * step, maps[number].height)
        return asked

    def still_read(number: int, need: Mapping[int, int]) -> int:
        """The first row of a map that is read after a band."""
        unfinished = [
            (reader, window) for reader, window in readers[number] if need[reader] < maps[reader].height
        ]
        read = [max(0, window.first(need[reader])) for reader, window in unfinished]
        return 0 if number in kept else min([need[number], *read])

    one = Pass([], known=known)
    # The first bands lie above the picture by as much as results read further down, so that no band has more rows to
    # compute than another one.
    above = max(rows * whole // maps[number].height for number, rows in asked_by(0).items())
    for bottom in range(band - -(-max(above, 0) // band) * band, whole + band, band):
        need = {number: max(rows, done[number]) for number, rows in asked_by(bottom).items()}
        tasks = list[Task]()
        for number in used:
            drops = tuple((left, still_read(left, need)) for left in leaving[number])
            step = max(maps[number].step if maps[number].elements is not None else maps[number].height, 1)
            starts = range(done[number], need[number], step)
            tasks += [Task(number, at, min(at + step, need[number]), ()) for at in starts]
            if tasks:
                tasks[-1] = tasks[-1]._replace(drops=(*tasks[-1].drops, *drops))
        if tasks:
            one.bands.append(tasks)
            one.tables.append(sum(size * _soon_read(maps, same, need) for (_, size), same in tables.items()))
        done = need
    return one.measured(maps, SPARE)


def joined(maps: Sequence[BandMap]) -> set[int]:
    """Return the maps of elements of which every reader reads rows of cells together; the number of each."""
    apart = {source for one in maps for source, _ in one.reads if source not in one.copied}
    return {source for one in maps for source in one.copied if maps[source].elements is not None} - apart


def has_too_much(memory: float, sizes: Sequence[float], spare: float) -> bool:
    """True if the memory of a map that is `joined` shall become smaller: its parts take `sizes` of it, and one more as
    large as the largest of them is to have room."""
    return memory > TOO_MUCH * spare * (sum(sizes) + max(sizes))


def is_table_kept(maps: Sequence[BandMap], number: int, row: int, done: Mapping[int, int]) -> bool:
    """True if a map that is to be computed soon has the kernel map of the rows before `row` of another one.

    Args:
        maps: all maps.
        number: of the other one.
        row: up to which that is computed.
        done: up to which row others are.
    """
    own = maps[number].table
    soon = row - _SOON * maps[number].step
    return any(maps[one].table == own and soon <= at < row for one, at in done.items() if one != number)


def _soon_read(maps: Sequence[BandMap], numbers: Sequence[int], done: Mapping[int, int]) -> float:
    """Return how many elements of a kernel map are kept for maps that have it in common and are computed soon."""
    rows, elements = sorted(done[one] for one in numbers), maps[numbers[0]].elements
    assert elements is not None
    reach = _SOON * maps[numbers[0]].step
    return sum(elements[b] - elements[a] for a, b in pairwise(rows) if b - a <= reach)


def used_by(maps: Sequence[BandMap], ends: Collection[int], known: Collection[int]) -> list[int]:
    """Return the maps that have to be computed for some, in order."""
    used, left = set[int](), list(ends)
    while left:
        number = left.pop()
        if number not in used and number not in known:
            used.add(number)
            left += [source for source, _ in maps[number].reads]
    return sorted(used)
