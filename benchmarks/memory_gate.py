"""Estimate the memory that networks would need if they computed a large picture in bands of rows; nothing is computed
at full size.

    python -m benchmarks.memory_gate
    python -m benchmarks.memory_gate --networks unet d2net --width 4000 --height 5024 --heights 8 32 128 --maps 5

Each network is traced on a small example. The rules of its operations say which rows of a map a row of the result
reads. The schedule is then simulated band by band: a band of the outputs asks each map for the rows that it lacks, they
are computed in the order of the graph, and a map keeps the rows that a later band reads. So nothing is computed twice.
A mean over the image, as in squeeze and excitation, takes a pass of its own before what reads it.

Counted are the values of maps, float32. Pointwise operations are fused into what precedes them, additions into the
later summand, concatenations are read where their parts lie. A window of several rows, or of several parts, has its
input rows copied while it runs. The picture, the outputs and the weights are apart.
"""

from __future__ import annotations

import argparse
import math
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torchvision.models.segmentation import deeplabv3_resnet101

from benchmarks import networks
from cadsurgery.data.networks import build_model
from cadsurgery.elements import functional
from cadsurgery.elements.bilinear import ends_of, place_on_map
from cadsurgery.elements.kernel_map import Window
from cadsurgery.surgery.arguments import take_image
from cadsurgery.surgery.read import read
from cadsurgery.surgery.spatial import Spatial
from cadsurgery.surgery.treatment import Treatment

BYTES = 4
GIB = 2**30
PICTURE = 0  # number of the picture among the maps
EXAMPLE = (256, 320)
JOINED = frozenset(("cat", "concat", "concatenate"))


class Rows(NamedTuple):
    """Rows of a map that rows of a result read, as two functions of the number of a row, which never
    fall; rows outside the map, too."""

    first: Callable[[int], int]
    last: Callable[[int], int]


def _same(row: int) -> int:
    return row


SAME = Rows(_same, _same)


def rows_of_window(window: Window) -> Rows:
    """Return the rows that a window reads; rows outside the map are padding."""
    span, top = window.dilation[0] * (window.kernel[0] - 1), window.padding[0]
    if window.finer > 1:  # row r of the result is made of rows i with 0 <= r + top - i finer <= span
        return Rows(
            lambda row: -(-(row + top - span) // window.finer), lambda row: (row + top) // window.finer
        )
    return Rows(lambda row: row * window.stride - top, lambda row: row * window.stride - top + span)


def rows_of_resize(height: int, result: int, mode: str, align_corners: bool) -> Rows:
    """Return the rows that a resize reads on a map of a height for the rows of the result."""
    numbers = torch.arange(result, dtype=torch.float64)
    numbers = numbers if mode == "nearest" or align_corners else numbers + 0.5
    place = place_on_map(numbers, height, result, mode, align_corners)
    (first, _), (after, share) = ends_of(place, height, slack=1e-9)
    last = first if mode == "nearest" else torch.where(share > 1e-9, after, first)
    return Rows(*(partial(_entry, table.tolist(), height / result) for table in (first, last)))


def _entry(table: list[int], ratio: float, row: int) -> int:
    """Return an entry of a table; before the first, what a resize by that ratio would read of rows above the map."""
    return table[row] if row >= 0 else math.floor(row * ratio)


@dataclass
class Map:
    """A map that a network computes.

    Attributes:
        name: node that it is made by, and module.
        height: rows.
        row: bytes of a row.
        reads: maps that it is computed from, by number, and their rows.
        copies: its input rows are copied while it is computed.
        means: numbers of the means over the image that it needs.
        macs: multiply-accumulates of a row.
    """

    name: str
    height: int
    row: int
    reads: list[tuple[int, Rows]] = field(default_factory=list)
    copies: bool = False
    means: set[int] = field(default_factory=set)
    macs: float = 0.0


@dataclass
class Plan:
    """The maps of a network in the order of its graph, the first being the picture.

    Attributes:
        maps: all maps.
        outputs: numbers of the maps that the network returns.
        means: for each mean over the image, the maps that it is taken of, and the means that it needs itself.
    """

    maps: list[Map]
    outputs: list[int] = field(default_factory=list)
    means: list[tuple[tuple[int, ...], frozenset[int]]] = field(default_factory=list)

    def level(self, mean: int) -> int:
        """Return how many passes there are before the mean is known."""
        return 1 + max((self.level(other) for other in self.needed_by_mean(mean)), default=0)

    def needed_by_mean(self, mean: int) -> set[int]:
        """Return the means without which a mean cannot be computed."""
        feeding, others = self.means[mean]
        return set(others) | set().union(*(self.needed(number) for number in feeding))

    def needed(self, number: int) -> set[int]:
        """Return the means without which a map cannot be computed."""
        if not self._needed:
            for one in self.maps:
                self._needed.append(one.means.union(*(self._needed[source] for source, _ in one.reads)))
        return self._needed[number]

    def __post_init__(self) -> None:
        self._needed: list[set[int]] = []


class Value(NamedTuple):
    """A value of the graph: the maps that it is read from, in the order of its channels, and the means it needs."""

    parts: tuple[int, ...] = ()
    means: frozenset[int] = frozenset()


class _Planner:
    """Makes the plan of a network from the treatments of its operations."""

    def __init__(self, spatial: Spatial, width: int, height: int) -> None:
        self.spatial, self.facts = spatial, spatial.facts
        self.size = (height, width)
        self.plan = Plan([])
        self.values: dict[fx.Node, Value] = {}

    def run(self) -> Plan:
        for node in self.facts.graph.nodes:
            self.values[node] = self._value(node)
        return self.plan

    def _value(self, node: fx.Node) -> Value:
        if node.op == "placeholder":
            return Value((self._add(node, row=0),))
        read = [self.values[source] for source in node.all_input_nodes]
        if node.op == "output":
            self.plan.outputs = sorted({part for value in read for part in value.parts})
            return Value()
        treatment = self.spatial.treatments[node]
        means = frozenset[int]().union(*(value.means for value in read))
        parts = tuple(part for value in read for part in value.parts)
        if node not in self.facts.shapes or (parts and treatment.kind == "shape"):
            return Value()  # numbers, such as sizes
        if not parts or treatment.kind == "broadcast":
            return Value((), means)
        if treatment.kind == "global":
            self.plan.means.append((parts, means))
            return Value((), frozenset((len(self.plan.means) - 1,)))
        return self._map(node, treatment, means)

    def _map(self, node: fx.Node, treatment: Treatment, means: frozenset[int]) -> Value:
        """Return the value of a node that gives a map: a map of its own, or those that it is fused into."""
        sources = [source for source in self.spatial.maps(node) if self.values[source].parts]
        if treatment.kind == "window" and treatment.window is not None:
            return Value((self._window(node, sources[0], treatment.window, means),))
        if treatment.kind == "resize":
            return Value((self._resize(node, sources[0], treatment, means),))
        heights = {self.facts.shapes[value][2] for value in (node, *sources) if value in self.facts.shapes}
        if len(heights) > 1 or not _acts_on_each_row(node, treatment):
            raise SystemExit(
                f"{node} ({self.facts.path(node)}, {node.target}) needs whole maps: {treatment.why}"
            )
        if getattr(node.target, "__name__", node.target) in JOINED:
            return Value(tuple(part for source in sources for part in self.values[source].parts), means)
        return self._pointwise(node, sources, means)

    def _pointwise(self, node: fx.Node, sources: Sequence[fx.Node], means: frozenset[int]) -> Value:
        latest = max(sources, key=lambda source: max(self.values[source].parts))
        into, carried = self.values[latest]
        others = [part for source in sources if source is not latest for part in self.values[source].parts]
        is_alone = len([user for user in latest.users if not self._only_asks(user)]) == 1
        if is_alone and means == carried and not others:
            return self.values[latest]
        if is_alone and len(into) == 1 and into[0] != PICTURE:
            fused = self.plan.maps[into[0]]
            fused.means |= means
            fused.reads += [(part, SAME) for part in others]
            return Value(into)
        number = self._add(node, means=means)
        self._read(number, [part for source in sources for part in self.values[source].parts], SAME)
        return Value((number,))

    def _only_asks(self, node: fx.Node) -> bool:
        return node.op != "output" and self.spatial.treatments[node].kind == "shape"

    def _window(self, node: fx.Node, source: fx.Node, window: Window, means: frozenset[int]) -> int:
        parts = self.values[source].parts
        height = self.plan.maps[parts[0]].height
        window = window.fit((height, self.size[1]))
        number = self._add(node, copies=window.kernel[0] > 1 or len(parts) > 1, means=means)
        self._read(number, parts, rows_of_window(window))
        return number

    def _resize(self, node: fx.Node, source: fx.Node, treatment: Treatment, means: frozenset[int]) -> int:
        if treatment.window is not None:
            return self._window(node, source, treatment.window, means)
        if treatment.call is not functional.resize:
            raise SystemExit(f"{node} ({node.target}) is no resize whose rows are known here.")
        options = dict(treatment.arguments)
        number = self._add(node, means=means)
        parts = self.values[source].parts
        have, want = self.plan.maps[parts[0]].height, self.plan.maps[number].height
        align = bool(options.get("align_corners"))
        self._read(number, parts, rows_of_resize(have, want, options.get("mode", "nearest"), align))
        return number

    def _read(self, number: int, parts: Collection[int], rows: Rows) -> None:
        self.plan.maps[number].reads += [(part, rows) for part in parts]

    def _add(
        self, node: fx.Node, row: int | None = None, copies: bool = False, means: Collection[int] = ()
    ) -> int:
        """Add the map of a node, of the size that it has for the whole picture."""
        shape = self.facts.shapes[node]
        down, across = (
            -(-whole * length // small)
            for whole, length, small in zip(self.size, shape[2:], self.facts.example.shape[2:], strict=True)
        )
        name = f"{node.name} {shape[1]} channels at 1/{self.size[0] / down:g}"
        row = shape[1] * across * BYTES if row is None else row
        work = self.facts.macs.get(node, 0) / len(self.facts.example) / shape[2]
        work *= across / shape[3]
        self.plan.maps.append(Map(name, down, row, copies=copies, means=set(means), macs=work))
        return len(self.plan.maps) - 1


def _acts_on_each_row(node: fx.Node, treatment: Treatment) -> bool:
    """True if a row of the result is made of the same row of each map; padding by nothing has no rule."""
    return treatment.kind in ("pointwise", "join") or node.target is F.pad


def plan_of(network: nn.Module, width: int, height: int, example: Tensor | None = None) -> Plan:
    """Trace a network on a small example, and return its maps for a picture of `height` rows of `width` pixels."""
    example = torch.randn(1, 3, *EXAMPLE) if example is None else example
    facts = read(network.eval(), take_image(network, example))
    return _Planner(Spatial(facts), width, height).run()


@dataclass
class Walk:
    """What a walk over a picture took.

    Attributes:
        peak: most bytes at once.
        held: the bytes of each map at that moment.
        work: multiply-accumulates.
        bands: for each band and map, the rows [first, end) computed and the first row kept after it.
    """

    peak: int = 0
    held: dict[int, int] = field(default_factory=dict)
    work: float = 0.0
    bands: list[dict[int, tuple[int, int, int]]] = field(default_factory=list)


def walk(
    plan: Plan,
    band: int,
    ends: Sequence[int] = (),
    kept: Collection[int] = (),
    known: Collection[int] = (PICTURE,),
    again: Collection[int] = (),
    notes: bool = False,
    copies: bool = True,
    cell: int = 1,
) -> Walk:
    """Walk down a picture in bands, and count the bytes of the maps.

    Args:
        plan: the maps.
        band: rows of the picture in a band.
        ends: maps that are asked for; by default the outputs.
        kept: maps that stay whole once they are computed, for a later pass.
        known: maps that are whole from the beginning: the picture, and those that a pass before kept.
        again: maps of which no rows are kept from band to band, so that a few are computed again.
        notes: note the rows of every band.
        copies: count the copies of the rows that windows read.
        cell: each map is computed in multiples of so many rows of the picture.
    """
    maps, ends = plan.maps, list(ends or plan.outputs)
    used = _used(plan, ends, known)
    readers: dict[int, list[tuple[int, Rows]]] = defaultdict(list)
    for number in used:
        for source, rows in maps[number].reads:
            readers[source].append((number, rows))
    last_reader = {source: max(number for number, _ in some) for source, some in readers.items()}
    leaves: dict[int, list[int]] = defaultdict(list)
    for number in used:
        leaves[last_reader.get(number, number)].append(number)
    height = maps[PICTURE].height
    cells = {number: max(1, round(cell * maps[number].height / height)) for number in used}
    done, start, above = dict.fromkeys(used, 0), dict.fromkeys(used, 0), _reach(maps, used, ends)
    alive = {number: maps[number].height * maps[number].row for number in known}
    live = sum(alive.values())
    result = Walk()
    for bottom in range(band - -(-above // band) * band, height + band, band):
        asked: dict[int, int] = {end: -(-min(bottom, height) * maps[end].height // height) for end in ends}
        for number in reversed(used):
            for reader, rows in readers[number]:
                asked[number] = max(asked.get(number, -height), rows.last(asked[reader] - 1) + 1)
            asked[number] = min(-(-asked[number] // cells[number]) * cells[number], maps[number].height)
        need = {number: max(asked[number], 0) for number in used}
        keep: dict[int, int] = {}
        for number in reversed(used):
            first = need[number]
            for reader, rows in readers[number]:
                begin = keep[reader] if reader in again else need[reader]
                if begin < maps[reader].height:
                    first = min(first, max(0, rows.first(begin)))
            keep[number] = 0 if number in kept else first
        for number in used:
            one = maps[number]
            begin = start[number] if number in again else done[number]
            fresh = need[number] - begin
            if fresh > 0:
                alive[number] = alive.get(number, 0) + fresh * one.row
                live += fresh * one.row
                result.work += fresh * one.macs
                copy = _copied(one, maps, begin, need[number]) if copies and one.copies else 0
                if live + copy > result.peak:
                    result.peak = live + copy
                    result.held = {**alive, -1: copy}
            for left in leaves[number]:
                rest = 0 if left in again else (need[left] - keep[left]) * maps[left].row
                live += rest - alive.get(left, 0)
                alive[left] = rest
        if notes:
            result.bands.append({n: (start[n] if n in again else done[n], need[n], keep[n]) for n in used})
        done, start = need, keep
    return result


def _reach(maps: Sequence[Map], used: Sequence[int], ends: Sequence[int]) -> int:
    """Return how many rows below a row of the outputs the picture is read for it."""
    asked = dict.fromkeys([PICTURE, *used], -maps[PICTURE].height) | dict.fromkeys(ends, 0)
    for number in reversed(used):
        for source, rows in maps[number].reads:
            asked[source] = max(asked.get(source, 0), rows.last(asked[number] - 1) + 1)
    return max(0, *(asked[number] * maps[PICTURE].height // maps[number].height for number in asked))


def _copied(one: Map, maps: Sequence[Map], begin: int, end: int) -> int:
    """Return the bytes of the input rows of the rows [begin, end) of a map."""
    return sum(
        (min(rows.last(end - 1) + 1, maps[source].height) - max(rows.first(begin), 0)) * maps[source].row
        for source, rows in one.reads
        if rows is not SAME
    )


def _used(plan: Plan, ends: Sequence[int], known: Collection[int]) -> list[int]:
    """Return the maps that have to be computed for some, in order."""
    used, left = set[int](), list(ends)
    while left:
        number = left.pop()
        if number not in used and number not in known:
            used.add(number)
            left += [source for source, _ in plan.maps[number].reads]
    return sorted(used)


def in_passes(
    plan: Plan, band: int, keeps: bool, again: Collection[int] = (), cell: int = 1
) -> tuple[Walk, float]:
    """Walk down a picture once for each level of means over the image, and once for the outputs.

    Returns the walk with the largest peak, and the work of all relative to one.

    Args:
        plan: the maps.
        band: rows of the picture in a band.
        keeps: between passes keep the maps that later ones read; otherwise compute them again from the picture.
        again, cell: see `walk`.
    """
    levels = [plan.level(mean) for mean in range(len(plan.means))]
    known: set[int] = {PICTURE}
    walks = list[Walk]()
    for level in range(1, max(levels, default=0) + 2):
        now = [mean for mean, its in enumerate(levels) if its == level]
        ends = sorted({part for mean in now for part in plan.means[mean][0]} if now else set(plan.outputs))
        ahead = (
            _frontier(plan, {mean for mean, its in enumerate(levels) if its >= level})
            if keeps and now
            else set()
        )
        new = ahead - known
        walks.append(walk(plan, band, sorted({*ends, *new} - known) or ends, new, known, again, cell=cell))
        known = {PICTURE} | ahead if keeps and now else known
    largest = max(walks, key=lambda one: one.peak)
    once = sum(
        plan.maps[number].macs * plan.maps[number].height for number in _used(plan, plan.outputs, (PICTURE,))
    )
    return largest, sum(one.work for one in walks) / once


def _frontier(plan: Plan, unknown: set[int]) -> set[int]:
    """Return the maps computable without some means that maps needing these read, or the network returns."""
    ready = {number for number in range(len(plan.maps)) if not plan.needed(number) & unknown}
    waiting = [number for number in _used(plan, plan.outputs, ()) if number not in ready]
    read = {source for number in waiting for source, _ in plan.maps[number].reads}
    return (read & ready) - {PICTURE}


def less_kept(plan: Plan, band: int, keeps: bool, rounds: int = 1) -> tuple[Walk, float, set[int]]:
    """Search for maps whose rows are better computed again in each band than kept, the largest first."""
    again: set[int] = set()
    best, work = in_passes(plan, band, keeps)
    for _ in range(rounds):
        held = sorted((number for number in best.held if number > 0), key=lambda n: -best.held[n])
        for number in held:
            tried, its_work = in_passes(plan, band, keeps, again | {number})
            if tried.peak < best.peak - 2**16:
                best, work, again = tried, its_work, again | {number}
    return best, work, again


class DenseBlock(nn.Module):
    """Five convolutions, each reading all before; the sum with the input (Wang et al. 2018, ESRGAN)."""

    def __init__(self, width: int, growth: int) -> None:
        super().__init__()
        self.convs = nn.ModuleList(
            nn.Conv2d(width + step * growth, growth if step < 4 else width, 3, padding=1) for step in range(5)
        )
        self.act = nn.LeakyReLU(0.2)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, H, W) to the same shape."""
        maps = [x]
        for conv in self.convs[:-1]:
            maps.append(self.act(conv(torch.cat(maps, 1))))
        return x + 0.2 * self.convs[-1](torch.cat(maps, 1))


class ResidualDense(nn.Module):
    """Three dense blocks, and the sum with the input."""

    def __init__(self, width: int, growth: int) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*(DenseBlock(width, growth) for _ in range(3)))

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, H, W) to the same shape."""
        return x + 0.2 * self.blocks(x)


class SuperResolution(nn.Module):
    """Residual-in-residual dense blocks, and a head that makes the picture four times as long and wide."""

    def __init__(self, blocks: int = 23, width: int = 64, growth: int = 32) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, width, 3, padding=1)
        self.trunk = nn.Sequential(*(ResidualDense(width, growth) for _ in range(blocks)))
        self.after, self.once, self.twice, self.high = (
            nn.Conv2d(width, width, 3, padding=1) for _ in range(4)
        )
        self.last, self.act, self.up = (
            nn.Conv2d(width, 3, 3, padding=1),
            nn.LeakyReLU(0.2),
            nn.Upsample(None, 2),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, 3, H, W) to (B, 3, 4 H, 4 W)."""
        x = self.first(x)
        x = x + self.after(self.trunk(x))
        x = self.act(self.once(self.up(x)))
        x = self.act(self.twice(self.up(x)))
        return self.last(self.act(self.high(x)))


class Returned(nn.Module):
    """A network whose call returns one of the maps of its dictionary, as users of the network take it."""

    def __init__(self, network: nn.Module, name: str) -> None:
        super().__init__()
        self.network, self.name = network, name

    def forward(self, x: Tensor) -> Tensor:
        """Return the map of that name."""
        output: Tensor = self.network(x)[self.name]
        return output


def _deeplab() -> nn.Module:
    return Returned(deeplabv3_resnet101(weights=None, weights_backbone=None), "out")


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "unet_resnet34": networks.resnet34_unet,
    "unet": networks.unet,
    "pyramid_resnet50": networks.resnet50_pyramid,
    "deeplabv3_resnet101": _deeplab,
    "esrgan": SuperResolution,
    "d2net": partial(build_model, "recipes.d2net_vgg.network:trunk"),
}


def rows_of_table(name: str, plan: Plan, heights: Sequence[int], most: int) -> Iterator[str]:
    """Yield the table's rows of a network: kept maps and computed again, if it needs means over the image."""
    whole = walk(plan, plan.maps[PICTURE].height, copies=False).peak
    for keeps in (False, True)[: 1 + bool(plan.means)]:
        found = {band: in_passes(plan, band, keeps) for band in heights}
        best = min(found, key=lambda band: found[band][0].peak)
        peak, work = found[best]
        passes = 1 + max((plan.level(mean) for mean in range(len(plan.means))), default=0)
        how = f", {passes} passes, maps {'kept' if keeps else 'computed again'}" if plan.means else ""
        cells = [f"{found[band][0].peak / GIB:.2f}" for band in heights]
        yield f"| {name}{how} | {whole / GIB:.1f} | {' | '.join(cells)} | {work:.2f} |"
        held = sorted(peak.held.items(), key=lambda item: -item[1])[:most]
        for number, size in held:
            yield f"  {plan.maps[number].name if number >= 0 else 'copy of input rows'}: {size / 2**20:.0f} MiB"


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--networks", nargs="*", default=list(NETWORKS), choices=list(NETWORKS))
    parser.add_argument("--onnx", nargs="*", type=Path, default=[], help="networks in ONNX files, besides")
    parser.add_argument("--width", type=int, default=4000)
    parser.add_argument("--height", type=int, default=5024)
    parser.add_argument("--heights", type=int, nargs="+", default=[8, 16, 32, 64, 128], help="rows of a band")
    parser.add_argument("--maps", type=int, default=0, help="print so many of the maps that hold most")
    parser.add_argument("--search", action="store_true", help="search for maps to compute again in each band")
    options = parser.parse_args()
    builders: dict[str, Any] = {name: NETWORKS[name] for name in options.networks}
    builders |= {file.stem: partial(build_model, str(file)) for file in options.onnx}
    print(f"| network | whole | {' | '.join(map(str, options.heights))} | work |")
    print(f"|{'---|' * (len(options.heights) + 3)}")
    for name, build in builders.items():
        try:
            network = build()
        except ImportError as error:
            print(f"| {name} | left out: {error} |")
            continue
        plan = plan_of(network, options.width, options.height)
        for line in rows_of_table(name, plan, options.heights, options.maps):
            print(line, flush=True)
        if options.search:
            for band in options.heights:
                least, work, again = less_kept(plan, band, keeps=bool(plan.means))
                print(
                    f"  bands of {band}, {len(again)} maps computed again: {least.peak / GIB:.2f}, work {work:.2f}"
                )


if __name__ == "__main__":
    main()
