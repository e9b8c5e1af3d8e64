"""Laws of operations that make a map finer inside the region, and of decoders and pyramids made of them."""

from __future__ import annotations

import math
import random
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from conftest import assert_same, images, random_levels, slow, thorough
from torch import Tensor

import cadsurgery as cs
from cadsurgery.elements import functional
from cadsurgery.elements.functional import Elements
from cadsurgery.elements.lattice import Geometry, Lattice
from cadsurgery.elements.resizing import Scaling

EXACT = 1e-9
double = torch.float64
MODES = pytest.mark.parametrize(
    ("mode", "align_corners"), [("nearest", False), ("bilinear", False), ("bilinear", True)]
)


def interpolate(x: Tensor, size: tuple[int, int], mode: str, align_corners: bool) -> Tensor:
    return F.interpolate(x, size, mode=mode, align_corners=align_corners if mode == "bilinear" else None)


# Sizes that do not divide, too: the output has the size another map of the network has. And stretched by a sample, as
# decoders do whose maps were rounded; a map that has its size already is left as it is.
RESIZED = [
    *((stages, size, None) for stages in ((2, 1), (2, 0), (1, 0)) for size in ((16, 24), (13, 22), (9, 7))),
    *(((2, 2), (23, 28), size) for size in ((6, 8), (5, 7), (5, 8), (6, 7))),
]


@MODES
@pytest.mark.parametrize(("stages", "size", "to"), RESIZED, ids=str)
def test_on_the_networks_own_grid_it_is_interpolate(
    stages: tuple[int, int], size: tuple[int, int], to: Any, mode: str, align_corners: bool
) -> None:
    """Law 1."""
    before, after = stages
    lattice = Geometry((2, 2)).uniform(2, 2, size if to is None else (23, 30)).at(before, size)
    spacings = (2**before, 2**after)
    grids = [tuple(-(-length // spacing) for length in size) for spacing in spacings]
    coarse = torch.randn(2, 3, *grids[0], dtype=double)
    x, to = Elements(coarse.permute(0, 2, 3, 1).flatten(0, 2), lattice), to or grids[1]
    found = functional.resize(x, after, spacings, 2 ** (before - after), to, mode, align_corners)
    assert_same(functional.to_dense(found, spacings[1]), interpolate(coarse, to, mode, align_corners), EXACT)


def mixed(levels: Tensor) -> tuple[Lattice, Elements]:
    lattice = Geometry((2, 2)).lattice(levels)
    return lattice, Elements(torch.randn(len(lattice), 3, dtype=double), lattice)


@pytest.mark.parametrize("mode", ["nearest", "bilinear"])
def test_on_a_mixed_map_each_element_is_read_by_its_own_cell(mode: str) -> None:
    """The definition, written out: a cell that stays as large keeps its value; the parts of a larger one are read
    at their centres between the centres of cells of that size, replicated at the border."""
    size = (16, 24)
    lattice, x = mixed(random_levels(2, size, (2, 2)))
    found = functional.resize(x, 1, (4, 2), 2, None, mode)
    target, index = found.lattice, lattice.index.view(2, *size)
    sides, target_sides = lattice.side_map, target.side_map
    for row, (image, y, x_) in enumerate(zip(*(part.tolist() for part in target.coordinates), strict=True)):
        cell, side = int(sides[image, y, x_]), int(target_sides[image, y, x_])

        def value(v: int, h: int, image: int = image, cell: int = cell) -> Tensor:
            return x.rows[index[image, min(v * cell, size[0] - 1), min(h * cell, size[1] - 1)]]

        if cell == side or mode == "nearest":
            expected = value(y // cell, x_ // cell)
        else:
            places = [max((at + side / 2) / cell - 0.5, 0.0) for at in (y, x_)]
            (v, h), (down, across) = (math.floor(p) for p in places), (p - math.floor(p) for p in places)
            top = (1 - across) * value(v, h) + across * value(v, h + 1)
            expected = (1 - down) * top + down * (
                (1 - across) * value(v + 1, h) + across * value(v + 1, h + 1)
            )
        assert torch.allclose(found.rows[row], expected, rtol=0, atol=1e-9), (image, y, x_)


def test_a_map_larger_than_its_outermost_cells_is_refused() -> None:
    lattice = Geometry((2,)).uniform(1, 1, (9, 9))
    x = Elements(torch.randn(len(lattice), 2), lattice)
    with pytest.raises(cs.InvalidInput, match="not divisible"):
        functional.resize(x, 0, (2, 1), 2, (11, 11))


@pytest.mark.parametrize(
    "name", ["resnet18", slow("mobilenetv2_050"), *map(thorough, ("convnext_atto", "hrnet_w18_small"))]
)
def test_several_feature_maps_stand_where_the_plan_says(name: str) -> None:
    """`features_only` of timm: at the network's own positions every map is the original's."""
    model = timm.create_model(name, features_only=True).eval()
    x = images(2, 96, 128)
    net = cs.adaptify(model, "none", output_stride=(8, 32), example_input=x)
    with torch.no_grad():
        found, expected = net(x), model(x)
    standing = net.plan.standing()
    assert len(standing) == len(expected) == len(found)
    for ours, theirs, (_, own, stride, how) in zip(found, expected, standing, strict=True):
        assert 96 // own == theirs.shape[2] and 96 // stride == ours.shape[2]
        assert how == ("dense" if own <= 8 else "fine")
        step = own // stride
        assert_same(ours[..., ::step, ::step], theirs, 1e-4)
    assert str(net.plan).count("(output stride ") == len(expected)


@pytest.mark.parametrize("dtype", [torch.float32, double], ids=str)
@pytest.mark.parametrize("mode", ["nearest", "nearest-exact"])
def test_samples_that_a_resize_reads_are_those_of_a_whole_map(mode: str, dtype: torch.dtype) -> None:
    """Which sample torch rounds to depends on the whole map: of one column it is another one here and there."""
    draw = random.Random(0)
    for _ in range(200):
        counts, size = ([draw.randint(1, 140) for _ in range(2)], [draw.randint(1, 300) for _ in range(2)])
        axes = [torch.arange(count, dtype=dtype) for count in counts]
        whole = torch.stack(torch.meshgrid(*axes, indexing="ij"))[None]
        read = F.interpolate(whole, size, mode=mode)[0]
        places = Scaling(size=size, mode=mode).places((counts[0], counts[1]), 1, dtype, torch.device("cpu"))
        assert torch.equal(places[0], read[0, :, 0].long()) and torch.equal(places[1], read[1, 0].long())
