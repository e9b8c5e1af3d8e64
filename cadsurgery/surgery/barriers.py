"""Find the nodes that must stay outside the region, in repeated passes, before the strides are chosen."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from torch import fx

from cadsurgery.following.facts import Facts
from cadsurgery.following.graphs import and_after
from cadsurgery.surgery.flow import Flow, Role, flow_forward
from cadsurgery.surgery.region import dilated_by_design, region_of
from cadsurgery.surgery.treatment import Barrier, Cause, operation_name

Refusal = Callable[[fx.Node, Sequence[fx.Node]], Barrier | None]

# An additional, coarser output map gets no adaptive stage of its own if it has less than this share of the MACs.
MERE_TAIL = 0.05
_FINAL = Barrier("resizes what leaves the region", Cause.END)
_CHOICE = Barrier("its whole numbers leave the region, where they cannot be interpolated", Cause.END)

_PLACES = Barrier("its indices are read dense, and inside a cell there are no places of maxima")


class Settled(NamedTuple):
    """A flow and the arguments it was computed with.

    Attributes:
        flow: the forward flow.
        refused: function that returns why a node may not be in the region, or None.
        by_design: nodes whose dilation does not replace a removed stride.
        removed_up_to: see `settle_flow`.
    """

    flow: Flow
    refused: Refusal
    by_design: frozenset[fx.Node]
    removed_up_to: int | None

    def up_to(self, low: int, through_heads: bool = False) -> Flow:
        """Return the flow for cells of at most `low` pixels, where more operations may stay in the region, also windows
        whose taps fall inside the cells if it goes `through_heads`."""
        return flow_forward(self.flow, self.refused, self.by_design, low, self.removed_up_to, through_heads)


def settle_flow(
    facts: Facts, asked: Refusal, named: bool, removed_up_to: int | None = None, floors: bool = False
) -> Settled:
    """Compute the forward flow in which removed strides can be restored and only windows of the region read padding.

    Args:
        facts: facts about the network.
        asked: function that returns why the requested region leaves out a node that reads certain maps, or None.
        named: true if the region names its operations; small tails are then kept in it.
        removed_up_to: the largest output stride that a dilation may stand for; None for no limit.
        floors: true if maps may become coarser than the network's own grid. Final resizes then stay in the region, and
            no output decides about its strides.
    """
    by_design: frozenset[fx.Node] = frozenset()
    outside: dict[fx.Node, Barrier] = {}

    def refused(node: fx.Node, maps: Sequence[fx.Node]) -> Barrier | None:
        padded = [source for source in maps if source in outside and outside[source].cause is Cause.PADDING]
        if padded and len(padded) == len(maps):  # a join with another map would fix the size
            return Barrier(f"reads what {padded[0].name} padded, which is larger than the maps of the region")
        return asked(node, maps) or outside.get(node)

    while True:
        flow = flow_forward(facts, refused, by_design, removed_up_to=removed_up_to)
        highs = set() if floors else {flow.grid[node] for node in flow.grid}
        dilated = frozenset().union(*(dilated_by_design(flow, region_of(flow, high)) for high in highs))
        # Final resizes read the region at arbitrary points, so that the output has the original network's size.
        resizes = [node for node in flow.last if flow.at_exit(node) and not floors]
        tails = {} if named or floors else _mere_tails(flow)
        leaving = _lone_pads(flow) | dict.fromkeys(resizes, _FINAL) | tails
        leaving |= dict.fromkeys(_leaving_choices(flow), _CHOICE)
        leaving |= dict.fromkeys(_poolings_unpooled_dense(flow) if floors else (), _PLACES)
        if dilated <= by_design and leaving.keys() <= outside.keys():
            return Settled(flow, refused, by_design, removed_up_to)
        by_design |= dilated
        outside |= leaving


def _leaving_choices(flow: Flow) -> list[fx.Node]:
    """Return operations whose results are whole numbers or truth values that leave the region, such as the argmax of
    class scores. The scores leave it instead, which can be interpolated."""
    choices = [
        node
        for node, role in flow.role.items()
        if role is Role.MAP
        and node in flow.shapes
        and flow.treatments[node].leaves_by is None  # indices of a pooling leave as torch has them
        and not {node} & (flow.floating | flow.barriers.keys())
        and any(user.op == "output" or user in flow.barriers for user in node.users)
    ]
    # One of several results is marked by the operation that returns them all.
    return [
        node if node.args[0] in flow.shapes else flow.maps(node)[0] for node in choices if flow.maps(node)
    ]


def _poolings_unpooled_dense(flow: Flow) -> list[fx.Node]:
    """Return poolings with indices that are returned, or that an operation outside of the region reads, such as an
    unpooling whose windows overlap: of all samples of a cell one maximum is known."""
    indices = [node for node, treatment in flow.treatments.items() if treatment.leaves_by is not None]
    return [
        node.args[0]  # type: ignore[misc]
        for node in indices
        if node not in flow.barriers
        and any(user in flow.barriers or user.op == "output" for user in node.users)
    ]


def _lone_pads(flow: Flow) -> dict[fx.Node, Barrier]:
    """Return padding operations whose result is read by other nodes than windows and paddings of the region."""

    def is_window(user: fx.Node) -> bool:  # or pads it further, or asks for the size
        kind = flow.treatments[user].kind
        of_region = kind in ("window", "pad") or (kind == "shape" and user.op != "output")
        return user not in flow.barriers and of_region

    return {
        pad: Barrier(
            f"pads the map for {operation_name(user, flow)}, which is no window of the region",
            Cause.PADDING,
        )
        for pad in flow.pads
        for user in pad.users
        if not is_window(user)
    }


def _mere_tails(flow: Flow) -> dict[fx.Node, Barrier]:
    """Return strided operations at the end of a network with several outputs that have few MACs, such as the coarsest
    levels of a feature pyramid; in the region they would determine the lowest output stride. Operations whose results
    return to a finer map do not count: the finer map needs them at every level."""
    several = sum(flow.role[node] is Role.MAP for node in flow.outputs) > 1
    total = sum(flow.macs.values())
    shares: dict[fx.Node, float] = {}
    for node in flow.graph.nodes if several else ():
        window = flow.treatments[node].window
        if window is not None and window.stride > 1 and node not in flow.barriers:
            after = and_after(node)
            if all(flow.grid.get(later, flow.grid[node]) >= flow.grid[node] for later in after):
                shares[node] = sum(flow.macs[later] for later in after) / max(1, total)
    tails = [node for node, share in shares.items() if share < MERE_TAIL]
    rest = flow.grid.keys() - and_after(*tails)
    coarsest = max((flow.restored[node] for node in rest), default=0)
    return {
        node: Barrier(f"only {shares[node]:.1%} of the MACs come from here on", Cause.END)
        for node in tails
        if flow.restored[node] > coarsest
    }
