"""Sides of an adaptive network: each mask at each pair of output strides, and the dense networks of the pair."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from cadsurgery.data.networks import Source
from cadsurgery.masks import MaskProvider, resolve_mask
from cadsurgery.network.macs import MASK_LAYERS, LayerWork, layer_work
from cadsurgery.network.model import AdaptiveModel
from cadsurgery.tasks.report import (
    Column,
    Row,
    accuracy_columns,
    macs_columns,
    percent,
    strides_in_words,
    time_columns,
)
from cadsurgery.tasks.side import Comparison, Counts, Figures, Side

HIGH, LOW = "all", "none"


@dataclass(frozen=True)
class Masked:
    """A converted network under one mask.

    Attributes:
        net: the converted network, for its plan and work.
        fast: its optimised copy, which is run.
        mask: the mask.
        work: work of layers by shape of the batch, shared by the masks of a network; None where it is not linear.
        of_mask: MACs of the mask itself, by shape of the batch.
    """

    net: AdaptiveModel
    fast: AdaptiveModel
    mask: MaskProvider
    work: dict[tuple[int, ...], tuple[LayerWork, ...] | None]
    of_mask: dict[tuple[int, ...], int] = field(default_factory=dict)

    def __call__(self, images: Tensor) -> Any:
        """Return the network's output under this mask."""
        with torch.inference_mode():
            return self.fast(images, mask=self.mask)

    def count(self, images: Tensor) -> Counts:
        """Count for the previous call, on the same images.

        Counted are fine pixels, active fine pixels, and the MACs with the mask and with everything high, of the
        network and of its adaptive region.
        """
        shape = tuple(images.shape)
        if shape not in self.work:
            self.work[shape] = layer_work(self.net, images)
        inside = {decision.node for decision in self.net.plan.chosen("adapt", "keep")}
        layers, lattice, counts = self.work[shape], self.fast.lattice, []
        levels = self.fast.levels
        if layers is None or shape not in self.of_mask:
            report = self.net.macs(images, mask=self.mask)
            self.of_mask[shape] = report.of_mask
            counts = [(e.layer, e.mask, e.high) for e in report.layers if e.layer not in MASK_LAYERS]
        if layers is not None:
            size, device = lattice.whole_size, lattice.levels.device
            high = self.net.geometry.uniform(0, lattice.batch, size, device)
            counts = [(entry.layer, entry.on(lattice), entry.on(high)) for entry in layers]
        of_mask = self.of_mask[shape]
        return {
            "active": int((levels == 0).sum()),
            "pixels": levels.numel(),
            "macs": of_mask + sum(mask for _, mask, _ in counts),
            "macs_high": sum(high for *_, high in counts),
            "region": of_mask + sum(mask for name, mask, _ in counts if name in inside),
            "region_high": sum(high for name, _, high in counts if name in inside),
        }


def _work(counts: Counts, figures: Figures) -> dict[str, Any]:
    region_high = counts["region_high"]
    return {
        "active_fraction": counts["active"] / counts["pixels"],
        "macs": counts["macs"] / counts["images"],
        "macs_of_high": counts["macs"] / counts["macs_high"],
        "region_of_high": counts["region"] / region_high if region_high else 1.0,
    }


def compare(
    nets: Sequence[AdaptiveModel], source: Source, masks: Sequence[object], device: torch.device
) -> Comparison:
    """Return for each network the sides dense high, the masks (default: its own), dense low.

    Rows have the `mask`, the `output_stride`, and the `active_fraction` of the fine maps. `macs_of_high` is relative
    to everything high; `region_of_high` is the same for the adaptive region alone, whose work the mask controls.
    """
    sides = [side for net in nets for side in _sides(net, masks, device)]
    words = str(nets[0].normalisation or "")
    return Comparison(source, sides, _columns, "mask", has_classes=True, normalisation=words)


def _sides(net: AdaptiveModel, masks: Sequence[object], device: torch.device) -> Iterator[Side]:
    """Yield the sides of one network, with copies of masks, which move to the device and stop training."""
    chosen = [
        copy.deepcopy(resolve_mask(mask)).eval().to(device) for mask in (HIGH, *(masks or (net.mask,)), LOW)
    ]
    middle = [mask for mask in chosen if mask.spec() not in (HIGH, LOW)]
    net, work = copy.deepcopy(net).to(device).eval(), dict[tuple[int, ...], tuple[LayerWork, ...] | None]()
    fast, pair = net.optimize(), net.plan.output_stride
    for mask in (chosen[0], *middle, chosen[-1]):
        run, spec = Masked(net, fast, mask, work), mask.spec() or "a function"
        anchor = spec in (HIGH, LOW)
        yield Side(
            f"dense OS {pair[spec == LOW]}" if anchor else f"{spec} {pair[0]}->{pair[1]}",
            run,
            run.count,
            about={"mask": spec, "output_stride": pair},
            summary=_work,
            anchor=anchor,
            curve="dense networks" if anchor else "",
            is_target=spec == HIGH,
        )


def _columns(report: Any) -> Iterator[Column[Row]]:
    high = {row.get("output_stride"): row for row in reversed(report.rows) if row.anchor}

    def whole(row: Row) -> Row:
        reference: Row = high.get(row.get("output_stride"), report.rows[0])
        return reference

    yield Column("mask", "mask", False)
    yield Column("output stride", "output_stride", False, strides_in_words)
    if report.fidelity:
        yield Column("divergence", "divergence", form=".4f")
    if report.fidelity == "values":
        yield Column("relative error", "relative_error", form=percent)
    else:
        accuracy, pixels = accuracy_columns("agreement" if report.fidelity else "pixel acc.")
        edges = (
            Column[Row]("boundary", "boundary_iou", form=percent),
            Column[Row]("trimap", "trimap_iou", form=percent),
        )
        balanced = Column[Row]("balanced", "balanced_fidelity", form=percent)
        yield from (pixels, balanced, accuracy, *edges) if report.fidelity else (accuracy, *edges, pixels)
    yield Column("active", "active_fraction", form=".3f")
    yield from macs_columns("high", whole)
    yield Column("region", "region_of_high", form=".2f")
    yield from time_columns("high", whole)
