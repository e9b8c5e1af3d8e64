"""Run a network on a picture in bands of rows, within a memory that is given."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from threading import RLock
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, fx
from torch.fx.node import map_arg

from cadsurgery.elements.axes import fast_layout
from cadsurgery.elements.elements import Elements
from cadsurgery.elements.lattice import Lattice, Pyramid
from cadsurgery.masks.basic import UniformMask
from cadsurgery.masks.provider import MaskProvider
from cadsurgery.network.bands.reading import BandPlan, BandReader, Key, uniform
from cadsurgery.network.bands.schedule import Pass, used_by, walk
from cadsurgery.network.bands.steps import Sum
from cadsurgery.network.program import Masked, Program
from cadsurgery.support.errors import InvalidInput
from cadsurgery.support.memory import in_mebibytes
from cadsurgery.support.torch_internals import tree_map
from cadsurgery.surgery.rewrite import ask_mask

_MOST_BANDS = 4096  # of one walk
_MOST_READERS = 4  # kinds of calls that are remembered
_WHOLE = "run it whole: net.optimize() without memory=."


@dataclass
class Walks:
    """The walks down a picture that give the results.

    Attributes:
        passes: the walks: one for each value of the whole image that another one needs, and one for the results.
        kept: the maps that stay as a whole after each, by number.
        band: rows of the tallest map in a band.
        work: rows that are computed, each times its bytes, relative to computing each once.
    """

    passes: list[Pass]
    kept: list[set[int]]
    band: int
    work: float

    @property
    def peak(self) -> int:
        """The most bytes of maps at once."""
        return max(one.peak for one in self.passes)


def plan_walks(reading: BandPlan, band: int, keeps: bool) -> Walks:
    """Plan the walks for bands of so many rows.

    Args:
        reading: the maps of the network.
        band: rows of the tallest map in a band.
        keeps: keep maps between walks that a later one reads; otherwise they are computed again from the picture.
    """
    number, maps, known = reading.number, reading.maps, {0}
    last = max((reading.passes.get(node, 0) for node in reading.outputs), default=0)
    every, passes, kept = set[int](), [], []
    for at in range(last + 1):
        wanted, later, staying = {number[node] for node in reading.map_outputs}, set[int](), set[int]()
        if at < last:
            wanted = {
                number[one.source] for key, one in reading.sums.items() if reading.passes[key] == at + 1
            }
            later = _read_later(reading, at) if keeps else later
            staying = later - known
        passes.append(walk(maps, sorted((wanted | staying) - known), band, known, staying))
        every |= wanted | staying
        known = {0} | ((known | staying) & later)
        kept.append(known)
    once = sum(maps[one].height * maps[one].row for one in used_by(maps, every, {0}))
    rows = sum(
        (task.end - task.first) * maps[task.number].row for p in passes for tasks in p.bands for task in tasks
    )
    return Walks(passes, kept, band, rows / max(once, 1))


def _read_later(reading: BandPlan, at: int) -> set[int]:
    """Return the maps of a walk that maps of later ones read, or that are results."""
    passes, number = reading.passes, reading.number
    is_ready = {one for node, one in number.items() if one and passes.get(node, 0) <= at}
    waiting = set(number.values()) - is_ready
    read = {source for one in waiting for source, _ in reading.maps[one].reads}
    later = {number[one.source] for key, one in reading.sums.items() if passes[key] > at + 1}
    return (read | later | {number[node] for node in reading.map_outputs}) & is_ready


def fit(reading: BandPlan, memory: int) -> Walks:
    """Return the walks that need the least work within a memory, in bytes.

    Raises:
        InvalidInput: bands of the fewest rows need more.
    """
    tallest, least = max(one.height for one in reading.maps), None
    ways = (True, False) if any(reading.sums) else (False,)
    for keeps in ways:
        for band in _bands(tallest):
            walks = plan_walks(reading, band, keeps)
            if walks.peak <= memory:
                return walks
            if least is None or walks.peak < least.peak:
                least = walks
    assert least is not None
    raise InvalidInput(
        f"{in_mebibytes(memory)} are too little for this picture.",
        where="memory",
        why=f"in bands of {least.band} rows its maps take {in_mebibytes(least.peak)}, "
        f"most of it {_largest(reading, least)}.",
        next=f'give at least memory="{in_mebibytes(least.peak).replace(" ", "")}".',
    )


def _bands(tallest: int) -> Iterator[int]:
    """Yield numbers of rows of a band to try, the most first."""
    band = 1 << max(tallest - 1, 1).bit_length()
    while band >= 8 and -(-tallest // band) <= _MOST_BANDS:
        yield band
        band //= 2


def _largest(reading: BandPlan, walks: Walks) -> str:
    held = max(walks.passes, key=lambda one: one.peak).largest
    return ", ".join(
        "copies of rows" if one < 0 else reading.maps[one].name
        for one in sorted((n for n in held if n), key=lambda n: -held[n])[:2]
    )


class _Held:
    """The rows of a map that are there, in parts: along an axis of a dense map, or as elements."""

    def __init__(self, axis: int, lattice: Callable[[int, int], Lattice] | None = None) -> None:
        self.axis, self.lattice = axis, lattice
        self.parts = list[tuple[int, int, Any]]()

    def add(self, first: int, end: int, rows: Any) -> None:
        self.parts.append((first, end, rows))

    def drop(self, row: int) -> None:
        self.parts = [part for part in self.parts if part[1] > row]

    def rows(self, first: int, end: int) -> Any:
        found = [
            rows
            if (first, end) == (at, stop)
            else self._narrow(rows, max(first - at, 0), min(end, stop) - at)
            for at, stop, rows in self.parts
            if at < end and stop > first
        ]
        if self.lattice is None:
            return found[0] if len(found) == 1 else torch.cat(found, self.axis)
        rows = [one.rows for one in found]
        return Elements(rows[0] if len(rows) == 1 else torch.cat(rows), self.lattice(first, end))

    def _narrow(self, rows: Any, first: int, end: int) -> Any:
        if self.lattice is None:
            return rows.narrow(self.axis, first, end - first)
        return Elements(rows.rows[rows.lattice.row_at(first) : rows.lattice.row_at(end)], rows.lattice)


class BandedCall:
    """The computation of one picture in bands."""

    def __init__(self, reader: BandReader, walks: Walks) -> None:
        self.reader, self.reading, self.walks = reader, reader.reading, walks
        self.nodes = list(self.reading.number)  # by number of their maps
        self.held = dict[int, _Held]()

    def run(self, arguments: dict[str, Any], lattice: Lattice | None = None) -> Any:
        """Return what the graph returns for the arguments of a call with one picture and, if it has a region, the
        lattice of it."""
        reading = self.reading
        values: dict[Key, Any] = {
            node: lattice if node.target is ask_mask else None
            for node in reading.graph.nodes
            if node.target is ask_mask or (node.op == "placeholder" and str(node.target) not in arguments)
        }
        self.reader.values = values
        image = arguments[str(reading.image.target)]
        whole = _Held(2)
        whole.add(0, image.shape[2], image)
        self.held = {0: whole}
        self._evaluate(arguments, 0)
        results = {
            node: fast_layout(torch.empty(reading.shapes[node], dtype=reading.types[node]))
            for node in reading.map_outputs
        }
        for at, (one, kept) in enumerate(zip(self.walks.passes, self.walks.kept, strict=True)):
            is_last = at == len(self.walks.passes) - 1
            sums = {key: s.make() for key, s in reading.sums.items() if reading.passes[key] == at + 1}
            self._walk(one, sums, results if is_last else {})
            for key, total in sums.items():
                values[key] = reading.sums[key].finish(total.finish())
            self.held = {number: held for number, held in self.held.items() if number in kept}
            self._evaluate(arguments, at + 1)
        return map_arg(reading.result, lambda node: results[node] if node in results else values[node])

    def _evaluate(self, arguments: dict[str, Any], at: int) -> None:
        """Compute what is no map and can be known before a walk."""
        reading, values = self.reading, self.reader.values
        for node in reading.graph.nodes:
            if node.op == "output" or node in values or reading.passes.get(node, 0) > at:
                continue
            if node in reading.number or node in self.reader.parts or node in reading.sums:
                continue
            if node.op == "placeholder":
                values[node] = arguments[str(node.target)]
            elif node in reading.numbers:
                values[node] = reading.numbers[node]
            elif all(source in values for source in node.all_input_nodes):
                values[node] = self.reader.call(node, {})

    def _walk(self, one: Pass, sums: dict[Key, Sum], results: dict[fx.Node, Tensor]) -> None:
        reading, held, number = self.reading, self.held, self.reading.number
        wanted = {number[node]: rows for node, rows in results.items()}
        summed: dict[int, list[Sum]] = {}
        for key, total in sums.items():
            summed.setdefault(number[reading.sums[key].source], []).append(total)
        for at in [
            at for at in (*wanted, *summed) if at in held
        ]:  # whole maps of an earlier walk, or the picture
            self._hand_on(at, held[at].rows(0, reading.maps[at].height), 0, wanted, summed)

        def fetch(node: fx.Node, first: int, end: int) -> Tensor:
            return held[number[node]].rows(first, end)

        for tasks in one.bands:
            for task in tasks:
                rows = reading.steps[task.number].compute(fetch, task.first, task.end)
                self._held(task.number).add(task.first, task.end, rows)
                self._hand_on(task.number, rows, task.first, wanted, summed)
                del rows
                for left, row in task.drops:
                    if left in held:
                        held[left].drop(row)

    def _held(self, number: int) -> _Held:
        if number not in self.held:
            node, cells = self.nodes[number], self.reader.cells
            grid = self.reading.grids.get(node)
            lattice = partial(cells.lattice, grid) if grid is not None and cells is not None else None
            self.held[number] = _Held(self.reading.axis.get(node, 0), lattice)
        return self.held[number]

    def _hand_on(
        self, at: int, rows: Tensor, first: int, wanted: dict[int, Tensor], summed: dict[int, list[Sum]]
    ) -> None:
        if at in wanted:
            axis = self.reading.axis[self.nodes[at]]
            wanted[at].narrow(axis, first, rows.shape[axis]).copy_(rows)
        for total in summed.get(at, ()):
            total.add(rows, first)


class Bands:
    """Computes the calls of an inference copy in bands of rows, within a memory."""

    def __init__(self, memory: int) -> None:
        """Take the memory in bytes."""
        self.memory = memory
        self._readers = dict[tuple[Any, ...], BandReader]()
        self._walks = WeakKeyDictionary[BandReader, Walks]()  # of the network's own graph: one for each size
        self._lock = RLock()  # a reader holds the values of the call that is running

    def __reduce__(self) -> tuple[type[Bands], tuple[int]]:
        return Bands, (self.memory,)

    def __call__(self, provider: MaskProvider, program: Program, arguments: dict[str, Any]) -> Masked:
        """Return output and lattice of a call with a mask; see `Program`.

        Raises:
            CannotConvert: an operation needs a whole map.
            InvalidInput: the memory is too little for this picture; or the call is none that bands can compute.
        """
        program.check_kinds(arguments)
        image, name = self._image(provider, program, arguments), program.image_name
        with self._lock, torch.no_grad():
            lattices = self._lattices(provider, program, arguments)
            outputs = []
            for one, lattice in zip(image.split(1), lattices, strict=True):
                call = {**arguments, name: one}
                reader, walks = self._prepare(program, call, lattice)
                outputs.append(BandedCall(reader, walks).run(call, lattice))
        output = outputs[0] if len(outputs) == 1 else tree_map(_join, *outputs)
        levels = [lattice.pyramid.levels for lattice in lattices]
        pyramid = Pyramid(levels[0] if len(levels) == 1 else torch.cat(levels), program.geometry)
        return program.contain(output), pyramid.lattice(lattices[0].stage, lattices[0].size)

    def plan(self, provider: MaskProvider, program: Program, arguments: dict[str, Any]) -> Walks:
        """Return the walks for the first picture of a call, without computing it."""
        image, name = self._image(provider, program, arguments), program.image_name
        with self._lock, torch.no_grad():
            call = {**arguments, name: image[:1]}
            return self._prepare(program, call, self._lattices(provider, program, call)[0])[1]

    def _image(self, provider: MaskProvider, program: Program, arguments: dict[str, Any]) -> Tensor:
        image: Any = program.image(arguments)
        why = next_ = ""
        if not program.masks_an_argument:
            why, next_ = "the network computes from its arguments the picture that masks see.", _WHOLE
        elif provider.looks_ahead:
            why = f"mask {provider.name} reads the output of a first pass over the whole picture."
            next_ = "choose a mask that looks at the picture alone, e.g. content or edges."
        elif image.device.type != "cpu":
            why, next_ = f"the picture is on {image.device}; bands are computed on the CPU.", _WHOLE
        if why:
            raise InvalidInput("the network is not computed in bands here.", why=why, next=next_)
        return image

    def _lattices(self, provider: MaskProvider, program: Program, arguments: dict[str, Any]) -> list[Lattice]:
        """Return the lattice of each picture of a call."""
        image, name, own = program.image(arguments), program.image_name, program.plan.identity_level
        first = {**arguments, name: image[:1]}
        if isinstance(provider, UniformMask) and program.unchanged is not None:
            level = 0 if provider.high else program.plan.max_level
            if level == own:
                size = self._reader(program, program.unchanged, first).fine_size()
                return [uniform(program.geometry, level, size)] * len(image)
        reader = self._reader(program, program.graph, first)
        assert reader.region is not None
        features = image
        if reader.region.args[2] is not reader.image:
            if provider.sees_features:
                raise InvalidInput(
                    "the network is not computed in bands here.",
                    why=f"mask {provider.name} reads features of the whole picture.",
                    next="choose a mask that looks at the picture alone, e.g. content or edges.",
                )
            features = image.new_zeros(()).expand(len(image), 1, *reader.fine_size())  # for its size
        lattice = program.masking(provider)(image, features)
        pyramids = [Pyramid(levels, program.geometry) for levels in lattice.pyramid.levels.split(1)]
        return [one.lattice(lattice.stage, lattice.size) for one in pyramids]

    def _prepare(self, program: Program, call: dict[str, Any], lattice: Lattice) -> tuple[BandReader, Walks]:
        """Return the reader of the graph that computes a picture, and its walks: the network's own graph where all
        cells are as in the network."""
        own, unchanged = program.plan.identity_level, program.unchanged
        is_own = unchanged is not None and lattice.uniform_level == own
        if is_own and unchanged is not None:
            reader = self._reader(program, unchanged, call)
            if reader not in self._walks:
                self._walks[reader] = fit(reader.read(), self.memory)
            return reader, self._walks[reader]
        reader = self._reader(program, program.graph, call)
        return reader, fit(reader.read(lattice), self.memory)

    def _reader(self, program: Program, graph: fx.Graph, call: dict[str, Any]) -> BandReader:
        kinds = tuple(
            (n, v.shape, v.dtype) if isinstance(v, Tensor) else (n, repr(v)) for n, v in call.items()
        )
        key = (id(graph), kinds)
        if key not in self._readers:
            if len(self._readers) >= _MOST_READERS:
                del self._readers[next(iter(self._readers))]
            self._readers[key] = BandReader(program, graph, call, program.image_name)
        return self._readers[key]


def _join(*parts: Any) -> Any:
    is_map = isinstance(parts[0], Tensor) and parts[0].dim() > 0
    return torch.cat(parts) if is_map else parts[0]
