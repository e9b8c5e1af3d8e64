"""Descriptors matched between two images of a plane: who is matched, how far off, and how often right."""

from __future__ import annotations

import math

import cv2
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import cadsurgery as cs
from recipes.hpatches.matching import (
    corner_error,
    match_errors,
    matching_accuracy,
    mutual_matches,
    warped,
)

QUICK = settings(max_examples=40, deadline=None, derandomize=True)
IDENTITY = torch.eye(3, dtype=torch.float64)
THRESHOLDS = tuple(range(1, 16))


def homography(seed: int) -> Tensor:
    """Some view of a plane: turned, scaled, moved, a little in perspective."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(3, 3, generator=generator, dtype=torch.float64)
    scale = torch.tensor([[0.2, 0.2, 20.0], [0.2, 0.2, 20.0], [1e-4, 1e-4, 0.0]], dtype=torch.float64)
    return IDENTITY + scale * noise


def moved(x: float, y: float) -> Tensor:
    return torch.tensor([[1, 0, x], [0, 1, y], [0, 0, 1]], dtype=torch.float64)


def spread(count: int, seed: int = 0) -> Tensor:
    """Points in an image of 200 x 300."""
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(count, 2, generator=generator, dtype=torch.float64) * torch.tensor([299.0, 199.0])


def each(count: int) -> Tensor:
    """Every point with its own."""
    return torch.arange(count).unsqueeze(1).expand(-1, 2)


# -- matches -------------------------------------------------------------------------------------------


@QUICK
@given(
    seed=st.integers(0, 999),
    sizes=st.tuples(st.integers(0, 12), st.integers(0, 12)),
    values=st.sampled_from([2, 1000]),
)
def test_a_match_is_the_nearest_of_its_nearest(seed: int, sizes: tuple[int, int], values: int) -> None:
    """Under the inner product; of equal ones the first counts."""
    torch.manual_seed(seed)
    first, second = (torch.randint(0, values, (size, 4)).double() for size in sizes)
    wanted = []
    for i, row in enumerate(first):
        if len(second):
            products = [float(row @ other) for other in second]
            j = products.index(max(products))
            back = [float(other @ second[j]) for other in first]
            if back.index(max(back)) == i:
                wanted.append([i, j])
    found = mutual_matches(first, second)
    assert found.dtype == torch.int64 and found.shape == (len(wanted), 2)
    assert found.tolist() == wanted


@pytest.mark.parametrize(
    ("first", "second"), [((3, 4), (3, 5)), ((0, 4), (2, 5)), ((4,), (3, 4)), ((1, 3, 4), (3, 4))]
)
def test_descriptors_of_different_networks_are_refused(
    first: tuple[int, ...], second: tuple[int, ...]
) -> None:
    with pytest.raises(cs.InvalidInput) as caught:
        mutual_matches(torch.zeros(first), torch.zeros(second))
    assert str(first) in caught.value.what and "(n, C) and (m, C)" in caught.value.next


# -- accuracy (K4) -------------------------------------------------------------------------------------


def test_no_matches_are_an_accuracy_of_zero() -> None:
    """K4."""
    none = torch.empty(0, 2, dtype=torch.long)
    errors = match_errors(spread(5), spread(7), none, IDENTITY)
    assert errors.shape == (0,)
    assert matching_accuracy(errors, THRESHOLDS) == [0.0] * 15


@QUICK
@given(
    offsets=st.lists(st.tuples(st.integers(-9, 9), st.integers(-9, 9)), min_size=1, max_size=12),
    seed=st.integers(0, 99),
)
def test_known_errors_give_the_known_accuracy(offsets: list[tuple[int, int]], seed: int) -> None:
    """K4: points moved by a homography, then each by so many pixels."""
    first, truth = spread(len(offsets), seed), homography(seed)
    second = warped(first, truth) + torch.tensor(offsets, dtype=torch.float64)
    order = torch.randperm(len(offsets))
    matches = torch.stack((order, torch.arange(len(offsets))), 1)
    errors = match_errors(first, second[order], matches, truth)
    lengths = [math.hypot(*offsets[int(i)]) for i in order]
    assert errors.tolist() == pytest.approx(lengths, abs=1e-8)
    limits = [limit + 1e-6 for limit in THRESHOLDS]
    wanted = [sum(length <= limit for length in lengths) / len(lengths) for limit in limits]
    assert matching_accuracy(errors, limits) == pytest.approx(wanted)


# -- homographies --------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(4))
def test_points_are_moved_as_opencv_moves_them(seed: int) -> None:
    points, truth = spread(50, seed), homography(seed)
    wanted = cv2.perspectiveTransform(points.numpy()[None], truth.numpy())[0]
    found = warped(points, truth)
    assert found.dtype == torch.float64 and np.allclose(found.numpy(), wanted)


@pytest.mark.parametrize("seed", range(3))
def test_a_third_of_wrong_matches_does_not_matter(seed: int) -> None:
    first, truth = spread(90, seed), homography(seed)
    second = warped(first, truth)
    second[:30] = spread(30, seed + 50)
    assert corner_error(first, second, each(90), truth, (200, 300)) < 0.1


@pytest.mark.parametrize(("x", "y"), [(3.0, 4.0), (0.0, 0.0), (-30.0, 40.0)])
def test_the_error_is_how_far_the_corners_are_off(x: float, y: float) -> None:
    """All matches say that nothing moved; the truth says all of it did."""
    points = spread(40)
    found = corner_error(points, points, each(40), moved(x, y), (200, 300))
    assert found == pytest.approx(math.hypot(x, y), abs=1e-3)
