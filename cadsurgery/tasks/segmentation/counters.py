"""One mask on one converted network: run on batches, with accuracy and work added up."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from cadsurgery.data import SegmentationData
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

    def macs(self, images: Tensor, labels: Tensor) -> dict[str, int]:
        """Of the call before, on the same images: with the mask and everything high, of the network and of its
        adaptive region."""
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
            size, where = lattice.whole_size, lattice.levels.device
            high = self.net.geometry.uniform(0, lattice.batch, size, where)
            counts = [(entry.layer, entry.on(lattice), entry.on(high)) for entry in layers]
        of_mask = self.of_mask[shape]
        return {
            "macs": of_mask + sum(mask for _, mask, _ in counts),
            "macs_high": sum(high for *_, high in counts),
            "region": of_mask + sum(mask for name, mask, _ in counts if name in inside),
            "region_high": sum(high for name, _, high in counts if name in inside),
        }


@dataclass
class Tally:
    """Sums over the images one setting has seen; all whole numbers, so that shares of the images merge exactly.

    Attributes:
        metrics: accuracy.
        counts: of `images`, of fine `pixels` and of `active` ones at level 0, and of MACs, see `Setting.macs`.
    """

    metrics: SegmentationMetrics
    counts: Counter[str] = field(default_factory=Counter)

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
        levels = setting.fast.levels
        of_call = {"images": len(images), "active": int((levels == 0).sum()), "pixels": levels.numel()}
        self.counts.update(of_call | setting.macs(images, labels))


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
        whole.counts.update(part.counts)
    return whole
