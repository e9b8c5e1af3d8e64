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
from cadsurgery.methods.side import Comparison, Counts, Figures, Side
from cadsurgery.network.macs import MASK_LAYERS, LayerWork, MacReport, layer_work
from cadsurgery.network.model import AdaptiveModel
from cadsurgery.support.rows import (
    Row,
    accuracy_columns,
    number,
    percent,
    quality_column,
    ratio,
    strides_in_words,
)
from cadsurgery.support.tables import Column

HIGH, LOW = "all", "none"


@dataclass(frozen=True)
class Masked:
    """A converted network under one mask.

    Attributes:
        net: the converted network, for its plan and work.
        fast: its optimised copy, which is run.
        mask: the mask.
        work: work of layers by shape of the batch, shared by the masks of a network; None where it is not linear.
        reports: MACs of the last call that was counted by itself, by shape of the batch.
    """

    net: AdaptiveModel
    fast: AdaptiveModel
    mask: MaskProvider
    work: dict[tuple[int, ...], tuple[LayerWork, ...] | None]
    reports: dict[tuple[int, ...], MacReport] = field(default_factory=dict)

    def __call__(self, images: Tensor) -> Any:
        """Return the network's output under this mask."""
        with torch.inference_mode():
            return self.fast(images, mask=self.mask)

    def count(self, images: Tensor) -> Counts:
        """Count for the previous call, on the same images.

        Counted are fine pixels, active fine pixels, and the MACs with the mask and with everything high, of the
        network and of its adaptive region; and the MACs of the network as given.
        """
        shape = tuple(images.shape)
        if shape not in self.work:
            self.work[shape] = layer_work(self.net, images)
        inside = {decision.node for decision in self.net.plan.chosen("adapt", "keep")}
        layers, lattice, levels = self.work[shape], self.fast.lattice, self.fast.levels
        if layers is None or shape not in self.reports:
            self.reports[shape] = self.net.macs(images, mask=self.mask)
        report = self.reports[shape]
        if layers is None:
            counts = [(e.layer, e.mask, e.high) for e in report.layers if e.layer not in MASK_LAYERS]
        else:
            size, device = lattice.whole_size, lattice.levels.device
            high = self.net.geometry.uniform(0, lattice.batch, size, device)
            counts = [(entry.layer, entry.on(lattice), entry.on(high)) for entry in layers]
        return {
            "active": int((levels == 0).sum()),
            "pixels": levels.numel(),
            "macs": report.of_mask + sum(mask for _, mask, _ in counts),
            "macs_high": sum(high for *_, high in counts),
            "macs_given": report.given or 0,
            "region": report.of_mask + sum(mask for name, mask, _ in counts if name in inside),
            "region_high": sum(high for name, _, high in counts if name in inside),
        }


def _work(counts: Counts, figures: Figures) -> dict[str, Any]:
    region_high = counts["region_high"]
    return {
        "active_fraction": counts["active"] / counts["pixels"],
        "macs": counts["macs"] / counts["images"],
        "macs_of_given": counts["macs"] / counts["macs_given"] if counts["macs_given"] else None,
        "macs_of_high": counts["macs"] / counts["macs_high"],
        "region_of_high": counts["region"] / region_high if region_high else 1.0,
    }


def compare(
    nets: Sequence[AdaptiveModel], source: Source, masks: Sequence[object], device: torch.device
) -> Comparison:
    """Return for each network the sides dense high, the masks (default: its own), dense low.

    Rows have the `mask` with all its options, the mask as `typed`, the `output_stride`, and the `active_fraction` of
    the fine maps; `is_given` marks the network as given. `macs_of_given` is relative to the network as given (None if
    its MACs are unknown), `macs_of_high` to everything high; `region_of_high` is the same for the adaptive region
    alone, whose work the mask controls.
    """
    sides = [side for net in nets for side in _sides(net, masks, device)]
    words = str(nets[0].normalisation or "")
    return Comparison(source, sides, _columns, "mask", has_classes=True, normalisation=words)


def _sides(net: AdaptiveModel, masks: Sequence[object], device: torch.device) -> Iterator[Side]:
    """Yield the sides of one network, with copies of masks, which move to the device and stop training."""
    middle = [mask for mask in masks or (net.mask,) if resolve_mask(mask).spec() not in (HIGH, LOW)]
    net, work = copy.deepcopy(net).to(device).eval(), dict[tuple[int, ...], tuple[LayerWork, ...] | None]()
    fast, plan = net.optimize(), net.plan
    (high, low), filled = plan.output_stride, _is_filled(net)
    for asked in (HIGH, *middle, LOW):
        mask = copy.deepcopy(resolve_mask(asked)).eval().to(device)
        run, spec = Masked(net, fast, mask, work), mask.spec() or "a function"
        typed = asked if isinstance(asked, str) else spec
        anchor, own = spec in (HIGH, LOW), {HIGH: 0, LOW: plan.max_level}.get(spec)
        dense = anchor and not (spec == LOW and filled)
        name = f"{typed} {high}->{low}"
        if anchor:
            name = f"dense OS {high if spec == HIGH else low}" if dense else f"{name}, {net.geometry.fill}"
        yield Side(
            name,
            run,
            run.count,
            about={
                "mask": spec,
                "typed": typed,
                "output_stride": plan.output_stride,
                "is_given": own is not None and own == plan.identity_level,
            },
            summary=_work,
            anchor=anchor,
            curve="dense networks" if dense else "",
            is_target=spec == HIGH,
        )


def _is_filled(net: AdaptiveModel) -> bool:
    """True if everything low is not the dense network at the low output stride.

    Maps that leave the region at the fine size are filled between their samples, and the operations behind the region
    read the filled maps. A map that the network only returns stays the dense network's with a linear fill: it is
    interpolated between the same samples.
    """
    leaving = {d.node for d in net.plan.chosen("adapt", "keep") if d.leaves == "fine" and d.stages[1] > 0}
    if net.geometry.fill == "linear":
        leaving -= {name for name, _ in net.plan.outputs}
    return bool(leaving)


def _columns(report: Any) -> Iterator[Column[Row]]:
    times = {row.output_stride: row.milliseconds for row in report.rows if row.get("is_given")}
    first = report.rows[0]

    def macs_of_given(row: Row) -> str:
        if "macs_of_given" not in row.values:  # a side of the user
            return ratio(row.macs * (first.macs_of_given or 0), first.macs)
        return number(row.macs_of_given, ".2f")

    def typed_name(row: Row) -> str:
        return f"{row.get('typed', row.label)}{' (as given)' if row.get('is_given') else ''}"

    def time_of_given(row: Row) -> str:
        # The network as given is the same at every pair; sides of the user have no pair.
        own = times.get(row.get("output_stride"), next(iter(times.values()), None))
        return ratio(row.milliseconds, own)

    yield Column("mask", typed_name, False)
    yield Column("output stride", "output_stride", False, strides_in_words)
    if report.fidelity:
        yield Column("divergence", "divergence", form=".4f")
    if report.fidelity == "values":
        yield quality_column("relative error", "relative_error")
    else:
        accuracy, pixels = accuracy_columns("agreement" if report.fidelity else "pixel acc.")
        edges = (
            Column[Row]("boundary", "boundary_iou", form=percent),
            Column[Row]("trimap", "trimap_iou", form=percent),
        )
        balanced = quality_column("balanced", "balanced_fidelity")
        yield from (pixels, balanced, accuracy, *edges) if report.fidelity else (accuracy, *edges, pixels)
    yield Column("active", "active_fraction", form=".3f")
    yield Column("MACs", "macs", form=".3e")
    yield Column("of given", macs_of_given)
    yield Column("ms", "milliseconds", form=".0f")
    yield Column("of given", time_of_given)
    yield Column("in the region", "region_of_high", form=".2f")
