"""Judgements picture by picture: what rare classes lose is not paid for by what others gain, and nothing by chance."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from cadsurgery.tasks.judging import (
    AGREEMENT,
    CLASSES,
    FOUND,
    Judgement,
    estimate,
    judge,
    kind_to_judge,
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
    assert estimate(*judged, AGREEMENT).change > 0.1 and estimate(*judged, CLASSES).change < 0


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
