"""One mask on one converted network: run on batches, with accuracy and work added up."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from cadsurgery.data import SegmentationData
from cadsurgery.elements.lattice import Lattice
from cadsurgery.masks import MaskProvider, labelled
from cadsurgery.network.macs import MASK_LAYERS, LayerWork, layer_work
from cadsurgery.network.model import AdaptiveModel
from cadsurgery.support.errors import InvalidInput
from cadsurgery.tasks.segmentation.metrics import SegmentationMetrics


@dataclass(frozen=True)
class Setting:
    """One mask on one converted network.

    Attributes:
        net: as converted, for its plan and work.
        fast: its optimised copy, which is run.
        mask: the provider.
        work: of layers by shape of the batch, shared by the settings of a network; None where it is not linear.
        of_mask: MACs that the mask itself takes, by shape of the batch.
    """

    net: AdaptiveModel
    fast: AdaptiveModel
    mask: MaskProvider
    work: dict[tuple[int, ...], tuple[LayerWork, ...] | None]
    of_mask: dict[tuple[int, ...], int] = field(default_factory=dict)

    def __call__(self, images: Tensor, labels: Tensor) -> Any:
        """The network's output under this mask; masks may see the labels (B, H, W)."""
        with torch.inference_mode(), labelled(labels):
            return self.fast(images, mask=self.mask)

    def macs(self, images: Tensor, labels: Tensor) -> Work:
        """Of the call before, on the same images."""
        shape = tuple(images.shape)
        if shape not in self.work:
            self.work[shape] = layer_work(self.net, images)
        inside = {decision.node for decision in self.net.plan.chosen("adapt", "keep")}
        layers, lattice, counts = self.work[shape], self.fast.lattice, []
        if layers is None or shape not in self.of_mask:
            with labelled(labels):
                report = self.net.macs(images, mask=self.mask)
            self.of_mask[shape] = report.of_mask
            counts = [(e.layer, e.mask, e.high) for e in report.layers if e.layer not in MASK_LAYERS]
        if layers is not None:
            high = _high(self.net, lattice)
            counts = [(entry.layer, entry.on(lattice), entry.on(high)) for entry in layers]
        own = self.of_mask[shape]
        return Work(
            own + sum(mask for _, mask, _ in counts),
            sum(high for *_, high in counts),
            own + sum(mask for name, mask, _ in counts if name in inside),
            sum(high for name, _, high in counts if name in inside),
        )


@dataclass(frozen=True)
class Work:
    """Sums of MACs: with the mask and everything high, of the network and of its adaptive region."""

    mask: int = 0
    high: int = 0
    region_mask: int = 0
    region_high: int = 0

    def __add__(self, other: Work) -> Work:
        return Work(*(a + b for a, b in zip(vars(self).values(), vars(other).values(), strict=True)))


@dataclass
class Tally:
    """Sums over the images one setting has seen; all whole numbers, so that shares of the images merge exactly.

    Attributes:
        metrics: accuracy.
        images: how many.
        active: fine pixels at level 0.
        pixels: fine pixels.
        work: MACs.
    """

    metrics: SegmentationMetrics
    images: int = 0
    active: int = 0
    pixels: int = 0
    work: Work = field(default_factory=Work)

    def add(self, setting: Setting, images: Tensor, labels: Tensor, data: SegmentationData) -> None:
        """Run a batch and add it."""
        scores = scores_of(setting(images, labels))
        if scores.shape[1] != len(data.classes):
            raise InvalidInput(
                f"the network has {scores.shape[1]} classes and data {data.name} has {len(data.classes)}.",
                next="evaluate a network trained on these classes, or open the data with its classes.",
            )
        scores = F.interpolate(scores.float(), size=labels.shape[1:], mode="bilinear", align_corners=False)
        self.metrics.update(scores.argmax(1), labels)
        self.images += len(images)
        levels = setting.fast.levels
        self.active += int((levels == 0).sum())
        self.pixels += levels.numel()
        self.work += setting.macs(images, labels)


def scores_of(output: Any) -> Tensor:
    """Class scores (B, C, h, w) of a network's output: a tensor, or the entry `out` of a dictionary.

    Raises:
        InvalidInput: it is something else.
    """
    scores = output.get("out") if isinstance(output, Mapping) else output
    if not isinstance(scores, Tensor) or scores.dim() != 4:
        shape = f"of shape {tuple(scores.shape)}" if isinstance(scores, Tensor) else type(output).__name__
        raise InvalidInput(
            f"the network's output is no map of class scores: {shape}.",
            next="evaluate a segmentation network: it returns (batch, classes, height, width), or a "
            'dictionary with that as "out".',
        )
    return scores


def merge(parts: Sequence[Tally]) -> Tally:
    """The sums of several parts of a split."""
    whole = copy.deepcopy(parts[0])
    for part in parts[1:]:
        whole.metrics.merge(part.metrics)
        whole.images += part.images
        whole.active += part.active
        whole.pixels += part.pixels
        whole.work += part.work
    return whole


def _high(net: AdaptiveModel, lattice: Lattice) -> Lattice:
    """Everything high, for images as those of a lattice."""
    return net.geometry.uniform(0, lattice.batch, lattice.whole_size, lattice.levels.device)
