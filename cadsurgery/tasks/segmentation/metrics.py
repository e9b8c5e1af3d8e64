"""Accuracy of a segmentation over a whole split, from sums over images that merge across processes."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from cadsurgery.data.datasets import IGNORED
from cadsurgery.data.labels import as_classes
from cadsurgery.support.errors import InvalidInput


class SegmentationMetrics:
    """Mean IoU, pixel accuracy, boundary IoU and trimap IoU, from one confusion matrix over all images.

    All states are sums over pixels, so metrics of parts of a split merge to those of the whole split. Distances are
    Chebyshev distances: windows are squares of pixels.

    Boundary IoU (Cheng et al., CVPR 2021): per class, the IoU of predicted and labelled area in the parts
    that lie within d pixels of their own outline. As in the authors' code, the image's border belongs to the
    outline. So does the border to ignored pixels, which belong to no class and are not counted.

    Trimap IoU (Krähenbühl and Koltun, NIPS 2011; Chen et al., PAMI 2018): mean IoU of the pixels within `trimap`
    pixels of a change of label, where ignored areas count as a label.

    Attributes:
        classes: number of classes.
        boundary: d as a share of the image's diagonal, at least one pixel.
        trimap: width of the band on each side of a change of label, in pixels.
        ignored: label of pixels that do not count.
    """

    def __init__(self, classes: int, boundary: float = 0.02, trimap: int = 9, ignored: int = IGNORED) -> None:
        """Start with no images.

        Raises:
            InvalidInput: there is no class, or a band without width.
        """
        if classes < 1 or boundary <= 0 or trimap < 1:
            raise InvalidInput(
                f"not all are positive: classes={classes}, boundary={boundary}, trimap={trimap}.",
                next="e.g. SegmentationMetrics(19, boundary=0.02, trimap=9).",
            )
        self.classes, self.boundary, self.trimap, self.ignored = classes, boundary, trimap, ignored
        square = torch.zeros(classes, classes, dtype=torch.int64)
        self._sums = {"all": square, "band": square, "common": square[0], "either": square[0]}

    def update(self, prediction: Tensor, labels: Tensor) -> None:
        """Add a batch.

        Args:
            prediction: (B, H, W) whole numbers, 0..classes-1.
            labels: (B, H, W) whole numbers, 0..classes-1 or the label of ignored pixels.

        Raises:
            InvalidInput: the sizes differ, or a value is out of range or no whole number.
        """
        prediction, labels = as_classes(prediction, what="predictions"), as_classes(labels)
        self._check(prediction, labels)
        valid = labels != self.ignored
        near_boundary = near_change(labels, self.trimap)
        self._add("all", self._confusion(prediction, labels))
        self._add("band", self._confusion(prediction, labels.where(near_boundary, self.ignored)))
        height, width = labels.shape[1:]
        distance = max(1, round(self.boundary * math.hypot(height, width)))
        seen = prediction.where(valid, self.ignored)
        inner, outer = (near_change(shown, distance, border=True) & valid for shown in (seen, labels))
        counts = [self._count(shown[band]) for shown, band in ((seen, inner), (labels, outer))]
        common = self._count(labels[inner & outer & (seen == labels)])
        self._add("common", common)
        self._add("either", counts[0] + counts[1] - common)

    def merge(self, other: SegmentationMetrics) -> None:
        """Add the images of another object.

        Raises:
            InvalidInput: the other object has other settings.
        """
        settings = [(part.classes, part.boundary, part.trimap) for part in (self, other)]
        if settings[0] != settings[1]:
            raise InvalidInput(
                f"metrics of (classes, boundary, trimap) = {settings[1]} cannot be added to those of {settings[0]}.",
                next="make both with the same arguments.",
            )
        for name, value in other._sums.items():
            self._add(name, value)

    def counts(self) -> dict[str, Tensor]:
        """The sums so far: `all`, a confusion matrix whose rows are labels; `band`, that of the trimap; `common` and
        `either`, for each class the pixels near its outlines in both maps and in either."""
        return dict(self._sums)

    def areas(self) -> Tensor:
        """Return for each class the pixels in both maps, in either, and in the labels, (3, C) int64."""
        confusion = self._sums["all"]
        hits, truth = confusion.diagonal(), confusion.sum(1)
        return torch.stack((hits, truth + confusion.sum(0) - hits, truth))

    def compute(self) -> dict[str, Any]:
        """Return the figures so far, as shares 0..1; None where no pixel was counted.

        Returns:
            `miou` and `iou` (per class; None for a class in neither predictions nor labels, which the mean excludes),
            `pixel_accuracy`, `boundary_iou`, `trimap_iou`, and `pixels`, the number of counted pixels.
        """
        everything, band = self._sums["all"], self._sums["band"]
        iou, total = _iou(everything), int(everything.sum())
        hits = int(everything.diagonal().sum())
        return {
            "miou": _mean(iou),
            "iou": iou,
            "pixel_accuracy": hits / total if total else None,
            "boundary_iou": _mean(_shares(self._sums["common"], self._sums["either"])),
            "trimap_iou": _mean(_iou(band)),
            "pixels": total,
        }

    def _add(self, name: str, value: Tensor) -> None:
        self._sums[name] = self._sums[name] + value.to(self._sums[name])

    def _confusion(self, prediction: Tensor, labels: Tensor) -> Tensor:
        """Count how often each label (row) was predicted as each class (column)."""
        counted = labels != self.ignored
        pairs = self.classes * labels[counted] + prediction[counted]
        return torch.bincount(pairs, minlength=self.classes**2).view(self.classes, self.classes)

    def _count(self, values: Tensor) -> Tensor:
        return torch.bincount(values, minlength=self.classes)

    def _check(self, prediction: Tensor, labels: Tensor) -> None:
        if prediction.dim() != 3 or prediction.shape != labels.shape:
            raise InvalidInput(
                f"predictions {tuple(prediction.shape)} and labels {tuple(labels.shape)} do not match.",
                next="give both as (batch, height, width); resize the scores before argmax.",
            )
        for what, values in (("prediction", prediction), ("label", labels[labels != self.ignored])):
            if values.numel() and not 0 <= int(values.min()) <= int(values.max()) < self.classes:
                raise InvalidInput(
                    f"a {what} is not 0..{self.classes - 1}: {int(values.min())}..{int(values.max())}.",
                    next=f"check the number of classes; ignored labels are {self.ignored}.",
                )


def near_change(values: Tensor, distance: int, *, border: bool = False) -> Tensor:
    """Mark pixels with another value within `distance` pixels, in a square around the pixel: (B, H, W) bool.

    Args:
        values: (B, H, W) integers below 2^15.
        distance: distance in pixels.
        border: True if the outside of the image counts as another value.
    """
    shown = values.to(torch.int16)  # maxima of int16 are several times faster than max-pooling
    if border:  # one ring is enough, because a window that leaves the image crosses it
        shown = F.pad(shown, (1, 1, 1, 1), value=-1)
    high, low = (_over_window(shown, distance, better) for better in (torch.maximum, torch.minimum))
    changes = high != low
    return changes[:, 1:-1, 1:-1] if border else changes


def _over_window(values: Tensor, distance: int, better: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """Compute the maximum or minimum in a square of side 2 distance + 1 around each pixel, axis by axis."""
    for axis in (1, 2):
        length, side, width = values.shape[axis], 2 * distance + 1, 1
        # Values repeated at the ends lie in the windows anyway.
        places = torch.arange(-distance, length + distance, device=values.device).clamp(0, length - 1)
        values = values.index_select(axis, places)
        while width < side:  # combine two windows that overlap or touch
            ahead = min(width, side - width)
            count = values.shape[axis] - ahead
            values = better(values.narrow(axis, 0, count), values.narrow(axis, ahead, count))
            width += ahead
    return values


def _iou(confusion: Tensor) -> list[float | None]:
    hits = confusion.diagonal()
    return _shares(hits, confusion.sum(0) + confusion.sum(1) - hits)


def _shares(parts: Tensor, wholes: Tensor) -> list[float | None]:
    pairs = zip(parts.tolist(), wholes.tolist(), strict=True)
    return [part / whole if whole else None for part, whole in pairs]


def _mean(values: list[float | None]) -> float | None:
    defined = [value for value in values if value is not None]
    return sum(defined) / len(defined) if defined else None
