"""Which part of the picture the values in boxes depend on, and the network on that part alone.

Each map of a network is followed from the boxes back to the picture, by what each operation reads: the steps of
`network/bands/` say that of rows, and of columns. The part of the picture that is found ends at the picture's border or
on a multiple of the largest stride and of the largest cells, so that every map of the part is a part of the map of the
whole picture. Then the network runs on the part, whose values in the boxes are those of the whole call.

Nothing is taken on trust: the graph is read for the part as well, and each map must read the same rows and columns
there, at the same places. What depends on the size of the picture, or on the place within it, is refused with its line.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx
from torch.fx.node import map_arg

from cadsurgery.elements.axes import NCHW
from cadsurgery.elements.lattice import Lattice, as_levels
from cadsurgery.elements.on_rows import OnRows
from cadsurgery.following.equivalence import meta_copy
from cadsurgery.following.guards import drop_dead_code
from cadsurgery.masks.basic import FixedMask
from cadsurgery.masks.provider import MaskProvider
from cadsurgery.network.bands.banded_call import Bands
from cadsurgery.network.bands.element_steps import Cells
from cadsurgery.network.bands.reading import Axis, BandPlan, SeenGraph, layout_of, uniform
from cadsurgery.network.bands.walk import SAME
from cadsurgery.network.boxes import Box, Span, around
from cadsurgery.network.input_refusals import first_value
from cadsurgery.network.invocations import find_lattice
from cadsurgery.network.program import Program
from cadsurgery.support.errors import CannotConvert, InvalidInput, UnknownName, first_line
from cadsurgery.support.torch_internals import tree_leaves, tree_map
from cadsurgery.support.torch_operations import is_kind

_AXES: tuple[Axis, Axis] = ("h", "w")
_MOST_SIZES = 64  # of pictures and parts of pictures that are remembered
_MOST_STRIDE = 1 << 12  # pixels for one sample of the coarsest map
_PLACE = 1e-11  # rows by which the places that a resize reads may differ
_MOST_MORE = 3  # how often more of the picture is tried


class Asked(NamedTuple):
    """Boxes of the pictures of a call, whose values are asked for.

    Attributes:
        program: the program.
        provider: the mask of the call.
        arguments: of the call with the whole pictures.
        boxes: the boxes of each picture.
        output: key or position of the output that is asked for; None for all.
    """

    program: Program
    provider: MaskProvider
    arguments: dict[str, Any]
    boxes: Sequence[Sequence[Box]]
    output: str | int | None = None

    @property
    def image(self) -> Tensor:
        """The pictures (B, C, H, W)."""
        return self.arguments[self.program.image_name]

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of a picture."""
        return self.image.shape[2], self.image.shape[3]

    def on(self, image: Tensor) -> dict[str, Any]:
        """Return the arguments of the call with other pictures."""
        return {**self.arguments, self.program.image_name: image}


@dataclass
class PicturePart:
    """A part of the picture that is computed.

    Attributes:
        box: the part.
        boxes: the numbers of the boxes whose values it gives.
    """

    box: Box
    boxes: list[int]


class AxisReads:
    """What the maps of a graph read along one axis, for pictures of one size.

    Attributes:
        plan: the maps, and the rows or columns that each reads.
        scales: rows of each map for each row of the picture, of those that come before a result.
        step: rows of the picture that parts of it are multiples of.
    """

    def __init__(self, seen: SeenGraph, program: Program, along: Axis, level: int) -> None:
        """Read the graph; `level` is the highest that a cell has.

        Raises:
            CannotConvert: an operation needs a whole map.
        """
        cells = None
        if seen.region is not None:
            size = seen.fine_size() if along == "h" else seen.fine_size()[::-1]
            geometry = program.geometry
            # Where level maps are floors, no cell is smaller than the samples of the network's own grids.
            sampled = level if geometry.floors else geometry.max_level
            largest = max(geometry.level_at(sampled, grid.stage) for grid in seen.grids.values())
            cells = Cells(uniform(geometry, level, size).pyramid, geometry.sides[largest], level=level)
        self.plan = BandPlan(seen, cells, along=along, computes=False)
        self.changing = self._of_image()
        self.scales = self._found_scales(seen)
        self.step = math.lcm(*(one.denominator for one in self.scales.values()))
        if seen.region is not None:
            side = program.geometry.sides[-1]  # of the network's own grids, whatever cells there are
            elements = [node for node in self.scales if node in seen.grids]
            self.step = math.lcm(self.step, *((side / self.scales[node]).numerator for node in elements))

    def _of_image(self) -> set[fx.Node]:
        """The values that are no maps, and no numbers, and are computed from the picture."""
        plan, found = self.plan, set[fx.Node]()
        for node in plan.seen.graph.nodes:
            is_value = node not in plan.maps and node not in plan.parts and node not in plan.seen.numbers
            reads = (one in plan.maps or one in plan.parts or one in found for one in node.all_input_nodes)
            if is_value and node is not plan.seen.region and any(reads):
                found.add(node)
        return found

    def _found_scales(self, seen: SeenGraph) -> dict[fx.Node, Any]:
        plan, scales = self.plan, dict[fx.Node, Any]()
        for node in self.before(plan.map_outputs):
            one = plan.maps[node]
            if node is seen.image:
                scales[node] = 1
                continue
            if any(source not in plan.maps for source, _ in one.reads):
                raise plan.refusal(node, "it reads values of the whole picture, or of places in it")
            found = {scales[source] / rows.rate for source, rows in one.reads}
            if len(found) != 1 or max(one.denominator for one in found) > _MOST_STRIDE:
                raise plan.refusal(node, "it depends on the size of the picture")
            (scales[node],) = found
        return scales

    def before(self, nodes: Iterable[fx.Node]) -> list[fx.Node]:
        """Return the maps that some depend on, these among them, in the order of the graph."""
        wanted, plan = set(nodes), self.plan
        for node in reversed(plan.maps):
            if node in wanted:
                wanted.update(source for source, _ in plan.maps[node].reads)
                depends = [one for one in node.all_input_nodes if one in self.changing]
                is_norm = any(getattr(key, "node", None) is node for key in plan.sums)
                if depends or is_norm:
                    raise plan.refusal(depends[0] if depends else node, "it reads the whole picture")
        return [node for node in plan.maps if node in wanted]


class PictureReads:
    """A graph, and what its maps read of pictures of one size.

    Attributes:
        seen: the graph, and the shapes of its maps.
        level: the highest that a cell has.
        axes: what they read of rows, and of columns.
    """

    def __init__(self, program: Program, seen: SeenGraph, level: int) -> None:
        """Read a graph that was seen for a call with one picture; `level` is the highest that a cell has.

        Raises:
            CannotConvert: an output is no map, or depends on the whole picture.
        """
        self.seen, self.level = seen, level
        try:
            self.axes = (
                AxisReads(self.seen, program, "h", level),
                AxisReads(self.seen, program, "w", level),
            )
        except CannotConvert as error:
            raise _refused(error) from error
        _check_outputs(self.axes[0].plan)

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the picture."""
        return self.seen.size(self.seen.image)

    def box_of(self, node: fx.Node, box: Box) -> Box:
        """Return the box of the map of a node that covers a box of the picture."""
        return _box_of(self.axes[0].plan, node, box, self.size)

    def needed(self, box: Box) -> list[dict[fx.Node, Span]]:
        """Return the rows and the columns of each map that the values in a box depend on."""
        found = []
        for axis, reads in enumerate(self.axes):
            need = {node: self.box_of(node, box).spans[axis] for node in reads.plan.map_outputs}
            for node in reversed(reads.scales):
                for source, rows in reads.plan.maps[node].reads if node in need else ():
                    first, end = sorted(rows.within(*need[node], reads.plan.maps[source].height))
                    known = need.get(source, (first, end))
                    need[source] = min(known[0], first), max(known[1], end)
            found.append(need)
        return found

    def part_for(self, box: Box, more: int = 0) -> Box:
        """Return the part of the picture that is computed for a box, and so many steps around it."""
        spans = list[int]()
        for need, reads, length in zip(self.needed(box), self.axes, self.size, strict=True):
            (first, end), step = need[self.seen.image], reads.step
            spans += [
                max(first // step - more, 0) * step,
                min((-(-end // step) + more) * step, length),
            ]
        return Box(*spans)

    def check(self, other: PictureReads, box: Box, part: Box) -> None:
        """Compare what the values in a box read with what they read where only a part of the picture is computed.

        Raises:
            CannotConvert: something else.
        """
        needs = self.needed(box)
        for axis, need in enumerate(needs):
            whole, cut, first = self.axes[axis], other.axes[axis], part.spans[axis][0]
            for node, span in need.items():
                if span[0] < span[1] and not _is_same(whole, cut, node, span, first):
                    raise _refused(
                        whole.plan.refusal(node, "what it computes depends on the size of the picture")
                    )
        numbers, others = self.seen.numbers, other.seen.numbers
        differing = {node for node, value in numbers.items() if others.get(node, value) != value}
        for node in needs[0] if differing else ():
            if _computes_with(node, differing, self.axes[0].plan):
                raise _refused(self.axes[0].plan.refusal(node, "it computes with the size of the picture"))


def _is_same(whole: AxisReads, cut: AxisReads, node: fx.Node, span: Span, first: int) -> bool:
    """True if rows of a map of the part of a picture from row `first` on are those of the whole."""
    one, other, offset = whole.plan.maps[node], cut.plan.maps.get(node), int(first * whole.scales[node])
    if other is None or cut.scales.get(node) != whole.scales[node]:
        return False
    if not (offset <= span[0] and span[1] <= offset + other.height):
        return False
    for (source, rows), (_, others) in zip(one.reads, other.reads, strict=True):
        before, above = int(first * whole.scales[source]), whole.plan.maps[source].height
        below = before + cut.plan.maps[source].height
        for row in (span[0], span[1] - 1):
            top, last = rows.first(row), rows.last(row)
            if (top, last) != (others.first(row - offset) + before, others.last(row - offset) + before):
                return False
            if (top < before and before > 0) or (last >= below and below < above):
                return False
        if one.places is not None and other.places is not None:
            places = other.places(span[0] - offset, span[1] - offset) + before
            if bool(((one.places(*span) - places).abs() > _PLACE).any()):
                return False
    return True


def _computes_with(node: fx.Node, numbers: set[fx.Node], plan: BandPlan) -> bool:
    """True if a map is computed with one of some numbers, as a factor or summand; or with a value made of them."""
    reads = list(node.all_input_nodes)
    is_pointwise = all(rows is SAME for _, rows in plan.maps[node].reads)
    target = type(plan.module(node)) if node.op == "call_module" else node.target
    if is_pointwise and (is_kind(target, "value", "values") or isinstance(target, OnRows)):
        return bool(numbers & _behind(reads, plan))
    values = [one for one in reads if one not in plan.seen.numbers]
    return bool(numbers & _behind(values, plan))


def _behind(nodes: Sequence[fx.Node], plan: BandPlan) -> set[fx.Node]:
    """Return nodes, and what those of them that are no maps are computed from, up to maps."""
    found, left = set[fx.Node](), list(nodes)
    while left:
        node = left.pop()
        if (
            node not in found
            and node not in plan.maps
            and node not in plan.parts
            and node is not plan.seen.region
        ):
            found.add(node)
            left += node.all_input_nodes if node not in plan.seen.numbers else []
    return found


def _refused(error: CannotConvert) -> CannotConvert:
    """Return the refusal of a network whose values in boxes are not those of a part of the picture."""
    return refused(error.where, error.why)


def refused(where: str, why: str) -> CannotConvert:
    """Return the error for a network that is not computed for a part of the picture only."""
    return CannotConvert(
        "the network cannot be computed for a part of the picture only.",
        where=where,
        why=why,
        next="call it on the whole picture: net(image).",
    )


def joined(parts: Sequence[PicturePart], whole: Box) -> list[PicturePart]:
    """Join parts where that is no more to compute; the whole picture if parts are as much."""
    left, done = list(parts), list[PicturePart]()
    while left:
        one, others = left.pop(), [*left, *done]
        for other in others:
            box = one.box.joined(other.box)
            if box.area <= one.box.area + other.box.area:
                rest = [part for part in others if part is not other]
                left, done = [*rest, PicturePart(box, one.boxes + other.boxes)], []
                break
        else:
            done.append(one)
    if len(done) > 1 and sum(part.box.area for part in done) >= whole.area:
        return [PicturePart(whole, [number for part in done for number in part.boxes])]
    return done


def _parts(
    size: tuple[int, int], boxes: Sequence[Box], part_for: Callable[[Box], tuple[Box, PictureReads]]
) -> list[PicturePart]:
    """Return the parts of a picture of a size that are computed for its boxes."""
    parts = [PicturePart(part_for(box)[0], [number]) for number, box in enumerate(boxes) if box.area]
    return joined(parts, Box(0, size[0], 0, size[1]))


Answer = Callable[[MaskProvider, Program, dict[str, Any]], tuple[Any, Any]]


@dataclass
class Values:
    """The values of a network in boxes.

    Attributes:
        parts: for each picture, and each of its boxes, the outputs; dictionaries and lists as the graph has them.
        whole: the outputs of one picture, without values.
        axes: the axes of height and width of each of them; None for what is no map.
        contain: makes the network's own kind of output from one of these.
    """

    parts: list[list[Any]]
    whole: Any
    axes: list[tuple[int, int] | None]
    contain: Callable[[Any], Any]

    @classmethod
    def of(
        cls,
        plan: BandPlan,
        asked: Asked,
    ) -> Values:
        """Return what boxes have of the outputs before anything is computed: empty ones have their values."""
        empty, nodes = (
            partial(_empty, plan, size=asked.size, like=asked.image),
            tree_leaves(plan.seen.returned[0]),
        )
        return cls(
            [[None if box.area else empty(box) for box in some] for some in asked.boxes],
            empty(Box(0, asked.size[0], 0, asked.size[1])),
            [_axes_of(plan, node) if node in plan.seen.shapes else None for node in nodes],
            asked.program.contain if asked.output is None else lambda value: value,
        )

    def onto(self, before: Sequence[Any], boxes: Sequence[Sequence[Box]], size: tuple[int, int]) -> list[Any]:
        """Return the leaves of whole outputs with the values in boxes of pictures of a size put onto those `before`."""
        found = list[Any]()
        parts = [[tree_leaves(part) for part in of_picture] for of_picture in self.parts]
        for number, (whole, axes) in enumerate(zip(before, self.axes, strict=True)):
            if axes is None:
                found.append(whole)
                continue
            whole = whole.clone()
            length = whole.shape[axes[0]], whole.shape[axes[1]]
            for picture, (some, of_picture) in enumerate(zip(boxes, parts, strict=True)):
                for box, leaves in zip(some, of_picture, strict=True):
                    part = whole[picture : picture + 1]
                    for axis, (first, end) in zip(axes, box.of_map(length, size).spans, strict=True):
                        part = part.narrow(axis, first, end - first)
                    part.copy_(leaves[number])
            found.append(whole)
        return found

    def blank(self, count: int) -> list[Any]:
        """Return the leaves of outputs of so many pictures, with zeros."""
        return [
            whole if axes is None else whole.new_zeros(count, *whole.shape[1:])
            for whole, axes in zip(tree_leaves(self.whole), self.axes, strict=True)
        ]

    def filled(self, leaves: Sequence[Any]) -> Any:
        """Return outputs of the network's kind from their leaves."""
        every = iter(leaves)
        return self.contain(tree_map(lambda _: next(every), self.whole))

    def put(self, number: int, index: int, result: Any, cut: Callable[[int, Tensor], Tensor]) -> None:
        """Add what a box has of a result: `cut` is given the number of each map, and the map."""
        numbers = iter(range(len(self.axes)))

        def part(value: Any) -> Any:
            output = next(numbers)
            return value if self.axes[output] is None else cut(output, value)

        self.parts[number][index] = tree_map(part, result)


@dataclass
class PictureParts:
    """Parts of a batch of pictures that are computed, for boxes of each picture.

    Attributes:
        asked: the boxes of each picture.
        ask: computes the lattice of that call; None if its level is the same everywhere.
        reads: what the maps of a whole picture read.
        parts: by place, for each picture that has a part there: its number, and the numbers of its boxes in the part.
        cut: what the maps of each part read.
    """

    asked: Asked
    ask: Callable[[], Lattice] | None
    reads: PictureReads
    parts: dict[Box, list[tuple[int, list[int]]]]
    cut: dict[Box, PictureReads]

    def call_of(self, box: Box) -> tuple[MaskProvider, dict[str, Any]]:
        """Return the mask and the arguments of the call with a part of the pictures."""
        numbers, image = [number for number, _ in self.parts[box]], self.asked.image
        if numbers != list(range(len(image))):
            image = image[numbers]
        if box.spans != tuple((0, length) for length in self.asked.size):
            layout = torch.channels_last if image.is_contiguous(memory_format=torch.channels_last) else None
            image = image[..., box.top : box.bottom, box.left : box.right]
            image = image.contiguous(memory_format=layout or torch.contiguous_format)
        return self.mask_of(box), self.asked.on(image)

    @cached_property
    def levels(self) -> Tensor | None:
        """The levels (B, h, w) of that call; None if its level is the same everywhere."""
        if self.ask is None:
            return None
        provider, shape = self.asked.provider, (len(self.asked.image), *self.reads.seen.fine_size())
        given = provider.levels if isinstance(provider, FixedMask) else None
        if given is not None and given.dtype == torch.int8 and given.shape == shape:
            return as_levels(given, self.asked.program.plan.max_level)  # made legal part by part
        return self.ask().pyramid.levels

    def highest(self, number: int, box: Box) -> int:
        """Return the highest level in a part of a picture."""
        assert self.levels is not None
        stride = self.asked.program.plan.strides[0]
        down, across = (slice(first // stride, -(-end // stride)) for first, end in box.spans)
        return int(self.levels[number, down, across].max())

    def mask_of(self, box: Box) -> MaskProvider:
        """Return the mask of the call with a part of the pictures: what that of the whole ones has there."""
        if (levels := self.levels) is None:
            return self.asked.provider
        stride, numbers = self.asked.program.plan.strides[0], [number for number, _ in self.parts[box]]
        height, width = self.cut[box].seen.fine_size()
        top, left = box.top // stride, box.left // stride
        return FixedMask(levels[numbers, top : top + height, left : left + width])

    def read(self, answer: Answer) -> Values:
        """Return the values in each box of each picture; `answer` returns output and lattice of a call with a mask."""
        plain, output = self.asked.program.bind_to(self.asked.program.net), self.asked.output
        plain.__dict__["container"] = dict
        values = Values.of(self.reads.axes[0].plan, self.asked)
        for box, users in self.parts.items():
            provider, arguments = self.call_of(box)
            result = answer(provider, plain, arguments)[0]
            result = result if output is None else select_output(result, output)
            for place, (number, indices) in enumerate(users):
                for index in indices:
                    cut = partial(self._cut, box, place, self.asked.boxes[number][index])
                    values.put(number, index, result, cut)
        return values

    def _cut(self, part: Box, place: int, box: Box, number: int, value: Tensor) -> Tensor:
        """Return what an output of a part of the pictures has of a box of one of them."""
        node = tree_leaves(self.reads.seen.returned[0])[number]
        value = value[place : place + 1]
        for reads, (first, end), (start, _) in zip(
            self.reads.axes, self.reads.box_of(node, box).spans, part.spans, strict=True
        ):
            offset = int(start * reads.scales[node])
            value = value.narrow(reads.plan.axis[node], max(first - offset, 0), end - first)
        return value

    @property
    def share(self) -> float:
        """The pixels that are computed, relative to those of all pictures."""
        shape = self.asked.image.shape
        pixels = sum(box.area * len(users) for box, users in self.parts.items())
        return pixels / (shape[0] * shape[2] * shape[3])


class _AskedRows:
    """Tells bands the rows of each output that the boxes of a picture lie in, and remembers the plans.

    Attributes:
        plans: of each picture.
    """

    def __init__(self, asked: Asked) -> None:
        self.plans, self._asked = dict[int, BandPlan](), asked

    def __call__(self, plan: BandPlan, number: int) -> dict[fx.Node, Span] | None:
        self.plans[number] = plan
        _check_outputs(plan)
        if not (boxes := [box for box in self._asked.boxes[number] if box.area]):
            return None
        whole = around(boxes)
        return {node: _box_of(plan, node, whole, self._asked.size).spans[0] for node in plan.map_outputs}


class Regions:
    """Finds the parts of pictures that a network computes for boxes, and remembers what it has read of graphs."""

    def __init__(self) -> None:
        self._graphs = dict[tuple[fx.Graph, str | int | None], fx.Graph]()
        self._counted = dict[tuple[Program, torch.dtype | None], Program]()
        self._seen = OrderedDict[tuple[Any, ...], tuple[SeenGraph, dict[int, PictureReads]]]()

    def __reduce__(self) -> tuple[type[Regions], tuple[()]]:
        return Regions, ()

    def find(self, asked: Asked) -> PictureParts:
        """Return the parts of the pictures of a call that are computed for boxes of each.

        Raises:
            CannotConvert: the network is not computed for a part of the picture only.
            UnknownName: no such output.
        """
        program, provider, arguments, boxes, output = asked
        if not program.image_name:
            raise InvalidInput(
                "the network cannot be computed for a part of the picture only.",
                why="it computes from its arguments the picture that masks see.",
                next="call it on the whole picture: net(image).",
            )
        level = provider.uniform_level(program.plan.max_level)
        graph, one = self.graph_of(program.graph_at(level), output), asked.on(asked.image[:1])
        reads = self._read(program, graph, one, program.plan.max_level if level is None else level)
        ask = partial(find_lattice, program, program.masking(provider), arguments) if level is None else None
        parts = PictureParts(asked, ask, reads, {}, {})

        def part_for(number: int, box: Box, more: int = 0) -> tuple[Box, PictureReads]:
            """Return the part for a box of a picture, and what is read if no cell is larger than those in the part."""
            least = level or 0
            while True:
                own = self._read(program, graph, one, least)
                part = own.part_for(box, more)
                if level is not None or (highest := parts.highest(number, part)) <= least:
                    return part, own
                least = highest

        for number, of_picture in enumerate(boxes):
            for part in _parts(reads.size, of_picture, partial(part_for, number)):
                within = around([of_picture[index] for index in part.boxes])
                box = self._checked(parts, graph, part, within, partial(part_for, number, within))
                parts.parts.setdefault(box, []).append((number, part.boxes))
        return parts

    def _checked(
        self,
        parts: PictureParts,
        graph: fx.Graph,
        part: PicturePart,
        within: Box,
        part_for: Callable[[int], tuple[Box, PictureReads]],
    ) -> Box:
        """Return the part of the picture that gives a part's boxes, which lie `within` a box, once the network reads
        the same there as in the whole one: with as many steps around it as that takes, by `part_for`."""
        asked, refusal, whole = parts.asked, None, Box(0, parts.reads.size[0], 0, parts.reads.size[1])
        for more in range(_MOST_MORE):
            box, reads = (whole, parts.reads) if part.box == whole else part_for(more)
            if box == whole:
                parts.cut[box] = parts.reads
                return box
            picture = asked.image[:1, :, box.top : box.bottom, box.left : box.right]
            try:
                cut = self._read(asked.program, graph, asked.on(picture), reads.level)
                reads.check(cut, within, box)
                parts.cut[box] = cut
                return box
            except CannotConvert as error:
                refusal = error
            except Exception as error:  # the network may refuse a size with any error
                why = f"it does not run on a part of {box.bottom - box.top}x{box.right - box.left} pixels: "
                refusal = refused("", f"{why}{first_line(error)}")
        assert refusal is not None
        raise refusal

    def graph_of(self, graph: fx.Graph, output: str | int | None) -> fx.Graph:
        """Return the graph of one output only."""
        if output is None:
            return graph
        key = graph, output
        if key not in self._graphs:
            copied, copies = fx.Graph(), dict[fx.Node, fx.Node]()
            copied.graph_copy(graph, copies)
            value, lattice = next(node for node in graph.nodes if node.op == "output").args[0]
            copied.output(map_arg((select_output(value, output), lattice), copies.__getitem__))
            drop_dead_code(copied)
            self._graphs[key] = copied
        return self._graphs[key]

    def _read(self, program: Program, graph: fx.Graph, arguments: dict[str, Any], level: int) -> PictureReads:
        """Return what the maps of a graph read in a call with one picture whose cells have at most a level."""
        kinds = tuple(
            (n, v.shape, v.dtype) if isinstance(v, Tensor) else (n, repr(v)) for n, v in arguments.items()
        )
        weight = first_value(program.net)
        counted = program, weight.dtype if weight is not None else None
        key = *counted, graph, kinds
        if key not in self._seen:
            if counted not in self._counted:
                self._counted[counted] = program.bind_to(meta_copy(program.net))
            self._seen[key] = SeenGraph(program, graph, arguments, self._counted[counted]), {}
            while len(self._seen) > _MOST_SIZES:
                self._seen.popitem(last=False)
        self._seen.move_to_end(key)
        seen, reads = self._seen[key]
        if level not in reads:
            reads[level] = PictureReads(program, seen, level)
        return reads[level]


@dataclass(frozen=True)
class ByRows:
    """Computes boxes of pictures by their rows, in bands.

    Attributes:
        regions: what was read of graphs.
        bands: compute them.
        asked: the boxes of each picture.
    """

    regions: Regions
    bands: Bands
    asked: Asked

    def read(self) -> Values:
        """Return the values in each box, of the rows of the boxes, and of all that values of the whole picture are made
        of.

        Raises:
            CannotConvert: an operation needs a whole map, or an output is none.
            InvalidInput: the call is none that bands can compute.
        """
        asked, rows = self.asked, _AskedRows(self.asked)
        program = asked.program.bind_to(asked.program.net)  # with graphs of one output only
        for name in ("graph", "unchanged"):
            if (graph := getattr(program, name)) is not None:
                program.__dict__[name] = self.regions.graph_of(graph, asked.output)
        results = self.bands.within(asked.provider, program, asked.arguments, rows)
        values = Values.of(rows.plans[0], asked)
        for number, result in enumerate(results):
            plan, spans = rows.plans[number], rows(rows.plans[number], number)
            for index, box in enumerate(asked.boxes[number]):
                if box.area and spans is not None:
                    cut = partial(_rows_and_columns, plan, box, asked.size, spans)
                    values.put(number, index, result, cut)
        return values

    def shares(self, counted: Program) -> list[dict[str, float]]:
        """Return the share of each layer's map that is computed, for each picture; `counted` is the program on meta
        tensors."""
        return self.bands.shares(self.asked.provider, counted, self.asked.arguments, _AskedRows(self.asked))


def _axes_of(plan: BandPlan, node: fx.Node) -> tuple[int, int]:
    """Return the axes of height and width of an output."""
    layout = layout_of(node)
    across = layout.find("w") if "w" in layout else NCHW.index("w")
    return plan.axis[node], across


def _check_outputs(plan: BandPlan) -> None:
    """Refuse outputs that are no maps of the rows and columns of the picture."""
    for node in tree_leaves(plan.seen.returned[0]):
        if node in plan.seen.shapes and (
            node not in plan.maps or not {"h", "w"} <= set(layout_of(node) or NCHW)
        ):
            raise _refused(plan.refusal(node, "it is no map of the picture's rows and columns"))


def _box_of(plan: BandPlan, node: fx.Node, box: Box, size: tuple[int, int]) -> Box:
    """Return the box of an output that covers a box of a picture of a size."""
    down, across = _axes_of(plan, node)
    shape = plan.seen.shapes[node]
    return box.of_map((shape[down], shape[across]), size)


def _empty(plan: BandPlan, box: Box, size: tuple[int, int], like: Tensor) -> Any:
    """Return what a box without pixels has of the outputs."""
    seen = plan.seen

    def part(node: Any) -> Any:
        if node not in seen.shapes:
            return seen.numbers.get(node) if isinstance(node, fx.Node) else node
        shape = list(seen.shapes[node])
        for axis, (first, end) in zip(
            _axes_of(plan, node), _box_of(plan, node, box, size).spans, strict=True
        ):
            shape[axis] = end - first
        return like.new_empty(shape, dtype=seen.types[node])

    return tree_map(part, _as_plain(seen.returned[0]))


def _rows_and_columns(
    plan: BandPlan,
    box: Box,
    size: tuple[int, int],
    spans: dict[fx.Node, Span],
    number: int,
    value: Tensor,
) -> Tensor:
    """Return what rows of an output have of a box."""
    node = tree_leaves(plan.seen.returned[0])[number]
    (top, bottom), (left, right) = _box_of(plan, node, box, size).spans
    down, across = _axes_of(plan, node)
    return value.narrow(down, top - spans[node][0], bottom - top).narrow(across, left, right - left)


def _as_plain(value: Any) -> Any:
    """Return a structure of a graph with ordinary lists and dictionaries."""
    if isinstance(value, dict):
        return {name: _as_plain(part) for name, part in value.items()}
    if isinstance(value, (tuple, list)):
        parts = [_as_plain(part) for part in value]
        return (
            type(value)(*parts)
            if hasattr(value, "_fields")
            else (tuple if isinstance(value, tuple) else list)(parts)
        )
    return value


def select_output(value: Any, output: str | int | None) -> Any:
    """Return the requested output of a graph."""
    several = dict(enumerate(value)) if isinstance(value, (tuple, list)) else value
    if not isinstance(several, dict):
        if output is not None:
            raise UnknownName(
                "output", str(output), [], next="the network has a single one: leave output out."
            )
        return value
    if output is None and len(several) == 1:
        return next(iter(several.values()))
    if not isinstance(output, (str, int)) or output not in several:
        names = [str(name) for name in several]
        raise UnknownName("output", str(output), names, next=f"say which with output=: {', '.join(names)}.")
    return several[output]
