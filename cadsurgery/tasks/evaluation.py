"""Accuracy of sides on labelled images, or fidelity to the dense network on others, against work and time."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import groupby, islice
from pathlib import Path
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.console import RenderableType
from rich.table import Table
from rich.text import Text
from torch import Tensor, nn

from cadsurgery.data import SegmentationData, open_data
from cadsurgery.data.images import normalise
from cadsurgery.masks import labelled, resolve_mask
from cadsurgery.support.divergence import KINDS, Kind, resize
from cadsurgery.support.errors import CadError, InvalidInput, check_name, describe_error
from cadsurgery.support.processes import gather, own_device, shard, world
from cadsurgery.tasks.for_each import Failure, Failures, Step, each, silent
from cadsurgery.tasks.open import at_strides, open_any, provenance
from cadsurgery.tasks.report import (
    COLOURS,
    Column,
    MeasuredReport,
    Row,
    against_macs,
    check_outputs,
    panels,
    percent,
    plain,
    table,
)
from cadsurgery.tasks.segmentation.fidelity import FidelityMetrics
from cadsurgery.tasks.segmentation.metrics import SegmentationMetrics
from cadsurgery.tasks.side import Comparison, Metrics, Side, time_sides
from cadsurgery.tasks.sides import masks as of_masks
from cadsurgery.tasks.sides import need_kind


def evaluate(
    network: str | nn.Module,
    data: str | SegmentationData,
    masks: Sequence[object] = (),
    *,
    output_stride: Sequence[tuple[int, int] | None] = (),
    options: Mapping[str, Any] | None = None,
    weights: str = "auto",
    split: str = "test",
    limit: int | None = None,
    batch: int = 1,
    rounds: int = 3,
    kind: Kind = "auto",
    device: str = "cpu",
    output: Path | None = None,
    picture: Path | None = None,
    thresholds: Sequence[float | Sequence[float]] = (),
    sides: Sequence[Side] = (),
    step: Step = silent,
    trust: bool = False,
) -> EvaluationReport:
    """Evaluate a network by its sides: accuracy, multiply-accumulates and time of each, on the same images.

    Of a network with masks these are every mask at every pair of output strides, and both dense networks of each pair;
    of one with exits, every exit at every threshold; of one with gates, the dense network and the gates; of one whose
    input is sampled, its sampler, equal distances, and the whole image. Sides of your own stand behind them.

    Without labels the figures are fidelity: the output of the dense network of the high output stride for an image
    stands for its labels, see `FidelityMetrics`; the outputs may be anything that has maps.

    Each image is read once and all sides are run on it, with `net.optimize()`. MACs are exact for every image. Under
    `torchrun` or `accelerate launch` each process takes its share of the images; every process returns the same
    figures, the first one measures times and writes.

    Args:
        network: a converted network or file, a network by name or `module:function`, or a module to convert.
        data: images with or without labels, or their spec; see `open_data`.
        masks: anything `adaptify` takes; default: the converted network's own, or `"edges"`.
        output_stride: pairs (high, low); default: the converted network's, or that of `adaptify`.
        options: further ones for `adaptify`; a converted network keeps its own.
        weights: of a network by name; see `build_model`.
        split: of data by spec.
        limit: the first so many images only.
        batch: images in one call; those that follow one another and have one size.
        rounds: of timing on the first image, all sides in turn; 0 for none.
        kind: of the outputs, without labels: `classes` or `values`; `auto` tells by the first, see
            `cadsurgery.support.divergence.kind_of`.
        device: "cpu" or "cuda".
        output: JSON file to write.
        picture: PNG to draw: accuracy against work, and against time if it was measured.
        thresholds: of confidence, of a network with exits; each is one number, or one of each exit but the last;
            default: its own.
        sides: of your own, see `cadsurgery.tasks.side.Side`; they get the images that the network gets.
        step: called with what is being done.
        trust: run code that a converted file names; see `cadsurgery.load`.

    Raises:
        InvalidInput: the network's output is no map of scores, or of another number of classes than the data; without
            labels, it has no maps, or a mask asks for labels; an impossible option.
        CadError: not one image could be used (that image's error); or a name, file or option is refused.
    """
    _check(limit, batch, rounds)
    check_name("kind of output", kind, KINDS)
    check_outputs(output, picture=picture)
    where = own_device(device)
    for mask in masks:
        resolve_mask(mask)  # a typo should not wait for the network to be built
    samples = (open_data(data, split) if isinstance(data, str) else data).first(limit)
    if (made := open_any(network, trust)) is not None:
        compared = _sides_of(made, samples, bool(masks or output_stride), thresholds, where)
    elif thresholds:
        raise InvalidInput(
            "thresholds are of networks with exits, and this one has none.",
            next="convert it with cs.anytime.",
        )
    else:
        step("building and converting")
        nets, source = at_strides(network, output_stride, options or {}, weights=weights, trust=trust)
        compared = of_masks.compare(nets, source, masks, where)
    compared = replace(compared, sides=[*compared.sides, *sides])
    tallies, failed, first = _judge(compared, samples, batch, kind, where, step)
    rows = [
        side.row(tally.values(side, samples.classes), compared.key)
        for side, tally in zip(compared.sides, tallies, strict=True)
    ]
    if rounds and first is not None and world().is_main:
        step("measuring")
        with _labelled(first.labels):
            rows = time_sides(compared.sides, rows, first.images, rounds)
    fidelity = [tally.metrics.kind for tally in tallies if isinstance(tally.metrics, FidelityMetrics)]
    report = EvaluationReport(
        data=samples.name,
        split=samples.split,
        fidelity=fidelity[0] if fidelity else None,
        images=int(tallies[0].counts["images"]),
        batch=batch,
        image=tuple(first.images.shape[1:]) if first is not None else (),
        rounds=rounds,
        processes=world().size,
        normalisation=compared.normalisation,
        rows=tuple(rows),
        failed=tuple(failed),
        compared=replace(compared, sides=()),  # a report keeps no networks
        **provenance(network, compared.source, where),
    )
    if world().is_main:
        report.write(output, picture)
    return report


def _sides_of(
    made: Any, data: SegmentationData, has_masks: bool, thresholds: Sequence[Any], where: torch.device
) -> Comparison:
    """The sides of a network that a method made."""
    kind = need_kind(made)
    if has_masks or (thresholds and not kind.has_thresholds):
        others = "" if kind.has_thresholds else " and no thresholds"
        raise InvalidInput(
            f"a network {kind.words} has no masks{others}.",
            next=f"leave out masks{', ' if others else ' and '}output strides{others and ' and thresholds'}.",
        )
    if not data.is_labelled:
        raise InvalidInput(
            f"a network {kind.words} is evaluated on labels.",
            next="give labelled data, see cadsurgery eval --help.",
        )
    return kind.compare(copy.deepcopy(made).eval().to(where), data, thresholds)


# -- judging -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Batch:
    """Images (B, 3, H, W) as the network expects them, and their labels (B, H, W), if they have any."""

    images: Tensor
    labels: Tensor | None

    def first(self) -> _Batch:
        return _Batch(self.images[:1], None if self.labels is None else self.labels[:1])


@dataclass
class Tally:
    """Sums over the images that a side has seen, which those of shares of the images merge to exactly."""

    metrics: Metrics
    counts: Counter[str] = field(default_factory=Counter)

    def values(self, side: Side, classes: Sequence[str]) -> dict[str, Any]:
        """The fields of the side's row."""
        figures = self.metrics.compute()
        found = {"divergence": None, "relative_error": None, **figures, **side.summary(self.counts, figures)}
        if (shares := found.get("iou")) is not None:
            names = classes or [f"class {place}" for place in range(len(shares))]
            found["iou"] = dict(zip(names, shares, strict=True))
        return {name: value for name, value in found.items() if name != "pixels"}


def _judge(
    compared: Comparison,
    data: SegmentationData,
    size: int,
    kind: Kind,
    where: torch.device,
    step: Step,
) -> tuple[list[Tally], list[Failure], _Batch | None]:
    """The tallies of all sides over the images of all processes, the failures, and the first image of this process."""
    tallies = [Tally((side.metrics or partial(_metrics_of, data, kind))()) for side in compared.sides]
    failures, done, first = Failures("image"), 0, None
    for positions, images, labels in _batches(data, size, failures):
        step(f"{done + len(images)} of {len(shard(data.names))} images")
        images = normalise(images, compared.source).to(where).contiguous(memory_format=torch.channels_last)
        batch = _Batch(images, labels.to(where) if data.is_labelled else None)
        truth, extent = batch.labels, (images.shape[2], images.shape[3])
        with torch.inference_mode(), _labelled(batch.labels):
            try:
                output = compared.sides[0].call(images)
            except (
                CadError,
                RuntimeError,
            ) as error:  # whatever the network itself says of images of this size
                for position in positions:
                    failures.at(position, data.names[position])
                    failures.note(_not_taken(error, images))
                continue
            for place, (side, tally) in enumerate(zip(compared.sides, tallies, strict=True)):
                output = side.call(images) if place else output
                truth = output if batch.labels is None and side.is_target else truth
                tally.metrics.update(output, truth, extent)
                tally.counts.update({"images": len(images), **side.count(images)})
        first, done = first or batch.first(), done + len(images)
    merged = [_merge(parts) for parts in zip(*gather(tallies, where), strict=True)]
    failed = failures.gather(where)
    if not merged[0].counts["images"]:
        raise CadError.from_dict(failed[0])
    return merged, failed, first


def _labelled(labels: Tensor | None) -> AbstractContextManager[None]:
    return nullcontext() if labels is None else labelled(labels)


def _merge(parts: Sequence[Tally]) -> Tally:
    whole = copy.deepcopy(parts[0])
    for part in parts[1:]:
        whole.metrics.merge(part.metrics)
        whole.counts.update(part.counts)
    return whole


def _batches(
    data: SegmentationData, size: int, failures: Failures
) -> Iterator[tuple[tuple[int, ...], Tensor, Tensor]]:
    """Positions, images (B, 3, H, W) and labels (B, H, W) of this process's share; unusable ones are noted and left
    out."""
    items = each(range(len(data)), data.__getitem__, failures, name=data.names.__getitem__)
    for _, alike in groupby(items, key=lambda item: item[1][0].shape):
        while batch := list(islice(alike, size)):
            positions, pairs = zip(*batch, strict=True)
            images, labels = zip(*pairs, strict=True)
            yield positions, torch.stack(images), torch.stack(labels)


def _not_taken(error: Exception, images: Tensor) -> CadError:
    """The refusal of images that a network cannot be run on."""
    if isinstance(error, CadError):
        return error
    return InvalidInput(
        f"the network does not take an image of {images.shape[2]}x{images.shape[3]} pixels.",
        why=describe_error(error),
        next="resize or crop the images to sizes that it takes, e.g. multiples of its strides.",
    )


def _check(limit: int | None, batch: int, rounds: int) -> None:
    if (limit is not None and limit < 1) or batch < 1 or rounds < 0:
        raise InvalidInput(
            f"limit={limit}, batch={batch}, rounds={rounds} leave nothing to do.",
            next="give at least 1 image, 1 image a call and 0 rounds.",
        )


def _metrics_of(data: SegmentationData, kind: Kind) -> Metrics:
    return Accuracy(len(data.classes), data.name) if data.is_labelled else FidelityMetrics(kind)


class Accuracy:
    """`SegmentationMetrics` of class scores, at the size of the labels."""

    def __init__(self, classes: int, data: str) -> None:
        self.metrics, self.data = SegmentationMetrics(classes), data

    def update(self, output: Any, truth: Tensor, size: tuple[int, int]) -> None:
        """Add the scores of a batch, beside its labels (B, H, W)."""
        scores, classes = scores_of(output), self.metrics.classes
        if scores.shape[1] != classes:
            raise InvalidInput(
                f"the network has {scores.shape[1]} classes and data {self.data} has {classes}.",
                next="evaluate a network trained on these classes, or open the data with its classes.",
            )
        self.metrics.update(resize(scores.float(), truth.shape[1:]).argmax(1), truth)

    def merge(self, other: Accuracy) -> None:
        """Add what another one has seen."""
        self.metrics.merge(other.metrics)

    def compute(self) -> dict[str, Any]:
        """As of `SegmentationMetrics`."""
        return self.metrics.compute()


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


# -- report --------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class EvaluationReport(MeasuredReport):
    """Accuracy against work: what was evaluated, on what, and a row for each side.

    A row has the side's name and what tells it from the others (see `cadsurgery.tasks.sides`), and of all images

    - `anchor`: True if it is what the others are compared with;
    - `miou`: mean IoU, 0..1, like all accuracies here; None if nothing counted, and of maps that are no class scores;
    - `iou`: of each class by name; None for a class in neither predictions nor labels;
    - `pixel_accuracy`: share of right pixels; `boundary_iou` and `trimap_iou`: see `SegmentationMetrics`;
    - `divergence`: without labels, mean over pixels and images; see `cadsurgery.support.divergence.divergence`;
    - `relative_error`: without labels, of maps that are no class scores; see `FidelityMetrics`;
    - `macs`: multiply-accumulates of an image, mean over images.

    Without labels accuracies are agreement with what the dense network of the high output stride gives.

    Attributes:
        split: part of the data.
        fidelity: None with labels; without, what the outputs are: `classes` or `values`.
        images: how many counted.
        batch: images in one call.
        image: (3, H, W) of the image that was timed.
        processes: that shared the images.
        rows: in the order asked for.
        compared: how the sides are shown.
    """

    split: str
    fidelity: str | None
    images: int
    batch: int
    image: tuple[int, ...]
    processes: int
    rows: tuple[Row, ...]
    compared: Comparison

    def to_dict(self) -> dict[str, Any]:
        """As plain values, for `--json`."""
        values = super().to_dict()
        del values["compared"]
        return {**values, **plain(self.compared.more)}

    def parts(self) -> Iterator[RenderableType]:
        """As of every such report, and how many images could be used if not all."""
        yield from super().parts()
        if self.failed:
            yield Text(f"{self.images} images done, {len(self.failed)} failed", style="red")

    def subject(self) -> str:
        """Data, device, and what was timed."""
        size = "x".join(map(str, self.image[1:]))
        timed = f"; ms: {size}, best of {self.rounds} interleaved rounds" if self.rounds else ""
        against = "; compared with the dense network of the high output stride" if self.fidelity else ""
        seen = f"{self.images} images{self.compared.images_in_words}"
        return f"{self.data}, split {self.split}, {seen}, on {self.device}{timed}{against}"

    def tables(self) -> Iterator[Table]:
        """All sides, and the classes."""
        yield table(self.rows, self.compared.columns(self), style=lambda row: "dim" if row.anchor else "")
        if self.fidelity or not self.compared.has_classes:
            return

        def iou(row: Row) -> Callable[[str], str]:
            return lambda name: percent(row.get("iou", {}).get(name))

        numbered = [Column(str(place), iou(row)) for place, row in enumerate(self.rows, 1)]
        classes: list[Column[str]] = [Column("class", str, False), *numbered]
        yield table(self.rows[0].iou, classes, "IoU of each class, columns as the rows above")

    def figure(self) -> Figure:
        """Accuracy against work and, if it was measured, time; see `Comparison` and `Side` for what is drawn how."""
        drawn = dict(self.compared.accuracy)
        if self.fidelity:
            drawn = _FIDELITY[self.fidelity]
        work = {"macs": "MACs of one image", "milliseconds": "milliseconds"}
        if any(row.milliseconds is None for row in self.rows):
            del work["milliseconds"]
        figure, axes = panels(len(work), len(work), 8, 5)
        for axis, (field_, words) in zip(axes, work.items(), strict=True):
            for accuracy, marker in zip(drawn, "o^", strict=False):
                _draw(axis, self.rows, field_, accuracy, marker)
            axis.margins(x=0.15, y=0.15)
            axis.set_xlim(left=0)
            against_macs(axis, words, f"{', '.join(drawn.values())}, %")
        figure.suptitle(f"{self.model}, {self.images} images", fontsize=10)
        return figure


_FIDELITY = {"classes": {"pixel_accuracy": "agreement"}, "values": {"relative_error": "relative error"}}


def _draw(axis: Axes, rows: Sequence[Row], work: str, accuracy: str, marker: str) -> None:
    """The points of rows: anchors black, others coloured; those of a curve joined, the others each with its name."""
    known = [row for row in rows if row.get(accuracy) is not None]
    points = {id(row): (getattr(row, work), 100 * row.get(accuracy)) for row in known}
    curves = list(dict.fromkeys(row.curve or row.label for row in known if not row.anchor))
    widest = max((x for x, _ in points.values()), default=1)
    for curve in dict.fromkeys(row.curve or row.label for row in known):
        members = [row for row in known if (row.curve or row.label) == curve]
        colour = "#222222" if members[0].anchor else COLOURS[curves.index(curve) % len(COLOURS)]
        style = f"{'s' if members[0].anchor and marker == 'o' else marker}{'-' if members[0].curve else ''}"
        # The dense network of two pairs of output strides is one network: it is drawn and named once.
        named = {(row.label, round(points[id(row)][1], 3)): points[id(row)] for row in members}
        axis.plot(
            *zip(*sorted(named.values()), strict=True),
            style,
            color=colour,
            linewidth=1,
            label=members[0].curve or None,
        )
        for (label, _), (x, y) in named.items():
            if members[0].curve and not members[0].anchor:
                break  # its name stands in the legend
            place, side = ((-6, 5), "right") if x > widest / 2 else ((6, 5), "left")
            place = (6, -12) if members[0].anchor else place
            side = "left" if members[0].anchor else side
            axis.annotate(label, (x, y), place, textcoords="offset points", ha=side, fontsize=8, color=colour)
