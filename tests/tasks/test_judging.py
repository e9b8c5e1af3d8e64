"""Judgements picture by picture: what rare classes lose is not paid for by what others gain, and nothing by chance."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from cadsurgery.tasks.judging import (
    AGREEMENT,
    CLASSES,
    FOUND,
    VALUES,
    Estimate,
    Judgement,
    estimate,
    judge,
    kind_to_judge,
    pool,
)
from cadsurgery.tasks.segmentation.fidelity import FidelityMetrics

SIZE = (23, 31)


def scores(classes: Tensor, count: int) -> Tensor:
    return F.one_hot(classes, count).movedim(-1, 1).float()


def drawn(images: int, seed: int, share: float) -> Tensor:
    """Classes (images, 1, h, w) of pixels: 0 and 1, and a share of 2."""
    generator = torch.Generator().manual_seed(seed)
    classes = torch.randint(2, (images, 1, *SIZE), generator=generator)
    return classes.where(torch.rand(classes.shape, generator=generator) > share, 2)


def of(found: Tensor, dense: Tensor) -> Judgement:
    return judge(0.0, scores(found, 3), scores(dense, 3), None, SIZE, "classes")


def test_it_is_the_balanced_fidelity_of_an_evaluation() -> None:
    dense, found = drawn(4, 0, 0.02), drawn(4, 1, 0.02)
    metrics = FidelityMetrics("classes")
    for one, other in zip(found, dense, strict=True):
        metrics.update(scores(one, 4), scores(other, 4), SIZE)
    judged = [of(one, other) for one, other in zip(found, dense, strict=True)]
    figures = metrics.compute()
    assert figures["balanced_fidelity"] == pytest.approx(estimate(judged, judged, CLASSES).value)
    assert figures["pixel_accuracy"] == pytest.approx(estimate(judged, judged, AGREEMENT).value)
    dense[:], found[:] = 0, 0
    found[..., 0, 0] = 1  # not a class of the dense network: it lowers mean IoU alone
    alone = FidelityMetrics("classes")
    alone.update(scores(found[0], 4), scores(dense[0], 4), SIZE)
    assert alone.compute()["balanced_fidelity"] > 0.99 > alone.compute()["miou"]


def test_a_rare_class_that_is_lost_is_no_improvement_though_more_pixels_agree() -> None:
    dense = drawn(6, 0, 0.01)
    before, after = dense.clone(), dense.where(dense < 2, 0)
    before[..., :5, :] = (1 - before[..., :5, :]).where(before[..., :5, :] < 2, 2)
    judged = [[of(*pair) for pair in zip(found, dense, strict=True)] for found in (after, before)]
    assert estimate(*judged, AGREEMENT).is_improvement and estimate(*judged, AGREEMENT).change > 0.1
    assert not estimate(*judged, CLASSES).is_improvement and estimate(*judged, CLASSES).change < 0


@pytest.mark.parametrize(
    ("change", "error", "improves"),
    [(0.02, 0.01, True), (0.01, 0.02, False), (0.0, 0.0, False), (-0.1, 0.01, False), (0.5, math.nan, False)],
)
def test_an_improvement_is_larger_than_its_error(change: float, error: float, improves: bool) -> None:
    assert Estimate(0.5, change, error, 3).is_improvement == improves


def test_an_improvement_on_few_pictures_must_be_larger() -> None:
    """As by Student's t, within some hundredths."""
    stats = pytest.importorskip("scipy.stats")
    for count in (2, 3, 7, 30, 1000):
        quantile = stats.t.ppf(stats.norm.cdf(1), count - 1) * math.sqrt(count / (count - 1))
        assert not Estimate(0.5, 0.95 * quantile, 1.0, count).is_improvement
        assert Estimate(0.5, 1.05 * quantile, 1.0, count).is_improvement


@pytest.mark.parametrize("measure", [CLASSES, AGREEMENT])
def test_several_settings_of_a_picture_are_judged_together(measure: str) -> None:
    dense, found = drawn(2, 0, 0.1), drawn(2, 1, 0.1)
    together = estimate([pool([of(one, dense[0]) for one in found])], [of(dense[0], dense[0])], measure)
    apart = estimate([of(one, dense[0]) for one in found], [of(dense[0], dense[0])] * 2, measure)
    assert together.value == pytest.approx(apart.value) and together.images == 1
    values = [
        judge(1.0, factor * torch.ones(1, 1, 4, 5), torch.ones(1, 1, 4, 5), None, (4, 5), "values")
        for factor in (0.9, 1.0)
    ]
    assert pool(values).error == pytest.approx(0.005) and estimate([pool(values)], values, VALUES).value < 1


def test_pictures_of_one_class_agree_or_not() -> None:
    given = torch.tensor([[0.0, 1.0, 0.0], [2.0, 0.0, 1.0]])
    judged = [judge(0.0, one[None], given[0][None], None, SIZE, "classes") for one in given]
    assert estimate(judged, judged, AGREEMENT).value == 0.5


def test_a_map_of_probabilities_is_judged_by_what_it_finds() -> None:
    """Half of what is found is missed: IoU 2 / 4 there and 60 / 62 elsewhere."""
    given = torch.full((1, 1, 8, 8), 0.01)
    given[..., :2, :2] = 0.97
    half = given.where(torch.arange(8) != 1, 0.3)
    assert kind_to_judge(given) == "found"
    judged = [judge(0.0, values, given, None, (8, 8), "found") for values in (half, given)]
    assert estimate(judged[:1], judged[1:], FOUND).value == pytest.approx((2 / 4 + 60 / 62) / 2)


@pytest.mark.parametrize(
    "values",
    [
        torch.linspace(0, 1, 64).view(1, 1, 8, 8),  # depth
        torch.linspace(0, 0.09, 64).view(1, 1, 8, 8),  # disparity, small everywhere
        10 * torch.eye(8)[None, None],  # beyond 1
        torch.eye(8).expand(1, 2, 8, 8),  # of two channels
    ],
    ids=["depth", "disparity", "beyond 1", "two channels"],
)
def test_other_maps_without_negative_values_are_no_probabilities(values: Tensor) -> None:
    assert kind_to_judge(values) == "values"
