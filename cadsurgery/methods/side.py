"""Sides of comparisons: each has a name, a call, its multiply-accumulates, and metrics for its outputs.

Evaluation, bench and conversion take a list of sides. Each kind of side has a module in its method or in `tasks/sides`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, NamedTuple, Protocol, TypeVar

import torch
from rich.text import Text
from torch import Tensor, nn

from cadsurgery.data import SegmentationData
from cadsurgery.data.networks import Source
from cadsurgery.methods.converted import ConvertedModel
from cadsurgery.support.fields import Reader
from cadsurgery.support.progress import Step, silent
from cadsurgery.support.rows import Row
from cadsurgery.support.tables import Column
from cadsurgery.support.timing import interleaved

Measured = TypeVar("Measured", bound=Row)
Counts = Mapping[str, float]
Figures = Mapping[str, Any]


class Metrics(Protocol):
    """Sums over images; metrics of parts of the images can be merged."""

    def update(self, output: Any, truth: Any, size: tuple[int, int]) -> None:
        """Add the output of a call, with labels (B, H, W) or the output that stands for them."""

    def merge(self, other: Any) -> None:
        """Add the sums of another object of this kind."""

    def compute(self) -> dict[str, Any]:
        """Return the figures so far, by field of a row; `iou` is a list with one entry per class."""


def mean_work(counts: Counts, figures: Figures) -> dict[str, Any]:
    """Return the multiply-accumulates and all other counts per image, mean over images."""
    return {name: count / counts["images"] for name, count in counts.items() if name != "images"}


def once_per_batch(function: Callable[[Tensor], Any]) -> Callable[[Tensor], Any]:
    """Keep a function's last result, so that sides that share a run compute it once per batch."""
    last: list[Any] = [None, None]

    def call(images: Tensor) -> Any:
        if last[0] is not images:
            last[:] = images, function(images)
        return last[1]

    return call


@dataclass(frozen=True)
class Side:
    """One of several things that are compared: a network, a mask, an exit, an engine, an image size.

    Attributes:
        name: name in tables and pictures.
        call: runs the side on images (B, 3, H, W), normalised for the network, and returns its output; labels for
            masks and samplers are provided.
        macs: MACs of a call; or a function that counts them on images right after the call on them, and returns a
            number or several by name, including `macs`.
        metrics: creates the metrics for its outputs in an evaluation; default: accuracy, or fidelity without labels.
        about: fields of its row that identify the side.
        timed: called instead of `call` for timing.
        summary: computes fields of its row from the sums of all counts (including `images`) and the metrics' figures.
        anchor: True if other sides are compared with it: dim in tables, black in pictures.
        curve: name of the curve that joins it with others in pictures; empty for none.
        is_target: without labels, its output stands for the labels of the sides that follow.
    """

    name: str
    call: Callable[[Tensor], Any]
    macs: int | Callable[[Tensor], int | Counts] = 0
    metrics: Callable[[], Metrics] | None = None
    about: Mapping[str, Any] = field(default_factory=dict)
    timed: Callable[[Tensor], object] | None = None
    summary: Callable[[Counts, Figures], dict[str, Any]] = mean_work
    anchor: bool = False
    curve: str = ""
    is_target: bool = False

    def count(self, images: Tensor) -> Counts:
        """Return the multiply-accumulates of a call on images, and other counts."""
        counted = self.macs(images) if callable(self.macs) else self.macs
        return counted if isinstance(counted, Mapping) else {"macs": counted}

    def row(self, values: Mapping[str, Any], key: str = "side") -> Row:
        """Create its row in a report; field `key` is its name."""
        return Row(
            self.name, {key: self.name, **self.about, "anchor": self.anchor, **values}, curve=self.curve
        )


def time_sides(
    sides: Iterable[Side],
    rows: Iterable[Measured],
    images: Tensor,
    rounds: int,
    seconds: float = float("inf"),
    is_processor_time: bool = False,
    step: Step = silent,
) -> list[Measured]:
    """Time sides on images, all in turn, and return their rows with the times; unchanged without rounds.

    Args:
        sides: the sides of the rows.
        rows: rows to complete.
        images: the batch.
        rounds: timing rounds.
        seconds: see `interleaved`.
        is_processor_time: True to measure the processor time of this process instead of elapsed time.
        step: progress callback, see `interleaved`.
    """
    rows, calls = list(rows), dict[str, Callable[[], object]]()
    for side in sides:
        name = side.name if side.name not in calls else f"{side.name} {len(calls)}"
        calls[name] = partial(side.timed or side.call, images)
    if not rounds:
        return rows
    clock = time.process_time if is_processor_time else time.perf_counter
    times = interleaved(calls, rounds, seconds=seconds, clock=clock, step=step).values()
    return [
        replace(row, milliseconds=taken.best, milliseconds_median=taken.median)
        for row, taken in zip(rows, times, strict=True)
    ]


def work_and_time(
    sides: Sequence[Side], images: Tensor, rounds: int, key: str = "side", **timing: Any
) -> list[Row]:
    """Return a row with work and time for each side, on the same images; see `time_sides`."""
    with torch.inference_mode():
        rows = [side.row(side.count(images), key) for side in sides]
    return time_sides(sides, rows, images, rounds, **timing)


# -- networks made by methods --------------------------------------------------------------------------


@dataclass(frozen=True)
class Comparison:
    """The sides of a network's evaluation, and how a report shows them.

    Attributes:
        source: source of the network, for which images are normalised.
        sides: in the order of the rows.
        columns: returns the columns of the report's table, see `EvaluationReport`.
        key: field of a row that has the side's name.
        accuracy: fields of the rows that are drawn against work, with their descriptions; the first as dots, the
            second as triangles.
        images_in_words: text after the number of images in the report.
        has_classes: True if the IoU of each class is printed.
        normalisation: normalisation assumed by masks, as text.
        more: further fields of the report.
    """

    source: Source
    sides: Sequence[Side]
    columns: Callable[[Any], Iterable[Column[Row]]]
    key: str
    accuracy: Mapping[str, str] = field(default_factory=lambda: {"miou": "mean IoU"})
    images_in_words: str = ""
    has_classes: bool = False
    normalisation: str = ""
    more: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class ConversionRequest:
    """A network to convert, and how.

    Attributes:
        before: the network as built, on the device.
        source: source of the network.
        batch: creates the image, normalised for a network of a source, on the device.
        options: options of the method.
        step: progress callback.
    """

    before: nn.Module
    source: Source
    batch: Callable[[Source], Tensor]
    options: Mapping[str, Any]
    step: Step


@dataclass(frozen=True)
class MethodConversion:
    """A network that a method converted, and its part of the report.

    Attributes:
        net: the converted network, with its plan.
        batch: the image.
        sides: the original network, with which work and time are compared, and the converted variants.
        more: further fields of the report.
        summary: text of the plan, printed first.
        lines: text printed last.
        title: title of the table of sides; default: the size of the image.
        notes: creates notes after the sides are timed.
        first: text printed before everything else; empty for none.
    """

    net: Any
    batch: Tensor
    sides: Sequence[Side]
    more: Mapping[str, Any]
    summary: Text
    lines: Sequence[Text]
    title: str = ""
    notes: Callable[[Sequence[Row]], Sequence[str]] = lambda rows: ()
    first: str = ""

    def without_network(self) -> MethodConversion:
        """Return the part of the report alone, which keeps no network in memory."""
        return replace(self, net=None, sides=(), notes=lambda rows: ())


class Timed(NamedTuple):
    """The sides that `bench` times.

    Attributes:
        sides: the original network comes first.
        not_counted: operations that are not among the MACs.
        ends: names of the sides at which the straight line of time against work begins and ends; None for no line.
    """

    sides: list[Side]
    not_counted: tuple[str, ...]
    ends: tuple[str, str] | None = None


class MethodSides(NamedTuple):
    """A kind of network that a method makes, and its sides.

    Attributes:
        network: class of the network.
        words: description after "a network", e.g. "with exits".
        convert: converts a network.
        compare: creates its sides for an evaluation, from the network on its device, the data and thresholds.
        time: creates its sides for a bench, from the network, the images, and shares of positions to compute.
        run: runs its optimised copy on a batch, within milliseconds if it can; returns the output and fields of the
            report.
        settings: arguments of the method that `cadsurgery convert --set` takes, each with the function that reads it.
        renamed: the options that they were before, where these had other names.
        has_thresholds: True if `compare` uses thresholds.
    """

    network: type[ConvertedModel]
    words: str
    convert: Callable[[ConversionRequest], MethodConversion]
    compare: Callable[[Any, SegmentationData, Sequence[Any]], Comparison]
    time: Callable[[Any, Tensor, Sequence[float]], Timed]
    run: Callable[[Any, Tensor, float], tuple[Any, dict[str, Any]]]
    settings: Mapping[str, Reader]
    renamed: Mapping[str, str] = {}
    has_thresholds: bool = False

    @property
    def method(self) -> str:
        """Name of the method, as in `cadsurgery convert --method`."""
        return self.network.method
