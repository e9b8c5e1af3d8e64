"""Laws of adaptive pooling to bins, and of small maps that are resized and joined with those of the region."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from conftest import assert_same, covering, images, random_levels
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
