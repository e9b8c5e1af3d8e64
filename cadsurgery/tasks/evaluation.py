"""Evaluate sides by accuracy on labelled images, or by fidelity to the dense network, against work and time."""

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

from cadsurgery.data import Samples, SegmentationData, as_data, open_data, sample_of
from cadsurgery.data.images import normalise
from cadsurgery.data.networks import Source
from cadsurgery.data.samples import pictures_of
from cadsurgery.masks import labelled, resolve_mask
from cadsurgery.methods.registry import need_kind
from cadsurgery.methods.side import Comparison, Metrics, Side, time_sides
from cadsurgery.support.divergence import KINDS, Kind, class_scores, resize
from cadsurgery.support.errors import CadError, InvalidInput, check_name, describe_error
from cadsurgery.support.launcher import world
from cadsurgery.support.processes import gather, own_device, shard
from cadsurgery.support.progress import Step, silent, within
from cadsurgery.support.rows import Row, percent, plain
from cadsurgery.support.tables import Column, table
from cadsurgery.tasks.for_each import Failure, Failures, each
from cadsurgery.tasks.open import Strides, at_strides, open_any, provenance, read_by
from cadsurgery.tasks.report import COLOURS, MeasuredReport, against_macs, check_outputs, panels
from cadsurgery.tasks.segmentation.fidelity import FidelityMetrics
from cadsurgery.tasks.segmentation.metrics import SegmentationMetrics
from cadsurgery.tasks.sides import masks as of_masks


def evaluate(
    network: str | nn.Module,
    data: str | Samples,
    masks: Sequence[object] = (),
    *,
    output_stride: Strides = (),
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
    bands: Sequence[int] = (),
    step: Step = silent,
    trust: bool = False,
) -> EvaluationReport:
    """Evaluate a network by its sides: accuracy, multiply-accumulates and time of each, on the same images.

    The sides depend on the network. With masks: every mask at every pair of output strides, and both dense networks
    of each pair. A network of another method has the sides of its method. Sides of the user follow.

    Without labels, outputs are compared with the output of the dense network at the high output stride, which stands
    for the labels, see `FidelityMetrics`; any outputs with maps are possible.

    Each image is read once, and all sides run on it, with `net.optimize()`. MACs are exact for every image. Under
    `torchrun` or `accelerate launch` each process takes its share of the images. All processes return the same
    figures; the first one measures times and writes files.

    Args:
        network: a converted network or file, a network by name or `module:function`, or a module to convert.
        data: images with or without labels: a spec, see `open_data`, or data of your own, see
            `cadsurgery.data.samples.Samples`.
        masks: anything `adaptify` accepts; default: the converted network's own mask, or `"edges"`.
        output_stride: a pair (high, low), or several; default: the converted network's, or that of `adaptify`.
        options: further options of `adaptify`; a converted network keeps its own.
        weights: weights of a network by name; see `build_model`.
        split: split of data given by spec.
        limit: use only the first images, up to this number.
        batch: maximum number of images per call; consecutive images of the same size are combined.
        rounds: timing rounds on the first image, all sides in turn; 0 for none.
        kind: kind of the outputs, without labels: `classes` or `values`; `auto` decides by the first output, see
            `cadsurgery.support.divergence.kind_of`.
        device: "cpu" or "cuda".
        output: JSON file to write.
        picture: PNG to draw: accuracy against work, and against time if it was measured.
        thresholds: confidence thresholds for a network with exits; each is one number, or one for each exit but the
            last; default: its own.
        sides: sides of the user, see `cadsurgery.methods.side.Side`; they get the same images as the network.
        bands: which bands of the images the network reads, counted from 1, in their order; default: those of the data,
            of the network, or all.
        step: progress callback.
        trust: run code that a converted file names; see `cadsurgery.load`.

    Raises:
        InvalidInput: the network does not return a map of scores, or has another number of classes than the data;
            without labels, it returns no maps, or a mask needs labels; or an option is out of range.
        CadError: no image could be used (the error of the first one); or a name, file or option is refused.
    """
    _check_options(limit, batch, rounds, kind, output, picture)
    torch_device = own_device(device)
    for mask in masks:
        resolve_mask(mask)  # a typo should not wait for the network to be built
    samples = (open_data(data, split, bands=bands) if isinstance(data, str) else as_data(data)).first(limit)
    opened: nn.Module | None = open_any(network, trust)
    pictures = pictures_of(samples)
    if opened is not None:
        read_by(opened, bands, (options or {}).get("normalisation"), pictures)
        compared = _sides_of(opened, samples, bool(masks or output_stride), thresholds, torch_device)
    else:
        _refuse_thresholds(thresholds)
        step("building and converting")
        nets, source = at_strides(
            *(network, output_stride, options or {}),
            weights=weights,
            bands=bands,
            pictures=pictures,
            trust=trust,
        )
        opened, compared = nets[0], of_masks.compare(nets, source, masks, torch_device)
    compared = replace(compared, sides=[*compared.sides, *sides])
    samples = _with_classes(samples.read_for(compared.source), compared, torch_device)
    judge = _Judge(compared, samples, kind, torch_device)
    failed = judge.run(batch, step)
    measured = _measured(judge, failed, rounds, step)
    report = EvaluationReport(batch=batch, **measured, **provenance(network, compared.source, torch_device))
    if world().is_main:
        report.write(output, picture)
    return report


def _refuse_thresholds(thresholds: Sequence[Any]) -> None:
    if thresholds:
        raise InvalidInput(
            "thresholds belong to networks with exits, and this network has none.",
            next="leave them out, or give a network that stops where it is confident.",
        )


def _measured(judge: _Judge, failed: Sequence[Failure], rounds: int, step: Step) -> dict[str, Any]:
    """Return the fields of a report that come from the run of all sides, of all processes together."""
    compared, samples = judge.compared, judge.data
    tallies, first = judge.gather(failed)
    fidelity = [tally.metrics.kind for tally in tallies if isinstance(tally.metrics, FidelityMetrics)]
    return {
        "data": samples.name,
        "split": samples.split,
        "fidelity": fidelity[0] if fidelity else None,
        "images": int(tallies[0].counts["images"]),
        "image": tuple(first[0].shape[1:]),
        "rounds": rounds,
        "processes": world().size,
        "normalisation": compared.normalisation,
        "rows": _rows(compared, tallies, samples.classes, first, rounds, step),
        "failed": tuple(failed),
        "compared": replace(compared, sides=()),  # a report keeps no networks
    }


def _check_options(
    limit: int | None,
    batch: int,
    rounds: int,
    kind: str,
    output: Path | None,
    picture: Path | None,
) -> None:
    if (limit is not None and limit < 1) or batch < 1 or rounds < 0:
        raise InvalidInput(
            f"limit={limit}, batch={batch}, rounds={rounds} leave nothing to do.",
            next="give at least 1 image, 1 image a call and 0 rounds.",
        )
    check_name("kind of output", kind, KINDS)
    check_outputs(output, picture=picture)


def _rows(
    compared: Comparison,
    tallies: Sequence[Tally],
    classes: Sequence[str],
    first: tuple[Tensor, Tensor | None],
    rounds: int,
    step: Step,
) -> tuple[Row, ...]:
    """Return the rows of all sides; the first process times them on the first image with its labels, if any."""
    rows = [
        side.row(tally.values(side, classes), compared.key)
        for side, tally in zip(compared.sides, tallies, strict=True)
    ]
    if rounds and world().is_main:
        with _labelled(first[1]):
            rows = time_sides(compared.sides, rows, first[0], rounds, step=within(step, "measuring"))
    return tuple(rows)


def _sides_of(
    made: Any, data: SegmentationData, has_masks: bool, thresholds: Sequence[Any], device: torch.device
) -> Comparison:
    """Return the sides of a network made by a method of `cadsurgery.methods`."""
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
    return kind.compare(copy.deepcopy(made).eval().to(device), data, thresholds)


def _with_classes(data: SegmentationData, compared: Comparison, device: torch.device) -> SegmentationData:
    """Return data with a known number of classes: that of the network's outputs for the first image that it takes.

    Raises:
        CadError: it takes none; the error of the first one.
    """
    first: CadError | None = None
    for index in range(len(data) if data.table is None else 0):
        image = torch.empty(0, 0, 0)
        try:  # images that cannot be used are reported where they are judged
            with torch.inference_mode():
                image, labels = sample_of(data, index)
                batch = normalise(image[None], compared.source).to(device)
                with labelled(labels[None].to(device)):
                    return data.with_outputs(class_scores(compared.sides[0].call(batch)).shape[1])
        except (CadError, RuntimeError) as error:
            first = first or refuse_images(error, image[None])
    if first is not None:
        raise first
    return data


# -- running all sides ---------------------------------------------------------------------------------


@dataclass
class Tally:
    """Sums of one side over images; tallies of shares of the images merge exactly."""

    metrics: Metrics
    counts: Counter[str] = field(default_factory=Counter)

    def merge(self, other: Tally) -> None:
        """Add the sums of another tally."""
        self.metrics.merge(other.metrics)
        self.counts.update(other.counts)

    def values(self, side: Side, classes: Sequence[str]) -> dict[str, Any]:
        """Return the fields of the side's row."""
        figures = self.metrics.compute()
        fields = {"divergence": None, "relative_error": None, **figures, **side.summary(self.counts, figures)}
        if (shares := fields.get("iou")) is not None:
            names = classes or [f"class {place}" for place in range(len(shares))]
            fields["iou"] = dict(zip(names, shares, strict=True))
        return {name: value for name, value in fields.items() if name != "pixels"}


class _Judge:
    """Runs all sides on images.

    Attributes:
        tallies: sums of each side over this process's images.
        first: position of this process's first usable image; the number of all images if there is none.
    """

    def __init__(
        self, compared: Comparison, data: SegmentationData, kind: Kind, device: torch.device
    ) -> None:
        self.compared, self.data, self._device, self.first = compared, data, device, len(data)
        usual: Callable[[], Metrics] = partial(FidelityMetrics, kind)
        if data.is_labelled:
            usual = partial(Accuracy, len(data.classes), data.name)
        self.tallies = [Tally((side.metrics or usual)()) for side in compared.sides]

    def run(self, size: int, step: Step) -> list[Failure]:
        """Judge this process's share of the images; return the failures of all processes."""
        failures, done, share = Failures("image"), 0, len(shard(range(len(self.data))))
        step(f"image 1 of {share}", 0, share)
        for positions, images, labels in _batches(self.data, size, failures):
            before = done + len(failures.noted)
            step(f"image {before + len(images)} of {share}", before, share)
            if (refusal := self._judge(images, labels)) is not None:
                for position in positions:
                    failures.at(position, self.data.names[position])
                    failures.note(refusal)
                continue
            self.first = min(self.first, *positions)
            done += len(images)
        return failures.gather(self._device)

    def _judge(self, images: Tensor, labels: Tensor) -> CadError | None:
        """Add a batch to the tallies of all sides; return the error if the network does not take its images."""
        known = labels.to(self._device) if self.data.is_labelled else None
        truth, extent = known, (images.shape[2], images.shape[3])
        with torch.inference_mode(), _labelled(known):
            try:
                images = _prepare(images, self.compared.source, self._device)
                output = self.compared.sides[0].call(images)
            except (CadError, RuntimeError) as error:  # networks refuse image sizes with errors of their own
                return refuse_images(error, images)
            for place, (side, tally) in enumerate(zip(self.compared.sides, self.tallies, strict=True)):
                output = side.call(images) if place else output
                truth = output if known is None and side.is_target else truth
                tally.metrics.update(output, truth, extent)
                tally.counts.update({"images": len(images), **side.count(images)})
        return None

    def gather(self, failed: Sequence[Failure]) -> tuple[list[Tally], tuple[Tensor, Tensor | None]]:
        """Return the tallies of all sides over all processes, and the first image with its labels, if it has any.

        Raises:
            CadError: no image could be used.
        """
        merged, *others = gather(self.tallies, self._device)
        for tallies in others:
            for whole, part in zip(merged, tallies, strict=True):
                whole.merge(part)
        firsts = gather(self.first, self._device)
        if not merged[0].counts["images"]:
            raise CadError.from_dict(failed[0])
        image, labels = sample_of(self.data, min(firsts))
        known = labels[None].to(self._device) if self.data.is_labelled else None
        return merged, (_prepare(image[None], self.compared.source, self._device), known)


def _prepare(images: Tensor, source: Source, device: torch.device) -> Tensor:
    return normalise(images, source).to(device).contiguous(memory_format=torch.channels_last)


def _labelled(labels: Tensor | None) -> AbstractContextManager[None]:
    return nullcontext() if labels is None else labelled(labels)


def _batches(
    data: SegmentationData, size: int, failures: Failures
) -> Iterator[tuple[tuple[int, ...], Tensor, Tensor]]:
    """Yield positions, images (B, C, H, W) and labels (B, H, W) of this process's share.

    Unusable images are recorded as failures and left out.
    """
    items = each(range(len(data)), partial(sample_of, data), failures, name=data.names.__getitem__)
    for _, alike in groupby(items, key=lambda item: item[1][0].shape):
        while batch := list(islice(alike, size)):
            positions, pairs = zip(*batch, strict=True)
            images, labels = zip(*pairs, strict=True)
            yield positions, torch.stack(images), torch.stack(labels)


def refuse_images(error: Exception, images: Tensor) -> CadError:
    """Return the error for images on which a network does not run."""
    if isinstance(error, CadError):
        return error
    return InvalidInput(
        f"the network does not take an image of {images.shape[2]}x{images.shape[3]} pixels.",
        why=describe_error(error),
        next="resize or crop the images to a size that it takes, e.g. multiples of its strides (run: --size).",
    )


class Accuracy:
    """`SegmentationMetrics` of class scores, at the size of the labels."""

    def __init__(self, classes: int, data: str) -> None:
        self.metrics, self.data = SegmentationMetrics(classes), data

    def update(self, output: Any, truth: Tensor, size: tuple[int, int]) -> None:
        """Add the scores of a batch with labels (B, H, W)."""
        scores, classes = class_scores(output), self.metrics.classes
        if scores.shape[1] != classes:
            raise InvalidInput(
                f"the network has {scores.shape[1]} classes and data {self.data} has {classes}.",
                next="evaluate a network trained on these classes, or open the data with its classes.",
            )
        self.metrics.update(resize(scores.float(), truth.shape[1:]).argmax(1), truth)

    def merge(self, other: Accuracy) -> None:
        """Add the sums of another object."""
        self.metrics.merge(other.metrics)

    def compute(self) -> dict[str, Any]:
        """Return the figures of `SegmentationMetrics`."""
        return self.metrics.compute()


# -- report --------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class EvaluationReport(MeasuredReport):
    """Accuracy against work: what was evaluated, on which data, and a row for each side.

    A row has the side's name and the fields that identify it (see `cadsurgery.tasks.sides`). Over all images it has

    - `anchor`: True if other sides are compared with it;
    - `miou`: mean IoU, 0..1, like all accuracies here; None without labels for maps that are not class scores;
    - `iou`: IoU of each class by name; None for a class that is in neither predictions nor labels;
    - `pixel_accuracy`: share of correct pixels; `boundary_iou` and `trimap_iou`: see `SegmentationMetrics`;
    - `balanced_fidelity`: without labels, mean IoU over the classes of the dense network; see `balanced_fidelity` of
      `cadsurgery.tasks.segmentation.fidelity`;
    - `divergence`: without labels, mean over pixels and images; see `cadsurgery.support.divergence.divergence`;
    - `relative_error`: without labels, for maps that are not class scores; see `FidelityMetrics`;
    - `macs`: multiply-accumulates per image, mean over images.

    Without labels, accuracies are the agreement with the dense network at the high output stride.

    Attributes:
        split: split of the data.
        fidelity: None with labels; without labels, the kind of the outputs: `classes` or `values`.
        images: number of images evaluated.
        batch: images per call.
        image: (C, H, W) of the image that was timed.
        processes: number of processes.
        rows: one row per side, in order.
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
        """Return plain values, for `--json`."""
        values = super().to_dict()
        del values["compared"]
        return {**values, **plain(self.compared.more)}

    def parts(self) -> Iterator[RenderableType]:
        """Yield the parts of any measured report, and the number of failed images."""
        yield from super().parts()
        if self.failed:
            yield Text(f"{self.images} images done, {len(self.failed)} failed", style="red")

    def subject(self) -> str:
        """Describe data, device, and what was timed."""
        against = "; compared with the dense network of the high output stride" if self.fidelity else ""
        seen = f"{self.images} images{self.compared.images_in_words}"
        return (
            f"{self.data}, split {self.split}, {seen}, on {self.device}{self.timed(self.image[1:])}{against}"
        )

    def tables(self) -> Iterator[Table]:
        """Yield the table of all sides, and the table of classes."""
        yield table(self.rows, self.compared.columns(self), style=lambda row: "dim" if row.anchor else "")
        if self.fidelity or not self.compared.has_classes:
            return

        def iou(row: Row) -> Callable[[str], str]:
            return lambda name: percent(row.get("iou", {}).get(name))

        numbered = [Column(str(place), iou(row)) for place, row in enumerate(self.rows, 1)]
        classes: list[Column[str]] = [Column("class", str, False), *numbered]
        yield table(self.rows[0].iou, classes, "IoU of each class, columns as the rows above")

    def figure(self) -> Figure:
        """Draw accuracy against work and, if measured, time; `Comparison` and `Side` define the styles."""
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


_FIDELITY = {
    "classes": {"pixel_accuracy": "agreement", "balanced_fidelity": "balanced fidelity"},
    "values": {"relative_error": "relative error"},
}


def _draw(axis: Axes, rows: Sequence[Row], work: str, accuracy: str, marker: str) -> None:
    """Draw the points of rows: anchors black, others coloured; a curve is joined, single points are labelled."""
    known = [row for row in rows if row.get(accuracy) is not None]
    points = {id(row): (getattr(row, work), 100 * row.get(accuracy)) for row in known}
    curves = list(dict.fromkeys(row.curve or row.label for row in known if not row.anchor))
    widest = max((x for x, _ in points.values()), default=1)
    for curve in dict.fromkeys(row.curve or row.label for row in known):
        members = [row for row in known if (row.curve or row.label) == curve]
        colour = "#222222" if members[0].anchor else COLOURS[curves.index(curve) % len(COLOURS)]
        style = f"{'s' if members[0].anchor and marker == 'o' else marker}{'-' if members[0].curve else ''}"
        # A dense network that is part of two pairs of output strides is drawn and labelled once.
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
                break  # the legend has its name
            place, side = ((-6, 5), "right") if x > widest / 2 else ((6, 5), "left")
            place = (6, -12) if members[0].anchor else place
            side = "left" if members[0].anchor else side
            axis.annotate(label, (x, y), place, textcoords="offset points", ha=side, fontsize=8, color=colour)
