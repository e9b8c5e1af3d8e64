"""Run a network on a picture in bands of rows, within a memory that is given."""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from itertools import product
from operator import methodcaller
from threading import RLock
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.node import map_arg

from cadsurgery.elements.axes import fast_layout
from cadsurgery.elements.elements import Elements, SmallMap
from cadsurgery.elements.lattice import Lattice, Pyramid
from cadsurgery.masks.masking import Masking
from cadsurgery.masks.provider import MaskProvider
from cadsurgery.network.bands.element_steps import Cells, Grid
from cadsurgery.network.bands.reading import BandPlan, Key, SeenGraph, uniform
from cadsurgery.network.bands.walk import Stream, Walk, used_by
from cadsurgery.network.program import Masked, Program
from cadsurgery.support.errors import CannotConvert, InvalidInput
from cadsurgery.support.memory import in_mebibytes
from cadsurgery.support.torch_internals import tree_map
from cadsurgery.surgery.rewrite import WORK, ask_mask


class _Shares:
    """The storage of a walk that only tells which share of a map is computed."""

    def compute(self, one: Stream, first: int, end: int) -> float:
        return one.count(first, end) / max(one.count(0, one.height), 1)

    def drop(self, one: Stream, row: int) -> None:
        pass

    def forget_table(self, one: Stream, first: int, end: int) -> None:
        pass

    def forget_cells(self, row: int) -> None:
        pass


ReadRows = Callable[[int, int], Tensor]  # rows [first, end) of a picture, (1, C, end - first, W)
_MOST_BANDS = 4096  # of one walk
_CELLS = (16, 8, 4, 2, 1)  # rows of cells at a time, the fastest first
_MOST_KINDS = 4  # kinds of calls that are remembered
_WHOLE = "run it whole: net.optimize() without memory=."


@dataclass
class Walks:
    """The walks down a picture that give the results.

    Attributes:
        walks: one for each value of the whole image that another one needs, and one for the results.
        band: rows of the tallest map in a band.
        peak: the most bytes of maps at once.
        largest: the maps that hold the most at that moment, and the bytes of each, by name.
        work: rows that are computed, each times its bytes, relative to computing each once.
        mask: bytes that the mask takes, before the maps, beside the picture.
    """

    walks: list[Walk]
    band: int
    peak: int
    largest: dict[str, float]
    work: float
    mask: int = 0

    @classmethod
    def of(cls, walks: list[Walk], once: int) -> Walks:
        """Measure walks, of which `once` are the bytes of all maps computed once."""
        found = [one.measured() for one in walks]
        largest = max(found, key=lambda one: one.peak)
        work = sum(one.computed for one in found) / max(once, 1)
        return cls(walks, walks[-1].band, int(largest.peak), largest.largest, work)

    def __str__(self) -> str:
        walks = "1 walk" if len(self.walks) == 1 else f"{len(self.walks)} walks"
        work = (
            f"{self.work:.2f} times the work of computing"
            if self.work >= 1.005
            else "no more work than computing"
        )
        return (
            f"maps of at most {in_mebibytes(self.peak)} at once, in bands of {self.band} rows, in {walks} down the "
            f"picture; {work} each map once"
            + (f"; the mask takes {in_mebibytes(self.mask)} before" if self.mask else "")
        )


Rows = Mapping[fx.Node, tuple[int, int]]  # rows [first, end) of maps that are asked for; all of the others


def plan_walks(plan: BandPlan, band: int, keeps: bool, rows: Rows | None = None) -> Walks:
    """Plan the walks for bands of so many rows.

    Args:
        plan: the maps of the network.
        band: rows of the tallest map in a band.
        keeps: keep maps between walks that a later one reads; otherwise they are computed again from the picture.
        rows: the rows of the results that are asked for, if not all.
    """
    maps, streams = plan.maps, list(plan.maps.values())
    known, picture = {streams[0]}, streams[0]
    asked = plan.map_outputs if plan.only_first else plan.outputs
    last = max((plan.walk_of.get(node, 0) for node in asked), default=0)
    every, walks = set[Stream](), list[Walk]()
    for at in range(last + 1):
        wanted, later, staying = {maps[node] for node in plan.map_outputs}, set[Stream](), set[Stream]()
        if at < last:
            wanted = {maps[one.source] for key, one in plan.sums.items() if plan.walk_of[key] == at + 1}
            later = _read_later(plan, at) if keeps else later
            staying = later - known
        ends = (wanted | staying) - known
        asked_rows = {maps[node]: span for node, span in (rows or {}).items()} if at == last else None
        walks.append(Walk(streams, ends, band, known, staying, asked_rows))
        every |= wanted | staying
        known = {picture} | ((known | staying) & later)
    once = sum(one.height * one.row for one in used_by(streams, every, {picture}))
    return Walks.of(walks, once)


def _read_later(plan: BandPlan, at: int) -> set[Stream]:
    """Return the maps of a walk that maps of later ones read, or that are results."""
    walk_of, maps = plan.walk_of, plan.maps
    is_ready = {one for node, one in maps.items() if one.compute is not None and walk_of.get(node, 0) <= at}
    read = {source for one in maps.values() if one not in is_ready for source, _ in one.sources}
    later = {maps[one.source] for key, one in plan.sums.items() if walk_of[key] > at + 1}
    return (read | later | {maps[node] for node in plan.map_outputs}) & is_ready


def fit(
    read: Callable[[int], BandPlan], cells: Sequence[int], memory: int, rows: Rows | None = None
) -> tuple[BandPlan, Walks]:
    """Return the plan and the walks that need the least work within a memory.

    Args:
        read: returns the maps of the network for so many rows of cells at a time.
        cells: the rows of cells to try, the fastest first.
        memory: bytes that maps may take.
        rows: the rows of the results that are asked for, if not all.

    Raises:
        InvalidInput: bands of the fewest rows need more.
    """
    least: tuple[BandPlan, Walks] | None = None
    for keeps, many in product((True, False), cells):
        plan = read(many)
        if not keeps and not plan.sums:
            break  # there is nothing to keep
        for band in _bands(plan, many == cells[-1]):
            walks = plan_walks(plan, band, keeps, rows)
            if walks.peak <= memory:
                return plan, walks
            if least is None or walks.peak < least[1].peak:
                least = plan, walks
    assert least is not None
    plan, walks = least
    least_memory = in_mebibytes(walks.peak, memory)
    held = sorted(
        (name for name, size in walks.largest.items() if size), key=lambda name: -walks.largest[name]
    )
    raise InvalidInput(
        f"{in_mebibytes(memory, walks.peak)} are too little for this picture.",
        where="memory",
        why=f"in bands of {walks.band} rows its maps take {least_memory}, most of it {', '.join(held[:2])}.",
        next=f'give at least memory="{least_memory.replace(" ", "")}".',
    )


def _bands(plan: BandPlan, has_fewest_cells: bool = True) -> Iterator[int]:
    """Yield numbers of rows of a band to try, the most first. Bands hold one block of rows of cells, in which elements
    are computed; those with fewer rows are for dense maps beside the region, and tried where blocks are smallest."""
    tallest = max(one.height for one in plan.maps.values())
    blocks = [-(-one.chunk * tallest // one.height) for one in plan.maps.values() if one.elements is not None]
    band = 1 << max(max(blocks, default=tallest) - 1, 1).bit_length()
    while band >= 8 and -(-tallest // band) <= _MOST_BANDS:
        yield band
        if blocks and not has_fewest_cells:
            return
        band //= 2


class _Held:
    """The rows of a map that are there, in parts. Of elements, which lie in rows of cells, the lattices take more
    memory: they are made where they are read."""

    def __init__(self, axis: int = 0, lattice: Callable[[int, int], Lattice] | None = None) -> None:
        """Take the axis along which rows are counted, or what makes the lattice of fine rows of elements."""
        self.axis, self.lattice = axis, lattice
        self.parts = list[tuple[int, int, Tensor]]()

    def add(self, first: int, end: int, rows: Any) -> None:
        self.parts.append((first, end, rows if self.lattice is None else rows.rows))

    def drop(self, row: int) -> None:
        self.parts = [part for part in self.parts if part[1] > row]

    def rows(self, first: int, end: int) -> Any:
        """Return rows; elements of whole cells, where a map ends a little below the one that it is joined with."""
        found = []
        for at, stop, rows in self.parts:
            begin, until = max(first, at), min(end, stop)
            if begin < until:
                is_all = (begin, until) == (at, stop) or self.lattice is not None
                found.append(rows if is_all else rows.narrow(self.axis, begin - at, until - begin))
        rows = found[0] if len(found) == 1 else torch.cat(found, self.axis)
        return rows if self.lattice is None else Elements(rows, self.lattice(first, end))


class BandedCall:
    """The computation of one picture in bands; the storage of its walks."""

    def __init__(self, plan: BandPlan, walks: Walks) -> None:
        self.plan, self.walks = plan, walks
        self.nodes = {one: node for node, one in plan.maps.items()}
        self.held = dict[Stream, Any]()  # `_Held`; for the picture, what reads it

    def run(
        self, arguments: dict[str, Any], lattice: Lattice | None = None, rows_of: Rows | None = None
    ) -> Any:
        """Return what the graph returns for the arguments of a call with one picture and, if it has a region, the
        lattice of it; or only rows of its maps."""
        plan, values = self.plan, self.plan.values
        image: Tensor = arguments[str(plan.seen.image.target)]
        results, spans = dict[Key, Tensor](), dict[fx.Node, tuple[int, int]]()
        for node in plan.map_outputs:
            shape, axis = list(plan.seen.shapes[node]), plan.axis[node]
            spans[node] = begin, stop = (rows_of or {}).get(node, (0, shape[axis]))
            shape[axis] = stop - begin
            results[node] = fast_layout(torch.empty(shape, dtype=plan.seen.types[node]))
        for node, first, rows in self.rows(arguments, lattice, lambda first, end: image[:, :, first:end]):
            axis, (begin, stop) = plan.axis[node], spans[node]
            above, end = max(first, begin), min(first + rows.shape[axis], stop)
            if above < end:
                found = rows.narrow(axis, above - first, end - above)
                results[node].narrow(axis, above - begin, end - above).copy_(found)
        values.update(results)
        for node in plan.behind:
            values[node] = plan.call(node, {})
        return map_arg(plan.seen.returned[0], values.__getitem__)

    def rows(
        self, arguments: dict[str, Any], lattice: Lattice | None, read: ReadRows
    ) -> Iterator[tuple[fx.Node, int, Tensor]]:
        """Yield rows of the results as they are computed: node, number of the first one, rows. `read` gives rows of the
        picture; of that in the arguments only the size is asked."""
        plan, values = self.plan, self.plan.values
        values.clear()
        for node in plan.seen.graph.nodes:
            if node.target is ask_mask or (node.op == "placeholder" and str(node.target) not in arguments):
                values[node] = lattice if node.target is ask_mask else None
        # The picture is read when it is asked for.
        self.held = {plan.maps[plan.seen.image]: SimpleNamespace(rows=read, drop=lambda _: None)}
        self._evaluate(arguments, 0)
        for at, walk in enumerate(self.walks.walks):
            self.held = {one: held for one, held in self.held.items() if one in walk.known}
            if at == len(self.walks.walks) - 1:
                yield from self._results(walk, plan.map_outputs)
                return
            sums = {key: s for key, s in plan.sums.items() if plan.walk_of[key] == at + 1}
            found = dict[Key, list[Tensor]]()
            for node, first, rows in self._results(walk, {s.source: None for s in sums.values()}):
                for key, value in sums.items():
                    if value.source is node:
                        part = value.measure(rows, first)
                        found[key] = [*map(value.join, found[key], part)] if key in found else part
                del rows
            values.update({key: value.finish(*found[key]) for key, value in sums.items()})
            self._evaluate(arguments, at + 1)

    def _evaluate(self, arguments: dict[str, Any], at: int) -> None:
        """Compute what is no map and can be known before a walk."""
        plan, values = self.plan, self.plan.values
        for node in plan.seen.graph.nodes:
            if node.op == "output" or node in values or plan.walk_of.get(node, 0) > at:
                continue
            if node in plan.maps or node in plan.parts or node in plan.sums:
                continue
            if node.op == "placeholder":
                values[node] = arguments[str(node.target)]
            elif node in plan.seen.numbers:
                values[node] = plan.seen.numbers[node]
            elif all(source in values for source in plan.awaited(node)):
                values[node] = plan.call(node, {})

    def _results(self, walk: Walk, wanted: Collection[fx.Node]) -> Iterator[tuple[fx.Node, int, Any]]:
        """Yield rows of some maps as they are computed: node, number of the first one, rows."""
        for node in wanted:
            one = self.plan.maps[node]
            if one in walk.known:  # the picture, or a map that an earlier walk has kept
                step = one.chunk * -(-self.walks.band // one.chunk)
                for first in range(0, one.height, step):
                    yield node, first, self.held[one].rows(first, min(first + step, one.height))
        for one, first, rows in walk.carry_out(self):
            if self.nodes[one] in wanted:
                yield self.nodes[one], first, rows
            del rows

    # -- the storage of a walk, see `Storage` --------------------------------------------------------

    def compute(self, one: Stream, first: int, end: int) -> Any:
        """Compute rows of a map, which are held from now on."""
        assert one.compute is not None
        read = [(node, *rows.within(first, end, self._height(node))) for node, rows in one.reads]
        rows = one.compute([self._fetch(*part) for part in read], first, end, read[0][1])
        self._held(one).add(first, end, rows)
        return rows

    def drop(self, one: Stream, row: int) -> None:
        """Free what was computed of a map before a row."""
        if one in self.held:
            self.held[one].drop(row)

    def forget_table(self, one: Stream, first: int, end: int) -> None:
        """Free the kernel map of rows of a map."""
        if one.forget_table is not None:
            one.forget_table(first, end)

    def forget_cells(self, row: int) -> None:
        """Free what is known of cells before a row."""
        if self.plan.cells is not None:
            self.plan.cells.drop(row)

    def _height(self, node: fx.Node) -> int:
        if node in self.plan.maps:
            return self.plan.maps[node].height
        value = self.plan.values[node]
        return sys.maxsize if isinstance(value, SmallMap) else int(value.shape[self.plan.axis[node]])

    def _fetch(self, node: fx.Node, first: int, end: int) -> Any:
        if node in self.plan.maps:
            return self.held[self.plan.maps[node]].rows(first, end)
        value = self.plan.values[node]
        if isinstance(value, SmallMap):
            return replace(value, top=first)
        return value.narrow(self.plan.axis[node], first, end - first)

    def _held(self, one: Stream) -> Any:
        if one not in self.held:
            node, cells = self.nodes[one], self.plan.cells
            grid = self.plan.seen.grids.get(node)
            if grid is None or cells is None:
                self.held[one] = _Held(self.plan.axis[node])
            else:
                self.held[one] = _Held(lattice=partial(cells.lattice, grid))
        return self.held[one]


@dataclass
class RowsOfResult:
    """The first map of a network's output, in rows. Each iteration computes them, from the top; one at a time. They are
    planned when they are first asked for.

    Attributes:
        shape: (C, H, W) of the map.
        levels: the level of each cell, (1, h, w).
    """

    shape: tuple[int, ...]
    levels: Tensor
    _fit: Callable[[], tuple[BandPlan, Walks]]
    _compute: Callable[[BandedCall], Iterator[tuple[fx.Node, int, Tensor]]]

    @cached_property
    def _planned(self) -> tuple[BandPlan, Walks]:
        return self._fit()

    @property
    def walks(self) -> Walks:
        """How the map is computed, and what memory that takes.

        Raises:
            InvalidInput: the memory is too little for this picture.
        """
        return self._planned[1]

    @torch.no_grad()  # as a decorator it does not hold for the code of the caller between two rows
    def __iter__(self) -> Iterator[tuple[int, Tensor]]:
        """Yield the number of a row, and rows (C, rows, W) from there on.

        Raises:
            InvalidInput: the memory is too little for this picture.
        """
        for _, first, rows in self._compute(BandedCall(*self._planned)):
            yield first, rows[0]


class Bands:
    """Computes the calls of an inference copy in bands of rows, within a memory."""

    def __init__(self, memory: int) -> None:
        """Take the memory in bytes."""
        self.memory = memory
        self._observed = dict[tuple[Any, ...], SeenGraph]()
        self._own = dict[SeenGraph, tuple[BandPlan, Walks]]()  # of own graphs: one for each size
        self._of_mask = 0  # bytes that the mask of the last call takes
        self._lock = RLock()  # a plan holds the values of the call that is running

    def __reduce__(self) -> tuple[type[Bands], tuple[int]]:
        return Bands, (self.memory,)

    def __call__(self, provider: MaskProvider, program: Program, arguments: dict[str, Any]) -> Masked:
        """Return output and lattice of a call with a mask; see `Program`.

        Raises:
            CannotConvert: an operation needs a whole map.
            InvalidInput: the memory is too little for this picture; or the call is none that bands can compute.
        """
        program.check_kinds(arguments)
        image = self._image(provider, program, arguments)
        with self._lock, torch.no_grad():
            lattices = self._lattices(provider, program, arguments)
            outputs = []
            for position, lattice in enumerate(lattices):
                call = _of_picture(arguments, image, position)
                outputs.append(BandedCall(*self._fit(program, call, lattice)).run(call, lattice))
        output = outputs[0] if len(outputs) == 1 else tree_map(_join, *outputs)
        levels = [lattice.pyramid.levels for lattice in lattices]
        pyramid = Pyramid(levels[0] if len(levels) == 1 else torch.cat(levels), program.geometry)
        return program.contain(output), pyramid.lattice(lattices[0].stage, lattices[0].size)

    def within(
        self,
        provider: MaskProvider,
        program: Program,
        arguments: dict[str, Any],
        rows: Callable[[BandPlan, int], Rows | None],
    ) -> list[Any]:
        """Return rows of the outputs of a call, for each picture; None for one of which none are asked for.

        Args:
            provider: the mask.
            program: the program.
            arguments: of the call.
            rows: returns the rows of each output, which are all maps, of a picture by its number.

        Raises:
            CannotConvert, InvalidInput: as for a call.
        """
        with self._lock, torch.no_grad():
            return [
                BandedCall(plan, walks).run(call, lattice, asked) if walks is not None else None
                for call, lattice, plan, walks, asked in self._within(provider, program, arguments, rows)
            ]

    def shares(
        self,
        provider: MaskProvider,
        program: Program,
        arguments: dict[str, Any],
        rows: Callable[[BandPlan, int], Rows | None],
    ) -> list[dict[str, float]]:
        """Return the share of the rows of each layer's map that `within` computes, for each picture; of a map that is
        computed twice, more than 1."""
        found = list[dict[str, float]]()
        with self._lock, torch.no_grad():
            for _, _, plan, walks, _ in self._within(provider, program, arguments, rows):
                counted = defaultdict[Stream, float](float)
                for walk in walks.walks if walks is not None else ():
                    for one, first, share in walk.carry_out(_Shares()):
                        counted[one] += share if first < one.height else 0.0
                layers = dict[str, float]()
                for node, one in plan.maps.items():
                    name = node.meta.get(WORK, (node.name,))[0]
                    layers[name] = max(layers.get(name, 0.0), counted[one])
                found.append(layers)
        return found

    def _within(
        self,
        provider: MaskProvider,
        program: Program,
        arguments: dict[str, Any],
        rows: Callable[[BandPlan, int], Rows | None],
    ) -> Iterator[tuple[dict[str, Any], Lattice, BandPlan, Walks | None, Rows | None]]:
        """Yield how the rows of each picture are computed: its call, lattice, plan, walks and rows."""
        program.check_kinds(arguments)
        image = self._image(provider, program, arguments)
        for position, lattice in enumerate(self._lattices(provider, program, arguments)):
            call = _of_picture(arguments, image, position)
            fitting = self._plans(program, call, lattice)
            plan, walks = fitting[0](fitting[1][-1]), None
            if (asked := rows(plan, position)) is not None:
                plan, walks = fit(*fitting, self.memory, asked)
            yield call, lattice, plan, walks, asked

    def plan(self, provider: MaskProvider, program: Program, arguments: dict[str, Any]) -> Walks:
        """Return the walks for the first picture of a call, without computing it."""
        image = self._image(provider, program, arguments)
        with self._lock, torch.no_grad():
            call = _of_picture(arguments, image, 0)
            lattice = self._lattices(provider, program, call)[0]
            return replace(self._fit(program, call, lattice)[1], mask=self._of_mask)

    def rows(
        self, provider: MaskProvider, start: int, read: ReadRows, program: Program, arguments: dict[str, Any]
    ) -> RowsOfResult:
        """Return the first map of the output in rows, from `start` on. Of the picture in the arguments only size and
        type are asked; `read` gives its rows, and all of it to masks other than `all` and `none`.

        Raises:
            CannotConvert, InvalidInput: as for a call; or the output holds no map.
        """
        program.check_kinds(arguments)
        image, name = self._image(provider, program, arguments), program.image_name
        with self._lock, torch.no_grad():
            (lattice,) = self._lattices(provider, program, arguments, read)
            fitting = self._plans(program, {**arguments, name: image[:1]}, lattice, only_first=True)
            try:
                plan = fitting[0](1)
            except CannotConvert:
                self._plans(program, {**arguments, name: image[:1]}, lattice)[0](1)  # refused as a call is
                plan = None
            if plan is None or not plan.map_outputs or plan.axis[plan.map_outputs[0]] != 2:
                raise InvalidInput(
                    "the network's output holds no map (B, C, H, W) that could be given in rows.",
                    why="it is flattened or reduced, as boxes and scores of a detector are.",
                    next="call the copy with the whole picture as a tensor: its maps are computed in bands, too.",
                )
            shape = tuple(plan.seen.shapes[plan.map_outputs[0]][1:])
            if not 0 <= start < shape[1]:
                raise InvalidInput(
                    f"start={start} is no row of the result, which has {shape[1]}.",
                    next=f"give 0 to {shape[1] - 1}.",
                )
        planned = partial(fit, *fitting, self.memory, {plan.map_outputs[0]: (start, shape[1])})
        compute = methodcaller("rows", arguments, lattice, read)
        return RowsOfResult(shape, lattice.pyramid.levels, planned, compute)

    def _image(self, provider: MaskProvider, program: Program, arguments: dict[str, Any]) -> Tensor:
        image: Any = program.image(arguments)
        why = next_ = ""
        if not program.image_name:
            why, next_ = "the network computes from its arguments the picture that masks see.", _WHOLE
        elif provider.looks_ahead:
            why = f"mask {provider.name} reads the output of a first pass over the whole picture."
            next_ = "choose a mask that looks only at the picture, e.g. content or edges."
        elif image.device.type != "cpu":
            why, next_ = f"the picture is on {image.device}; bands are computed on the CPU.", _WHOLE
        if why:
            raise InvalidInput("the network is not computed in bands here.", why=why, next=next_)
        return image

    def _lattices(
        self,
        provider: MaskProvider,
        program: Program,
        arguments: dict[str, Any],
        read: ReadRows | None = None,
    ) -> list[Lattice]:
        """Return the lattice of each picture of a call; `read` gives rows of the picture in place of the arguments."""
        image, self._of_mask = program.image(arguments), 0
        first = _of_picture(arguments, image, 0)
        level = provider.uniform_level(program.plan.max_level)
        if level is not None and level == program.own_level:
            size = self._observe(program, program.graph_at(level), first).fine_size()
            return [uniform(program.geometry, level, size)] * len(image)
        seen = self._observe(program, program.graph, first)
        assert seen.region is not None
        features = image
        if seen.region.args[2] is not seen.image:
            if provider.sees_features:
                raise InvalidInput(
                    "the network is not computed in bands here.",
                    why=f"mask {provider.name} reads features of the whole picture.",
                    next="choose a mask that looks only at the picture, e.g. content or edges.",
                )
            features = image.new_zeros(()).expand(len(image), 1, *seen.fine_size())  # for its size
        masking, height = program.masking(provider), image.shape[2]
        self._of_mask = self._check_mask(masking, program, first, features)
        read = read or (lambda first, end: image[:, :, first:end])
        if features is image:
            features = read(0, height) if provider.sees_features else image.new_zeros(()).expand_as(image)
        lattice = masking.of_rows(read, height, features) if provider.sees_image else masking(image, features)
        pyramids = [Pyramid(levels, program.geometry) for levels in lattice.pyramid.levels.split(1)]
        return [one.lattice(lattice.stage, lattice.size) for one in pyramids]

    def _check_mask(self, masking: Masking, program: Program, call: dict[str, Any], features: Tensor) -> int:
        """Return the bytes that a mask takes.

        Raises:
            InvalidInput: it sees all of a picture at once, and takes more than the memory.
        """
        image = program.image(call)
        needed, is_whole = masking.memory(image.shape[2] * image.shape[3], features)
        if is_whole and needed > self.memory:
            least = in_mebibytes(max(needed, self._most_for_maps(program, call, features)), self.memory)
            raise InvalidInput(
                f"{in_mebibytes(self.memory, needed)} are too little for this picture.",
                where="memory",
                why=f"mask {masking.provider.spec()} takes {in_mebibytes(needed, self.memory)} beside it.",
                next=f'give at least memory="{least.replace(" ", "")}"; or a mask that is computed in bands, such as '
                "edges or content, of a network whose normalisation is known: adaptify(normalisation=).",
            )
        return needed

    def _most_for_maps(self, program: Program, call: dict[str, Any], features: Tensor) -> int:
        """Return the bytes of maps in the smallest bands if all but one cell is kept high."""
        geometry, size = program.geometry, (features.shape[2], features.shape[3])
        levels = torch.zeros(1, *size, dtype=torch.int8)
        levels[:, : geometry.sides[-1], : geometry.sides[-1]] = geometry.max_level
        read, cells = self._plans(program, call, Pyramid(levels, geometry).lattice(0, size))
        plan = read(cells[-1])
        return min(plan_walks(plan, band, keeps).peak for keeps in (True, False) for band in _bands(plan))

    def _fit(self, program: Program, call: dict[str, Any], lattice: Lattice) -> tuple[BandPlan, Walks]:
        """Return the plan and the walks for a picture; for the network's own graph they are made once."""
        seen = self._graph(program, call, lattice)
        if seen.region is not None:
            return fit(*self._plans(program, call, lattice), self.memory)
        if seen not in self._own:
            self._own[seen] = fit(*self._plans(program, call, lattice), self.memory)
        return self._own[seen]

    def _plans(
        self, program: Program, call: dict[str, Any], lattice: Lattice, only_first: bool = False
    ) -> tuple[Callable[[int], BandPlan], Sequence[int]]:
        """Return what plans a picture for so many rows of cells at a time, and the numbers of these to try."""
        seen, side = self._graph(program, call, lattice), lattice.geometry.sides[-1]
        counts = dict[Grid, list[int]]()
        if seen.region is None:
            return lambda many: BandPlan(seen, only_first=only_first), (1,)

        def read(many: int) -> BandPlan:
            return BandPlan(seen, Cells(lattice.pyramid, side * many, counts), only_first=only_first)

        return read, _CELLS

    def _graph(self, program: Program, call: dict[str, Any], lattice: Lattice) -> SeenGraph:
        """Return the graph that computes a picture: the network's own one where all cells are as there."""
        return self._observe(program, program.graph_at(lattice.uniform_level), call)

    def _observe(self, program: Program, graph: fx.Graph, call: dict[str, Any]) -> SeenGraph:
        kinds = tuple(
            (n, v.shape, v.dtype) if isinstance(v, Tensor) else (n, repr(v)) for n, v in call.items()
        )
        key = (id(graph), kinds)
        if key not in self._observed:
            if len(self._observed) >= _MOST_KINDS:
                self._own.pop(self._observed.pop(next(iter(self._observed))), None)
            self._observed[key] = SeenGraph(program, graph, call)
        return self._observed[key]


def _of_picture(arguments: dict[str, Any], image: Tensor, position: int) -> dict[str, Any]:
    """Return the arguments of a call with one picture of a batch: of every tensor that is such a batch, too.

    Raises:
        InvalidInput: a tensor has as many entries as there are pictures, which may be one for each or the same for all.
    """

    def of_picture(value: Any) -> Any:
        if len(image) == 1 or not isinstance(value, Tensor) or not value.dim() or len(value) != len(image):
            return value
        if value.dim() == 4 and value.shape[2:] == image.shape[2:]:
            return value[position : position + 1]
        raise InvalidInput(
            "a batch is not computed in bands here.",
            why=f"whether a tensor of shape {tuple(value.shape)} belongs to the pictures one by one is not known.",
            next="call the network picture by picture.",
        )

    return {name: tree_map(of_picture, value) for name, value in arguments.items()}


def _join(*parts: Any) -> Any:
    is_map = isinstance(parts[0], Tensor) and parts[0].dim() > 0
    return torch.cat(parts) if is_map else parts[0]
