"""Sides of a network with a sampled input: its sampler, uniform sampling, and the network on the whole image."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from rich.text import Text
from torch import Tensor, nn

from cadsurgery.data import SegmentationData
from cadsurgery.data.networks import source_of
from cadsurgery.masks import labelled
from cadsurgery.methods.resampling import ResampledModel, UniformSampler, resample
from cadsurgery.methods.side import (
    Comparison,
    ConversionRequest,
    Counts,
    Figures,
    MethodConversion,
    MethodSides,
    Side,
    Timed,
    mean_work,
)
from cadsurgery.support.divergence import maps_of, relative_difference, resize
from cadsurgery.support.fields import Reader, read_size, read_whole
from cadsurgery.support.rows import Row, accuracy_columns, macs_columns, percent, time_columns
from cadsurgery.support.tables import Column

WHOLE = "the whole image"


# -- evaluating ----------------------------------------------------------------------------------------


def compare(net: ResampledModel, data: SegmentationData, thresholds: Sequence[Any] = ()) -> Comparison:
    """Return the sides: the network's own sampler, uniform sampling at the same size, and the whole image.

    Rows have `of_targets`, the mean IoU of the classes whose boundaries matter (None if the data have none of them),
    and `macs_of_sampler`, which is part of `macs`.
    """
    fast, options = net.optimize(), net.sampler.options
    uniform = copy.deepcopy(net)
    uniform.location_sampler = UniformSampler(options)
    of_uniform = copy.copy(fast)
    of_uniform._modules = {**fast._modules, "location_sampler": uniform.sampler}
    chosen = range(len(data.classes)) if options.targets is None else options.targets
    targets = [place for place in chosen if place < len(data.classes)]

    def work(counts: Counts, figures: Figures) -> dict[str, Any]:
        of_targets = [value for place in targets if (value := figures["iou"][place]) is not None]
        mean = sum(of_targets) / len(of_targets) if of_targets else None
        return {**mean_work(counts, figures), "of_targets": mean}

    def side(name: str, counted: ResampledModel, run: nn.Module) -> Side:
        def count(images: Tensor) -> Counts:
            macs = counted.macs(images)
            if name == WHOLE:
                return {"macs": macs.original, "macs_of_sampler": 0}
            return {"macs": macs.total, "macs_of_sampler": macs.sampler}

        return Side(name, lambda x: maps_of(run(x))[-1], count, summary=work, anchor=name == WHOLE)

    sides = [side(net.sampler.spec(), net, fast)]
    if not isinstance(net.sampler, UniformSampler):
        sides.append(side("uniform", uniform, of_uniform))
    return Comparison(
        source_of(net),
        [*sides, side(WHOLE, net, fast.network)],
        _columns,
        "sampler",
        {"miou": "mean IoU of all classes (dots)", "of_targets": "of the targets (triangles)"},
        f" sampled at {'x'.join(map(str, net.size))}",
        more={"size": net.size, "targets": tuple(data.classes[place] for place in targets)},
    )


def _columns(report: Any) -> Iterator[Column[Row]]:
    whole = next(row for row in report.rows if row.anchor)
    yield Column("sampled by", "sampler", False)
    accuracy, *others = accuracy_columns()
    yield from (accuracy, Column("targets", "of_targets", form=percent), *others)
    yield from macs_columns("given", lambda row: whole, ".3f")
    yield from time_columns("given", lambda row: whole)


# -- timing --------------------------------------------------------------------------------------------


def time(net: ResampledModel, images: Tensor, fractions: Sequence[float]) -> Timed:
    """Return the sides: the network on the whole image, and on the sampled image."""
    fast, counted = net.optimize(), net.macs(images)
    sides = [
        Side(f"{WHOLE}, optimised", fast.network, counted.original, anchor=True),
        Side(f"sampled by {net.sampler.spec()}", fast, counted.total),
    ]
    return Timed(sides, counted.not_counted)


# -- converting ----------------------------------------------------------------------------------------


def convert(request: ConversionRequest) -> MethodConversion:
    """Put a sampler before the network. Sampled uniformly at the image's size, it is compared with the original."""
    before, batch = request.before, request.batch(request.source)
    net = resample(before, **{"targets": None, **request.options})
    request.step("verifying")
    same = resample(before, "uniform", (batch.shape[2], batch.shape[3]), example_input=batch)
    with torch.inference_mode():
        output, expected = (maps_of(network(batch))[0] for network in (same, before))
        expected = resize(expected, batch.shape[2:])
    error = relative_difference(output, expected)
    nothing = torch.zeros(batch.shape[0], *batch.shape[2:], dtype=torch.int64, device=batch.device)
    with labelled(nothing):  # for a sampler that needs labels
        counted = net.macs(batch)
    sides = [
        Side(WHOLE, before, counted.original),
        Side(f"sampled by {net.sampler.spec()}", net, counted.total),
        Side("sampled, net.optimize()", net.optimize(), counted.total),
    ]
    verified = f"verified: uniform at the image's size it is the original (relative error {error:.1e})"
    lines = [Text(verified, style="green")]
    if net.plan.sampler == "learned":
        untrained = "the sampler is new: train it with cadsurgery finetune --set objective=locations"
        lines.append(Text(untrained, style="yellow"))
    more = {"error": error, "not_counted": counted.not_counted}
    return MethodConversion(net, batch, sides, more, Text(str(net.plan)), lines)


def run(net: ResampledModel, batch: Tensor, milliseconds: float) -> tuple[Any, dict[str, Any]]:
    """Return the output, and the size of the sampled image."""
    return net(batch), {"sampled": "x".join(map(str, net.size))}


_SETTINGS: dict[str, Reader] = {
    **{"sampler": str, "size": read_size, "grid": int, "smoothness": float},
    **{"targets": read_whole, "ignore": int, "share": float, "mode": str},
}
KIND: MethodSides = MethodSides(
    *(ResampledModel, "whose input is sampled", convert, compare, time, run, _SETTINGS),
    renamed={"sample_size": "size", "sample_grid": "grid"},
)
