"""Metrics over a split: against their definitions pixel by pixel, torchmetrics, and the laws of sums."""

from __future__ import annotations

import math
import pickle
from typing import Any

import pytest
import torch
from conftest import covering
from torch import Tensor

import cadsurgery as cs
from cadsurgery.data import IGNORED
from cadsurgery.tasks.segmentation.metrics import SegmentationMetrics

CLASSES, SIZE = 4, (37, 26)


def maps(batch: int = 2, ignored: bool = True) -> tuple[Tensor, Tensor]:
    """Blobs: predictions that mostly agree with the labels, some labels ignored."""
    height, width = SIZE
    coarse = torch.randint(CLASSES, (batch, -(-height // 6), -(-width // 6)))
    labels = coarse.repeat_interleave(6, 1).repeat_interleave(6, 2)[:, :height, :width].clone()
    prediction = labels.roll((1, 2), (1, 2))
    prediction[torch.rand(prediction.shape) < 0.05] = 1
    if ignored:
        labels[:, 5:9, 3:20] = IGNORED
        labels[torch.rand(labels.shape) < 0.03] = IGNORED
    return prediction, labels


def compute(prediction: Tensor, labels: Tensor, **options: Any) -> dict[str, Any]:
    metrics = SegmentationMetrics(CLASSES, **options)
    metrics.update(prediction, labels)
    return metrics.compute()


def window(values: Tensor, y: int, x: int, distance: int) -> Tensor:
    top, left = max(0, y - distance), max(0, x - distance)
    return values[top : y + distance + 1, left : x + distance + 1]


def is_near_other(values: Tensor, y: int, x: int, distance: int) -> bool:
    return bool((window(values, y, x, distance) != values[y, x]).any())


def boundary_iou(prediction: Tensor, labels: Tensor, distance: int) -> float:
    """The definition: for each class, erode its masks by squares, the outside eroding too, and compare the rims."""
    shares = []
    for number in range(CLASSES):
        common = either = 0
        for predicted, truth in zip(prediction, labels, strict=True):
            valid = truth != IGNORED
            rims = []
            for mask in ((predicted == number) & valid, truth == number):
                rim = torch.zeros_like(mask)
                for y in range(SIZE[0]):
                    for x in range(SIZE[1]):
                        around = window(mask, y, x, distance)
                        whole = around.numel() == (2 * distance + 1) ** 2 and bool(around.all())
                        rim[y, x] = mask[y, x] and not whole
                rims.append(rim & valid)
            common += int((rims[0] & rims[1]).sum())
            either += int((rims[0] | rims[1]).sum())
        if either:
            shares.append(common / either)
    return sum(shares) / len(shares)


@pytest.mark.slow
def test_iou_and_pixel_accuracy_are_those_of_torchmetrics() -> None:
    import torchmetrics  # with scipy, which takes seconds

    prediction, labels = maps(3)
    found = compute(prediction, labels)
    options: dict[str, Any] = {"num_classes": CLASSES, "ignore_index": IGNORED}
    each = torchmetrics.functional.classification.multiclass_jaccard_index(
        prediction, labels, average=None, **options
    )
    right = torchmetrics.functional.classification.multiclass_accuracy(
        prediction, labels, average="micro", **options
    )
    assert found["iou"] == pytest.approx(each.tolist())
    assert found["miou"] == pytest.approx(each.mean().item())
    assert found["pixel_accuracy"] == pytest.approx(right.item())
    assert found["pixels"] == int((labels != IGNORED).sum())


@pytest.mark.parametrize(("share", "ignored"), covering([0.02, 0.07, 0.2], [False, True]))
def test_boundary_iou_is_that_of_its_definition(share: float, ignored: bool) -> None:
    prediction, labels = maps(2, ignored)
    distance = max(1, round(share * math.hypot(*SIZE)))
    found = compute(prediction, labels, boundary=share)["boundary_iou"]
    assert found == pytest.approx(boundary_iou(prediction, labels, distance))


@pytest.mark.parametrize("width", [1, 3, 9, 50])
def test_trimap_iou_is_the_iou_of_the_pixels_near_a_change_of_label(width: int) -> None:
    prediction, labels = maps()
    far = labels.clone()
    for image, shown in zip(labels, far, strict=True):
        for y in range(SIZE[0]):
            for x in range(SIZE[1]):
                if not is_near_other(image, y, x, width):
                    shown[y, x] = IGNORED
    assert compute(prediction, labels, trimap=width)["trimap_iou"] == compute(prediction, far)["miou"]


def test_what_is_predicted_at_ignored_pixels_does_not_matter() -> None:
    prediction, labels = maps()
    other = torch.where(labels == IGNORED, torch.randint_like(prediction, CLASSES), prediction)
    assert not torch.equal(other, prediction)
    assert compute(prediction, labels) == compute(other, labels)


def test_parts_merge_to_the_whole_in_any_order() -> None:
    prediction, labels = maps(5)
    whole = compute(prediction, labels)
    parts = [SegmentationMetrics(CLASSES) for _ in range(3)]
    for part, chosen in zip(parts, (slice(0, 1), slice(1, 4), slice(4, 5)), strict=True):
        part.update(prediction[chosen], labels[chosen])
    for order in ((0, 1, 2), (2, 0, 1)):
        merged = SegmentationMetrics(CLASSES)
        for number in order:
            merged.merge(pickle.loads(pickle.dumps(parts[number])))  # as processes send them
        assert merged.compute() == whole


def test_a_class_in_neither_map_is_none_and_left_out_of_the_mean() -> None:
    labels = torch.zeros(1, 8, 8, dtype=torch.int64)
    labels[:, :4] = 2
    found = compute(labels, labels)
    assert found["iou"] == [1, None, 1, None] and found["miou"] == 1 == found["boundary_iou"]


def test_impossible_settings_values_and_sizes_are_refused() -> None:
    for classes, options in ((0, {}), (2, {"boundary": 0.0}), (2, {"trimap": 0})):
        with pytest.raises(cs.InvalidInput, match="SegmentationMetrics"):
            SegmentationMetrics(classes, **options)  # type: ignore[arg-type]
    metrics, labels = SegmentationMetrics(CLASSES), torch.zeros(1, 4, 4, dtype=torch.int64)
    for prediction, truth in ((labels + CLASSES, labels), (labels - 1, labels), (labels, labels + CLASSES)):
        with pytest.raises(cs.InvalidInput, match=r"0\.\.3"):
            metrics.update(prediction, truth)
    with pytest.raises(cs.InvalidInput, match="do not match"):
        metrics.update(labels[:, :2], labels)
    with pytest.raises(cs.InvalidInput, match="same arguments"):
        metrics.merge(SegmentationMetrics(CLASSES, trimap=3))
    assert metrics.compute()["pixels"] == 0


def test_counts_have_a_row_for_each_label_and_areas_end_with_those_of_labels() -> None:
    prediction, labels = maps(3, False)
    prediction[labels == 1] = 0  # not symmetric
    metrics = SegmentationMetrics(CLASSES)
    metrics.update(prediction, labels)
    for label in range(CLASSES):
        for predicted in range(CLASSES):
            both = (labels == label) & (prediction == predicted)
            assert metrics.counts()["all"][label, predicted] == both.sum()
    assert torch.equal(metrics.areas()[2], torch.bincount(labels.flatten(), minlength=CLASSES))
