"""Masks: edges as published, graded edges, the string form, the other providers, maps per call.

The published recipe (grey of the normalised image, signed central differences, K x K dilation, every o-th
pixel, patches of P fine pixels) is written down here again, slowly, with an all-ones convolution and loops.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from conftest import covering
from feature_cases import Scored
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import adapted_strided as net
from networks import strided
from torch import Tensor

import cadsurgery as cs
from cadsurgery.masks import Budget, FineMapSpec, resolve_mask
from cadsurgery.masks.filters import near

QUICK = settings(max_examples=25, deadline=None, derandomize=True)
SIZES = [(96, 128), (97, 129), (101, 67), (33, 200)]


def scenes(batch: int, size: tuple[int, int], seed: int = 0) -> Tensor:
    """Normalised images of a few flat rectangles on zero: edges here and there, none at the border of zero."""
    generator = torch.Generator().manual_seed(seed)
    height, width = size
    scene = torch.zeros(batch, 3, height, width)
    for image in scene:
        for _ in range(3):
            y, x = (int(torch.randint(0, limit - 4, (), generator=generator)) for limit in size)
            tall, wide = (int(torch.randint(2, 20, (), generator=generator)) for _ in size)
            image[:, y : y + tall, x : x + wide] = torch.randn(3, 1, 1, generator=generator)
    return scene


# -- the published recipe, written independently -------------------------------------------------------


def near_edges(image: Tensor, threshold: float, side: int) -> Tensor:
    """Steps 1 to 4: bool (B, H, W), whether the side x side window around a pixel holds an edge."""
    red, green, blue = image.double().unbind(1)
    grey = (0.299 * red + 0.587 * green + 0.114 * blue).unsqueeze(1)
    right = torch.tensor([[0.0, 0, 0], [-1, 0, 1], [0, 0, 0]], dtype=torch.float64).view(1, 1, 3, 3)
    across = F.conv2d(grey, right, padding=1)
    along = F.conv2d(grey, right.transpose(2, 3), padding=1)
    edges = ((across >= threshold) | (along >= threshold)).double()
    window = torch.ones(1, 1, side, side, dtype=torch.float64)
    return F.conv2d(edges, window, padding=side // 2).squeeze(1) > 0.5


def wanted_levels(image: Tensor, thresholds: list[float], sides: list[int], stride: int, low: int) -> Tensor:
    """Step 5 for each threshold: level i near edges above threshold i, the lowest elsewhere."""
    levels = torch.full_like(image[:, 0, ::stride, ::stride], low).long()
    for level in reversed(range(len(thresholds))):
        near = near_edges(image, thresholds[level], sides[level])[:, ::stride, ::stride]
        levels[near] = min(level, low)
    return levels


def in_patches(levels: Tensor, patch: int, low: int) -> Tensor:
    """Step 6: a patch is high as a whole if any of its pixels asks for less than the lowest level."""
    found = levels.clone()
    for image in found:
        for y in range(0, image.shape[0], patch):
            for x in range(0, image.shape[1], patch):
                block = image[y : y + patch, x : x + patch]
                block[:] = 0 if bool((block < low).any()) else low
    return found


def split_as_needed(levels: Tensor, low: int) -> Tensor:
    """The largest legal map: a cell of 2^l x 2^l pixels exists where all of them ask for at least l."""
    found = torch.zeros_like(levels)
    for image, wanted in zip(found, levels, strict=True):
        for level in range(1, low + 1):
            side = 2**level
            for y in range(0, image.shape[0], side):
                for x in range(0, image.shape[1], side):
                    if int(wanted[y : y + side, x : x + side].min()) >= level:
                        image[y : y + side, x : x + side] = level
    return found


@pytest.mark.parametrize(
    ("size", "threshold", "strides"),
    covering(SIZES, [0.15, 0.35, 0.95], [((8, 32), 4), ((16, 32), 2), ((8, 16), 4)]),
)
def test_edges_are_exactly_the_published_ones(
    size: tuple[int, int], threshold: float, strides: tuple[tuple[int, int], int]
) -> None:
    output_stride, patch = strides
    model = net(f"edges:threshold={threshold},dilation=11", output_stride=output_stride, patch="block")
    low = model.plan.max_level
    image = scenes(3, size)
    model(image)
    wanted = wanted_levels(image, [threshold], [11], output_stride[0], low)
    assert torch.equal(model.levels.long(), in_patches(wanted, patch, low))


@pytest.mark.parametrize(("size", "stride"), covering(SIZES, [8, 16]))
def test_graded_edges_give_each_level_to_its_own_threshold(size: tuple[int, int], stride: int) -> None:
    thresholds, sides = [0.95, 0.1], [5, 15]
    image = scenes(2, size, seed=3)
    model = net("edges:threshold=0.95/0.1,dilation=5/15", output_stride=(stride // 2, 2 * stride))
    model(image)
    wanted = wanted_levels(image, thresholds, sides, stride // 2, 2)
    assert set(wanted.unique().tolist()) == {0, 1, 2}
    assert torch.equal(model.levels.long(), split_as_needed(wanted, 2))


# -- the other masks -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mask", "patch", "level"),
    [
        *(("all", "quadtree", 0), ("none", "quadtree", 2)),
        *(("random:fraction=0", "block", 2), ("random:fraction=1", "quadtree", 0)),
    ],
)
def test_what_keeps_everything_or_nothing_does_so(mask: str, patch: str, level: int) -> None:
    model = net(mask, patch=patch)
    model(torch.randn(2, 3, 97, 129))
    assert model.levels.shape == (2, 13, 17) and (model.levels == level).all()
    assert model.active_fraction == float(level == 0)


@pytest.mark.parametrize("seed", [0, 3])
def test_a_seeded_random_mask_repeats_and_differs_between_images_and_seeds(seed: int) -> None:
    model, image = net(f"random:fraction=0.5,seed={seed}"), torch.randn(2, 3, 256, 256)
    model(image)
    first = model.levels.clone()
    model(image)
    assert torch.equal(model.levels, first)
    assert not torch.equal(first[0], first[1])
    model(image, mask="random:fraction=0.5,seed=4")
    assert not torch.equal(model.levels, first)


# -- budgets -------------------------------------------------------------------------------------------


def kept_patches(levels: Tensor, patch: int, low: int) -> Tensor:
    """Bool (B, rows, columns), after checking that every patch is wholly at level 0 or wholly the lowest."""
    assert set(levels.unique().tolist()) <= {0, low}
    rows, columns = (range(0, side, patch) for side in levels.shape[1:])
    blocks = [[levels[:, y : y + patch, x : x + patch].flatten(1) for x in columns] for y in rows]
    assert all((block == block[:, :1]).all() for row in blocks for block in row)
    return torch.stack([torch.stack([block[:, 0] == 0 for block in row], 1) for row in blocks], 1)


def budget(scores: Tensor, fraction: float, patch: int = 4, **options: bool) -> Tensor:
    """Which patches a budget keeps for given scores (B, h, w)."""
    grid, nothing = FineMapSpec(scores.shape[0], tuple(scores.shape[1:]), 8, 2, patch, patch), torch.empty(0)
    levels = Budget(Scored(scores), fraction, **options)(nothing, nothing, grid)
    assert levels.shape == scores.shape
    return kept_patches(levels, patch, 2)


FRACTIONS = [0.0, 0.01, 0.25, 0.34, 0.5, 0.99, 1.0]
MAPS = [(16, 24), (13, 17), (3, 29), (1, 1), (4, 5)]


@pytest.mark.parametrize("size", [(2, 3), (3, 3), (2, 5), (4, 4), (1, 2)])
def test_a_fine_map_larger_than_the_samples_of_an_image_repeats_the_last(size: tuple[int, int]) -> None:
    """As of networks that pad, along one axis or both; a smaller one is cut."""
    values, side = torch.rand(2, 8, 12), 4
    rows, columns = (
        torch.arange(count).clamp(max=most - 1) for count, most in zip(size, (2, 3), strict=True)
    )
    expected = values[:, ::side, ::side][:, rows][:, :, columns]
    assert torch.equal(near(values, 1, FineMapSpec(2, size, side, 2, 4, 4)), expected)


@pytest.mark.parametrize(("size", "fraction", "patch"), covering(MAPS, FRACTIONS, [1, 4]))
def test_a_budget_keeps_exactly_its_fraction_of_each_images_patches(
    size: tuple[int, int], fraction: float, patch: int
) -> None:
    found = budget(torch.randn(3, *size), fraction, patch)
    assert found.shape[1:] == tuple(-(-side // patch) for side in size)
    assert found.flatten(1).sum(1).tolist() == [round(fraction * found[0].numel())] * 3


@pytest.mark.parametrize(("size", "fraction"), covering(MAPS, FRACTIONS))
def test_a_budget_per_batch_keeps_exactly_its_fraction_of_all_patches(
    size: tuple[int, int], fraction: float
) -> None:
    scores = torch.randn(3, *size) + torch.tensor([0.0, 9.0, 0.0]).view(3, 1, 1)
    found = budget(scores, fraction, per_batch=True)
    assert found.sum() == round(fraction * found.numel())
    assert found[1].all() or not (found[0] | found[2]).any()  # the second image's are the best of all


@QUICK
@given(
    seed=st.integers(0, 99), size=st.tuples(st.integers(1, 20), st.integers(1, 20)), fraction=st.floats(0, 1)
)
def test_a_budget_keeps_the_patches_of_the_highest_mean_inside_the_map(
    seed: int, size: tuple[int, int], fraction: float
) -> None:
    scores = torch.randn(2, *size, generator=torch.Generator().manual_seed(seed))
    found = budget(scores, fraction)
    for image, keep in zip(scores.double(), found, strict=True):
        means = {
            (y, x): image[4 * y : 4 * y + 4, 4 * x : 4 * x + 4].mean().item()
            for y in range(keep.shape[0])
            for x in range(keep.shape[1])
        }
        best = sorted(means, key=means.__getitem__, reverse=True)[: int(keep.sum())]
        assert sorted(best) == [tuple(place) for place in keep.nonzero().tolist()]


# -- maps per call -------------------------------------------------------------------------------------


@pytest.mark.parametrize("high", [0, 1])
def test_zeros_and_ones_in_uint8_are_refused_and_both_meanings_named(high: int) -> None:
    model, image = net(), torch.randn(2, 3, 97, 129)
    region = torch.zeros(2, 13, 17, dtype=torch.uint8)
    region[:, :8, :8] = high
    with pytest.raises(cs.InvalidInput, match="two meanings") as caught:
        model(image, mask=region)
    assert "map.bool()" in caught.value.next and "map.to(torch.int64)" in caught.value.next
    model(image, mask=region.bool())
    assert torch.equal(model.levels.long(), torch.where(region.bool(), 0, 2))
    model(image, mask=region.long())
    assert torch.equal(model.levels.long(), split_as_needed(region.long(), 2))


@pytest.mark.parametrize(
    ("dtype", "inside", "strides"),
    covering([torch.uint8, torch.int16, torch.int64], [100, 127, 255], [(8, 16), (8, 32)]),
)
def test_a_region_as_a_picture_shows_it_is_refused_and_the_advice_keeps_that_region(
    dtype: torch.dtype, inside: int, strides: tuple[int, int]
) -> None:
    """OpenCV draws 255 inside: as levels, clamped, it would be everything else that is kept."""
    model = cs.adaptify(strided(), output_stride=strides, verify_laws=False)
    region, image = torch.zeros(1, 12, 16, dtype=dtype), torch.randn(1, 3, 96, 128)
    region[:, 4:8, 8:12] = inside
    with pytest.raises(cs.InvalidInput) as caught:
        model(image, mask=region)
    assert "give map > 0" in caught.value.next
    assert inside != 255 or "clamp" not in caught.value.next
    model(image, mask=region > 0)
    assert model.active_fraction == 16 / (12 * 16)


@pytest.mark.parametrize(
    "other", ["all", torch.zeros(13, 17, dtype=torch.long), lambda image: torch.ones(13, 17).bool()]
)
def test_a_mask_given_to_a_call_holds_for_that_call_only(other: object) -> None:
    model, image = net("none"), torch.randn(1, 3, 97, 129)
    before = model(image)
    model(image, mask=other)
    assert model.active_fraction == 1.0
    assert torch.equal(model(image), before)
    assert model.active_fraction == 0.0 and model.mask.spec() == "none"


# -- the registry --------------------------------------------------------------------------------------


def test_masks_are_listed_by_name_with_their_options_form_and_source() -> None:
    infos = {info.name: info for info in cs.list_masks()}
    assert list(infos) == sorted(infos) and {"all", "none", "random"} <= infos.keys()
    for info in infos.values():
        assert info.summary.endswith(".")
        assert resolve_mask(info.form.replace("MASK", "edges")).options() == info.options
    kept = {info.name: info.source for info in cs.list_masks(of_recipes=True)}
    assert "CVPRW 2023" in kept.pop("learned") and "ICLR" in kept.pop("confidence") and not kept
    sources = {"edges": "Hesse", "keypoints": "Hesse et al., CVPRW 2023", "detail": "ours"}
    assert all(infos[name].form == name and source in infos[name].source for name, source in sources.items())
    wrappers = ("budget", "dilate", "smooth", "threshold")
    assert (
        all(infos[name].form == f"MASK | {name}" for name in wrappers)
        and infos["union"].form == "MASK + MASK"
    )
