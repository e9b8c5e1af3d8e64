"""Find out where a network downsamples: the forward pass over its graph. All distances are in input pixels.

The pass finds the `grid` of each value (its output stride in the network as it is) and `restored` (its output stride
if removed strides were restored: where the dilation doubles along a chain, a stride was removed). The backward pass is
in `region`.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace
from enum import Enum
from functools import cached_property

from torch import fx

from cadsurgery.elements.axes import NCHW, is_flat
from cadsurgery.following.facts import Facts, MapFacts
from cadsurgery.following.graphs import and_after
from cadsurgery.following.moved_views import View, view_of
from cadsurgery.support.torch_operations import is_in_place, is_kind
from cadsurgery.surgery.rules import treat
from cadsurgery.surgery.treatment import Barrier, Cause, Treatment, is_mixer, why_whole


class Role(Enum):
    """Kind of value that a node returns."""

    MAP = "map"  # one sample per grid position of each image
    VECTOR = "vector"  # one vector per image, from a global operation
    OTHER = "other"  # sizes, constants, parameters, values of any other shape


@dataclass(frozen=True, eq=False)
class Flow(MapFacts):
    """Roles, treatments and output strides of all nodes, and the operations that cannot run on elements; with what the
    rules are given, the facts about the network and its maps.

    Attributes:
        role: role of each node.
        treatments: treatment of each node by its rule.
        grid: output stride of each map in the network as it is.
        restored: output stride of each map if removed strides were restored.
        barriers: operations on maps that cannot run on elements, with the reason.
        foreign: values computed by barriers from maps that are no maps themselves.
        grown: nodes where a removed stride was found, with the output stride after them.
        most: the requested low output stride, once it is known.
        removed_up_to: the largest output stride that a dilation may restore; None for no limit.
        through_heads: true if windows whose taps fall inside cells do not end the region.
        inside_cells: such windows.
        views: how the positions of each map were moved since the picture; see `views`.
    """

    role: dict[fx.Node, Role] = field(default_factory=dict)
    treatments: dict[fx.Node, Treatment] = field(default_factory=dict)
    grid: dict[fx.Node, int] = field(default_factory=dict)
    restored: dict[fx.Node, int] = field(default_factory=dict)
    barriers: dict[fx.Node, Barrier] = field(default_factory=dict)
    grown: dict[fx.Node, int] = field(default_factory=dict)
    foreign: set[fx.Node] = field(default_factory=set)
    most: int | None = None
    removed_up_to: int | None = None
    through_heads: bool = False
    inside_cells: set[fx.Node] = field(default_factory=set)
    views: dict[fx.Node, View] = field(default_factory=dict)

    def cell(self, node: fx.Node) -> int:
        """Return the side in pixels of a map's largest cell: its restored output stride, at most the low one."""
        return min(self.restored[node], self.most or self.restored[node])

    def maps(self, node: fx.Node) -> list[fx.Node]:
        """Return the maps that a node reads."""
        return [source for source in node.all_input_nodes if self.role[source] is Role.MAP]

    def only_asks(self, node: fx.Node) -> bool:
        """True if a node reads only the size of a map."""
        asks = self.treatments[node].kind == "shape" and node.op != "output"
        return asks or self.role[node] is Role.VECTOR

    def at_exit(self, node: fx.Node) -> bool:
        """True if a resize can read elements at arbitrary points and return a dense map."""
        operation = self.treatments[node].operation
        return (
            self.treatments[node].kind == "resize" and operation is not None and operation.at_exit is not None
        )

    @cached_property
    def has_attention(self) -> bool:
        """True if an operation mixes all positions of the image; valid only after the pass."""
        return bool(position_mixers(self))

    def comes_back(self, node: fx.Node, high: int) -> bool:
        """True if a map that is computed dense can be joined with maps of the region: a floating-point map coarser than
        the high output stride. In networks with attention maps come back under floors alone (`high` is 0), where each
        keeps the network's own output stride."""
        shape = self.shapes.get(node, ())
        is_plain = len(shape) == 4 and self.layout(node) == NCHW and node in self.floating
        return is_plain and self.grid[node] > high and not (high and self.has_attention)

    @cached_property
    def last(self) -> frozenset[fx.Node]:
        """Resizes that are followed by pointwise operations only; valid only after the pass."""
        return frozenset(
            node
            for node, treatment in self.treatments.items()
            if treatment.kind == "resize" and self.maps(node) and _is_last(node, self)
        )


_OTHER = Treatment("shape")


def flow_forward(
    facts: Facts,
    refused: Callable[[fx.Node, Sequence[fx.Node]], Barrier | None] = lambda node, maps: None,
    by_design: frozenset[fx.Node] = frozenset(),
    most: int | None = None,
    removed_up_to: int | None = None,
    through_heads: bool = False,
) -> Flow:
    """Compute roles and output strides from the input on.

    Args:
        facts: facts about the network.
        refused: function that returns why a node that reads certain maps may not be in the region, or None.
        by_design: nodes whose dilation grows although no stride was removed there.
        most: the requested low output stride; by default the network's lowest.
        removed_up_to: the largest output stride that a dilation may restore: with 0 all dilations count as the
            network's design, with None none of them.
        through_heads: see `Flow`.
    """
    observed = {field.name: getattr(facts, field.name) for field in fields(Facts)}
    flow = Flow(**observed, most=most, removed_up_to=removed_up_to, through_heads=through_heads)
    for node in facts.graph.nodes:
        if node.op == "placeholder" or node in facts.given:
            is_image = facts.is_image(node)
            flow.role[node] = Role.MAP if is_image else Role.OTHER
            flow.treatments[node] = _OTHER
            if is_image:
                flow.grid[node], flow.restored[node], flow.views[node] = 1, 1, ()
                _note_map(node, NCHW, flow)
            continue
        maps = flow.maps(node)
        vector = any(flow.role[source] is Role.VECTOR for source in node.all_input_nodes)
        treatment = _OTHER if node.op == "output" else treat(node, flow)
        treatment = flow.treatments[node] = _to_known_grid(node, maps, treatment, flow)
        if not maps and any(source in flow.foreign for source in node.all_input_nodes):
            _behind_foreign(node, flow)
        elif not maps:
            flow.role[node] = Role.VECTOR if vector else Role.OTHER
        elif node.op == "output" or treatment.kind == "shape":
            flow.role[node] = Role.OTHER
        elif treatment.kind == "broadcast" and node.args[0] not in maps:  # reads only the map's size
            flow.role[node] = Role.VECTOR
        elif barrier := refused(node, maps) or _barrier(node, maps, flow):
            flow.barriers[node] = barrier
            _behind_barrier(node, maps[0], flow)
        elif treatment.kind == "global":
            flow.role[node] = Role.VECTOR
        else:
            flow.role[node] = Role.MAP
            _advance(node, maps, flow, by_design)
            _note_map(node, treatment.layout or flow.layout(maps[0]), flow, maps[0])
            if treatment.kind == "pad" and treatment.window is not None:
                flow.pads[node] = treatment.window
        if flow.role[node] is Role.MAP:
            flow.views[node] = view_of(node, maps, flow.views, flow, flow.grid)
    return flow


def _to_known_grid(node: fx.Node, maps: list[fx.Node], treatment: Treatment, flow: Flow) -> Treatment:
    """Set the factor of a resize to a given size from the grids of maps of that size; on small maps several factors
    would fit the sizes."""
    images = flow.images
    by_size = treatment.kind == "resize" and not treatment.last_only and dict(treatment.arguments).get("size")
    if not by_size or not maps or len(flow.shapes.get(node, ())) != 4:
        return treatment
    before, after = images[maps[0]], tuple(flow.shapes[node][2:])
    grids = {flow.grid[source] for source, size in images.items() if size == after}
    scales = sorted(flow.grid[maps[0]] // grid for grid in grids if flow.grid[maps[0]] % grid == 0)
    if treatment.scale in scales:
        return treatment
    fitting = (s for s in scales if all(abs(a - b * s) < s for a, b in zip(after, before, strict=True)))
    return replace(treatment, scale=next(fitting, treatment.scale))


def _note_map(node: fx.Node, layout: str, flow: Flow, source: fx.Node | None = None) -> None:
    """Record the axes and the image size of a map."""
    shape = flow.shapes.get(node)
    flow.layouts[node] = layout
    if shape is not None and "h" in layout and len(shape) == len(layout):
        flow.images[node] = (shape[layout.index("h")], shape[layout.index("w")])
    elif source is not None:
        flow.images[node] = flow.images[source]


def _behind_barrier(node: fx.Node, source: fx.Node, flow: Flow) -> None:
    """Set the role of a result that is computed dense: a map on some grid, or something else."""
    treatment = flow.treatments[node]
    parts = node not in flow.shapes  # e.g. the parts of a split map
    layout = treatment.layout if treatment.kind != "barrier" else ""
    same = parts or flow.shapes[node] == flow.shapes.get(source)
    layout = layout or (flow.layout(source) if same else NCHW)
    if not parts and len(flow.shapes[node]) != len(layout):
        flow.role[node] = Role.OTHER
        flow.foreign.add(node)
        return
    _note_map(node, layout, flow, source)
    window = treatment.window
    grid = flow.grid[source] * window.stride // window.finer if window is not None else 0
    if not grid:
        before, after = flow.images[source][0], flow.images[node][0]
        grid = flow.grid[source] * round(before / max(1, after))
        if after > before:
            grid = max(1, flow.grid[source] // round(after / max(1, before)))
        alike = [flow.grid[other] for other in flow.grid if flow.images[other] == flow.images[node]]
        grid = grid if grid in alike or not alike else alike[-1]  # small maps round sizes
    flow.role[node] = Role.MAP
    flow.grid[node] = flow.restored[node] = grid


def _behind_foreign(node: fx.Node, flow: Flow) -> None:
    """Set the role of a value computed from foreign values: a map if it looks like one, else a foreign value, too."""
    flow.role[node] = Role.OTHER
    if node in flow.shapes:
        flow.foreign.add(node)
    grid = _looks_like_map(flow.shapes.get(node, ()), flow.example.shape) if node.op != "output" else 0
    if grid:
        flow.role[node] = Role.MAP
        flow.barriers[node] = Barrier("is computed from values that are no map")
        flow.grid[node] = flow.restored[node] = grid
        _note_map(node, NCHW, flow)


def _looks_like_map(shape: Sequence[int], image: Sequence[int]) -> int:
    """Return the output stride of a value that has the shape of a map of the image; 0 if it has another shape."""
    if len(shape) != 4 or shape[0] != image[0] or min(shape[2:]) < 2:
        return 0
    grid = round(image[2] / shape[2])
    fits = (
        have in (size // grid, -(-size // grid))
        for have, size in zip(shape[2:], image[2:], strict=True)
        if grid
    )
    return grid if grid and all(fits) else 0


def _barrier(node: fx.Node, maps: list[fx.Node], flow: Flow) -> Barrier | None:
    """Return why a node cannot run on elements; None if it can."""
    treatment = flow.treatments[node]
    if what := _moved(maps, flow):
        return Barrier(f"reads a {what} copy of the picture: the mask lies on the other one", Cause.COPY)
    if treatment.kind == "barrier":
        return Barrier(treatment.why, treatment.cause)
    if misfit := _misfit(node, maps, flow):
        return Barrier(misfit)
    if treatment.kind == "resize" and flow.restored[maps[0]] != flow.grid[maps[0]]:
        return Barrier("changes the resolution of a dilated map", Cause.CELLS)
    inside = why_inside_cells(node, maps, flow)
    if inside and flow.through_heads:
        flow.inside_cells.add(node)
        return None
    return Barrier(inside, Cause.CELLS) if inside else None


def _moved(maps: Sequence[fx.Node], flow: Flow) -> str:
    """Return how the copy of the picture was moved that all of some maps show; "" if one shows the picture itself."""
    return flow.views[maps[0]][-1].what if all(flow.views[source] for source in maps) else ""


def copy_read(node: fx.Node, flow: Flow) -> str:
    """Return how the copy of the picture was moved that a node reads, which therefore runs dense; else ""."""
    barrier = flow.barriers.get(node)
    return _moved(flow.maps(node), flow) if barrier is not None and barrier.cause is Cause.COPY else ""


def _misfit(node: fx.Node, maps: list[fx.Node], flow: Flow) -> str:
    """Return why the treatment of a node does not apply here, or ""."""
    treatment = flow.treatments[node]
    layout = flow.layout(maps[0])
    if any(flow.treatments[source].leaves_by for source in maps):
        return "reads the indices of a pooling, numbers of the places of a dense map"
    if treatment.kind == "broadcast":
        return "resizes a map"
    if treatment.kind == "join":
        if len({flow.grid[source] for source in maps}) > 1:
            return "joins maps of different output strides"
        if any(not _are_alike(flow.layout(source), layout, treatment) for source in maps):
            return "joins maps whose axes are ordered differently"
        others = [source for source in node.all_input_nodes if source not in maps]
        if not all(_is_flat(source, layout, maps, flow) for source in others):
            return "joins a map with a value that has its own extent in the image, e.g. a position embedding"
        return ""
    expected = [treatment.reads or node.args[0], *(v for _, v in treatment.arguments if v in maps)]
    if set(maps) != set(expected) or len({flow.grid[source] for source in maps}) > 1:
        return "reads a map as something else than its input"
    elementwise = treatment.kind == "pointwise" and not treatment.call
    if treatment.axes not in ("", layout) and not (elementwise or treatment.kind == "global"):
        return f"needs a map of axes {treatment.axes}, not {layout}"
    if treatment.kind == "resize":
        if treatment.last_only:
            return treatment.last_only
        if flow.grid[maps[0]] % treatment.scale:
            return "makes the map finer than the image"
    return ""


def _are_alike(first: str, second: str, treatment: Treatment) -> bool:
    """True if a join can combine maps of two layouts; without a layout of its own it takes any channel axes."""
    if treatment.axes:
        return first == second
    return first.replace("c", "") == second.replace("c", "")


def why_inside_cells(node: fx.Node, maps: list[fx.Node], flow: Flow) -> str:
    """Return why a window reads points inside the cells of its map, or ""."""
    treatment = flow.treatments[node]
    if treatment.kind == "window" and treatment.window is not None and not treatment.window.is_pointwise:
        cell, reaches = flow.cell(maps[0]), [step * flow.grid[maps[0]] for step in treatment.window.dilation]
        if any(reach % cell for reach in reaches):
            apart = next(reach for reach in reaches if reach % cell)
            return f"its taps are {apart} pixels apart, which is no multiple of the cells' {cell} pixels"
    return ""


def _is_flat(source: fx.Node, layout: str, maps: list[fx.Node], flow: Flow) -> bool:
    """True if a value is the same at all positions: a number, a parameter, or one vector per image, also broadcast to
    the map's size."""
    treatment = flow.treatments[source]
    if treatment.kind == "broadcast" and treatment.arguments:
        return layout == NCHW and tuple(flow.shapes[source][2:]) == flow.images[maps[0]]
    filled = is_filled(source) and flow.shapes[source][2:] == flow.shapes[maps[0]][2:] and layout == NCHW
    return filled or treatment.kind == "broadcast" or is_flat(flow.shapes.get(source, ()), layout)


def is_filled(node: fx.Node) -> bool:
    """True if a tensor holds the same number everywhere, such as zeros concatenated to a map as new channels."""
    writes = (user for user in node.users if user.args and user.args[0] is node and user.op != "call_module")
    changed = any(
        write.target is operator.setitem or is_in_place(write.target, write.args, write.kwargs)
        for write in writes
    )
    if changed or node.op not in ("call_function", "call_method"):
        return False
    source = node.args[0] if node.args else None
    copies = is_kind(node.target, "copies", "converts") and isinstance(source, fx.Node) and is_filled(source)
    return copies or is_kind(node.target, "fills")


def _advance(node: fx.Node, maps: list[fx.Node], flow: Flow, by_design: frozenset[fx.Node]) -> None:
    grid, restored = flow.grid[maps[0]], max(flow.restored[source] for source in maps)
    treatment = flow.treatments[node]
    window = treatment.window
    if window is not None and treatment.kind == "window":
        reach = min(window.dilation) * grid
        growth = reach // restored if not window.is_pointwise and reach % restored == 0 else 1
        removed = growth > 1 and growth & (growth - 1) == 0 and node not in by_design
        if removed and (flow.removed_up_to is None or restored * growth <= flow.removed_up_to):
            restored *= growth
            flow.grown[node] = restored
        grid, restored = grid * window.stride, restored * window.stride
    flow.grid[node], flow.restored[node] = grid // treatment.scale, restored // treatment.scale


def position_mixers(flow: Flow) -> list[fx.Node]:
    """Return operations that mix positions of an image other than by windows, means or resizing: attention, recurrence,
    matrix products over positions. Convolutional networks have none."""
    barriers = flow.barriers
    return [
        node
        for node in flow.graph.nodes
        if is_mixer(node, flow)
        or (node in barriers and (barriers[node].cause is Cause.POSITIONS or _is_foreign_leaf(node, flow)))
    ]


def _is_foreign_leaf(node: fx.Node, flow: Flow) -> bool:
    """True if a node is a library's module that was not traced into and may do anything."""
    made_of = node.op == "call_module" and any(True for _ in flow.module(node).children())
    foreign = made_of and not type(flow.module(node)).__module__.startswith("torch.")
    return foreign and not why_whole(node, flow)


def _is_last(node: fx.Node, flow: Flow) -> bool:
    """True if no operation after a node reads neighbours, resizes or reduces, and the node's result is only joined with
    full-resolution maps and maps made of resizes."""
    after = and_after(node)
    if {flow.treatments[user].kind for user in after - {node}} & {"window", "global", "resize"}:
        return False
    joined = {source for user in after for source in flow.maps(user)} - after - set(flow.maps(node))
    return all(flow.grid[source] == 1 or _is_made_of_resizes(source, flow) for source in joined)


def _is_made_of_resizes(node: fx.Node, flow: Flow) -> bool:
    """True if a map is computed pointwise from resized maps."""
    kind, sources = flow.treatments[node].kind, flow.maps(node)
    if kind == "resize":
        return flow.treatments[node].window is None
    return (
        kind in ("pointwise", "join") and bool(sources) and all(_is_made_of_resizes(s, flow) for s in sources)
    )
