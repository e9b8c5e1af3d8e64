"""Laws of adaptive pooling to bins, and of small maps that are resized and joined with those of the region."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import assert_same, covering, images, random_levels, some
from random_laws import compare
from random_networks import Case, Draw, settled
from torch import Tensor, nn

import cadsurgery as cs
from cadsurgery.elements import functional
from cadsurgery.elements.functional import Elements
from cadsurgery.elements.lattice import Geometry

EXACT = 1e-9
double = torch.float64
SIZES = [(16, 24), (13, 22), (9, 7)]
BINS = [(2, 2), (3, 3), (6, 6), (1, 5)]


def entering(levels: Tensor) -> Elements:
    lattice = Geometry((2, 2)).lattice(levels)
    return Elements(torch.randn(len(lattice), 3, dtype=double), lattice)


@pytest.mark.parametrize(("size", "bins", "largest"), covering(SIZES, BINS, [False, True]), ids=str)
def test_on_the_networks_own_grid_it_is_torchs(
    size: tuple[int, int], bins: tuple[int, int], largest: bool
) -> None:
    x = entering(torch.full((2, *size), 2))
    pool = F.adaptive_max_pool2d if largest else F.adaptive_avg_pool2d
    assert_same(functional.pool_to_bins(x, bins, largest, 4), pool(functional.to_dense(x, 4), bins), EXACT)


def test_one_bin_is_the_mean_of_the_image() -> None:
    for levels in (random_levels(2, (13, 22), (2, 2)), torch.full((2, 13, 22), 1)):
        x = entering(levels)
        assert_same(functional.pool_to_bins(x, (1, 1), False, 4), functional.global_mean(x), EXACT)
        assert_same(functional.pool_to_bins(x, (1, 1), True, 4), functional.global_max(x), EXACT)


HOW = [("bilinear", False), ("bilinear", True), ("nearest", None)]


class PooledPyramid(nn.Module):
    """As PSPNet: bins, each mixed, resized to the map and joined with it."""

    def __init__(self, bins: tuple[int, ...], how: tuple[str, Any], largest: bool, by_module: bool) -> None:
        super().__init__()
        self.down = nn.Sequential(*(nn.Sequential(nn.Conv2d(a, 8, 3, 2, 1), nn.ReLU()) for a in (3, 8, 8, 8)))
        pool = nn.AdaptiveMaxPool2d if largest else nn.AdaptiveAvgPool2d
        self.pools = nn.ModuleList([pool(count) for count in bins])
        self.mix = nn.ModuleList(
            [nn.Sequential(nn.Conv2d(8, 4, 1), nn.BatchNorm2d(4), nn.ReLU()) for _ in bins]
        )
        self.last = nn.Conv2d(8 + 4 * len(bins), 5, 3, padding=1)
        self.how: dict[str, Any] = dict(zip(("mode", "align_corners"), how, strict=True))
        self.by_module, self.largest, self.bins = by_module, largest, bins

    def pool(self, x: Tensor, i: int) -> Tensor:
        if self.by_module:
            return self.pools[i](x)
        return (F.adaptive_max_pool2d if self.largest else F.adaptive_avg_pool2d)(x, self.bins[i])

    def forward(self, x: Tensor) -> Tensor:
        x = self.down(x)
        parts = [
            F.interpolate(mix(self.pool(x, i)), size=x.shape[2:], **self.how)
            for i, mix in enumerate(self.mix)
        ]
        return self.last(torch.cat([x, *parts], dim=1))


@pytest.mark.parametrize(
    ("bins", "how", "largest", "by_module"),
    covering([(1, 2, 3, 6), (5, 4)], some(HOW), [False, True], [True, False]),
    ids=str,
)
def test_a_pooled_pyramid_is_its_emulation_and_stays_in_the_region(
    bins: tuple[int, ...], how: tuple[str, Any], largest: bool, by_module: bool
) -> None:
    torch.manual_seed(0)
    model = PooledPyramid(bins, how, largest, by_module).double()
    x = images(2, 83, 61, double)
    settled(model, x, Draw(0))
    net = compare(Case(model, x, images(2, 64, 80, double), True), Draw(len(bins)))
    assert not net.plan.chosen("barrier") and net.plan["last"].action == "keep"
    assert net.plan.matters


@pytest.mark.parametrize(
    "pool", [nn.AdaptiveAvgPool2d((None, 3)), nn.AdaptiveMaxPool2d(2, return_indices=True)]
)
def test_what_follows_from_the_size_of_the_map_ends_the_region(pool: nn.Module) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.down = nn.Sequential(*(nn.Conv2d(a, 8, 3, 2, 1) for a in (3, 8, 8)))
            self.pool, self.mid = pool, nn.Conv2d(8, 8, 3, padding=1)

        def forward(self, x: Tensor) -> Tensor:
            x = self.pool(self.mid(self.down(x)))
            return x[0] if self.pool.__class__ is nn.AdaptiveMaxPool2d else x

    torch.manual_seed(0)
    model, x = Net().eval(), images(2, 48, 64)
    net = cs.adaptify(model, "none", example_input=x, verify_laws=False)
    reason = net.plan["pool"].reason
    assert net.plan["pool"].action == "barrier" and ("size of the map" in reason or "indices" in reason)
    with torch.no_grad():
        assert_same(net(x), model(x))
