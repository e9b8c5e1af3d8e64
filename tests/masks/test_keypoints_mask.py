"""The mask around keypoints: the published rule, what finds the points, how it is written, ranked and kept.

The published rule is written down again as it is: the full-resolution 0/1 map of keypoints convolved with d x d ones
and zero padding, every o-th pixel, and level i, from K - 1 down to 0, on each aligned 2^(i+1) block with an active
sample.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import made_once
from torch import Tensor, nn

import cadsurgery as cs
from cadsurgery.elements.lattice import Geometry
from cadsurgery.masks import FineMapSpec, KeypointMask, keypoints_at

QUICK = settings(max_examples=30, deadline=None, derandomize=True)
INF = math.inf
Size = tuple[int, int]
Point = tuple[int, int]
SIDES = st.one_of(st.sampled_from([0, INF]), st.integers(0, 20).map(lambda half: 2 * half + 1))


def grid_of(size: Size, batch: int = 2, stride: int = 1, low: int = 3) -> FineMapSpec:
    """The grid of an image size whose stages halve `low` times."""
    return FineMapSpec(batch, (-(-size[0] // stride), -(-size[1] // stride)), stride, low, 2**low, 2**low)


@made_once
def net(mask: object = "none", **options: Any) -> cs.AdaptiveModel:
    """Output stride 8 by three pools, all of them adaptive."""
    layers: list[nn.Module] = []
    for depth in range(3):
        layers += [nn.Conv2d(4 if depth else 3, 4, 3, 1, 1), nn.ReLU(), nn.MaxPool2d(2)]
    model = nn.Sequential(*layers, nn.Conv2d(4, 4, 3, 1, 1)).eval()
    options = {"output_stride": (1, 8), "example_input": torch.zeros(1, 3, 32, 32), **options}
    return cs.adaptify(model, mask, verify_laws=False, **options)


def tensors(points: list[list[Point]]) -> list[Tensor]:
    return [torch.tensor(part, dtype=torch.float32).reshape(-1, 2) for part in points]


def published(
    points: list[Point], sides: list[float], size: Size, stride: int, low: int, fine: Size | None = None
) -> Tensor:
    """Levels (h, w) of one image of `size`, on a fine map that may lose the border."""
    height, width = fine or size
    here = torch.zeros(1, 1, *size)
    for x, y in points:
        here[0, 0, y, x] = 1
    levels = torch.full_like(here[0, 0, ::stride, ::stride][:height, :width], low).long()
    for level in reversed(range(len(sides))):
        if sides[level] == 0:
            continue
        active = torch.ones_like(levels, dtype=torch.bool)
        if sides[level] != INF:
            side = int(sides[level])
            near = F.conv2d(here, torch.ones(1, 1, side, side), padding=side // 2)
            active = near[0, 0, ::stride, ::stride][:height, :width] > 0.5
        block = 2 ** (level + 1)
        for y in range(0, levels.shape[0], block):
            for x in range(0, levels.shape[1], block):
                if active[y : y + block, x : x + block].any():
                    levels[y : y + block, x : x + block] = level
    return levels


@QUICK
@given(
    data=st.data(),
    size=st.tuples(st.integers(1, 44), st.integers(1, 44)),
    stride=st.sampled_from([1, 2, 4]),
    low=st.integers(1, 3),
    patch=st.sampled_from(["quadtree", "block"]),
)
def test_the_legal_level_map_is_that_of_the_published_rule(
    data: st.DataObject, size: Size, stride: int, low: int, patch: str
) -> None:
    """Any size, stride, points and dilations; images of a batch with different numbers of points, none at all."""
    place = st.tuples(st.integers(0, size[1] - 1), st.integers(0, size[0] - 1))
    points = data.draw(st.lists(st.lists(place, max_size=4), min_size=1, max_size=3))
    sides = data.draw(st.lists(SIDES, min_size=1, max_size=low))
    geometry, image = Geometry((2,) * low, patch=patch), torch.zeros(len(points), 3, *size)
    with keypoints_at(tensors(points)):
        found = KeypointMask("given", dilations=sides)(image, image, grid_of(size, len(points), stride, low))
    assert found.dtype == torch.int8
    wanted = torch.stack([published(part, sides, size, stride, low) for part in points])
    assert torch.equal(geometry.lattice(found.long()).levels, geometry.lattice(wanted).levels)


@pytest.mark.parametrize(
    ("dilations", "levels"),
    [
        ("0/0/0", {3}),
        ("0/19/35", {1, 2, 3}),
        ("25/51/51", {0, 1, 3}),
        ("inf/inf/inf", {0}),
        ("1", {0, 1, 2, 3}),
    ],
)
def test_one_keypoint_gives_the_levels_of_its_dilations(dilations: str, levels: set[int]) -> None:
    """K2 and K3: what a published triplet leaves of a network at output strides 1 to 8."""
    model = net(f"keypoints:detector=given,dilations={dilations}")
    with keypoints_at([torch.tensor([[52.0, 43.0]])]):
        model(torch.zeros(1, 3, 96, 112))
    assert set(model.levels.unique().tolist()) == levels


@pytest.mark.parametrize(("size", "high"), [((37, 50), 1), ((33, 41), 2), ((39, 47), 4)])
def test_a_network_that_loses_its_border_has_the_published_map_without_it(size: Size, high: int) -> None:
    """Pools drop what is no whole window: the fine map is smaller than the subsampled one."""
    points = [[(size[1] - 1, size[0] - 1), (3, 30)], [(20, 11)]]
    sides = [5.0, 9.0, 13.0][: 3 - int(math.log2(high))]
    text = "/".join(f"{side:g}" for side in sides)
    model = net(f"keypoints:detector=given,dilations={text}", output_stride=(high, 8))
    with keypoints_at(tensors(points)):
        model(torch.zeros(2, 3, *size))
    fine = (size[0] // high, size[1] // high)
    wanted = torch.stack([published(part, sides, size, high, len(sides), fine) for part in points])
    assert torch.equal(model.levels, model.geometry.lattice(wanted).levels)


@QUICK
@given(x=st.floats(-0.5, 39.49), y=st.floats(-0.5, 29.49), side=st.sampled_from([1, 3, 7]))
def test_a_point_between_pixels_is_that_of_its_pixel(x: float, y: float, side: int) -> None:
    """Pixel n goes from n - 1/2 to n + 1/2."""
    pixel = (math.floor(x + 0.5), math.floor(y + 0.5))
    image, mask, grid = torch.zeros(1, 3, 30, 40), KeypointMask("given", dilations=side), grid_of((30, 40), 1)
    with keypoints_at([torch.tensor([[x, y]], dtype=torch.float64)]):
        between = mask(image, image, grid)
    with keypoints_at(tensors([[pixel]])):
        assert torch.equal(between, mask(image, image, grid))
    assert between[0, min(pixel[1], 29), min(pixel[0], 39)] == 0


class Detecting(nn.Module):
    """A score map and descriptors, both of output stride 4."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(
            nn.Conv2d(3, 8, 3, 1, 1),
            nn.Tanh(),
            nn.Conv2d(8, 8, 3, 2, 1),
            nn.Tanh(),
            nn.Conv2d(8, 8, 3, 2, 1),
        )
        self.score = nn.Conv2d(8, 1, 1)

    def forward(self, image: Tensor) -> dict[str, Tensor]:
        found = self.body(image)
        return {"descriptors": found, "scores": self.score(found)}


def test_own_keypoints_are_the_peaks_of_a_first_pass_with_everything_downsampled() -> None:
    """Two passes by hand give the same map and output."""
    model = cs.adaptify(
        Detecting().eval(),
        "keypoints:detector=own,count=4,dilations=5/11",
        example_input=torch.zeros(1, 3, 32, 32),
        verify_laws=False,
    )
    image = torch.randn(2, 3, 41, 54)
    with torch.no_grad():
        found, levels = model(image), model.levels.clone()
        first = model(image, mask="none")["scores"][:, 0]
        points = []
        for scores in first:
            padded = F.pad(scores, (2, 2, 2, 2), value=-INF)
            peaks = [
                (float(scores[y, x]), x, y)
                for y in range(scores.shape[0])
                for x in range(scores.shape[1])
                if scores[y, x] == padded[y : y + 5, x : x + 5].max()
            ]
            best = sorted(peaks, reverse=True)[:4]
            step_y, step_x = 41 / scores.shape[0], 54 / scores.shape[1]
            middle = [[(x + 0.5) * step_x - 0.5, (y + 0.5) * step_y - 0.5] for _, x, y in best]
            points.append(torch.tensor(middle, dtype=torch.float64))
        with keypoints_at(points):
            expected = model(image, mask="keypoints:detector=given,dilations=5/11")
    assert torch.equal(model.levels, levels) and 0 < model.active_fraction < 1
    assert all(torch.equal(found[key], expected[key]) for key in expected)


@pytest.mark.parametrize("stride", [1, 4, 8])
def test_the_scores_are_minus_the_distance_in_samples(stride: int) -> None:
    size, points = (33, 50), [[(7, 30), (44, 2), (20, 20)], []]
    image, grid = torch.zeros(2, 3, *size), grid_of(size, 2, stride)
    with keypoints_at(tensors(points)):
        scores = KeypointMask("given", dilations=1).scores(image, image, grid)
    wanted = torch.full((2, *grid.size), -float(max(grid.size)))
    places = torch.tensor([[y, x] for x, y in points[0]])
    for y in range(grid.size[0]):
        for x in range(grid.size[1]):
            apart = (places - torch.tensor([y * stride, x * stride])).abs().amax(1).min()
            wanted[0, y, x] = -(int(apart) // stride)
    assert scores.dtype == torch.float32 and torch.equal(scores, wanted)
