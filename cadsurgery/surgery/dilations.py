"""Interpret a network's dilations as removed strides or as its design. Each interpretation is evaluated, and
one is chosen.

A dilation that doubles from one stage to the next and stays replaces a removed stride, as in segmentation networks made
from classifiers. Cells of the former stride then lose nothing that later windows read. Dilations that come and go
(1, 2, 5, 1, 2, 5), differ between branches, or double from one operation to the next (1, 2, 4, 8, 16: a context module)
are the network's design: with cells enlarged by them, later windows would read inside the cells.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from torch import fx

from cadsurgery.following.facts import Facts
from cadsurgery.following.graphs import and_after
from cadsurgery.surgery.barriers import MERE_TAIL, Refusal, Settled, settle_flow
from cadsurgery.surgery.flow import Flow, Role
from cadsurgery.surgery.plan import Considered
from cadsurgery.surgery.region import Region, region_of
from cadsurgery.surgery.treatment import Cause

# The usual output stride of classification networks; dilations beyond it belong to context modules.
USUAL = 32

# Share of the MACs that makes a region worthwhile in networks with a decoder.
ENOUGH = 0.3


@dataclass(frozen=True)
class Interpretation:
    """One interpretation of a network's dilations.

    Attributes:
        settled: the forward pass with this interpretation.
        regions: region for each possible high output stride.
        possible: possible (high, low) pairs.
        usual: the default pair; None if no pair is possible.
        work: multiply-accumulates in the region of the default pair.
        is_evident: true if the network's structure shows that these strides were removed.
    """

    settled: Settled
    regions: dict[int, Region]
    possible: tuple[tuple[int, int], ...]
    usual: tuple[int, int] | None
    work: int
    is_evident: bool

    @property
    def largest_stride(self) -> int:
        """The largest output stride that a dilation replaces; 0 if all dilations are by design."""
        return max(self.settled.flow.grown.values(), default=0)


def interpret_dilations(facts: Facts, asked: Refusal, named: bool) -> tuple[Interpretation, ...]:
    """Return the interpretations of a network's dilations, the chosen one first; most networks have only one.

    Args:
        facts: facts about the network.
        asked: function that returns why the requested region leaves out a node that reads certain maps, or None.
        named: true if the region names its operations.
    """
    settled = settle_flow(facts, asked, named)
    in_stages = _is_in_stages(settled.flow)
    whole = _read(settled, in_stages)
    spacings = sorted(set(whole.settled.flow.grown.values()))
    if not spacings:
        return (whole,)
    limits = (*spacings[-2::-1], 0)
    fewer = [_read(settle_flow(facts, asked, named, limit), in_stages) for limit in limits]
    interpretations = [whole, *fewer]
    chosen = _choose_among(interpretations)
    return (chosen, *(one for one in interpretations if one is not chosen))


def _choose_among(interpretations: list[Interpretation]) -> Interpretation:
    """Choose the interpretation with the largest evidently removed strides; else the one without removed strides, if
    its region has at least half the work of any other."""
    by_design = interpretations[-1]
    limit = max(USUAL, *by_design.settled.flow.grid.values())
    usable = [one for one in interpretations if one.usual is not None and one.largest_stride <= limit]
    usable = usable or interpretations
    if evident := [one for one in usable if one.is_evident]:
        return evident[0]
    most = max(usable, key=lambda one: one.work)
    return by_design if by_design in usable and 2 * by_design.work >= most.work else most


def consider(interpretations: Sequence[Interpretation], total: int) -> tuple[Considered, ...]:
    """Summarise the interpretations for reports, the chosen one first.

    Args:
        interpretations: interpretations of one network.
        total: multiply-accumulates of the network.
    """
    return tuple(
        Considered(
            one.usual,
            tuple(sorted(set(one.settled.flow.grown.values()))),
            one.work / max(1, total),
            one.is_evident,
        )
        for one in (interpretations if len(interpretations) > 1 else ())
    )


def _read(settled: Settled, in_stages: bool) -> Interpretation:
    flow = settled.flow
    regions = {high: region_of(flow, high) for high in sorted(set(flow.grid.values()))}
    possible = tuple((high, low) for high, region in regions.items() for low in region.strides[1:])
    usual = _choose_strides(flow, regions, possible) if possible else None
    work = _macs_of(flow, regions[usual[0]].on_elements) if usual is not None else 0
    return Interpretation(
        settled, regions, possible, usual, work, bool(possible) and in_stages and _is_consistent(flow)
    )


def _is_consistent(flow: Flow) -> bool:
    """True if at most half of the work after removed strides depends on windows that would read inside the cells."""
    behind, finer = _behind(flow)
    macs = flow.macs
    return bool(behind) and 2 * sum(macs[node] for node in finer) <= sum(macs[node] for node in behind)


def _is_in_stages(flow: Flow) -> bool:
    """True if dilations grow between stages; in a context module they double at least three times with few windows in
    between."""
    behind, finer = _behind(flow)
    steps = {flow.grown[node] for node in (behind - finer) & flow.grown.keys()}
    windows = [node for node in behind - finer if _reads_neighbours(node, flow)]
    return len(steps) <= 2 or len(windows) > 2 * len(steps)


def _behind(flow: Flow) -> tuple[set[fx.Node], set[fx.Node]]:
    """Return the nodes after removed strides, up to other ends of the region, and those among them that depend on
    windows which would read inside the cells."""
    ends = [node for node, barrier in flow.barriers.items() if barrier.cause is not Cause.CELLS]
    behind = and_after(*flow.grown, without=ends)
    return behind, and_after(*(behind & flow.barriers.keys()), without=ends)


def _reads_neighbours(node: fx.Node, flow: Flow) -> bool:
    """True if a dilated window becomes undilated on the cells that it reads."""
    treatment, maps = flow.treatments[node], flow.maps(node)
    if treatment.kind != "window" or treatment.window is None or treatment.window.is_pointwise:
        return False
    reach = min(treatment.window.dilation) * flow.grid[maps[0]]
    return flow.grid[maps[0]] < reach == flow.restored[node] // treatment.window.stride


def _choose_strides(
    flow: Flow, regions: dict[int, Region], possible: Sequence[tuple[int, int]]
) -> tuple[int, int]:
    """Choose the default high and low output stride."""
    low = max(pair[1] for pair in possible)
    highs = [high for high, lowest in possible if lowest == low]
    current = max(flow.grid[node] for node in regions[highs[-1]].needed)
    if current < low:  # a dilated network already has its high output stride
        return (current if current in highs else highs[-1]), low
    usual = max((high for high in highs if high <= _trunk(flow, low) / 4), default=highs[0])
    # If a barrier, e.g. attention in the last stages, leaves little work in that region, others are compared. If a
    # branch to a finer output has most of the work, the coarsest with enough work is chosen.
    work = {high: _macs_of(flow, region.readers) for high, region in regions.items()}
    returns_map = any(flow.role[node] is Role.MAP for node in flow.outputs)
    finer = returns_map and any(_comes_back(node, flow) and grid <= usual for node, grid in flow.grid.items())
    most, enough = max(work.values()), ENOUGH * sum(flow.macs.values())
    if finer and _macs_of(flow, regions[usual].on_elements) < (enough if enough <= most else most / 4):
        enough = min(enough, most / 2)
    else:
        near = (high for high, region in regions.items() if high == usual or region.strides[-1] <= 4 * high)
        work = {high: work[high] for high in near}
        enough = max(work.values()) / 2
    worth = [high for high in work if work[high] >= enough]
    chosen = usual if usual in worth else max(worth)
    return chosen, regions[chosen].strides[-1]


def _comes_back(node: fx.Node, flow: Flow) -> bool:
    """True if a map is finer than its input, and is not a final resize."""
    finer = any(flow.grid[node] < flow.grid[source] for source in flow.maps(node))
    return finer and node not in flow.last


def _macs_of(flow: Flow, nodes: Iterable[fx.Node]) -> int:
    """Return the multiply-accumulates of some nodes."""
    return sum(flow.macs[node] for node in nodes)


def _trunk(flow: Flow, low: int) -> int:
    """Return the network's own low output stride, without small side branches that return to a finer map."""
    work: dict[int, int] = {}
    ends: set[int] = set()
    for node, grid in flow.grid.items():
        work[grid] = work.get(grid, 0) + flow.macs[node]
        for user in node.users:
            last = flow.treatments[user].kind == "global" or user in flow.last
            if last or user in flow.barriers or user.op == "output":
                ends.add(grid)
    needed = MERE_TAIL * sum(work.values())
    return max((grid for grid in work if grid <= low and (work[grid] >= needed or grid in ends)), default=low)
