"""Keypoints of images: SIFT as published, peaks of score maps, and what is taken as points."""

from __future__ import annotations

import math
import sys
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import cadsurgery as cs
from cadsurgery.data.images import street_scene
from cadsurgery.masks.detectors import opencv, peaks, points_of, sift

QUICK = settings(max_examples=40, deadline=None, derandomize=True)
INF = math.inf


def picture(height: int = 120, width: int = 161) -> Any:
    """Grey bytes of a generated street scene."""
    return (255 * street_scene(height, width).mean(0)).to(torch.uint8).numpy()


# -- sift ----------------------------------------------------------------------------------------------


def test_sift_gives_whole_pixels_once_the_strongest_first() -> None:
    points, responses = sift(picture(), 512)
    assert points.dtype == responses.dtype == np.float32
    assert points.shape == (len(responses), 2) and 10 < len(points) <= 512
    assert (points == points.round()).all()
    assert len({tuple(point) for point in points.tolist()}) == len(points)
    assert (points >= 0).all() and (points < [161, 120]).all()
    assert (np.diff(responses) <= 0).all() and (responses > 0).all()


def test_sift_is_opencvs_rounded_and_without_doubles() -> None:
    """Each pixel has the response of the strongest keypoint that is rounded to it."""
    strongest: dict[tuple[int, int], float] = {}
    for found in cv2.SIFT_create().detect(picture(), None):
        pixel = (round(found.pt[0]), round(found.pt[1]))
        strongest[pixel] = max(strongest.get(pixel, 0.0), found.response)
    points, responses = sift(picture(), 10**6)
    given = {(int(x), int(y)): float(value) for (x, y), value in zip(points, responses, strict=True)}
    assert given.keys() == strongest.keys()
    assert all(given[pixel] == pytest.approx(strongest[pixel]) for pixel in given)


def test_without_opencv_it_is_said_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cv2", None)
    with pytest.raises(cs.CadError, match="OpenCV") as caught:
        opencv()
    assert "cadsurgery[keypoints]" in caught.value.next
    with pytest.raises(cs.CadError, match="OpenCV"):
        sift(picture(), 5)


# -- peaks ---------------------------------------------------------------------------------------------


def peaks_by_hand(scores: Tensor, count: int, radius: int, border: int) -> list[tuple[float, int, int]]:
    """(minus value, y, x) of each finite sample that no other within the window exceeds, sorted."""
    height, width = scores.shape
    found = []
    for y in range(border, height - border):
        for x in range(border, width - border):
            window = scores[max(0, y - radius) : y + radius + 1, max(0, x - radius) : x + radius + 1]
            if scores[y, x].isfinite() and scores[y, x] >= window.max():
                found.append((-float(scores[y, x]), y, x))
    return sorted(found)[:count]


@QUICK
@given(
    seed=st.integers(0, 999),
    size=st.tuples(st.integers(1, 14), st.integers(1, 14)),
    count=st.integers(1, 20),
    radius=st.integers(0, 4),
    border=st.integers(0, 3),
    values=st.sampled_from([3, 1000]),
)
def test_peaks_are_the_largest_of_their_windows(
    seed: int, size: tuple[int, int], count: int, radius: int, border: int, values: int
) -> None:
    """Few different values have many equal neighbours: all of them count, in raster order."""
    torch.manual_seed(seed)
    scores = torch.randint(0, values, (2, *size)).float()
    for one, (points, strengths) in zip(scores, peaks(scores, count, radius, border), strict=True):
        wanted = peaks_by_hand(one, count, radius, border)
        assert points.tolist() == [[x, y] for _, y, x in wanted]
        assert strengths.tolist() == [-value for value, _, _ in wanted]


@pytest.mark.parametrize("value", [INF, -INF, math.nan])
def test_what_is_not_finite_is_no_peak(value: float) -> None:
    scores = torch.full((1, 9, 9), -INF)
    scores[0, 2, 2], scores[0, 7, 7] = 1.0, value
    ((points, strengths),) = peaks(scores, 9)
    assert points.tolist() == [[2, 2]] and strengths.tolist() == [1.0]


# -- what is taken as points ---------------------------------------------------------------------------

IMAGE = torch.zeros(2, 3, 24, 40)


@pytest.mark.parametrize(
    "part", [torch.tensor([[3.25, 7.0]]), np.array([[3.25, 7.0]], dtype=np.float32), [[3.25, 7.0]]]
)
def test_points_of_each_image_are_taken_as_they_are(part: Any) -> None:
    first, second = points_of([part, torch.empty(0, 2)], IMAGE, 5, "")
    assert first.dtype == second.dtype == torch.float64
    assert first.tolist() == [[3.25, 7.0]] and second.shape == (0, 2)


@pytest.mark.parametrize(("size", "channel"), [((12, 20), False), ((7, 9), True), ((48, 80), False)])
def test_a_sample_of_a_score_map_stands_for_the_middle_of_its_pixels(
    size: tuple[int, int], channel: bool
) -> None:
    """The pixels of all samples together are the image: its middle is that of the map."""
    scores = torch.full((2, *size), -INF)
    y, x = size[0] // 3, size[1] - 1
    scores[:, y, x] = 1.0
    (found, _) = points_of(scores.unsqueeze(1) if channel else scores, IMAGE, 5, "")
    step_y, step_x = 24 / size[0], 40 / size[1]
    assert found.tolist() == [pytest.approx([(x + 0.5) * step_x - 0.5, (y + 0.5) * step_y - 0.5])]


@pytest.mark.parametrize(("x", "y"), [(-0.51, 0), (0, 23.5), (math.nan, 0), (0, INF)])
def test_a_point_outside_the_image_is_refused_with_its_bounds(x: float, y: float) -> None:
    with pytest.raises(cs.InvalidInput, match="not in the image") as caught:
        points_of([torch.empty(0, 2), torch.tensor([[3.0, 3.0], [x, y]])], IMAGE, 5, "mask m")
    assert caught.value.where == "mask m, image 1"
    assert "0..39" in caught.value.why and "0..23" in caught.value.why
    assert "x before y" in caught.value.next


@pytest.mark.parametrize(
    ("found", "what"),
    [
        (None, "NoneType"),
        (torch.zeros(2, 8, 8).long(), r"int64 tensor of shape \(2, 8, 8\)"),
        (torch.zeros(1, 8, 8), r"\(1, 8, 8\)"),
        ([torch.zeros(1, 2)], "a list of 1 for a batch of 2"),
        ({0: torch.zeros(1, 2), 1: torch.zeros(1, 2)}, "dict"),
    ],
)
def test_what_is_neither_points_nor_scores_is_refused(found: Any, what: str) -> None:
    with pytest.raises(cs.InvalidInput, match=what) as caught:
        points_of(found, IMAGE, 5, "mask m")
    assert "(n, 2)" in caught.value.next and "(B, h, w)" in caught.value.next
    assert caught.value.where == "mask m"
