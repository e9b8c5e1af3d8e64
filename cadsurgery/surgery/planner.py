"""Make the plan: choose the strides, find the region, decide for every node. Pure: nothing is changed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, get_args

from torch import fx

from cadsurgery.elements.axes import NCHW
from cadsurgery.support.errors import CannotConvert, InvalidInput, UnknownName
from cadsurgery.surgery.facts import Facts
from cadsurgery.surgery.flow import Flow, Region, Role, dilated_by_design, flow_forward, region_of
from cadsurgery.surgery.hooks import stays_whole
from cadsurgery.surgery.plan import AFTER, RESIZED, Action, Decision, Outputs, Plan
from cadsurgery.surgery.treatment import Treatment, operation_name

RegionOption = str | Sequence[str]

# Attribute names under which libraries keep the part of a network that other heads can be put on.
BACKBONE_NAMES = ("backbone", "encoder", "features", "body", "trunk")

# Operations that join all positions, on values with more than two axes.
_MIXERS = frozenset(
    (
        *("scaled_dot_product_attention", "MultiheadAttention", "matmul", "bmm", "baddbmm", "einsum"),
        *("LSTM", "GRU", "cumsum", "roll", "grid_sample", "unfold", "Unfold"),
        *("fft2", "rfft2", "fft_fft2", "fft_rfft2"),
    )
)

_JOINING = ("group_norm", "group_deviation", "norm_of_batch", "softmax_over_image", "normalize_over_image")
_OUTSIDE, _PADS = "outside the region", "pads"

# A further, coarser output map that costs less than this share of a network is no reason for a stage of its own.
MERE_TAIL = 0.05


def make_plan(
    facts: Facts,
    output_stride: tuple[int, int] | None = None,
    region: RegionOption = "auto",
    part: str = "",
    outputs: Outputs = "fine",
) -> tuple[Plan, dict[fx.Node, Treatment]]:
    """Decide for every node of a traced network; the treatments say how. Pure: the network is not changed.

    Args:
        facts: of the traced network.
        output_stride: (high, low); by default (native / 4, native) for a strided network and
            (current, undilated) for a dilated one.
        region: `"auto"`, `"backbone"`, or names of nodes or modules.
        part: where the traced network is a part of another one, its name there: what it returns then keeps its
            native size, which the rest of that network relies on.
        outputs: size at which maps that leave the region as they are are returned, `fine` or `native`.

    Raises:
        CannotConvert: nothing can be made adaptive.
        InvalidInput: an impossible output stride, or another word for the outputs; the message lists the possible ones.
        UnknownName: a region name that is neither a node nor a module.
    """
    if outputs not in get_args(Outputs):
        raise InvalidInput(
            f"outputs={outputs!r} is not a choice.", next=f"use one of {', '.join(get_args(Outputs))}."
        )
    returned: Outputs = "native" if part else outputs
    refused = _refusal(facts, region)
    flow, settled = _settled_flow(facts, refused, named=not isinstance(region, str))
    highs = sorted({flow.grid[node] for node in flow.grid})
    regions = {high: region_of(flow, facts, high) for high in highs}
    possible = [(high, low) for high in highs for low in regions[high].strides[1:]]
    if not possible:
        raise _nothing_to_convert(facts, flow)
    high, low = _choose(facts, flow, regions, possible, output_stride)
    chosen = regions[high]
    if low < chosen.strides[-1]:  # no cell is larger than that: what reads in between may stay
        capped = flow_forward(facts, settled.refused, settled.by_design, low)
        if (larger := region_of(capped, facts, high)).strides == chosen.strides:
            flow, chosen = capped, larger
        else:
            flow = flow_forward(facts, settled.refused, settled.by_design)  # facts are noted anew
    names = region if isinstance(region, str) else tuple(region)
    decisions = _decide(facts, flow, chosen, fine_outputs=returned == "fine")
    readers = _readers(facts, flow, chosen)
    fine = any(decision.leaves in ("fine", RESIZED) for decision in decisions)
    if not fine and not any(_works(node, flow) for node in readers):
        raise _nothing_to_convert(facts, flow)
    identity = _identity_level(flow, chosen, chosen.strides.index(low))
    joins = any(_joins(node, flow) for node in readers)
    leaving = [flow.grid[n] for n in chosen.needed if chosen.stage(n) and _dense_readers(n, flow, chosen)]
    finest = high if fine or joins else min(leaving, default=low)
    shape = tuple(facts.example.shape)
    made = Plan(
        decisions=tuple(decisions),
        output_stride=(high, low),
        strides=chosen.strides,
        identity_level=identity,
        region=names,
        possible=tuple(possible),
        example_shape=shape,
        outputs=tuple(
            (node.name, flow.grid[node]) for node in _outputs(facts) if flow.role[node] is Role.MAP
        ),
        matters=finest < low,
        finest=finest,
        returned=returned,
        part=part,
    )
    return made, flow.treatments


def _outputs(facts: Facts) -> list[fx.Node]:
    return next(node for node in facts.graph.nodes if node.op == "output").all_input_nodes


def _readers(facts: Facts, flow: Flow, region: Region) -> list[fx.Node]:
    """Operations of the region that work on more than the map it starts from."""
    return [
        node
        for node in facts.graph.nodes
        if any(source in region.needed and region.stage(source) > 0 for source in flow.maps(node))
        and node not in flow.barriers
        and (node in region.needed or flow.treatments[node].kind == "global")
    ]


def _works(node: fx.Node, flow: Flow) -> bool:
    """Whether an operation looks beyond a single element."""
    window = flow.treatments[node].window
    return _joins(node, flow) or (window is not None and not window.is_pointwise)


def _joins(node: fx.Node, flow: Flow) -> bool:
    """Whether an operation brings finer values from one position to another."""
    return flow.treatments[node].kind in ("global", "resize") or flow.treatments[node].call in _JOINING


class _Settled(NamedTuple):
    """What a flow was settled with: why nodes are left out, and whose dilation stands for no removed stride."""

    refused: Callable[[fx.Node], str]
    by_design: frozenset[fx.Node]


def _settled_flow(facts: Facts, refused: Callable[[fx.Node], str], named: bool) -> tuple[Flow, _Settled]:
    """The forward flow in which every removed stride could really be put back, and every pad has its windows; what a
    region names it has, however little work that is."""
    by_design: frozenset[fx.Node] = frozenset()
    dense: dict[fx.Node, str] = {}

    def refused_or_dense(node: fx.Node) -> str:
        padded = next(
            (source for source in node.all_input_nodes if dense.get(source, "").startswith(_PADS)), None
        )
        if padded is not None and facts.layout(padded):
            return f"reads what {padded.name} padded, which is larger than the maps of the region"
        return refused(node) or dense.get(node, "")

    while True:
        flow = flow_forward(facts, refused_or_dense, by_design)
        highs = {flow.grid[node] for node in flow.grid}
        found = [dilated_by_design(flow, region_of(flow, facts, high)) for high in highs]
        new = frozenset().union(*found) - by_design
        new_dense = _lone_pads(facts, flow) | _last_resizes(facts, flow)
        new_dense |= {} if named else _mere_tails(facts, flow)
        if not new and not new_dense.keys() - dense.keys():
            return flow, _Settled(refused_or_dense, by_design)
        by_design |= new
        dense |= new_dense


def _lone_pads(facts: Facts, flow: Flow) -> dict[fx.Node, str]:
    """Padding that something else than a window of the region reads."""
    return {
        pad: f"{_PADS} the map for {operation_name(user, facts)}, which is no window of the region"
        for pad in facts.pads
        for user in pad.users
        if not _pads_for(user, flow)
    }


def _last_resizes(facts: Facts, flow: Flow) -> dict[fx.Node, str]:
    """Resizes that nothing but pointwise operations follow: they read the region at arbitrary points, and what comes
    out is as large as in the network."""
    return {
        node: "resizes what leaves the region"
        for node, treatment in flow.treatments.items()
        if _is_resize(treatment) and _is_last(node, flow) and flow.maps(node)
    }


def _is_resize(treatment: Treatment) -> bool:
    return treatment.kind == "resize" and treatment.call == "resize"


def _mere_tails(facts: Facts, flow: Flow) -> dict[fx.Node, str]:
    """Strided operations at the end of a network with several outputs that are hardly any of its work, such as
    the coarsest levels of a feature pyramid: with a stage of their own they would be its lowest output stride."""
    several = sum(flow.role[node] is Role.MAP for node in _outputs(facts)) > 1
    total = sum(facts.macs.values())
    found = {}
    for node in facts.graph.nodes if several else ():
        window = flow.treatments[node].window
        if window is not None and window.stride > 1 and node not in flow.barriers:
            share = sum(facts.macs[after] for after in _and_after(node)) / max(1, total)
            if share < MERE_TAIL:
                found[node] = f"only {share:.1%} of the MACs come from here on"
    return found


def _pads_for(user: fx.Node, flow: Flow) -> bool:
    kind = flow.treatments[user].kind
    return user not in flow.barriers and (kind == "window" or (kind == "shape" and user.op != "output"))


def _choose(
    facts: Facts,
    flow: Flow,
    regions: dict[int, Region],
    possible: list[tuple[int, int]],
    asked: tuple[int, int] | None,
) -> tuple[int, int]:
    if asked is not None:
        pair = tuple(asked) if isinstance(asked, (tuple, list)) else asked
        if pair not in possible:
            listed = ", ".join(f"({high}, {low})" for high, low in possible)
            raise InvalidInput(
                f"output_stride={asked} is not possible for this network.",
                why="high and low must be strides the network has, or had before it was dilated.",
                next=f"choose one of {listed}.",
            )
        return pair[0], pair[1]
    low = max(pair[1] for pair in possible)
    highs = [high for high, lowest in possible if lowest == low]
    current = max(flow.grid[node] for node in regions[highs[-1]].needed)
    if current < low:  # dilated: it is at its high output stride already
        return (current if current in highs else highs[-1]), low
    usual = max((high for high in highs if high <= _trunk(facts, flow, low) / 4), default=highs[0])
    # Where a barrier, e.g. attention in the last stages, leaves hardly anything of that, the work before it counts.
    work = {
        high: sum(facts.macs[node] for node in _readers(facts, flow, found))
        for high, found in regions.items()
        if high == usual or found.strides[-1] <= 4 * high
    }
    worth = [high for high in work if work[high] >= max(work.values()) / 2]
    chosen = usual if usual in worth else max(worth)
    return chosen, regions[chosen].strides[-1]


def _trunk(facts: Facts, flow: Flow, low: int) -> int:
    """The network's own output stride: its lowest, not counting a side branch that comes back finer."""
    work: dict[int, int] = {}
    ends: set[int] = set()
    for node, grid in flow.grid.items():
        work[grid] = work.get(grid, 0) + facts.macs[node]
        for user in node.users:
            kind = flow.treatments[user].kind
            last = kind == "global" or (kind == "resize" and _is_last(user, flow))
            if last or user in flow.barriers or user.op == "output":
                ends.add(grid)
    needed = MERE_TAIL * sum(work.values())
    return max((grid for grid in work if grid <= low and (work[grid] >= needed or grid in ends)), default=low)


def _identity_level(flow: Flow, region: Region, max_level: int) -> int | None:
    """The level whose uniform map puts every value of the region on the network's own grid."""
    staged = [(region.stage(node), flow.grid[node]) for node in region.needed if region.stage(node) > 0]
    levels = range(max_level + 1)
    return next(
        (lv for lv in levels if all(region.strides[min(st, lv)] == grid for st, grid in staged)), None
    )


def _refusal(facts: Facts, region: RegionOption) -> Callable[[fx.Node], str]:
    """Why the region asked for leaves a node out, or ""."""
    if region == "auto":
        return lambda node: ""
    modules = dict(facts.model.named_modules())
    if region == "backbone":
        found = [name for name in BACKBONE_NAMES if name in modules]
        if not found:
            raise CannotConvert(
                'region="backbone" is not possible: the network does not say which part is its backbone.',
                where=type(facts.model).__name__,
                next=f'use region="auto", or name modules: region=[...] of '
                f"{', '.join(name for name in modules if name and '.' not in name)}.",
            )
        region = found[:1]
    elif isinstance(region, str):
        raise UnknownName("region", region, ["auto", "backbone"], next="or a list of node or module names.")
    if not isinstance(region, (list, tuple)) or not all(isinstance(name, str) for name in region):
        raise InvalidInput(
            f"region={region!r} is not a region.",
            next='give "auto", "backbone" or a list of node or module names.',
        )
    names = tuple(region)
    known = {node.name for node in facts.graph.nodes} | set(modules)
    for name in names:
        if name not in known:
            raise UnknownName(
                "node or module", name, known | {"auto", "backbone"}, next="see print(cs.plan(model))."
            )

    def refused(node: fx.Node) -> str:
        path = facts.path(node)
        if any(node.name == name or path == name or path.startswith(f"{name}.") for name in names):
            return ""
        return f"{_OUTSIDE} {', '.join(names)}"

    return refused


def _nothing_to_convert(facts: Facts, flow: Flow) -> CannotConvert:
    model = type(facts.model).__name__
    what = f"{model} has nothing that can be made adaptive."
    next_step = "convert another part of the network with region=[...], or teach the operation: see docs/extending.md."
    whole = next((node for node in facts.graph.nodes if _stays_whole(node, facts)), None)
    if whole is not None and whole in flow.barriers:
        return CannotConvert(
            what,
            where=_place(whole, facts),
            why=_first_barrier(facts, flow),
            next="take that off before the conversion (a hook: handle.remove()), or convert another part of the "
            "network with region=[...].",
        )
    mixers = [node for node in position_mixers(facts, flow) if _OUTSIDE not in flow.barriers.get(node, "")]
    if mixers and not any(reason.startswith(_OUTSIDE) for reason in flow.barriers.values()):
        first, strided = mixers[0], [node for node in flow.grid if _downsamples(node, flow)]
        before = "its patch embedding" if len(strided) < 2 else f"{len(strided)} strided operations"
        return CannotConvert(
            f"{what} It joins all positions of the image, as transformers do.",
            where=_place(first, facts),
            why=f"it has {len(mixers)} operations such as {operation_name(first, facts)} that join all positions of "
            f"the map, which then must all have one resolution; between {before} and them no convolution works on a "
            "downsampled map.",
            next="choose a convolutional network (cadsurgery list), or convert the convolutional part of this one: "
            "region=[...].",
        )
    if not any(_downsamples(node, flow) for node in flow.grid):
        return CannotConvert(
            f"{what} It is a network without strides.",
            why="it has no strided convolution or pooling that a rule knows, and no dilation that stands for one"
            + (f"; {_first_barrier(facts, flow)}" if flow.barriers else "."),
            next="content-adaptive downsampling needs a network that downsamples.",
        )
    where = next(iter(flow.barriers), None)
    return CannotConvert(
        what,
        where=_place(where, facts) if where else "",
        why=_first_barrier(facts, flow) if where else "nothing but pointwise operations follows its strides.",
        next=next_step,
    )


def _downsamples(node: fx.Node, flow: Flow) -> bool:
    return any(flow.spacing[source] < flow.spacing[node] for source in flow.maps(node))


def _first_barrier(facts: Facts, flow: Flow) -> str:
    node, reason = next(iter(flow.barriers.items()))
    total = sum(facts.macs.values()) or 1
    return f"{reason}; it holds {facts.macs[node] / total:.0%} of the MACs, and all after it stays dense."


def position_mixers(facts: Facts, flow: Flow) -> list[fx.Node]:
    """Operations that join positions of an image otherwise than by windows, means or resizing: attention, recurrence,
    matrices over positions. Convolutional networks have none."""
    return [
        node
        for node in facts.graph.nodes
        if (
            operation_name(node, facts).removeprefix("Tensor.") in _MIXERS
            and len(facts.shapes.get(node, "any")) > 2
        )
        or "mixes the positions" in flow.barriers.get(node, "")
        or (node in flow.barriers and _is_foreign_leaf(node, facts))
    ]


def _is_foreign_leaf(node: fx.Node, facts: Facts) -> bool:
    """Whether a node is a module of a library that tracing does not look into: it may do anything."""
    made_of = node.op == "call_module" and any(True for _ in facts.module(node).children())
    foreign = made_of and not type(facts.module(node)).__module__.startswith("torch.")
    return foreign and not _stays_whole(node, facts)


def _stays_whole(node: fx.Node, facts: Facts) -> str:
    return stays_whole(facts.module(node)) if node.op == "call_module" else ""


def _place(node: fx.Node, facts: Facts) -> str:
    """Module, operation and source line of a node, for messages."""
    parts = (operation_name(node, facts), _source_line(node))
    return f"{facts.path(node) or node.name} ({', '.join(part for part in parts if part)})"


def _source_line(node: fx.Node) -> str:
    """Where in the network's own code a node comes from, e.g. `resnet.py:148`."""
    lines = [
        line.strip() for line in (node.stack_trace or "").splitlines() if line.strip().startswith("File")
    ]
    own = [line for line in lines if "/torch/" not in line.partition(",")[0]]
    if not own:
        return ""
    file, line = own[-1].split(",")[:2]
    return f"{file.rpartition('/')[2].rstrip(chr(34))}:{line.split()[-1]}"


def _decide(facts: Facts, flow: Flow, region: Region, fine_outputs: bool) -> list[Decision]:
    treatments = flow.treatments
    resized = _resized(facts, flow, region)
    sizes = _leaving_sizes(facts.layouts, flow, region, resized, fine_outputs)
    staged = {node for node in region.needed if region.stage(node) > 0}
    staged |= {pad for pad in facts.pads if any(user in staged for user in pad.users)}
    read = {node: [source for source in flow.maps(node) if source in staged] for node in facts.graph.nodes}
    on_elements = {
        node for node, sources in read.items() if node in staged or _reads_last(node, sources, flow, region)
    }
    asking = {node for node in read if _only_asks(node, flow)}
    ends = {node for node, sources in read.items() if sources} - on_elements - asking
    after = set().union(*map(_and_after, ends)) - ends - on_elements

    def judge(node: fx.Node) -> tuple[Action, str]:
        if node in on_elements:
            before, behind = _stages(node, flow, region)
            return "adapt" if treatments[node].window and behind > before else "keep", treatments[node].why
        if node in resized:
            return "exit", f"reads {read[node][0].name} at any point, on the grid the network resizes"
        if node in ends:
            natural = node.op == "output" or treatments[node].kind == "resize"
            reason = flow.barriers.get(node) or _why_it_ends(node, flow, region)
            leaving = ", ".join(source.name for source in read[node])
            reason = f"{reason}; {leaving} leaves at {sizes[read[node][0]]} size"
            return "exit" if natural else "barrier", reason
        if node in region.needed and any(user in staged for user in node.users):
            return "enter", "one element per sample of this map"
        return "dense", AFTER if node in after else ""

    decisions = []
    for node in facts.graph.nodes:
        action, reason = judge(node)
        window = (
            treatments[node].window if node in on_elements and treatments[node].kind == "window" else None
        )
        if window is not None:
            window = window._replace(spacing=max(1, flow.grid[flow.maps(node)[0]] // region.strides[0]))
        decisions.append(
            Decision(
                node=node.name,
                path=facts.path(node),
                operation=_describe(node, facts, treatments[node]),
                action=action,
                reason=reason,
                stages=_stages(node, flow, region) if node in on_elements else (0, 0),
                window=window,
                grid=max(1, flow.grid.get(node, 1) // region.strides[0]),
                leaves=RESIZED if node in resized else sizes.get(read[node][0] if node in ends else node, ""),
                layout=facts.layout(node),
                source=_source_line(node) if node in ends else "",
                macs=facts.macs[node],
                shape=tuple(facts.shapes.get(node, ())),
                cost=sum(facts.macs[found] for found in _and_after(node)) if node in ends else 0,
            )
        )
    return decisions


def _why_it_ends(node: fx.Node, flow: Flow, region: Region) -> str:
    """Why a node that every rule lets pass reads the region's values dense."""
    if node.op == "output":
        return "the network's output"
    if any(source in region.outside for source in flow.maps(node)):
        return "combines it with what left the region"
    if flow.treatments[node].kind == "resize":
        return f"makes the map finer than output stride {region.strides[0]}"
    return f"works at output stride {region.strides[0]}"


def _reads_last(node: fx.Node, sources: list[fx.Node], flow: Flow, region: Region) -> bool:
    """Whether a node reads elements and yields what needs none: one vector per image, or a map as fine as the
    fine map or finer."""
    if not sources or node in flow.barriers:
        return False
    treatment, high = flow.treatments[node], region.strides[0]
    if treatment.kind != "resize":
        return treatment.kind == "global"
    if flow.grid[node] == high:
        return True
    return treatment.call == "resize" and flow.grid[node] < high


def _is_last(node: fx.Node, flow: Flow) -> bool:
    """Whether nothing that reads neighbours or mixes channels comes after a node, and nothing joins it with a map that
    is there at its own size anyway."""
    after = _and_after(node)
    if {flow.treatments[user].kind for user in after - {node}} & {"window", "global", "resize"}:
        return False
    joined = {source for user in after for source in flow.maps(user)} - after - set(flow.maps(node))
    return all(flow.grid[source] == 1 or _is_made_of_resizes(source, flow) for source in joined)


def _is_made_of_resizes(node: fx.Node, flow: Flow) -> bool:
    """Whether a map is computed from resized maps, element by element."""
    kind, sources = flow.treatments[node].kind, flow.maps(node)
    if kind == "resize":
        return True
    return (
        kind in ("pointwise", "join") and bool(sources) and all(_is_made_of_resizes(s, flow) for s in sources)
    )


def _only_asks(node: fx.Node, flow: Flow) -> bool:
    """Whether a node that reads a map wants its size only."""
    return (flow.treatments[node].kind == "shape" and node.op != "output") or flow.role[node] is Role.VECTOR


def _stages(node: fx.Node, flow: Flow, region: Region) -> tuple[int, int]:
    """Stages of the lattices a node of the region reads and writes."""
    before = min(region.stage(source) for source in flow.maps(node))
    return before, region.stage(node) if node in region.needed else before


def _and_after(node: fx.Node) -> set[fx.Node]:
    """A node and all that depends on it."""
    found, pending = set(), [node]
    while pending:
        if (last := pending.pop()) not in found:
            found.add(last)
            pending.extend(last.users)
    return found


def _resized(facts: Facts, flow: Flow, region: Region) -> frozenset[fx.Node]:
    """Last resizes that read elements. One that reads a map whose own grid is the fine map bilinearly needs none of
    them: it resizes that map as the network does."""
    high = region.strides[0]
    return frozenset(
        node
        for node, treatment in flow.treatments.items()
        if _is_resize(treatment)
        and _is_last(node, flow)
        and all(source in region.needed and region.stage(source) > 0 for source in flow.maps(node))
        and facts.layout(flow.maps(node)[0]) == NCHW
        and (flow.grid[flow.maps(node)[0]] > high or dict(treatment.arguments)["mode"] != "bilinear")
    )


def _leaving_sizes(
    layouts: dict[fx.Node, str], flow: Flow, region: Region, resized: frozenset[fx.Node], fine_outputs: bool
) -> dict[fx.Node, str]:
    """For each map that leaves the region: `fine` if everything after accepts another size, else `native`. Resizes
    that read elements do not need it to leave."""
    sizes = {}
    for node in region.needed:
        readers = [user for user in _dense_readers(node, flow, region) if user not in resized]
        if region.stage(node) > 0 and readers:
            # Flattened positions say nothing of height and width: whoever takes them counts on the network's own.
            returned = fine_outputs and "h" in layouts[node] and all(user.op == "output" for user in readers)
            fine = flow.grid[node] == region.strides[0] or returned
            sizes[node] = "fine" if fine else "native"
    return sizes


def _dense_readers(node: fx.Node, flow: Flow, region: Region) -> list[fx.Node]:
    """Users of a map of the region that need it as a dense tensor."""
    return [
        user
        for user in node.users
        if not (user in region.needed and region.stage(user) > 0)
        and not _reads_last(user, [node], flow, region)
        and not _only_asks(user, flow)
    ]


def _describe(node: fx.Node, facts: Facts, treatment: Treatment) -> str:
    name = operation_name(node, facts)
    window = treatment.window
    if window is None:
        return name
    stride = f"/{window.stride}" if window.stride > 1 else ""
    dilation = f" dilated {window.dilation[0]}" if window.dilation != (1, 1) else ""
    return f"{name} {window.kernel[0]}x{window.kernel[1]}{stride}{dilation}"
