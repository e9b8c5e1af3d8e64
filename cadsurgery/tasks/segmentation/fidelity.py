"""Fidelity without labels: how close outputs are to the outputs with everything kept high."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

from cadsurgery.support.divergence import Kind, divergence, kind_of, maps_of, resize
from cadsurgery.support.errors import InvalidInput
from cadsurgery.tasks.segmentation.metrics import SegmentationMetrics

NO_CLASS = -1  # so that no pixel of a prediction is ignored


def balanced_fidelity(hits: Tensor, either: Tensor, truth: Tensor) -> Tensor:
    """Return the mean over classes of the IoU of a prediction with the dense network's, for counts (..., C) of pixels.

    Every class that the dense network predicts counts the same, so that rare classes count, which the share of equal
    pixels hardly shows. Other classes do not count: a few pixels of one must not weigh as much as a whole class.

    Args:
        hits: pixels of each class in both predictions.
        either: in either prediction.
        truth: in that of the dense network.
    """
    counted = truth > 0
    return ((hits / either.clamp(min=1)) * counted).sum(-1) / counted.sum(-1).clamp(min=1)


class FidelityMetrics:
    """Divergence from a target output; for class scores also the agreement of classes, with the target's as labels.

    As in `SegmentationMetrics`, figures of parts of the images merge exactly to those of all images.

    Attributes:
        kind: kind of the outputs, `classes` or `values`; `auto` until the first output.
        images: number of images.
        agreement: agreement of classes over maps; None before the first image, and for outputs (B, C) or other
            values.
    """

    def __init__(self, kind: Kind = "auto") -> None:
        """Start with no images.

        Args:
            kind: as in `cadsurgery.support.divergence.divergence`.
        """
        self.kind = kind
        self.agreement: SegmentationMetrics | None = None
        self._apart: list[float] = []  # divergence of each image
        self._same, self._pixels = 0, 0

    @property
    def images(self) -> int:
        """Number of images."""
        return len(self._apart)

    def update(self, output: Any, target: Any, size: tuple[int, int]) -> None:
        """Add a batch.

        Args:
            output: output of the network.
            target: output with everything kept high.
            size: (height, width) of the images, at which classes are compared.

        Raises:
            InvalidInput: the outputs have no maps, or their maps differ.
        """
        if self.kind == "auto":
            self.kind = kind_of(target)
        apart = divergence(target, output, self.kind)
        self._apart += apart.double().mean((1, 2)).tolist()
        if self.kind == "classes":
            self._add_classes(maps_of(output)[0], maps_of(target)[0], size)

    def _add_classes(self, output: Tensor, target: Tensor, size: tuple[int, int]) -> None:
        pooled = target.shape[2:].numel() == 1
        ours, theirs = (scores if pooled else resize(scores, size) for scores in (output, target))
        prediction, labels = ours.argmax(1), theirs.argmax(1)
        self._same += int((prediction == labels).sum())
        self._pixels += labels.numel()
        if not pooled:
            self.agreement = self.agreement or SegmentationMetrics(target.shape[1], ignored=NO_CLASS)
            self.agreement.update(prediction, labels)

    def merge(self, other: FidelityMetrics) -> None:
        """Add the images of another object.

        Raises:
            InvalidInput: the other object has outputs of another kind.
        """
        if not other.images:
            return
        if self.images and self.kind != other.kind:
            raise InvalidInput(
                f"some outputs are {self.kind} and others {other.kind}.",
                why="the kind is decided by the first image of each process.",
                next=f"name it: kind={other.kind}.",
            )
        self.kind = other.kind
        self._apart += other._apart
        self._same, self._pixels = self._same + other._same, self._pixels + other._pixels
        if self.agreement is None:
            self.agreement = other.agreement
        elif other.agreement is not None:
            self.agreement.merge(other.agreement)

    def compute(self) -> dict[str, Any]:
        """Return the figures so far; None where nothing was counted.

        Returns:
            `divergence`, the mean over images. For values `relative_error`, its square root: the root mean square of
            the differences, relative to the target's. For class scores `pixel_accuracy`, the share of pixels with
            the target's class; for maps of them also `balanced_fidelity`, see the function, and the other figures of
            `SegmentationMetrics.compute`.
        """
        mean = math.fsum(self._apart) / len(self._apart) if self._apart else None
        names = ("miou", "pixel_accuracy", "boundary_iou", "trimap_iou", "balanced_fidelity")
        figures: dict[str, Any] = dict.fromkeys(names)
        figures |= {"iou": [], "divergence": mean, "relative_error": None}
        if self.kind == "values" and mean is not None:
            figures["relative_error"] = math.sqrt(mean)
        if self.agreement is not None:
            figures |= self.agreement.compute()
            figures["balanced_fidelity"] = float(balanced_fidelity(*self.agreement.areas().double()))
        if self._pixels:
            figures["pixel_accuracy"] = self._same / self._pixels
        return figures
