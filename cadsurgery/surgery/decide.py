"""Make the plan: choose the strides, find the region, decide for every node. The inputs are not changed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, get_args

from torch import fx

from cadsurgery.elements.axes import NCHW
from cadsurgery.elements.sizes import divide_up
from cadsurgery.following.arguments import describe_call
from cadsurgery.following.facts import Facts
from cadsurgery.following.graphs import and_after, source_line
from cadsurgery.support.errors import InvalidInput
from cadsurgery.surgery.barriers import Refusal, settle_flow
from cadsurgery.surgery.dilations import Interpretation, consider, interpret_dilations
from cadsurgery.surgery.flow import Flow, Role, copy_read, flow_forward, why_inside_cells
from cadsurgery.surgery.plan import Action, Decision, Leaves, Outputs, Plan, Prospect
from cadsurgery.surgery.refusals import RegionOption, asked_region, nothing_to_convert
from cadsurgery.surgery.region import Region, floor_region, region_of
from cadsurgery.surgery.treatment import Barrier, Cause, Treatment, operation_name

FLOOR = 32  # the floor that plans and `recommend` speak of, in input pixels


def make_plan(
    facts: Facts,
    output_stride: tuple[int, int] | None = None,
    region: RegionOption = "auto",
    part: str = "",
    outputs: Outputs = "fine",
    up_to: int | None = None,
    coarsest: int | None = None,
) -> tuple[Plan, Flow]:
    """Decide for every node of a traced network; return the plan and the flow behind it. Nothing is changed.

    Args:
        facts: facts about the traced network.
        output_stride: (high, low); by default (native / 4, native) for a strided network and
            (current, undilated) for a dilated one.
        region: `"auto"`, `"heads"`, `"backbone"`, or names of nodes or modules.
        part: name of the traced network in its host network, if it is a part of one. Its outputs then keep their native
            size, which the rest of the host relies on.
        outputs: size of maps that leave the region and are returned unchanged, `fine` or `native`.
        up_to: largest output stride in the region; None for no limit.
        coarsest: where the mask does not keep the network's own grid, no map is finer than so many input pixels, and
            `output_stride` has no meaning; None for cells between `output_stride`.

    Raises:
        CannotConvert: nothing can be made adaptive.
        InvalidInput: an impossible output stride or value of `outputs`; the message lists the possible ones.
        UnknownName: a region name that is neither a node nor a module.
    """
    if outputs not in get_args(Outputs):
        raise InvalidInput(
            f"outputs={outputs!r} is not a choice.", next=f"use one of {', '.join(get_args(Outputs))}."
        )
    returned: Outputs = "native" if part else outputs
    asked = asked_region(facts, region)
    if up_to is not None:
        asked = _up_to(up_to, asked, flow_forward(facts, asked))
    if coarsest is not None:
        return _plan_of_floors(facts, asked, coarsest, region, part)
    interpretations = interpret_dilations(facts, asked, named=not isinstance(region, str))
    if not any(one.possible for one in interpretations):
        raise nothing_to_convert(interpretations[0].settled.flow)
    interpretation, (high, low) = _choose(interpretations, output_stride)
    flow, chosen = interpretation.settled.flow, interpretation.regions[high]
    through_heads = region == "heads"
    if through_heads or low < chosen.strides[-1]:  # with smaller cells more operations may stay in the region
        capped = interpretation.settled.up_to(low, through_heads)
        if (larger := region_of(capped, high)).strides == chosen.strides:
            flow, chosen = capped, larger
    decisions = _decide(flow, chosen, fine_outputs=returned == "fine")
    fine = any(decision.leaves in ("fine", "resized") for decision in decisions)
    if not fine and not any(_works(node, flow) for node in chosen.readers):
        raise nothing_to_convert(flow)
    identity = _identity_level(flow, chosen, chosen.strides.index(low))
    if identity != 0 and any(decision.inside_cells for decision in decisions):
        raise _heads_need_own_grid(flow, chosen, low)
    joins = any(_joins(node, flow) for node in chosen.readers)
    leaving = [flow.grid[n] for n in chosen.needed if chosen.stage(n) and chosen.dense_readers(n)]
    finest = high if fine or joins else min(leaving, default=low)
    plan = Plan(
        output_stride=(high, low),
        strides=chosen.strides,
        identity_level=identity,
        possible=_possible(interpretations),
        matters=finest < low,
        finest=finest,
        returned=returned,
        considered=consider(interpretations, sum(facts.macs.values())),
        **_of_every_plan(flow, decisions, region, part),
    )
    return plan, flow


def _of_every_plan(
    flow: Flow, decisions: Sequence[Decision], region: RegionOption, part: str
) -> dict[str, Any]:
    """Return the fields of a plan that do not depend on what its levels mean."""
    return {
        "decisions": tuple(decisions),
        "region": region if isinstance(region, str) else tuple(region),
        "example_shape": tuple(flow.example.shape),
        "outputs": tuple(
            (node.name, flow.grid[node]) for node in flow.outputs if flow.role[node] is Role.MAP
        ),
        "part": part,
        "call": describe_call(flow.model, flow.arguments),
        "not_counted": tuple(flow.not_counted),
        "around": _around(flow, decisions),
    }


def _around(flow: Flow, decisions: Sequence[Decision]) -> int:
    """Return the pixels by which paddings in front make the first map of the region longer than the image."""
    first = next(decision.node for decision in decisions if decision.action == "enter")
    node = next(node for node in flow.graph.nodes if node.name == first)
    spacing, size = flow.grid[node], flow.images.get(node, ())
    more = [spacing * length - side for length, side in zip(size, flow.example.shape[2:], strict=False)]
    if not more or min(more) <= 2 * spacing or max(more) - min(more) >= spacing:
        return 0
    while flow.maps(node):
        if not _is_of_windows(node, flow):  # a resize, whose map has the image from edge to edge
            return 0
        node = flow.maps(node)[0]
    return min(more) // spacing * spacing


def _is_of_windows(node: fx.Node, flow: Flow) -> bool:
    """True for an operation whose map is longer than the one that it reads by its padding alone."""
    kind = flow.treatments[node].kind
    return kind in ("window", "pointwise", "pad", "join") or (kind == "barrier" and flow.macs[node] > 0)


def _plan_of_floors(
    facts: Facts, asked: Refusal, coarsest: int, region: RegionOption, part: str
) -> tuple[Plan, Flow]:
    """Plan a conversion in which maps become coarser than the network's own grid, see `make_plan`."""
    if isinstance(coarsest, bool) or not isinstance(coarsest, int) or coarsest < 2:
        raise InvalidInput(f"coarsest={coarsest!r} is no number of pixels above 1.", next="give 16 or 32.")
    flow = settle_flow(facts, asked, not isinstance(region, str), removed_up_to=0, floors=True).flow
    chosen = floor_region(flow, coarsest)
    if chosen is None:
        strides = sorted(set(flow.grid.values()))
        raise InvalidInput(
            f"coarsest={coarsest} is not possible for this network.",
            why=f"its maps have output strides {', '.join(map(str, strides))}, of which cells of {coarsest} pixels are "
            "to be made.",
            next=f"give a multiple of {strides[-1]} by a power of two, or one of its strides.",
        )
    if not any(_works(node, flow) for node in chosen.readers):
        raise nothing_to_convert(flow)
    plan = Plan(
        output_stride=(chosen.strides[0], coarsest),
        strides=chosen.strides,
        identity_level=0,
        possible=(),
        finest=chosen.strides[0],
        returned="native",
        floors=True,
        **_of_every_plan(flow, _decide(flow, chosen, fine_outputs=False), region, part),
    )
    return plan, flow


def _heads_need_own_grid(flow: Flow, region: Region, low: int) -> InvalidInput:
    """Return the error for heads read inside cells of a map that is finer than the network's own."""
    own = max(flow.grid[node] for node in region.needed if region.stage(node))
    return InvalidInput(
        f'region="heads" is not possible with the high output stride {region.strides[0]}.',
        why=f"maps of the region have output stride {own} in the network; where taps fall inside cells, its own grid "
        "must be the finest.",
        next=f'give output_stride=({own}, {low}), or region="auto".',
    )


def _up_to(stride: int, asked: Refusal, flow: Flow) -> Refusal:
    """Extend a refusal function: nodes beyond an output stride are left out of the region, too."""
    beyond = {node for node, restored in flow.restored.items() if restored > stride}

    def refused(node: fx.Node, maps: Sequence[fx.Node]) -> Barrier | None:
        if node in beyond:
            return Barrier(f"its output stride is {flow.restored[node]}, beyond {stride}", Cause.ASKED)
        return asked(node, maps)

    return refused


def _possible(interpretations: Sequence[Interpretation]) -> tuple[tuple[int, int], ...]:
    """Return all pairs of high and low output stride, starting with those of the preferred interpretation."""
    return tuple(dict.fromkeys(pair for one in interpretations for pair in one.possible))


def _choose(
    interpretations: Sequence[Interpretation], asked: tuple[int, int] | None
) -> tuple[Interpretation, tuple[int, int]]:
    """Return the interpretation to plan, and its (high, low) output stride: the requested pair or the default."""
    if asked is None:
        first = next(one for one in interpretations if one.usual is not None)
        assert first.usual is not None
        return first, first.usual
    pair = tuple(asked) if isinstance(asked, (tuple, list)) else asked
    for interpretation in interpretations:
        if pair in interpretation.possible:
            return interpretation, (pair[0], pair[1])
    listed = ", ".join(f"({high}, {low})" for high, low in _possible(interpretations))
    dense = _strided_barriers(interpretations[0].settled.flow)
    raise InvalidInput(
        f"output_stride={asked} is not possible for this network.",
        why="high and low must be strides the network has, or had before it was dilated"
        + "".join(dense)
        + ".",
        next=f"choose one of {listed}.",
    )


def _strided_barriers(flow: Flow) -> list[str]:
    """Return why strided operations are no adaptive stages, one clause for each."""
    return [
        f"; {flow.path(node) or node.name} ({operation_name(node, flow)}) is no adaptive stage: {barrier.why}"
        for node, barrier in flow.barriers.items()
        if barrier.cause is Cause.OPERATION
        and any(flow.grid.get(node, 0) > flow.grid[source] for source in flow.maps(node))
    ]


def _works(node: fx.Node, flow: Flow) -> bool:
    """True if an operation reads more than a single element."""
    window = flow.treatments[node].window
    return _joins(node, flow) or (window is not None and not window.is_pointwise)


def _joins(node: fx.Node, flow: Flow) -> bool:
    """True if an operation mixes values of different positions."""
    operation = flow.treatments[node].operation
    return operation is not None and operation.mixes


def _identity_level(flow: Flow, region: Region, max_level: int) -> int | None:
    """Return the level whose uniform map gives every value of the region its own grid; None if there is none."""
    staged = [(region.stage(node), flow.grid[node]) for node in region.needed if region.has(node)]
    levels = range(max_level + 1)
    return next(
        (lv for lv in levels if all(region.strides[min(st, lv)] == grid for st, grid in staged)), None
    )


def _decide(flow: Flow, region: Region, fine_outputs: bool) -> list[Decision]:
    """Return a decision for each node, in order."""
    decide = _Deciding(flow, region, fine_outputs)
    return [decide(node) for node in flow.graph.nodes]


class _Deciding:
    """Decides for one node after another.

    Attributes:
        resized: final resizes that read elements.
        sizes: size of each map that leaves the region.
        read: for each node the values of the region that it reads.
        on_elements: nodes that run on elements.
        ends: nodes that read the region's values dense.
        after: nodes that depend on those.
        again: nodes that are read by the region but are not part of it, each with a reader.
    """

    def __init__(self, flow: Flow, region: Region, fine_outputs: bool) -> None:
        self.flow, self.region = flow, region
        self.resized = _resized(flow, region)
        self.sizes = _leaving_sizes(flow, region, self.resized, fine_outputs)
        self.read = {node: region.read_by(node) for node in flow.graph.nodes}
        self.on_elements = region.on_elements
        self.ends = {
            node
            for node, sources in self.read.items()
            if sources and node not in self.on_elements and not flow.only_asks(node)
        }
        self.after = set().union(*map(and_after, self.ends)) - self.ends - self.on_elements
        self.again = {
            node: next(user for user in node.users if user in region.maps)
            for node in region.outside
            if not region.maps.isdisjoint(node.users)
        }

    def __call__(self, node: fx.Node) -> Decision:
        """Return the decision for a node."""
        flow, facts, treatment = self.flow, self.flow, self.flow.treatments[node]
        high, is_end = self.region.strides[0], node in self.ends
        action, reason = self._judge(node)
        window = treatment.window if node in self.on_elements and treatment.kind != "pad" else None
        if window is not None:
            window = window._replace(spacing=max(1, flow.grid[flow.maps(node)[0]] // high))
        leaves = self.sizes.get(self.read[node][0] if is_end else node, "")
        later = and_after(node, without=self.on_elements) if is_end else ()
        return Decision(
            node=node.name,
            path=facts.path(node),
            operation=_describe(node, facts, treatment),
            action=action,
            reason=reason,
            stages=self.region.stages(node) if node in self.on_elements else (0, 0),
            window=window,
            spacing=max(1, flow.grid.get(node, 1) // high),
            leaves="resized" if node in self.resized else leaves,
            layout=facts.layout(node),
            source=source_line(node) if is_end else "",
            after=action == "dense" and node in self.after,
            again=self.again[node].name if node in self.again else "",
            macs=facts.macs[node],
            shape=tuple(facts.shapes.get(node, ())),
            cost=sum(facts.macs[follower] for follower in later),
            inside_cells=node in self.on_elements and node in flow.inside_cells,
            of_copy=copy_read(node, flow),
        )

    def _judge(self, node: fx.Node) -> tuple[Action, str]:
        """Return what is done with a node, and why."""
        treatment, barrier = self.flow.treatments[node], self.flow.barriers.get(node)
        if node in self.on_elements:
            before, behind = self.region.stages(node)
            action: Action = "adapt" if treatment.window and behind > before else "keep"
            is_inside = node in self.flow.inside_cells
            return action, why_inside_cells(
                node, self.flow.maps(node), self.flow
            ) if is_inside else treatment.why
        if node in self.resized:
            return "exit", f"reads {self.read[node][0].name} at any point, on the grid the network resizes"
        if node in self.ends:
            natural = node.op == "output" or treatment.kind == "resize"
            reason = barrier.why if barrier is not None else _why_it_ends(node, self.flow, self.region)
            leaving = ", ".join(source.name for source in self.read[node])
            reason = f"{reason}; {leaving} leaves at {self.sizes[self.read[node][0]]} size"
            if barrier is not None and barrier.cause is Cause.CELLS and treatment.kind == "window":
                reason += '; region="heads" continues through it'
            return "exit" if natural else "barrier", reason
        if barrier is not None and barrier.cause is Cause.COPY and node not in self.again:
            return "dense", barrier.why
        if node in self.region.needed and any(user in self.region.maps for user in node.users):
            return "enter", "one element per sample of this map"
        if node in self.region.outside and (node in self.again or node not in self.after):
            return "dense", barrier.why if barrier is not None else "reads what is outside the region"
        return "dense", "after the region" if node in self.after else ""


def _why_it_ends(node: fx.Node, flow: Flow, region: Region) -> str:
    """Return why a node that has a rule reads the region's values dense."""
    if node.op == "output":
        return "the network's output"
    if any(source in region.outside for source in flow.maps(node)):
        return "combines it with what left the region"
    if flow.treatments[node].kind == "resize":
        return f"makes the map finer than output stride {region.strides[0]}"
    return f"works at output stride {region.strides[0]}"


def _resized(flow: Flow, region: Region) -> frozenset[fx.Node]:
    """Return the final resizes that read elements. A bilinear resize of a map that has the high output stride already
    is not among them: it runs dense, as in the network."""
    high = region.strides[0]
    return frozenset(
        node
        for node in (() if region.floors else flow.last)
        if flow.at_exit(node)
        and all(map(region.has, flow.maps(node)))
        and flow.layout(flow.maps(node)[0]) == NCHW
        and (
            flow.grid[flow.maps(node)[0]] > high
            or dict(flow.treatments[node].arguments)["mode"] != "bilinear"
        )
    )


def _leaving_sizes(
    flow: Flow, region: Region, resized: frozenset[fx.Node], fine_outputs: bool
) -> dict[fx.Node, Leaves]:
    """Return the size of each map that leaves the region: `fine` if all operations after it accept another size, else
    `native`. Maps that only such resizes read do not leave."""
    sizes: dict[fx.Node, Leaves] = {}
    for node in region.needed:
        readers = [user for user in region.dense_readers(node) if user not in resized]
        if region.has(node) and readers:
            # A flattened map does not tell its height and width: its readers rely on the network's own.
            returned = (
                fine_outputs and "h" in flow.layouts[node] and all(user.op == "output" for user in readers)
            )
            fine = flow.grid[node] == region.strides[0] or returned
            fine = fine and flow.treatments[node].leaves_by is None
            sizes[node] = "fine" if fine else "native"
    return sizes


def _describe(node: fx.Node, facts: Facts, treatment: Treatment) -> str:
    name = operation_name(node, facts)
    window = treatment.window
    if window is None:
        return name
    stride = f"/{max(window.stride, window.finer)}" if max(window.stride, window.finer) > 1 else ""
    dilation = f" dilated {window.dilation[0]}" if window.dilation != (1, 1) else ""
    return f"{name} {window.kernel[0]}x{window.kernel[1]}{stride}{dilation}"


# -- what floors would save ----------------------------------------------------------------------------


def floors_prospect(facts: Facts, region: RegionOption, size: Sequence[int]) -> Prospect | None:
    """Estimate the share of MACs that a network takes with everything at the usual floor.

    Args:
        facts: facts about the traced network.
        region: see `make_plan`.
        size: height and width of the image to estimate for.

    Returns:
        None if the network's strides do not lead to this floor, or no multiplication would be saved.
    """
    asked = asked_region(facts, region)
    flow = settle_flow(facts, asked, not isinstance(region, str), removed_up_to=0, floors=True).flow
    chosen = floor_region(flow, FLOOR)
    if chosen is None:
        return None
    macs = sum(_macs_at(node, flow, size) for node in facts.graph.nodes)
    low = sum(_macs_at(node, flow, size, _floor_of(node, chosen, FLOOR)) for node in facts.graph.nodes)
    return Prospect(FLOOR, low / macs) if low < macs else None


def _floor_of(node: fx.Node, region: Region, coarsest: int) -> int:
    """Return the floor of a node: 1 outside the region."""
    return coarsest if region.has(node) else 1


def _macs_at(node: fx.Node, flow: Flow, size: Sequence[int], floor: int = 1) -> float:
    """Return a node's multiply-accumulates on one image; of a map they are proportional to its positions."""
    macs = flow.macs[node] / len(flow.example)
    if not macs or flow.role[node] is not Role.MAP:
        return macs
    own, grid = flow.images[node], flow.grid[node]
    is_example = tuple(size) == tuple(flow.example.shape[2:])
    sides = own if is_example else [divide_up(length, grid) for length in size]
    step = max(1, floor // grid)
    return macs * math.prod(divide_up(side, step) for side in sides) / math.prod(own)
