"""Estimate what floors would save in a network, from its plan alone: nothing is converted."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import fx

from cadsurgery.elements.sizes import divide_up
from cadsurgery.surgery.facts import Facts
from cadsurgery.surgery.flow import Flow, Role
from cadsurgery.surgery.plan import Prospect
from cadsurgery.surgery.refusals import RegionOption, asked_region
from cadsurgery.surgery.region import Region, floor_region
from cadsurgery.surgery.settle import settle_flow

FLOOR = 32  # the floor that plans and `recommend` speak of, in input pixels


def floors_prospect(
    facts: Facts, region: RegionOption, size: Sequence[int], coarsest: int = FLOOR
) -> Prospect | None:
    """Estimate the share of MACs that a network takes with everything at a floor.

    Args:
        facts: facts about the traced network.
        region: see `make_plan`.
        size: height and width of the image to estimate for.
        coarsest: the floor.

    Returns:
        None if the network's strides do not lead to this floor, or no multiplication would be saved.
    """
    asked = asked_region(facts, region)
    flow = settle_flow(facts, asked, not isinstance(region, str), coarsest=0, floors=True).flow
    chosen = floor_region(flow, coarsest)
    if chosen is None:
        return None
    given = sum(_macs(node, flow, size) for node in facts.graph.nodes)
    low = sum(_macs(node, flow, size, _floor(node, chosen, coarsest)) for node in facts.graph.nodes)
    return Prospect(coarsest, low / given) if low < given else None


def _floor(node: fx.Node, region: Region, coarsest: int) -> int:
    """Return the floor of a node: 1 outside the region."""
    return coarsest if node in region.needed and region.stage(node) else 1


def _macs(node: fx.Node, flow: Flow, size: Sequence[int], floor: int = 1) -> float:
    """Return a node's multiply-accumulates on one image; of a map they are proportional to its positions."""
    macs = flow.facts.macs[node] / len(flow.facts.example)
    if not macs or flow.role[node] is not Role.MAP:
        return macs
    own, grid = flow.facts.images[node], flow.grid[node]
    is_example = tuple(size) == tuple(flow.facts.example.shape[2:])
    sides = own if is_example else [divide_up(length, grid) for length in size]
    step = max(1, floor // grid)
    return macs * math.prod(divide_up(side, step) for side in sides) / math.prod(own)
