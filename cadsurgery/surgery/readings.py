"""Readings of a network's dilations: removed strides, or its design. Each reading is planned, and one chosen.

A dilation that doubles from one stage to the next and stays is a stride that was removed, as in segmentation networks
made from classifiers: cells as large as before it was removed lose nothing their windows read. Dilations that come and
go (1, 2, 5, 1, 2, 5), differ between branches, or double from one operation to the next (1, 2, 4, 8, 16: a context
module) are the network's design: of cells made larger by them, later windows would need the inside.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import fx

from cadsurgery.surgery.facts import Facts
from cadsurgery.surgery.flow import Flow, Role
from cadsurgery.surgery.graphs import and_after
from cadsurgery.surgery.plan import Considered
from cadsurgery.surgery.region import Region, readers, region_of
from cadsurgery.surgery.settle import MERE_TAIL, Refusal, Settled, settle_flow
from cadsurgery.surgery.treatment import Cause

# The output stride of classification networks, whose strides are removed: dilations that stand for more are context.
USUAL = 32

# Share of a network's work that is worth a region, where it is a decoder's.
ENOUGH = 0.3


@dataclass(frozen=True)
class Reading:
    """One way to read a network's dilations.

    Attributes:
        settled: the forward pass that reads them so.
        regions: for each possible high output stride, the region.
        possible: (high, low) pairs.
        usual: that pair of them which is taken where none is asked for; None if there is none.
        work: multiply-accumulates in the region of that pair.
        is_evident: true if the network is built as one from which these strides were removed.
    """

    settled: Settled
    regions: dict[int, Region]
    possible: tuple[tuple[int, int], ...]
    usual: tuple[int, int] | None
    work: int
    is_evident: bool

    @property
    def coarsest(self) -> int:
        """The largest spacing that a dilation stands for; 0 if all are by design."""
        return max(self.settled.flow.grown.values(), default=0)


def read_dilations(facts: Facts, asked: Refusal, named: bool) -> tuple[Reading, ...]:
    """The readings of a network's dilations, that to be planned first; of most networks there is one.

    Args:
        facts: of the network.
        asked: why the region asked for leaves out a node that reads these maps.
        named: true if a region names its operations.
    """
    settled = settle_flow(facts, asked, named)
    in_stages = _is_in_stages(settled.flow)
    whole = _read(settled, in_stages)
    spacings = sorted(set(whole.settled.flow.grown.values()))
    if not spacings:
        return (whole,)
    limits = (*spacings[-2::-1], 0)
    fewer = [_read(settle_flow(facts, asked, named, limit), in_stages) for limit in limits]
    readings = [whole, *fewer]
    chosen = _choose_reading(readings)
    return (chosen, *(reading for reading in readings if reading is not chosen))


def _choose_reading(readings: list[Reading]) -> Reading:
    """That with the largest strides which evidently were removed; else that without any, if it keeps half as much work
    in the region as another."""
    by_design = readings[-1]
    limit = max(USUAL, *by_design.settled.flow.grid.values())
    usable = [one for one in readings if one.usual is not None and one.coarsest <= limit] or readings
    if evident := [reading for reading in usable if reading.is_evident]:
        return evident[0]
    most = max(usable, key=lambda reading: reading.work)
    return by_design if by_design in usable and 2 * by_design.work >= most.work else most


def consider(readings: Sequence[Reading], total: int) -> tuple[Considered, ...]:
    """Summarise the readings for reports, the chosen one first.

    Args:
        readings: of one network.
        total: its multiply-accumulates.
    """
    return tuple(
        Considered(
            reading.usual,
            tuple(sorted(set(reading.settled.flow.grown.values()))),
            reading.work / max(1, total),
            reading.is_evident,
        )
        for reading in (readings if len(readings) > 1 else ())
    )


def _read(settled: Settled, in_stages: bool) -> Reading:
    flow = settled.flow
    regions = {high: region_of(flow, high) for high in sorted(set(flow.grid.values()))}
    possible = tuple((high, low) for high, region in regions.items() for low in region.strides[1:])
    usual = _choose_strides(flow, regions, possible) if possible else None
    work = _on_elements(flow, regions[usual[0]]) if usual is not None else 0
    return Reading(
        settled, regions, possible, usual, work, bool(possible) and in_stages and _is_consistent(flow)
    )


def _is_consistent(flow: Flow) -> bool:
    """True if at most half of the work behind the strides that dilations stand for reads finer than the cells then are,
    up to where something else ends the region."""
    behind, finer = _behind(flow)
    macs = flow.facts.macs
    return bool(behind) and 2 * sum(macs[node] for node in finer) <= sum(macs[node] for node in behind)


def _is_in_stages(flow: Flow) -> bool:
    """True if dilations grow from one stage to the next: where they double three times or more, with hardly any window
    in between, it is a context module."""
    behind, finer = _behind(flow)
    steps = {flow.grown[node] for node in (behind - finer) & flow.grown.keys()}
    windows = [node for node in behind - finer if _reads_neighbours(node, flow)]
    return len(steps) <= 2 or len(windows) > 2 * len(steps)


def _behind(flow: Flow) -> tuple[set[fx.Node], set[fx.Node]]:
    """Nodes that depend on strides which dilations stand for, up to where something else ends the region; and those of
    them that depend on windows which read finer than the cells then are."""
    ends = [node for node, barrier in flow.barriers.items() if barrier.cause is not Cause.CELLS]
    behind = and_after(*flow.grown, without=ends)
    return behind, and_after(*(behind & flow.barriers.keys()), without=ends)


def _reads_neighbours(node: fx.Node, flow: Flow) -> bool:
    """True if a dilated window of the network is an undilated one on the cells that it reads."""
    treatment, maps = flow.treatments[node], flow.maps(node)
    if treatment.kind != "window" or treatment.window is None or treatment.window.is_pointwise:
        return False
    reach = min(treatment.window.dilation) * flow.grid[maps[0]]
    return flow.grid[maps[0]] < reach == flow.spacing[node] // treatment.window.stride


def _choose_strides(
    flow: Flow, regions: dict[int, Region], possible: Sequence[tuple[int, int]]
) -> tuple[int, int]:
    """High and low output stride where none are asked for."""
    low = max(pair[1] for pair in possible)
    highs = [high for high, lowest in possible if lowest == low]
    current = max(flow.grid[node] for node in regions[highs[-1]].needed)
    if current < low:  # dilated: it is at its high output stride already
        return (current if current in highs else highs[-1]), low
    usual = max((high for high in highs if high <= _trunk(flow, low) / 4), default=highs[0])
    # Where a barrier, e.g. attention in the last stages, leaves hardly anything of that, the work before it counts, and
    # where a branch to a finer output has most of the work, the coarsest that has enough of it.
    work = {high: _work(flow, region) for high, region in regions.items()}
    returns_map = any(flow.role[node] is Role.MAP for node in flow.facts.outputs)
    finer = returns_map and any(_comes_back(node, flow) and grid <= usual for node, grid in flow.grid.items())
    most, enough = max(work.values()), ENOUGH * sum(flow.facts.macs.values())
    if finer and _on_elements(flow, regions[usual]) < (enough if enough <= most else most / 4):
        enough = min(enough, most / 2)
    else:
        near = (high for high, region in regions.items() if high == usual or region.strides[-1] <= 4 * high)
        work = {high: work[high] for high in near}
        enough = max(work.values()) / 2
    worth = [high for high in work if work[high] >= enough]
    chosen = usual if usual in worth else max(worth)
    return chosen, regions[chosen].strides[-1]


def _comes_back(node: fx.Node, flow: Flow) -> bool:
    """True if a map is finer than the one it is made of, and not only to be returned so."""
    finer = any(flow.grid[node] < flow.grid[source] for source in flow.maps(node))
    return finer and node not in flow.last


def _on_elements(flow: Flow, region: Region) -> int:
    """Multiply-accumulates of what a plan would adapt or keep."""
    inside = {node for node in region.needed if region.stage(node) > 0} | set(readers(flow, region))
    return sum(flow.facts.macs[node] for node in inside)


def _work(flow: Flow, region: Region) -> int:
    return sum(flow.facts.macs[node] for node in readers(flow, region))


def _trunk(flow: Flow, low: int) -> int:
    """The network's own output stride: its lowest, not counting a side branch that comes back finer."""
    work: dict[int, int] = {}
    ends: set[int] = set()
    for node, grid in flow.grid.items():
        work[grid] = work.get(grid, 0) + flow.facts.macs[node]
        for user in node.users:
            last = flow.treatments[user].kind == "global" or user in flow.last
            if last or user in flow.barriers or user.op == "output":
                ends.add(grid)
    needed = MERE_TAIL * sum(work.values())
    return max((grid for grid in work if grid <= low and (work[grid] >= needed or grid in ends)), default=low)
