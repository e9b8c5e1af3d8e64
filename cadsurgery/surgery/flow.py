"""Where a network downsamples, and at which stride each of its values has to be known.

Two passes over the graph, in input pixels throughout:

- forward: the `grid` of each value (its output stride in the network as it is) and its `spacing` (the same
  once removed strides are put back: where the dilation of a chain doubles, a stride was removed);
- backward: the stride at which each value is `needed`. A pointwise operation needs of its input what is
  needed of its output; a window needs no finer grid than its taps reach. So a coarsening moves towards the
  input until a spatial operation absorbs it by computing only the kept outputs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum

from torch import fx

from cadsurgery.surgery.facts import Facts
from cadsurgery.surgery.rules import Treatment


class Role(Enum):
    """What kind of value a node yields."""

    MAP = "map"  # (B, C, H, W), one sample per grid position
    VECTOR = "vector"  # one vector per image, from a global operation
    OTHER = "other"  # sizes, constants, parameters, values of any other shape


@dataclass
class Flow:
    """Roles, grids and spacings of all nodes, and the operations that no lattice passes.

    Attributes:
        role: of each node.
        grid: output stride of each map in the network as it is.
        spacing: output stride of each map with removed strides put back.
        barriers: operations on maps without a treatment, and why.
    """

    role: dict[fx.Node, Role] = field(default_factory=dict)
    grid: dict[fx.Node, int] = field(default_factory=dict)
    spacing: dict[fx.Node, int] = field(default_factory=dict)
    barriers: dict[fx.Node, str] = field(default_factory=dict)
    grown: dict[fx.Node, int] = field(default_factory=dict)

    def maps(self, node: fx.Node) -> list[fx.Node]:
        """The maps a node reads."""
        return [source for source in node.all_input_nodes if self.role[source] is Role.MAP]


def flow_forward(
    facts: Facts,
    treatments: dict[fx.Node, Treatment],
    refused: Callable[[fx.Node], str] = lambda node: "",
    by_design: frozenset[fx.Node] = frozenset(),
) -> Flow:
    """Grids and spacings from the input on.

    Args:
        facts: of the network.
        treatments: of every node, by its rule.
        refused: why a node may not be in the region, or "".
        by_design: nodes whose dilation grows although no stride was removed there.
    """
    flow = Flow()
    for node in facts.graph.nodes:
        if node.op == "placeholder":
            first = facts.is_map(node) and not flow.grid
            flow.role[node] = Role.MAP if first else Role.OTHER
            if first:
                flow.grid[node] = flow.spacing[node] = 1
            continue
        maps = flow.maps(node)
        treatment = treatments[node]
        if not maps:
            vector = any(flow.role[source] is Role.VECTOR for source in node.all_input_nodes)
            flow.role[node] = Role.VECTOR if vector else Role.OTHER
        elif node.op == "output" or treatment.kind == "shape":
            flow.role[node] = Role.OTHER
        elif treatment.kind == "broadcast" and node.args[0] not in maps:  # reads the map for its size only
            flow.role[node] = Role.VECTOR
        elif reason := refused(node) or _misfit(node, maps, treatments, flow, facts):
            flow.barriers[node] = reason
            several = node not in facts.shapes  # e.g. the parts of a split map
            flow.role[node] = Role.MAP if several or facts.is_map(node) else Role.OTHER
            if flow.role[node] is Role.MAP:
                window = treatment.window
                known = flow.grid[maps[0]] * window.stride if window else 0
                flow.grid[node] = known or _observed_grid(node, maps[0], flow, facts)
                flow.spacing[node] = flow.grid[node]
        elif treatment.kind == "global":
            flow.role[node] = Role.VECTOR
        else:
            flow.role[node] = Role.MAP
            _advance(node, maps, treatment, flow, by_design)
    return flow


def _misfit(
    node: fx.Node, maps: list[fx.Node], treatments: dict[fx.Node, Treatment], flow: Flow, facts: Facts
) -> str:
    """Why the treatment of a node does not apply here, or ""."""
    treatment = treatments[node]
    if treatment.kind == "barrier":
        return treatment.why
    if treatment.kind == "broadcast":
        return "resizes a map"
    if treatment.kind == "join":
        if len({flow.grid[source] for source in maps}) > 1:
            return "joins maps of different output strides"
        others = [source for source in node.all_input_nodes if source not in maps]
        if not all(_is_flat(source, treatments, facts) for source in others):
            return "joins a map with a value of another shape"
        return ""
    if maps != [node.args[0]]:
        return "reads a map as something else than its input"
    if treatment.window is not None and not treatment.window.is_pointwise:
        spacing = flow.spacing[maps[0]]
        reaches = [step * flow.grid[maps[0]] for step in treatment.window.dilation]
        if any(reach % spacing for reach in reaches):
            return f"its taps, {min(reaches)} pixels apart, fall inside cells of {spacing} pixels"
    return ""


def _is_flat(source: fx.Node, treatments: dict[fx.Node, Treatment], facts: Facts) -> bool:
    """Whether a value has no extent in the image: a number, a parameter, one vector per image."""
    shape = tuple(facts.shapes.get(source, ()))
    flat = not shape or (len(shape) in (3, 4) and shape[-2:] == (1, 1))
    return flat or treatments[source].kind == "broadcast"


def _advance(
    node: fx.Node, maps: list[fx.Node], treatment: Treatment, flow: Flow, by_design: frozenset[fx.Node]
) -> None:
    grid, spacing = flow.grid[maps[0]], max(flow.spacing[source] for source in maps)
    window = treatment.window
    if window is not None:
        reach = min(window.dilation) * grid
        growth = reach // spacing if not window.is_pointwise else 1
        if growth > 1 and growth & (growth - 1) == 0 and node not in by_design:
            spacing *= growth
            flow.grown[node] = spacing
        grid, spacing = grid * window.stride, spacing * window.stride
    flow.grid[node], flow.spacing[node] = grid, spacing


def _observed_grid(node: fx.Node, source: fx.Node, flow: Flow, facts: Facts) -> int:
    """Output stride of a map by its size on the example: the best that is known of a foreign operation."""
    before = _height(source, flow, facts)
    after = facts.shapes[node][2] if facts.is_map(node) else before
    if after > before:
        return max(1, flow.grid[source] // round(after / max(1, before)))
    return flow.grid[source] * round(before / max(1, after))


def _height(node: fx.Node, flow: Flow, facts: Facts) -> int:
    """Height of a map, or of the parts of a map, on the example."""
    while not facts.is_map(node):
        node = flow.maps(node)[0]
    return facts.shapes[node][2]


@dataclass(frozen=True)
class Region:
    """The part of a network that runs on lattices, for one high output stride.

    Attributes:
        strides: output strides of the lattices, the high one first.
        outside: maps computed after the region, from what left it.
        needed: output stride of the lattice each other map is computed on.
    """

    strides: tuple[int, ...]
    outside: frozenset[fx.Node]
    needed: dict[fx.Node, int]

    def stage(self, node: fx.Node) -> int:
        """Number of adaptive stages passed by a map; 0 is the dense map at the high output stride."""
        return self.strides.index(self.needed[node])


def region_of(flow: Flow, facts: Facts, treatments: dict[fx.Node, Treatment], high: int) -> Region:
    """The region that starts at the high output stride and ends where a barrier does not let it go on."""
    outside: set[fx.Node] = set()
    for node in facts.graph.nodes:
        maps = flow.maps(node) if node.op != "output" else []
        enters = node in flow.barriers and any(flow.spacing[source] > high for source in maps)
        if flow.role[node] is Role.MAP and (enters or any(source in outside for source in maps)):
            outside.add(node)
    inside = [node for node in facts.graph.nodes if flow.role[node] is Role.MAP and node not in outside]
    strides = [high]
    for spacing in sorted({flow.spacing[node] for node in inside if node not in flow.barriers}):
        if spacing > strides[-1] and spacing % strides[-1] == 0:
            strides.append(spacing)
    region = Region(tuple(strides), frozenset(outside), {})
    for node in reversed(inside):
        if node in flow.barriers or any(flow.grid[source] < high for source in flow.maps(node)):  # before it
            region.needed[node] = high
            continue
        uses = [_need(node, user, flow, treatments, region) for user in node.users]
        region.needed[node] = min([use for use in uses if use], default=_floor(region, flow.spacing[node]))
    entering = {s for node in inside if region.stage(node) for s in flow.maps(node) if not region.stage(s)}
    if any(flow.grid[node] != high for node in entering):  # the fine map would not be the network's own
        return Region((high,), frozenset(outside), dict.fromkeys(inside, high))
    return region


def _need(
    node: fx.Node, user: fx.Node, flow: Flow, treatments: dict[fx.Node, Treatment], region: Region
) -> int:
    """The coarsest stride at which `user` can take its input `node`; 0 if it does not read values."""
    treatment = treatments[user]
    if flow.role[user] is Role.OTHER and treatment.kind == "shape":
        return 0
    if user not in region.needed or user in flow.barriers:  # the output, a global operation, a dense reader
        return _floor(region, flow.spacing[node])
    window = treatment.window
    if window is None:
        return region.needed[user]
    need = _floor(region, region.needed[user] // window.stride)
    if not window.is_pointwise:
        need = _floor(region, need, *(step * flow.grid[node] for step in (*window.dilation, *window.padding)))
    return need


def _floor(region: Region, limit: int, *multiples: int) -> int:
    """The largest stride of the region that is at most `limit` and divides all `multiples`."""
    fitting = [s for s in region.strides if s <= limit and all(m % s == 0 for m in multiples)]
    return fitting[-1] if fitting else region.strides[0]


def dilated_by_design(flow: Flow, region: Region) -> frozenset[fx.Node]:
    """Nodes whose grown dilation is no removed stride: something else needs their input finer."""
    return frozenset(
        node
        for node, spacing in flow.grown.items()
        if node in region.needed
        and region.needed.get(flow.maps(node)[0], spacing) < min(spacing, region.strides[-1])
    )
