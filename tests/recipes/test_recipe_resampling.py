"""The recipe of non-uniform sampling: the published way back, with which ours can be compared."""

from __future__ import annotations

import pytest
import torch
from conftest import assert_same, slow, some
from torch import Tensor

from cadsurgery import resampling
from cadsurgery.methods.resampling.locations import normalise, upsample
from cadsurgery.methods.resampling.shifts import ShiftNet

pytest.importorskip("scipy")
from recipes.resampling_mobilenetv2 import recipe
from recipes.resampling_mobilenetv2.published import interpolate_back

SIZE = (41, 53)


def locations(fold: float) -> Tensor:
    """Two grids of locations, which neighbours pass where it is folded."""
    torch.manual_seed(0)
    line = torch.linspace(0, 1, 6, dtype=torch.float64)
    grid = torch.stack(torch.meshgrid(line, line, indexing="ij"), -1)
    return grid + (torch.rand(2, 6, 6, 2, dtype=torch.float64) - 0.5) * (0.1 + fold)


def points(places: Tensor, samples: tuple[int, int]) -> Tensor:
    return normalise(upsample(places, samples)) * places.new_tensor([SIZE[0] - 1, SIZE[1] - 1])


def affine(at: Tensor) -> Tensor:
    """Scores (..., 2) that are affine in the place (..., 2)."""
    return at @ at.new_tensor([[0.3, -0.1], [0.2, 0.4]]) + 1


@pytest.mark.parametrize("fold", [0.0, 0.3])
def test_affine_scores_come_back_exactly(fold: float) -> None:
    """Whatever the triangulation: folded grids, too."""
    places = locations(fold)
    found = interpolate_back(affine(points(places, (17, 23))).permute(0, 3, 1, 2), places, SIZE)
    lines = [torch.arange(length, dtype=torch.float64) for length in SIZE]
    pixels = torch.stack(torch.meshgrid(*lines, indexing="ij"), -1)
    assert_same(found, affine(pixels).permute(2, 0, 1).expand(2, -1, -1, -1), 1e-9)


def test_a_grid_with_a_sample_for_each_pixel_gives_the_scores() -> None:
    line = torch.linspace(0, 1, 4, dtype=torch.float64)
    grid = torch.stack(torch.meshgrid(line, line, indexing="ij"), -1)[None]
    scores = torch.rand(1, 2, *SIZE)
    assert_same(interpolate_back(scores, grid, SIZE), scores, 1e-6)


def test_ours_is_the_published_way_for_affine_scores_on_grids_that_do_not_fold() -> None:
    places = locations(0.0)
    scores = affine(points(places, (17, 23))).permute(0, 3, 1, 2)
    ours = resampling.interpolate_back(scores, places, SIZE)
    assert_same(ours, interpolate_back(scores, places, SIZE), 1e-9)


COUNTS = [  # of the published notebook, and true: seed 3.7
    (0.25, 2, 8, 64, 17_600_064, 18_341_376),
    (1.0, 19, 16, 128, 161_547_264, 162_791_424),
    slow(1.0, 19, 16, 160, 252_371_520, 254_315_520),
    slow(1.0, 19, 16, 192, 363_378_944, 366_178_304),
    slow(1.0, 19, 16, 224, 494_569_536, 498_379_776),
    (1.0, 2, 4, 32, 124_646_464, 128_290_816),
]


@pytest.mark.parametrize(
    ("width", "outputs", "stride", "size", "published", "true"), some(COUNTS, every=3, rows=True)
)
def test_multiply_accumulates_are_the_published_ones(
    width: float, outputs: int, stride: int, size: int, published: int, true: int
) -> None:
    net, image = ShiftNet(3, outputs, width, stride), torch.empty(1, 3, size, size, device="meta")
    assert recipe.macs_as_published(net, image) == published
    assert resampling.conv_macs(net, image) == true
