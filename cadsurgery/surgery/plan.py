"""The plan: one decision per node, made before anything is changed, and printable."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Literal

import torch.nn.functional as F
from torch import fx

from cadsurgery.errors import CannotConvert, InvalidInput, UnknownName
from cadsurgery.kernel_map import Window
from cadsurgery.surgery.facts import Facts
from cadsurgery.surgery.flow import Flow, Region, Role, dilated_by_design, flow_forward, region_of
from cadsurgery.surgery.rules import Treatment, operation_name, treat

Action = Literal["dense", "enter", "adapt", "keep", "exit", "barrier"]
RegionOption = str | Sequence[str]

# Attribute names under which libraries keep the part of a network that other heads can be put on.
BACKBONE_NAMES = ("backbone", "encoder", "features", "body", "trunk")


@dataclass(frozen=True)
class Decision:
    """What happens to one node.

    Attributes:
        node: name in the graph.
        path: module it belongs to.
        operation: what it does, e.g. `Conv2d 3x3/2`.
        action: `dense` (untouched), `enter` (its dense value is read as elements), `adapt` (a strided
            operation made adaptive), `keep` (runs on elements as it is), `exit` (reads what leaves the
            region) or `barrier` (an operation that ends the region).
        reason: why.
        stages: stage of its input and of its output.
        window: its window, with its spacing in fine pixels.
        grid: fine pixels between the samples of its output as the network itself has it.
        leaves: size at which its value leaves the region: `fine`, `native` or "".
        macs: multiply-accumulates on the example, in the network as it is.
        shape: of its output on the example, in the network as it is.
    """

    node: str
    path: str
    operation: str
    action: Action
    reason: str
    stages: tuple[int, int] = (0, 0)
    window: Window | None = None
    grid: int = 1
    leaves: str = ""
    macs: int = 0
    shape: tuple[int, ...] = ()


@dataclass(frozen=True)
class Plan:
    """What a conversion will do; `print(plan)` lists every decision.

    Attributes:
        decisions: one per node, in order of execution.
        output_stride: (high, low).
        strides: output strides of the lattices, from the high one to the network's lowest.
        identity_level: the level at which a uniform map gives the network as it was: the lowest for a
            strided network, 0 for a dilated one, None if its own strides are not among the lattices.
        region: the region asked for.
        possible: possible (high, low) pairs.
        example_shape: shape of the image the plan was made on.
    """

    decisions: tuple[Decision, ...]
    output_stride: tuple[int, int]
    strides: tuple[int, ...]
    identity_level: int | None
    region: str | tuple[str, ...]
    possible: tuple[tuple[int, int], ...]
    example_shape: tuple[int, ...]

    @property
    def stage_strides(self) -> tuple[int, ...]:
        """Stride of each adaptive stage."""
        return tuple(b // a for a, b in zip(self.strides, self.strides[1:], strict=False))

    @property
    def max_level(self) -> int:
        """The lowest level of a level map: that of the low output stride."""
        return self.strides.index(self.output_stride[1])

    def __getitem__(self, node: str) -> Decision:
        for decision in self.decisions:
            if decision.node == node:
                return decision
        raise UnknownName("node", node, [decision.node for decision in self.decisions])

    def chosen(self, *actions: Action) -> list[Decision]:
        """The decisions with one of these actions."""
        return [decision for decision in self.decisions if decision.action in actions]

    def share(self, *actions: Action) -> float:
        """Share of the network's MACs (on the example, as it is) under these actions."""
        total = sum(decision.macs for decision in self.decisions)
        return sum(decision.macs for decision in self.chosen(*actions)) / total if total else 0.0

    @property
    def region_end(self) -> list[Decision]:
        """The decisions where the region ends."""
        return self.chosen("exit", "barrier")

    @property
    def cost_of_barriers(self) -> float:
        """Share of the network's MACs that run dense after the region."""
        order = [decision.action for decision in self.decisions]
        start = next((i for i, action in enumerate(order) if action in ("adapt", "keep")), len(order))
        after = [d for d in self.decisions[start:] if d.action in ("dense", "exit", "barrier")]
        total = sum(decision.macs for decision in self.decisions)
        return sum(decision.macs for decision in after) / total if total else 0.0

    def to_json(self) -> str:
        """The whole plan as JSON; `Plan.from_json` reads it back."""
        return json.dumps(asdict(self))

    @staticmethod
    def from_json(text: str) -> Plan:
        """The plan written by `to_json`."""
        fields = json.loads(text)
        decisions = []
        for entry in fields.pop("decisions"):
            window = entry.pop("window")
            entry = {key: tuple(value) if isinstance(value, list) else value for key, value in entry.items()}
            if window is not None:
                window = Window(*(tuple(value) if isinstance(value, list) else value for value in window))
            decisions.append(Decision(**entry, window=window))
        fields["possible"] = tuple(tuple(pair) for pair in fields["possible"])
        fields = {key: tuple(value) if isinstance(value, list) else value for key, value in fields.items()}
        return Plan(tuple(decisions), **fields)

    def __str__(self) -> str:
        header = ("node", "operation", "action", "output stride", "reason")
        rows = [header] + [
            (d.node, d.operation, d.action, self.stride_text(d), d.reason) for d in self.decisions
        ]
        widths = [max(len(row[column]) for row in rows) for column in range(4)]
        table = [
            "  ".join([*(cell.ljust(w) for cell, w in zip(row, widths, strict=False)), row[4]]).rstrip()
            for row in rows
        ]
        return "\n".join([self.summary(), "", *table])

    def summary(self) -> str:
        """What becomes adaptive and where it ends, in a few lines."""
        high, low = self.output_stride
        kind = "its own where the mask is high" if self.identity_level == 0 else "its own where the mask is low"
        kind = kind if self.identity_level is not None else "neither is its own"
        lines = [
            f"output stride {high} where the mask says so, {low} elsewhere ({kind})",
            f"adaptive stages: {len(self.stage_strides)}, from {' to '.join(map(str, self.strides))}; "
            f"levels 0..{self.max_level}",
            f"{len(self.chosen('adapt'))} operations adapted, {len(self.chosen('keep'))} kept on elements, "
            f"{self.share('adapt', 'keep'):.0%} of the MACs in the region",
        ]
        for decision in self.region_end:
            place = decision.node if decision.action == "barrier" else f"{decision.node} (leaves {decision.leaves})"
            lines.append(f"region ends at {place}: {decision.reason}")
        if self.cost_of_barriers > 0:
            lines.append(f"{self.cost_of_barriers:.0%} of the MACs run dense after the region")
        return "\n".join(lines)

    def stride_text(self, decision: Decision) -> str:
        """Output stride before and after a node, for tables."""
        if decision.action not in ("adapt", "keep"):
            return decision.leaves and f"-> {decision.leaves}"
        before, after = (self.strides[stage] for stage in decision.stages)
        return f"{before} -> {after}" if before != after else f"{after}"


def make_plan(facts: Facts, output_stride: tuple[int, int] | None = None, region: RegionOption = "auto") -> Plan:
    """Decide for every node of a traced network. Pure: nothing is changed.

    Args:
        facts: of the traced network.
        output_stride: (high, low); by default (native / 4, native) for a strided network and
            (current, undilated) for a dilated one.
        region: `"auto"`, `"backbone"`, or names of nodes or modules.

    Raises:
        CannotConvert: nothing can be made adaptive.
        InvalidInput: an impossible output stride; the message lists the possible ones.
        UnknownName: a region name that is neither a node nor a module.
    """
    refused = _refusal(facts, region)
    treatments = {node: treat(node, facts) for node in facts.graph.nodes}
    flow = _settled_flow(facts, treatments, refused)
    highs = sorted({flow.grid[node] for node in flow.grid})
    regions = {high: region_of(flow, facts, treatments, high) for high in highs}
    possible = [(high, low) for high in highs for low in regions[high].strides[1:]]
    if not possible:
        raise _nothing_to_convert(facts, flow)
    high, low = _choose(flow, regions, possible, output_stride)
    chosen = regions[high]
    names = region if isinstance(region, str) else tuple(region)
    decisions = _decide(facts, treatments, flow, chosen)
    identity = _identity_level(flow, chosen, chosen.strides.index(low))
    shape = tuple(facts.example.shape)
    return Plan(tuple(decisions), (high, low), chosen.strides, identity, names, tuple(possible), shape)


def _settled_flow(facts: Facts, treatments: dict[fx.Node, Treatment], refused: Callable[[fx.Node], str]) -> Flow:
    """The forward flow in which every removed stride could really be put back."""
    by_design: frozenset[fx.Node] = frozenset()
    while True:
        flow = flow_forward(facts, treatments, refused, by_design)
        highs = {flow.grid[node] for node in flow.grid}
        found = [dilated_by_design(flow, region_of(flow, facts, treatments, high)) for high in highs]
        if not (new := frozenset().union(*found) - by_design):
            return flow
        by_design |= new


def _choose(
    flow: Flow, regions: dict[int, Region], possible: list[tuple[int, int]], asked: tuple[int, int] | None
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
    return max((high for high in highs if high <= low / 4), default=highs[0]), low


def _identity_level(flow: Flow, region: Region, max_level: int) -> int | None:
    """The level whose uniform map puts every value of the region on the network's own grid."""
    staged = [(region.stage(node), flow.grid[node]) for node in region.needed if region.stage(node) > 0]
    levels = range(max_level + 1)
    return next((lv for lv in levels if all(region.strides[min(st, lv)] == grid for st, grid in staged)), None)


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
    names = tuple(region)
    known = {node.name for node in facts.graph.nodes} | set(modules)
    for name in names:
        if name not in known:
            raise UnknownName("node or module", name, known)

    def refused(node: fx.Node) -> str:
        path = facts.path(node)
        if any(node.name == name or path == name or path.startswith(f"{name}.") for name in names):
            return ""
        return f"outside the region {', '.join(names)}"

    return refused


def _nothing_to_convert(facts: Facts, flow: Flow) -> CannotConvert:
    model = type(facts.model).__name__
    if flow.barriers:
        node, reason = next(iter(flow.barriers.items()))
        after = sum(facts.macs[other] for other in facts.graph.nodes) or 1
        return CannotConvert(
            f"{model} has nothing that can be made adaptive.",
            where=f"{node.name} ({operation_name(node, facts)}{_source_line(node)})",
            why=f"{reason}; this operation holds {facts.macs[node] / after:.0%} of the MACs and all after it stay dense.",
            next="convert another part of the network with region=[...], or teach the operation with "
            "cadsurgery.surgery.rules.rule.",
        )
    return CannotConvert(
        f"{model} has nothing that can be made adaptive.",
        why="it has no strided convolution or pooling, and no dilation that stands for one.",
        next="content-adaptive downsampling needs a network that downsamples.",
    )


def _source_line(node: fx.Node) -> str:
    lines = [line.strip() for line in (node.stack_trace or "").splitlines() if line.strip().startswith("File")]
    if not lines:
        return ""
    file, line = lines[-1].split(",")[:2]
    return f", {file.split('/')[-1].rstrip(chr(34))}:{line.split()[-1]}"


def _decide(
    facts: Facts, treatments: dict[fx.Node, Treatment], flow: Flow, region: Region
) -> list[Decision]:
    sizes = _leaving_sizes(flow, region, treatments)
    staged = {node for node in region.needed if region.stage(node) > 0}
    decisions = []
    for node in facts.graph.nodes:
        maps = flow.maps(node)
        inputs = [source for source in maps if source in staged]
        on_elements = node in staged or (
            bool(inputs) and flow.role[node] is Role.VECTOR and node not in flow.barriers
        )
        action, reason = "dense", ""
        stages, window = (0, 0), None
        if on_elements:
            stage_in = min(region.stage(source) for source in maps)
            stage_out = region.stage(node) if node in staged else stage_in
            stages = (stage_in, stage_out)
            window = treatments[node].window
            if window is not None:
                window = window._replace(spacing=max(1, flow.grid[maps[0]] // region.strides[0]))
            action, reason = "adapt" if window and stage_out > stage_in else "keep", treatments[node].why
        elif inputs and treatments[node].kind != "shape":
            natural = node.op == "output" or node.target in _RESIZES
            action = "exit" if natural else "barrier"
            reason = flow.barriers.get(node, "the network's output")
            leaving = ", ".join(source.name for source in inputs)
            reason = f"{reason}; {leaving} leaves at {sizes[inputs[0]]} size"
        elif any(user in staged for user in node.users) and node in region.needed:
            action, reason = "enter", "one element per sample of this map"
        decisions.append(
            Decision(
                node=node.name,
                path=facts.path(node),
                operation=_describe(node, facts, treatments[node]),
                action=action,  # type: ignore[arg-type]
                reason=reason,
                stages=stages,
                window=window,
                grid=max(1, flow.grid.get(node, 1) // region.strides[0]),
                leaves=sizes.get(inputs[0] if action in ("exit", "barrier") else node, ""),
                macs=facts.macs[node],
                shape=tuple(facts.shapes.get(node, ())),
            )
        )
    return decisions


_RESIZES = (F.interpolate, F.upsample)


def _leaving_sizes(
    flow: Flow, region: Region, treatments: dict[fx.Node, Treatment]
) -> dict[fx.Node, str]:
    """For each map that leaves the region: `fine` if everything after accepts another size, else `native`."""
    sizes = {}
    for node in region.needed:
        readers = _dense_readers(node, flow, region, treatments)
        if region.stage(node) > 0 and readers:
            fine = flow.grid[node] == region.strides[0] or all(_accepts_any_size(user) for user in readers)
            sizes[node] = "fine" if fine else "native"
    return sizes


def _dense_readers(
    node: fx.Node, flow: Flow, region: Region, treatments: dict[fx.Node, Treatment]
) -> list[fx.Node]:
    """Users of a map of the region that need it as a dense tensor."""
    return [
        user
        for user in node.users
        if user not in region.needed and flow.role[user] is not Role.VECTOR and treatments[user].kind != "shape"
    ]


def _accepts_any_size(user: fx.Node) -> bool:
    if user.op == "output":
        return True
    if user.target in _RESIZES:
        return user.kwargs.get("size") is not None and user.kwargs.get("scale_factor") is None
    return False


def _describe(node: fx.Node, facts: Facts, treatment: Treatment) -> str:
    name = operation_name(node, facts)
    window = treatment.window
    if window is None:
        return name
    stride = f"/{window.stride}" if window.stride > 1 else ""
    dilation = f" dilated {window.dilation[0]}" if window.dilation != (1, 1) else ""
    return f"{name} {window.kernel[0]}x{window.kernel[1]}{stride}{dilation}"
