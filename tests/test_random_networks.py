"""Random small networks keep the laws: what a call returns is a dense emulation's, on any level map.

Each seed is a network of `random_networks`, converted with random options, run on a random level map per image. A
refusal is `CannotConvert` with a reason of the network, never one that asks to report a mistake of ours.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from conftest import assert_same, random_levels
from emulation import Emulation
from planned_emulation import PlannedEmulator, Told
from random_networks import Case, Draw, random_case
from torch.utils._pytree import tree_leaves

import cadsurgery as cs

QUICK = 30
ALL = 300


def told(plan: cs.Plan) -> dict[str, Told]:
    """What the emulator is told of each node: plain numbers."""
    return {
        d.node: Told(d.action in ("adapt", "keep"), d.stages[1], d.grid, d.leaves, d.layout)
        for d in plan.decisions
    }


def at_own_samples(emulator: PlannedEmulator, output: Any) -> Any:
    """An output with each map that is returned at the fine size at the network's own samples."""
    returned = next(node for node in emulator.module.graph.nodes if node.op == "output").args[0]

    def read(value: Any, source: Any) -> Any:
        if isinstance(source, list | tuple):
            return type(value)([read(*pair) for pair in zip(value, source, strict=True)])
        if isinstance(source, dict):
            return {key: read(value[key], part) for key, part in source.items()}
        of = emulator.told[source.name]
        fine = of.inside and of.layout and of.leaves == "fine"
        return value[:, :, :: of.grid, :: of.grid] if fine else value

    return read(output, returned)


def convert(case: Case, draw: Draw) -> cs.AdaptiveModel:
    possible = cs.plan(case.model, example_input=case.example).possible
    options: dict[str, Any] = {
        "output_stride": draw.choice([None, draw.choice(possible)]),
        "fill": draw.choice(["linear", "linear", "nearest", "guided"]),
        "patch": draw.choice(["quadtree", "quadtree", "block"]),
    }
    return cs.adaptify(case.model, "none", example_input=case.example, **options)


def check(seed: int) -> None:
    case, draw = random_case(seed), Draw(-1 - seed)
    net = convert(case, draw)
    plan, geometry, x = net.plan, net.geometry, case.image
    with torch.no_grad():
        original = case.model(x.clone())
        net(x, mask="all")
        size = (net.levels.shape[1], net.levels.shape[2])
        options = {"max_level": plan.max_level, "patch": geometry.patch}
        levels = random_levels(
            len(x), size, plan.stage_strides, split=draw.choice([0.3, 0.5, 0.7]), **options
        )
        found = net(x, mask=levels)
        assert torch.equal(net.levels.long(), levels)

        emulation = Emulation(levels, plan.stage_strides, geometry.fill)
        guide = plan.chosen("enter")[0].node if geometry.fill == "guided" else ""
        emulator = PlannedEmulator(copy.deepcopy(case.model), emulation, told(plan), guide)
        same(found, emulator.run(x.clone()))

        if case.per_image:
            for image in range(len(x)):
                alone = net(x[image : image + 1], mask=levels[image : image + 1])
                same(alone, of_image(found, image))
        if plan.identity_level is not None:
            own = net(x, mask=torch.full_like(levels, plan.identity_level))
            if int(net.levels.max()) == plan.identity_level:  # blocks have no levels in between
                same(at_own_samples(emulator, own), original)
        same(net.optimize()(x, mask=levels), found, 1e-8)


def same(found: Any, expected: Any, tolerance: float = 1e-9) -> None:
    """Outputs of any structure are equal up to rounding."""
    assert isinstance(expected, type(found))  # torch.fx returns lists of its own kind
    pairs = zip(tree_leaves(found), tree_leaves(expected), strict=True)
    for one, other in pairs:
        assert_same(one, other, tolerance)


def of_image(output: Any, image: int) -> Any:
    return torch.utils._pytree.tree_map(lambda leaf: leaf[image : image + 1], output)


@pytest.mark.parametrize(
    "seed", [pytest.param(s, marks=[pytest.mark.slow] if s >= QUICK else []) for s in range(ALL)]
)
def test_a_random_network_is_its_emulation(seed: int) -> None:
    check(seed)
