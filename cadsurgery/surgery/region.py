"""Find the stride at which each value of a network is needed: the backward pass over its graph, in input pixels.

A pointwise operation needs its input at the stride of its output. A window needs its input no finer than the distance
of its taps. So coarsening moves towards the input until a spatial operation absorbs it by computing fewer outputs.
"""

from __future__ import annotations

import operator
from collections.abc import Collection
from dataclasses import dataclass, field
from functools import cached_property

from torch import fx

from cadsurgery.following.graphs import upstream
from cadsurgery.surgery.flow import Flow, Role

# A region of floors begins behind barriers if it has at least this share of the MACs then, and so many times the MACs
# that it has before them.
_LEAST, _MUCH = 0.05, 2


@dataclass(frozen=True, eq=False)
class Region:
    """The part of a network that runs on lattices, for one high output stride. It tells what runs on elements, and on
    which lattices; later passes read that in the plan's decisions.

    Attributes:
        flow: the forward pass that it was found from.
        strides: output strides of the lattices, the high one first.
        outside: maps coarser than the high output stride that are computed dense because their inputs left the region.
            They are read as elements again where they are joined with maps of the region.
        needed: output stride of the lattice that each other map is computed on.
        before: where level maps are floors, the dense maps that the region reads: the image and what is computed from
            its pixels alone, and a beginning that has to stay dense. Otherwise None.
    """

    flow: Flow = field(repr=False)
    strides: tuple[int, ...]
    outside: frozenset[fx.Node]
    needed: dict[fx.Node, int]
    before: frozenset[fx.Node] | None = None

    @property
    def floors(self) -> bool:
        """True if maps become coarser than the network's own grid, see `Geometry.floors`."""
        return self.before is not None

    def stage(self, node: fx.Node) -> int:
        """Return the stage of the lattice that a map is computed on; 0 is the dense map that the region reads."""
        if self.before is None:
            return self.strides.index(self.needed[node])
        return 0 if node in self.before else 1 + self.strides.index(self.needed[node])

    def stages(self, node: fx.Node) -> tuple[int, int]:
        """Return the stages of the lattices that a node on elements reads and writes."""
        before = min(self.stage(source) for source in self.flow.maps(node) if source not in self.outside)
        return before, self.stage(node) if node in self.needed else before

    def has(self, node: fx.Node) -> bool:
        """True for a map beyond the first lattice."""
        return node in self.needed and self.stage(node) > 0

    # What is cached is valid only after the pass.

    @cached_property
    def maps(self) -> frozenset[fx.Node]:
        """The maps beyond the first lattice, and the padded maps that windows of the region read."""
        pads = (pad for pad in self.flow.pads if any(map(self.has, pad.users)))
        return frozenset((*filter(self.has, self.needed), *pads))

    @cached_property
    def on_elements(self) -> frozenset[fx.Node]:
        """The nodes that run on elements: those of these maps, and those that read elements last."""
        nodes = self.flow.graph.nodes
        return self.maps | {node for node in nodes if self.reads_last(node, self.read_by(node))}

    @cached_property
    def readers(self) -> list[fx.Node]:
        """The operations of the region that read maps beyond the first lattice."""
        return [
            node
            for node in self.flow.graph.nodes
            if any(map(self.has, self.flow.maps(node)))
            and node not in self.flow.barriers
            and (node in self.needed or self.flow.treatments[node].kind == "global")
        ]

    def read_by(self, node: fx.Node) -> list[fx.Node]:
        """Return the maps of the region that a node reads."""
        return [source for source in self.flow.maps(node) if source in self.maps]

    def reads_last(self, node: fx.Node, sources: list[fx.Node]) -> bool:
        """True if a node reads elements and returns a dense result: one vector per image, or a map at least as fine as
        the high output stride."""
        flow = self.flow
        if not sources or node in flow.barriers or not self.outside.isdisjoint(flow.maps(node)):
            return False
        if flow.treatments[node].kind != "resize":
            return flow.treatments[node].kind == "global"
        high = self.strides[0]
        is_fine = flow.grid[node] == high or (flow.at_exit(node) and flow.grid[node] < high)
        return is_fine and not self.floors

    def dense_readers(self, node: fx.Node) -> list[fx.Node]:
        """Return the users of a map of the region that need it as a dense tensor."""
        return [
            user
            for user in node.users
            if not self.has(user) and not self.reads_last(user, [node]) and not self.flow.only_asks(user)
        ]


def region_of(flow: Flow, high: int) -> Region:
    """Find the region for a high output stride: all coarser maps, up to the barriers.

    Maps at the high output stride or finer are dense and exact wherever they are in the graph. The region can therefore
    start again where such a map is downsampled, as in networks with parallel branches.
    """
    outside = set[fx.Node]()
    for node in flow.graph.nodes:
        coarse = flow.role[node] is Role.MAP and flow.restored[node] > high
        if coarse and (node in flow.barriers or _reads_outside(node, flow, high, outside)):
            outside.add(node)
    inside = [node for node in flow.graph.nodes if flow.role[node] is Role.MAP and node not in outside]
    strides = [high]
    for stride in sorted({flow.restored[node] for node in inside if node not in flow.barriers}):
        if stride > strides[-1] and stride % strides[-1] == 0:
            strides.append(stride)
    region = Region(flow, tuple(strides), frozenset(outside), {})
    for node in reversed(inside):
        before = any(flow.grid[source] < high for source in flow.maps(node))
        if node in flow.barriers or before or _reads_outside(node, flow, high, outside):
            region.needed[node] = high
        else:
            uses = [use for use in (_need(node, user, flow, region) for user in node.users) if use]
            region.needed[node] = min(uses, default=_rounded_down(region, flow.restored[node]))
        if node not in flow.shapes:  # a split: its parts, such as halves of the channels, share its lattice
            parts = [part for part in node.users if part in region.needed]
            region.needed.update(dict.fromkeys(parts, region.needed[node]))
    _finish_dense(inside, flow, region)
    entering = {
        source
        for node in inside
        for source in flow.maps(node)
        if region.stage(node) and source not in outside and not region.stage(source)
    }
    foreign = any(flow.grid[node] != high for node in entering)  # the fine map would not be the network's own
    # The first size is that of the fine map. Padding belongs to the window that reads it, not to a map.
    sizes = [flow.images[node] for node in flow.graph.nodes if node in entering and node not in flow.pads]
    grown = any(length > most for size in sizes for length, most in zip(size, sizes[0], strict=True))
    if foreign or grown or (sizes and any(_outgrows(node, sizes[0], flow, region) for node in inside)):
        return Region(flow, (high,), frozenset(outside), dict.fromkeys(inside, high))
    return region


def floor_region(flow: Flow, coarsest: int) -> Region | None:
    """Find the region in which maps may become as coarse as `coarsest` pixels: everything from the first operation with
    weights on that no barrier cuts off. Every map of it stays on the network's own grid where it is kept. None if the
    strides of the maps do not lead to `coarsest`.

    Where barriers near the beginning cut off most of the network, it begins behind them instead: what they read is
    computed dense, and its map is the fine map of the region.
    """
    best = _floor_region(flow, coarsest)
    total, beginning = sum(flow.macs.values()), set[fx.Node]()
    most = max(_LEAST * total, _MUCH * _macs_of(best))
    for node in flow.barriers if most < total else ():
        if flow.role[node] is Role.MAP and flow.grid[node] < coarsest and node not in beginning:
            beginning |= {source for source in upstream(node) if flow.role[source] is Role.MAP}
            behind = _floor_region(flow, coarsest, frozenset(beginning))
            if (macs := _macs_of(behind)) > most:
                best, most = behind, macs
    return best


def _macs_of(region: Region | None) -> int:
    """Return the multiply-accumulates of the maps beyond the first lattice."""
    return 0 if region is None else sum(region.flow.macs[node] for node in region.needed if region.has(node))


def _floor_region(flow: Flow, coarsest: int, beginning: frozenset[fx.Node] = frozenset()) -> Region | None:
    """Find the region of `floor_region` behind the maps of a beginning that is computed dense."""
    maps = [node for node in flow.graph.nodes if flow.role[node] is Role.MAP]
    read = [node for node in beginning if any(user in maps and user not in beginning for user in node.users)]
    high = max((flow.grid[node] for node in read), default=1)
    sizes = {flow.images[node] for node in read if flow.grid[node] == high}
    image = flow.example.shape[2:]
    if len(sizes) > 1 or any(
        2 * high * length > 3 * side for size in sizes for length, side in zip(size, image, strict=True)
    ):
        return None  # there is no fine map that all of them have, or it is an enlarged picture
    larger = set[fx.Node]()  # maps with more samples than the fine map, such as the image enlarged beside it
    while True:
        before, outside = _dense_of_floors(maps, flow, beginning, high, larger)
        if (found := _larger_than_fine(before, outside, flow, high)) <= larger:
            break
        larger |= found
    inside = [node for node in maps if node not in outside]
    strides = [high]
    for grid in sorted({flow.grid[node] for node in inside if node not in before}):
        if grid > strides[-1] and grid % strides[-1] == 0:
            strides.append(grid)
    while strides[-1] < coarsest:
        strides.append(2 * strides[-1])
    own = {flow.grid[node] for node in inside if node not in before}
    if coarsest not in strides[1:] or not own <= set(strides):
        return None
    needed = {node: flow.grid[node] for node in inside}
    return Region(flow, tuple(strides), frozenset(outside), needed, frozenset(before))


def _dense_of_floors(
    maps: list[fx.Node],
    flow: Flow,
    beginning: frozenset[fx.Node],
    high: int,
    larger: Collection[fx.Node],
) -> tuple[set[fx.Node], set[fx.Node]]:
    """Return the dense maps that a region of floors reads, and the maps that are outside of it, among them `larger`."""
    before, outside = set(beginning), set(larger)
    for node in maps:
        of_pixels = high == 1 and (_is_of_pixels(node, flow, before) or _grows(node, flow, before))
        if node in outside or node in before:
            continue
        if of_pixels:
            before.add(node)
            continue
        is_finer = flow.grid[node] < high or any(
            source in before and flow.grid[source] < high for source in flow.maps(node)
        )
        if node in flow.barriers or is_finer or _reads_outside(node, flow, 0, outside):
            outside.add(node)
    return before, outside


def _larger_than_fine(
    before: Collection[fx.Node], outside: Collection[fx.Node], flow: Flow, high: int
) -> set[fx.Node]:
    """Return the maps that a region of floors reads and that have more samples than its fine map, which is the first of
    the image's size or, where there is none, the first of all."""
    read = {
        source
        for node in flow.grid
        if node not in before and node not in outside and flow.role[node] is Role.MAP
        for source in flow.maps(node)
        if source in before
    }
    sizes = {node: flow.images[node] for node in flow.graph.nodes if node in read and node not in flow.pads}
    of_image = (size for size in sizes.values() if size == tuple(flow.example.shape[2:]) and high == 1)
    fine = next(of_image, next(iter(sizes.values()), ()))
    return {node for node, size in sizes.items() if any(map(operator.gt, size, fine))}


def _is_of_pixels(node: fx.Node, flow: Flow, before: Collection[fx.Node]) -> bool:
    """True for the image and for what is computed from each of its pixels alone, without weights."""
    if not flow.maps(node):
        return flow.grid[node] == 1 and node not in flow.barriers
    alone = flow.treatments[node].kind in ("pointwise", "join") and not flow.macs[node]
    return alone and node not in flow.barriers and all(source in before for source in flow.maps(node))


def _grows(node: fx.Node, flow: Flow, before: Collection[fx.Node]) -> bool:
    """True for a barrier in front, such as a convolution that pads the image by so much that its map grows: its map is
    computed whole, and the region begins behind it."""
    sources = flow.maps(node)
    return (
        bool(sources)
        and node in flow.barriers
        and flow.grid[node] == 1
        and all(source in before for source in sources)
    )


def _outgrows(node: fx.Node, fine: tuple[int, int], flow: Flow, region: Region) -> bool:
    """True if a resize inside the region gives more samples than the fine map holds, as to the size of another branch,
    whose strides round up where those of this branch round down."""
    sources = [region.stage(source) for source in flow.maps(node) if source in region.needed]
    if flow.treatments[node].kind != "resize" or region.stage(node) >= max(sources, default=0):
        return False
    spacing, side = (stride // region.strides[0] for stride in (flow.grid[node], region.strides[-1]))
    rooms = (-(-length // side) * side for length in fine)  # whole cells
    samples = flow.images.get(node, (0, 0))
    return any((count - 1) * spacing >= room for count, room in zip(samples, rooms, strict=True))


def _finish_dense(inside: list[fx.Node], flow: Flow, region: Region) -> None:
    """Leave norms and activations behind an operation that runs dense on its dense map, where they become a part of it,
    instead of on the elements that are read from the map."""
    dense = {node for node in inside if node in flow.barriers}
    for node in inside:
        sources = flow.maps(node)
        is_behind = len(sources) == 1 and sources[0] in dense and len(sources[0].users) == 1
        if node not in flow.shapes:  # a split is no map; its parts would enter one by one
            continue
        if is_behind and flow.treatments[node].kind == "pointwise" and node not in flow.barriers:
            region.needed[node] = region.strides[0]
            dense.add(node)


def _reads_outside(node: fx.Node, flow: Flow, high: int, outside: Collection[fx.Node]) -> bool:
    """True if a node reads maps that left the region, except in a join with maps of the region."""
    left = [source for source in flow.maps(node) if source in outside]
    joins = flow.treatments[node].kind == "join" and len(left) < len(flow.maps(node))
    return bool(left) and not (joins and all(flow.comes_back(source, high) for source in left))


def _need(node: fx.Node, user: fx.Node, flow: Flow, region: Region) -> int:
    """Return the coarsest stride at which `user` can read its input `node`; 0 if it does not read values."""
    treatment = flow.treatments[user]
    if flow.role[user] is Role.OTHER and treatment.kind == "shape" and user.op != "output":
        return 0
    if user not in region.needed or user in flow.barriers:  # the output, a global operation, a dense reader
        return _rounded_down(region, flow.restored[node])
    if treatment.kind == "resize":
        return _rounded_down(region, min(flow.restored[node], region.needed[user] * treatment.scale))
    window = treatment.window
    if window is None or treatment.kind == "pad":
        return region.needed[user]
    need = _rounded_down(region, region.needed[user] // window.stride)
    if not window.is_pointwise and user not in flow.inside_cells:
        need = _rounded_down(region, need, *(step * flow.grid[node] for step in window.steps))
    return need


def _rounded_down(region: Region, limit: int, *multiples: int) -> int:
    """Return the largest stride of the region that is at most `limit` and divides all `multiples`."""
    fitting = [s for s in region.strides if s <= limit and all(m % s == 0 for m in multiples)]
    return fitting[-1] if fitting else region.strides[0]


def dilated_by_design(flow: Flow, region: Region) -> frozenset[fx.Node]:
    """Return nodes whose grown dilation does not replace a removed stride, because their input is needed finer."""

    def available_at(node: fx.Node) -> int:
        """Return the stride at which a node's input is available; pointwise operations pass a coarsening on."""
        source = flow.maps(node)[0]
        while source in region.needed and flow.treatments[source].kind == "pointwise":
            before = flow.maps(source)[0]
            if region.needed.get(before, 0) < region.needed[source]:
                return region.needed.get(before, 0)
            source = before
        return region.needed.get(source, region.strides[-1])

    return frozenset(
        node
        for node, stride in flow.grown.items()
        if node in region.needed and available_at(node) < min(stride, region.strides[-1])
    )
