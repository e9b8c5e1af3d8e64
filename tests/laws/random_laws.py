"""A random network held against its dense emulation and itself: the laws, on a random level map for each image."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import torch
from conftest import assert_same, random_levels
from emulation import Emulation
from networks import unverified
from planned_emulation import NotFollowed, PlannedEmulator, Told
from random_networks import Case, Draw
from torch import Tensor
from torch.utils._pytree import tree_leaves

import cadsurgery as cs
from cadsurgery.following.guards import GuardFailed
from cadsurgery.surgery.verify import FirstOfEqual


def told(plan: cs.Plan) -> dict[str, Told]:
    """What the emulator is told of each node: plain numbers."""
    return {
        d.node: Told(d.action in ("adapt", "keep"), d.stages[1], d.spacing, d.leaves, d.layout, d.shape)
        for d in plan.decisions
    }


def at_own_samples(output: Any, original: Any) -> Any:
    """An output with each map that is returned at the fine size at the network's own samples."""

    def read(value: Tensor, own: Tensor) -> Tensor:
        if value.shape == own.shape or value.dim() != 4:
            return value
        steps = (1 << power for power in range(1, 8))
        grids = (value[:, :, ::step, ::step] for step in steps)
        return next((grid for grid in grids if grid.shape == own.shape), value)

    return torch.utils._pytree.tree_map(read, output, original)


def convert(case: Case, draw: Draw) -> cs.AdaptiveModel:
    possible = cs.plan(case.model, example_input=case.given).possible
    options: dict[str, Any] = {
        "output_stride": draw.choice([None, draw.choice(possible)]),
        "fill": draw.choice(["linear", "linear", "nearest", "guided"]),
        "patch": draw.choice(["quadtree", "quadtree", "block"]),
    }
    return cs.adaptify(case.model, "none", example_input=case.given, **options)


def compare(case: Case, draw: Draw, options: dict[str, Any] | None = None) -> cs.AdaptiveModel:
    """Converts a network, with random options or with these and without a comparison of its own, and holds it against
    its emulation and itself.

    Where a map that left the region is pooled with indices, values of a window are equal but for rounding, which the
    batch, the kernels and the emulation change: of these the first counts as the largest, for all of them.
    """
    x, more = case.image, case.more
    of_this_size = replace(case, example=x, more_of_example=more)
    if options is None:
        net = convert(case, draw)
    else:
        net = unverified(case.model, "none", example_input=case.given, **options)
    with torch.no_grad(), FirstOfEqual():
        original = case.model(x.clone(), *more)
        try:
            levels = draw_levels(net, draw, x, *more)
        except GuardFailed:  # with other strides
            net = convert(of_this_size, draw)
            levels = draw_levels(net, draw, x, *more)
        plan = net.plan
        found = net(x, *more, mask=levels)
        assert torch.equal(net.levels.long(), levels)
        assert all(bool(leaf.isfinite().all()) for leaf in tree_leaves(found))
        try:
            expected = emulate(case, net, levels)
        except NotFollowed:
            pass
        else:
            same(found, expected)

        if case.per_image and not case.joined:
            for image in range(len(x)):
                one = [value[image : image + 1] for value in (x, *more)]
                same(net(*one, mask=levels[image : image + 1]), of_image(found, image))
        if plan.identity_level is not None:
            own = net(x, *more, mask=torch.full_like(levels, plan.identity_level))
            if int(net.levels.max()) == plan.identity_level:  # blocks have no levels in between
                same(at_own_samples(own, original), original)
        refuses_alike(case, net)
        try:
            same(net.optimize()(x, *more, mask=levels), found, 1e-8)
        except GuardFailed:  # a copy has the one way of the example
            net = convert(of_this_size, draw)
            levels = draw_levels(net, draw, x, *more)
            same(net.optimize()(x, *more, mask=levels), net(x, *more, mask=levels), 1e-8)
    return net


def refuses_alike(case: Case, net: cs.AdaptiveModel) -> None:
    """At a size where the network raises, as it joins maps that round differently, the converted one refuses, too."""
    if case.more:
        return
    image = case.image[..., :-1, :-1]
    try:
        case.model(image.clone())
    except RuntimeError:
        refused = False
        try:
            net(image)
        except cs.InvalidInput:
            refused = True
        assert refused


def draw_levels(net: cs.AdaptiveModel, draw: Draw, image: Tensor, *more: Tensor) -> Tensor:
    """A random level map for a batch."""
    net(image, *more, mask="all")
    count, *sides = net.levels.shape  # of all images that the network joins
    size, split = (sides[0], sides[1]), draw.choice([0.3, 0.5, 0.7])
    options = {"max_level": net.plan.max_level, "patch": net.geometry.patch}
    return random_levels(count, size, net.plan.stage_strides, split=split, **options)


def emulate(case: Case, net: cs.AdaptiveModel, levels: Tensor) -> Any:
    """The outputs by emulation.

    Raises:
        NotFollowed: it does not follow the network.
    """
    plan, geometry = net.plan, net.geometry
    emulation = Emulation(levels, plan.stage_strides, geometry.fill)
    guide = plan.chosen("enter")[0].node if geometry.fill == "guided" else ""
    emulator = PlannedEmulator(copy.deepcopy(case.model), emulation, told(plan), guide)
    return emulator.run(case.image.clone(), *case.more)


def same(found: Any, expected: Any, tolerance: float = 1e-9) -> None:
    """Outputs of any structure are equal up to rounding."""
    assert isinstance(expected, type(found))  # torch.fx returns lists of its own kind
    pairs = zip(tree_leaves(found), tree_leaves(expected), strict=True)
    for one, other in pairs:
        assert_same(one, other, tolerance)


def of_image(output: Any, image: int) -> Any:
    return torch.utils._pytree.tree_map(lambda leaf: leaf[image : image + 1], output)
