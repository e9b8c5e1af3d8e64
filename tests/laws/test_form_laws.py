"""Every form of a network gives what the network gives: a table of forms, held against random networks.

A form is another way to run or to count a converted network: an optimised copy in some type, a copy, a file, static
shapes, its output at points, its halves, its dense twins. Each is compared with the network itself, on the networks of
`random_networks` with random options, level maps, batches and sizes. `CADSURGERY_SEEDS` sets how many networks the slow
suite draws, as for `test_random_networks`; here a fiftieth of them, as each is run in all forms.
"""

from __future__ import annotations

import copy
import os
import pickle
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from conftest import without_kernels
from random_laws import draw_levels, of_image, same
from random_networks import LATER, Case, Draw, random_case
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook
from torch.utils._pytree import tree_leaves

import cadsurgery as cs
from cadsurgery.elements.lattice import Lattice
from cadsurgery.masks import FineMapSpec
from cadsurgery.masks.masking import Masking
from cadsurgery.network.dense_twin import dense_twin
from cadsurgery.network.macs import layer_work
from cadsurgery.network.paths import blend
from cadsurgery.network.points import readable
from cadsurgery.surgery.verify import FirstOfEqual

# 3: points that depend on some elements alone. 13: a map that is padded beyond the level map, norms of the batch.
# LATER + 2: images that are joined along the batch. Slow: 11, padding that a stride asks for, and 14, another input.
QUICK = (3, 13, LATER + 2)
COUNT = int(os.environ.get("CADSURGERY_SEEDS", 2000)) // 100
SLOW = sorted({4, 11, 14, 26, *(first + seed for first in (0, LATER) for seed in range(COUNT))} - {*QUICK})
BUDGET = "edges | budget:fraction=0.34"


@dataclass(frozen=True)
class Subject:
    """A converted random network, its call, a level map for each image, and the output with that."""

    seed: int
    case: Case
    net: cs.AdaptiveModel
    levels: Tensor
    found: Any

    @property
    def inputs(self) -> tuple[Tensor, ...]:
        """The arguments of the call; the image is a copy, since networks may write to it."""
        return self.case.image.clone(), *self.case.more

    @cached_property
    def fast(self) -> cs.AdaptiveModel:
        """The optimised copy."""
        return self.net.optimize()

    @property
    def masks(self) -> list[Any]:
        """The random level map, and both uniform ones, which run as ordinary convolutions."""
        return [self.levels, "all", "none"]


@cache
def subject(seed: int) -> Subject:
    """The network of a seed, converted on an image of the size it is called with: a copy has no branches for others."""
    case, draw = random_case(seed), Draw(-1 - seed)
    case = replace(case, example=case.image, more_of_example=case.more)
    options: dict[str, Any] = {
        "fill": draw.choice(["linear", "nearest", "guided"]),
        "patch": draw.choice(["quadtree", "block"]),
    }
    with torch.no_grad(), FirstOfEqual():
        net = cs.adaptify(case.model, "none", example_input=case.given, verify_laws=False, **options)
        levels = draw_levels(net, draw, case.image.clone(), *case.more)
        return Subject(seed, case, net, levels, net(case.image.clone(), *case.more, mask=levels))


def optimised(of: Subject) -> None:
    """In float64, with convolutions and norms fused or only the latter folded."""
    for fast in (of.fast, of.net.optimize(fuse=False)):
        for mask in of.masks:
            same(fast(*of.inputs, mask=mask), of.net(*of.inputs, mask=mask), 1e-8)
            assert torch.equal(fast.levels, of.net.levels)
            assert fast.active_fraction == of.net.active_fraction


def optimised_one_by_one(of: Subject) -> None:
    """An image alone gives what it gives in a batch."""
    if of.case.per_image and not of.case.joined:
        for image in range(len(of.case.image)):
            inputs = [value[image : image + 1] for value in of.inputs]
            same(of.fast(*inputs, mask=of.levels[image : image + 1]), of_image(of.found, image), 1e-8)


def rounding(of: Subject, dtype: torch.dtype) -> None:
    """Errors against float64 are at most a little larger than those of the network itself in that type."""
    exact = tree_leaves(of.found)
    net = copy.deepcopy(of.net).to(dtype)
    inputs = [value.to(dtype) for value in of.inputs]
    plain, fast = (tree_leaves(run(*inputs, mask=of.levels)) for run in (net, net.optimize()))
    for one, other, value in zip(fast, plain, exact, strict=True):
        assert one.dtype == other.dtype and one.shape == other.shape
        mine, its = ((leaf.double() - value).norm() for leaf in (one, other))
        assert mine <= 2 * its + torch.finfo(dtype).eps * value.norm()


def in_float32(of: Subject) -> None:
    rounding(of, torch.float32)


def in_bfloat16(of: Subject) -> None:
    rounding(of, torch.bfloat16)


def without_a_compiler(of: Subject) -> None:
    """The operations of torch give what the compiled kernels give; a copy may be made with either."""
    with without_kernels():
        for run in (of.fast, of.net.optimize()):
            same(run(*of.inputs, mask=of.levels), of.found, 1e-8)


def copied(of: Subject) -> None:
    for net in (of.net, of.fast):
        expected = net(*of.inputs, mask=of.levels)
        for other in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
            same(other(*of.inputs, mask=of.levels), expected, 1e-15)


def stored(of: Subject) -> None:
    with TemporaryDirectory() as folder:
        path = Path(folder) / "net.safetensors"
        cs.save(of.net, path)
        loaded = cs.load(path, model=random_case(of.seed).model)
    same(loaded(*of.inputs, mask=of.levels), of.found, 1e-15)


def halves(of: Subject) -> None:
    """A program's parts before and after the mask are the whole, and a call is its run."""
    program = of.net.program

    def masking(_: Tensor, features: Tensor) -> Lattice:
        return of.net.geometry.lattice(of.levels)

    whole, lattice = program(masking, program.bind(*of.inputs))
    parts, again = program.after(masking, program.before(program.bind(*of.inputs)))
    assert torch.equal(lattice.levels, again.levels)
    for found in (whole, parts, of.net.run(masking, *of.inputs)):
        same(found, of.found, 1e-15)


def with_static_shapes(of: Subject) -> None:
    """Rows beyond the real ones are never read: NaN is written into them behind each activation in the region."""
    net = copy.deepcopy(of.net)
    net.mask = BUDGET
    expected = net(*of.inputs)
    same(poisoned(net, *of.inputs), expected, 1e-8)


def poisoned(net: cs.AdaptiveModel, *inputs: Tensor) -> Any:
    lattices: list[Lattice] = []

    class Watched(Masking):
        def __call__(self, image: Tensor, features: Tensor) -> Lattice:
            lattices.append(super().__call__(image, features))
            return lattices[-1]

    def poison(module: nn.Module, inputs: Any, rows: Any) -> Any:
        if not lattices or not isinstance(module, kinds) or not isinstance(rows, Tensor) or rows.dim() != 2:
            return rows
        for stage in range(1, lattices[0].stage + len(net.geometry.strides) + 1):
            lattice = lattices[0].at(stage)
            if len(rows) == len(lattice):
                real = int(lattice.counts.sum())
                return torch.cat([rows[:real], torch.full_like(rows[real:], torch.nan)])
        return rows

    kinds = (nn.ReLU, nn.SiLU, nn.GELU, nn.LeakyReLU, nn.Hardswish, nn.ELU, nn.Mish, nn.ReLU6)
    hook = register_module_forward_hook(
        poison
    )  # of all modules: those of the region refuse hooks of their own
    try:
        masking = Watched(net.mask, net.geometry, net.plan.strides[0], static=True)
        return net.run(masking, *inputs)
    finally:
        hook.remove()


def at_points(of: Subject) -> None:
    """Each map that leaves the region, read at points, is the whole map there; and counted work is that of calls."""
    if of.case.more:  # it takes an image alone
        return
    size, images = of.case.image.shape[2:], len(of.case.image)
    room = torch.tensor([size[1] - 1, size[0] - 1], dtype=torch.float64)
    points = [torch.rand(count, 2, dtype=torch.float64) * room for count in (5, 0, 3)[:images]]
    names: list[Any] = [None]
    if isinstance(of.found, dict):
        names = [*of.found]
    elif isinstance(of.found, list | tuple):
        names = [*range(len(of.found))]
    for name in names:
        if not readable(of.net, name):
            continue
        work = of.net.macs(*of.inputs, mask=of.levels).mask
        for net, mask in ((of.fast, of.levels), *((of.net, mask) for mask in of.masks)):
            found = net(*of.inputs, mask=mask)
            dense, levels = found if name is None else found[name], net.levels
            for reach in ("all", "receptive"):
                rows = cs.read_at(
                    net, *of.inputs, points, mask=mask, reach=reach, align="corners", output=name
                )
                assert torch.equal(net.levels, levels)
                for image, part, found in zip(dense, points, rows, strict=True):
                    y, x = (
                        [round(value * (side - 1) / (whole - 1)) for value in part[:, axis].tolist()]
                        for axis, side, whole in ((1, image.shape[1], size[0]), (0, image.shape[2], size[1]))
                    )
                    same(found, image[:, y, x].T, 1e-8) if len(part) else None
        counted = cs.macs_at(of.net, *of.inputs, points, mask=of.levels, align="corners", output=name)
        assert counted.receptive <= counted.all == work


def blended(of: Subject) -> None:
    """With all weight on a level, blended paths are that level everywhere."""
    if of.case.joined:  # weights are of the images of the call
        return
    for level in range(of.net.geometry.max_level + 1):

        def weigh(features: Tensor, grid: FineMapSpec, level: int = level) -> Tensor:
            weights = features.new_zeros(grid.batch, grid.max_level + 1, *grid.size)
            weights[:, level] = 1
            return weights

        uniform = torch.full_like(of.levels, level)
        same(blend(of.net, of.inputs, weigh), of.net(*of.inputs, mask=uniform), 1e-8)


def dense_twins(of: Subject) -> None:
    """The network at a uniform level by operations of torch alone."""
    if not of.case.more:
        for level, mask in ((0, "all"), (of.net.plan.max_level, "none")):
            twin = dense_twin(of.net, level, of.inputs[0])
            same(twin(*of.inputs), of.net(*of.inputs, mask=mask), 1e-8)
            other = of.case.image.flip(3)
            same(twin(other.clone()), of.net(other.clone(), mask=mask), 1e-8)
            called = [str(node.target) for node in twin.graph.nodes if node.op == "call_function"]
            assert called and not any("cadsurgery" in name or "mkldnn" in name for name in called)


def counted(of: Subject) -> None:
    """MACs of a mask, counted on shapes alone, are those of a copy and of a count by layers that serves every mask."""
    net = of.net
    report, high, low = (net.macs(*of.inputs, mask=mask) for mask in of.masks)
    assert high.mask == high.high == report.high and low.mask == low.low == report.low
    assert of.fast.macs(*of.inputs, mask=of.levels).mask == report.mask
    if not of.case.more and (layers := layer_work(net, of.inputs[0])) is not None:
        lattice = net.geometry.lattice(of.levels)
        work = {layer.layer: layer.on(lattice) for layer in layers}
        assert {name: macs for name, macs in work.items() if macs} == {
            layer.layer: layer.mask for layer in report.layers if layer.mask
        }


# Form number k runs on the quick seed number k % 3 in the default suite: one that asks something of it.
FORMS: list[Callable[[Subject], None]] = [
    *(optimised_one_by_one, in_bfloat16, optimised),
    *(blended, counted, in_float32),
    *(dense_twins, stored, halves),
    *(at_points, without_a_compiler, with_static_shapes),
    copied,
]
CASES = [
    pytest.param(
        form,
        seed,
        marks=() if seed == QUICK[place % len(QUICK)] else pytest.mark.slow,
        id=f"{form.__name__}-{seed}",
    )
    for seed in (*QUICK, *SLOW)
    for place, form in enumerate(FORMS)
]


@pytest.mark.parametrize(("form", "seed"), CASES)
@torch.no_grad()
def test_a_form_gives_what_the_network_gives(form: Callable[[Subject], None], seed: int) -> None:
    with FirstOfEqual():
        form(subject(seed))
