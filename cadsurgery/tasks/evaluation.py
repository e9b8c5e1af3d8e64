"""Evaluate sides by accuracy on labelled images, or by fidelity to the dense network, against work and time."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import groupby, islice
from pathlib import Path
from typing import Any, NamedTuple

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.console import RenderableType
from rich.table import Table
from rich.text import Text
from torch import Tensor, nn

from cadsurgery.data import Samples, SegmentationData, as_data, open_data, sample_of
from cadsurgery.data.images import normalise
from cadsurgery.data.samples import pictures_of
from cadsurgery.masks import resolve_mask
from cadsurgery.methods.registry import need_kind
from cadsurgery.methods.side import Comparison, Side, time_sides
from cadsurgery.support.divergence import KINDS, Kind, class_scores
from cadsurgery.support.errors import CadError, InvalidInput, NotInstalled, check_name
from cadsurgery.support.progress import Step, silent, within
from cadsurgery.support.provenance import find_device
from cadsurgery.support.rows import Row, percent, plain
from cadsurgery.support.tables import Column, table
from cadsurgery.tasks.measuring import PictureBatch, Quality, Tally, as_labels, measure, refuse_images
from cadsurgery.tasks.open import Strides, at_strides, open_any, provenance, read_by
from cadsurgery.tasks.report import (
    COLOURS,
    MeasuredReport,
    against_macs,
    check_outputs,
    panels,
    spread_labels,
)
from cadsurgery.tasks.sides import masks as of_masks
from cadsurgery.tasks.workers import refuse_launchers, share


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
    workers: int = 1,
    step: Step = silent,
    trust: bool = False,
) -> EvaluationReport:
    """Evaluate a network by its sides: accuracy, multiply-accumulates and time of each, on the same images.

    The sides depend on the network. With masks: every mask at every pair of output strides, and both dense networks
    of each pair. A network of another method has the sides of its method. Sides of the user follow.

    Without labels, outputs are compared with the output of the dense network at the high output stride, which stands
    for the labels, see `cadsurgery.tasks.measuring.Quality`; any outputs with maps are possible.

    Each image is read once, and all sides run on it, with `net.optimize()`. MACs are exact for every image.

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
        workers: number of processes that share the images, with one thread each, or a GPU each; 1 for this process.
            Each opens network and data itself.
        step: progress callback.
        trust: run code that a converted file names; see `cadsurgery.load`.

    Raises:
        InvalidInput: the network does not return a map of scores, or has another number of classes than the data;
            without labels, it returns no maps, or a mask needs labels; or an option is out of range.
        CadError: no image could be used (the error of the first one); or a name, file or option is refused.
    """
    if (limit is not None and limit < 1) or min(batch, workers) < 1 or rounds < 0:
        raise InvalidInput(
            f"limit={limit}, batch={batch}, rounds={rounds}, workers={workers} leave nothing to do.",
            next="give at least 1 image, 1 image a call, 0 rounds and 1 process.",
        )
    check_name("kind of output", kind, KINDS)
    check_outputs(output, picture=picture)
    refuse_launchers("eval")
    how: dict[str, Any] = {"weights": weights, "bands": bands, "trust": trust}
    what = (network, data, masks, output_stride, options or {}, split, limit, thresholds, sides, device)
    work = partial(_open, *what, how, kind, batch)
    judge = work(step=step)
    places = range(len(judge.data))
    if workers > 1:
        step("starting processes", 0, len(places))
        size = batch * max(1, min(_BATCHES, len(places) // (workers * batch)))
        parts: Iterable[_JudgedPart] = share(iter(places), work, workers, judge.lost, size=size)
    else:
        parts = judge(places, step)
    measured = judge.measured(parts, rounds, step)
    report = EvaluationReport(
        batch=batch,
        processes=workers,
        **measured,
        **provenance(network, judge.compared.source, judge.device),
    )
    report.write(output, picture)
    return report


_BATCHES = 16  # that a process gets at a time, at most
Failure = dict[str, str]  # an error as plain values, with the image's name


def _open(
    network: str | nn.Module,
    data: str | Samples,
    masks: Sequence[object],
    output_stride: Strides,
    options: Mapping[str, Any],
    split: str,
    limit: int | None,
    thresholds: Sequence[float | Sequence[float]],
    sides: Sequence[Side],
    device_name: str,
    how: Mapping[str, Any],
    kind: Kind,
    batch: int,
    step: Step = silent,
) -> _Judge:
    """Open the network and the data, in this process or another one."""
    device, bands = find_device(device_name), how["bands"]
    for mask in masks:
        resolve_mask(mask)  # a typo should not wait for the network to be built
    samples = (open_data(data, split, bands=bands) if isinstance(data, str) else as_data(data)).first(limit)
    opened: nn.Module | None = open_any(network, how["trust"])
    pictures = pictures_of(samples)
    if opened is not None:
        read_by(opened, bands, options.get("normalisation"), pictures)
        compared = _sides_of(opened, samples, bool(masks or output_stride), thresholds, device)
    elif thresholds:
        raise InvalidInput(
            "thresholds belong to networks with exits, and this network has none.",
            next="leave them out, or give a network that stops where it is confident.",
        )
    else:
        step("building and converting")
        nets, source = at_strides(network, output_stride, options, pictures=pictures, **how)
        compared = of_masks.compare(nets, source, masks, device)
    compared = replace(compared, sides=[*compared.sides, *sides])
    return _Judge(
        compared, _with_classes(samples.read_for(compared.source), compared, device), kind, device, batch
    )


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
                with as_labels(labels[None].to(device)):
                    return data.with_outputs(class_scores(compared.sides[0].call(batch)).shape[1])
        except (CadError, RuntimeError) as error:
            first = first or refuse_images(error, image[None].shape[2:])
    if first is not None:
        raise first
    return data


# -- running all sides ---------------------------------------------------------------------------------


class _JudgedPart(NamedTuple):
    """What some images gave: a tally for each side, failures by position, and the first image that could be used."""

    images: int
    tallies: list[Tally]
    failed: dict[int, Failure]
    first: int | None = None


@dataclass(frozen=True)
class _Judge:
    """Runs all sides on images."""

    compared: Comparison
    data: SegmentationData
    kind: Kind
    device: torch.device
    batch: int

    def __call__(self, places: Sequence[int], step: Step = silent) -> list[_JudgedPart]:
        """Run all sides on images; those of one size that follow each other run together."""
        failed, done, first, tallies = dict[int, Failure](), 0, list[int](), list[Tally]()
        step(f"image 1 of {len(places)}", 0, len(places))
        for pictures, found in measure(self.compared.sides, self._pictures(places, failed), self._metrics):
            before = done + len(failed)
            step(f"image {before + len(pictures.places)} of {len(places)}", before, len(places))
            if isinstance(found, CadError):
                failed |= {place: self._failure(place, found) for place in pictures.places}
                continue
            done, first = done + len(pictures.places), first or [*pictures.places]
            for whole, own in zip(tallies, found, strict=False):
                whole.merge(own)
            tallies = tallies or found
        return [_JudgedPart(len(places), tallies, failed, *first[:1])]

    def lost(self, place: int, error: CadError) -> _JudgedPart:
        """Return the part of an image that ended its process."""
        return _JudgedPart(1, [], {place: self._failure(place, error)})

    def _failure(self, place: int, error: CadError) -> Failure:
        return {"image": self.data.names[place], **error.to_dict()}

    def _metrics(self) -> list[Quality]:
        if self.data.is_labelled:
            return [Quality(of_labels=True, classes=len(self.data.classes), data=self.data.name)]
        return [Quality(self.kind)]

    def _pictures(self, places: Sequence[int], failed: dict[int, Failure]) -> Iterator[PictureBatch]:
        """Yield batches; images that cannot be used are noted and left out."""

        def read() -> Iterator[tuple[int, Tensor, Tensor]]:
            for place in places:
                try:
                    yield place, *sample_of(self.data, place)
                except NotInstalled:  # no other image would do better
                    raise
                except CadError as error:
                    failed[place] = self._failure(place, error)

        for _, alike in groupby(read(), key=lambda item: item[1].shape):
            while some := list(islice(alike, self.batch)):
                at, images, labels = zip(*some, strict=True)
                yield self.prepare(torch.stack(images), torch.stack(labels), at)

    def prepare(self, images: Tensor, labels: Tensor, places: tuple[int, ...] = (0,)) -> PictureBatch:
        """Normalise images, and bring them and their labels to the device."""
        ready = normalise(images, self.compared.source).to(self.device)
        known = labels.to(self.device) if self.data.is_labelled else None
        ready = ready.contiguous(memory_format=torch.channels_last)
        return PictureBatch(ready, (images.shape[2], images.shape[3]), known, places)

    def measured(self, parts: Iterable[_JudgedPart], rounds: int, step: Step) -> dict[str, Any]:
        """Return the fields of a report that come from the run of all sides.

        Raises:
            CadError: no image could be used; the error of the first one.
        """
        count, done, merged = len(self.data), 0, list[Tally]()
        failed, firsts = dict[int, Failure](), list[int]()
        for part in parts:
            done, failed = done + part.images, failed | part.failed
            firsts += [] if part.first is None else [part.first]
            if part.images < count:  # of another process
                step(f"image {done} of {count}", done, count)
            for whole, own in zip(merged, part.tallies, strict=False):
                whole.merge(own)
            merged = merged or part.tallies
        failures = [failure for _, failure in sorted(failed.items())]
        if not merged:
            raise CadError.from_dict(failures[0])
        image, labels = sample_of(self.data, min(firsts))
        example = self.prepare(image[None], labels[None])
        rows = [self._row(*pair) for pair in zip(self.compared.sides, merged, strict=True)]
        if rounds:
            with as_labels(example.labels):
                how = within(step, "measuring")
                rows = time_sides(self.compared.sides, rows, example.images, rounds, step=how)
        quality = next((one for tally in merged for one in tally.metrics if isinstance(one, Quality)), None)
        return {
            "data": self.data.name,
            "split": self.data.split,
            "fidelity": None if quality is None or quality.of_labels else quality.kind,
            "images": int(merged[0].counts["images"]),
            "image": tuple(example.images.shape[1:]),
            "rounds": rounds,
            "normalisation": self.compared.normalisation,
            "rows": tuple(rows),
            "failed": tuple(failures),
            "compared": replace(self.compared, sides=()),  # a report keeps no networks
        }

    def _row(self, side: Side, tally: Tally) -> Row:
        """Return the row of a side."""
        figures = tally.metrics[0].compute()
        fields = {"divergence": None, "relative_error": None, **figures}
        fields |= side.summary(tally.counts, figures)
        if (shares := fields.get("iou")) is not None:
            names = self.data.classes or [f"class {place}" for place in range(len(shares))]
            fields["iou"] = dict(zip(names, shares, strict=True))
        return side.row(
            {name: value for name, value in fields.items() if name != "pixels"}, self.compared.key
        )


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
      `cadsurgery.tasks.measuring`;
    - `divergence`: without labels, mean over pixels and images; see `cadsurgery.support.divergence.divergence`;
    - `relative_error`: without labels, for maps that are not class scores; see `Quality`;
    - `errors`: standard error over images of each of these qualities, by a bootstrap; empty for one image;
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
        spread_labels(figure)
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
