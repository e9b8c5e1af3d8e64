"""Sides of comparisons: each has a name, a call, its multiply-accumulates, and the metrics that judge its outputs.

Evaluation, bench and conversion take a list of sides. A new kind of side is a file in `tasks/sides`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, TypeVar

import torch
from rich.text import Text
from torch import Tensor, nn

from cadsurgery.data.networks import Source
from cadsurgery.support.timing import interleaved
from cadsurgery.tasks.report import Column, Row

if TYPE_CHECKING:
    from cadsurgery.data import SegmentationData
    from cadsurgery.tasks.evaluation import EvaluationReport
    from cadsurgery.tasks.for_each import Step

Measured = TypeVar("Measured", bound=Row)
Counts = Mapping[str, float]
Figures = Mapping[str, Any]


class Metrics(Protocol):
    """Sums over images; those of parts of the images merge to those of all."""

    def update(self, output: Any, truth: Any, size: tuple[int, int]) -> None:
        """Add the output of a call, beside labels (B, H, W), or the output that stands for them."""

    def merge(self, other: Any) -> None:
        """Add what another one of the same kind has seen."""

    def compute(self) -> dict[str, Any]:
        """The figures so far, by field of a row; `iou` is a list with an entry for each class."""


def mean_work(counts: Counts, figures: Figures) -> dict[str, Any]:
    """The multiply-accumulates of an image, mean over images."""
    return {"macs": counts["macs"] / counts["images"]}


def once_per_batch(function: Callable[[Tensor], Any]) -> Callable[[Tensor], Any]:
    """A function of images whose last result is kept: sides that share a run call it for the same batch one after the
    other."""
    last: list[Any] = [None, None]

    def call(images: Tensor) -> Any:
        if last[0] is not images:
            last[:] = images, function(images)
        return last[1]

    return call


@dataclass(frozen=True)
class Side:
    """Something that is compared with others: a network, a mask, an exit, an engine, a size of the image.

    Attributes:
        name: in tables and pictures.
        call: runs it on images (B, 3, H, W), prepared for the network; returns its output. Masks and samplers that ask
            for labels find them.
        macs: multiply-accumulates of a call; or a function that counts them on images right after the call on them: a
            number, or several by name, `macs` among them.
        metrics: makes what outputs are judged by in an evaluation; default: accuracy, or fidelity without labels.
        about: fields of its row that tell it from the others.
        timed: is timed in place of the call.
        summary: fields of its row, of the sums of all counts (and `images`, how many) and the figures of the metrics.
        anchor: True if it is what others are compared with: dim in tables, black in pictures.
        curve: sides of one curve are joined in pictures; empty: of none.
        is_target: without labels, its output stands for them, for the sides that follow.
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
        """The multiply-accumulates of a call on images, and what is counted beside them."""
        counted = self.macs(images) if callable(self.macs) else self.macs
        return counted if isinstance(counted, Mapping) else {"macs": counted}

    def row(self, values: Mapping[str, Any], key: str = "side") -> Row:
        """Its row in a report, named in the field `key`."""
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
) -> list[Measured]:
    """The rows of sides with their times on images, all in turn; without rounds as they are.

    Args:
        sides: of the rows.
        rows: to complete.
        images: the batch.
        rounds: that count.
        seconds: see `interleaved`.
        is_processor_time: True to count the time of this process, not of the clock on the wall.
    """
    rows, calls = list(rows), dict[str, Callable[[], object]]()
    for side in sides:
        name = side.name if side.name not in calls else f"{side.name} {len(calls)}"
        calls[name] = partial(side.timed or side.call, images)
    if not rounds:
        return rows
    clock = time.process_time if is_processor_time else time.perf_counter
    times = interleaved(calls, rounds, seconds=seconds, clock=clock).values()
    return [
        replace(row, milliseconds=taken.best, milliseconds_median=taken.median)
        for row, taken in zip(rows, times, strict=True)
    ]


def measure(
    sides: Sequence[Side], images: Tensor, rounds: int, key: str = "side", **timing: Any
) -> list[Row]:
    """A row of work and time for each side on the same images; see `time_sides`."""
    with torch.inference_mode():
        rows = [side.row(side.count(images), key) for side in sides]
    return time_sides(sides, rows, images, rounds, **timing)


# -- what a method makes of networks -------------------------------------------------------------------


@dataclass(frozen=True)
class Comparison:
    """The sides that a network is evaluated by, and how a report shows them.

    Attributes:
        source: where the network comes from; images are prepared for it.
        sides: in the order of the rows.
        columns: of the table of a report.
        key: field of a row in which its side is named.
        accuracy: fields of the rows that are drawn against work, with their names in words; the first as dots, the
            second as triangles.
        images_in_words: follows the number of images in the report.
        has_classes: True if the IoU of each class is printed too.
        normalisation: the range that masks take the input for, in words.
        more: fields of the report besides.
    """

    source: Source
    sides: Sequence[Side]
    columns: Callable[[EvaluationReport], Iterable[Column[Row]]]
    key: str
    accuracy: Mapping[str, str] = field(default_factory=lambda: {"miou": "mean IoU"})
    images_in_words: str = ""
    has_classes: bool = False
    normalisation: str = ""
    more: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Request:
    """A network that is to be converted, and how.

    Attributes:
        before: the network as it was built, on the device.
        source: where it came from.
        batch: makes the image, as a network of a source expects it, on the device.
        options: of the method.
        verify: True if it is to be compared with the network as it was.
        step: called with what is being done.
    """

    before: nn.Module
    source: Source
    batch: Callable[[Source], Tensor]
    options: Mapping[str, Any]
    verify: bool
    step: Step


@dataclass(frozen=True)
class Conversion:
    """The network that a method made, and its part of the report.

    Attributes:
        net: with its plan.
        batch: the image.
        sides: the network as it was, and what was made of it.
        more: fields of the report besides.
        summary: of the plan, printed first.
        lines: printed last.
        title: of the table of the sides; default: the size of the image.
        whole: place of the side that work and time of the others are compared with; None: with none.
        notes: gives what can be said only once the sides are timed.
    """

    net: Any
    batch: Tensor
    sides: Sequence[Side]
    more: Mapping[str, Any]
    summary: Text
    lines: Sequence[Text]
    title: str = ""
    whole: int | None = None
    notes: Callable[[Sequence[Row]], Sequence[str]] = lambda rows: ()

    def without_network(self) -> Conversion:
        """The part of the report alone, which keeps no network in memory."""
        return replace(self, net=None, sides=(), notes=lambda rows: ())


class Timed(NamedTuple):
    """The sides that `bench` times, the network as it was first; the names of those at which the straight line of time
    against work begins and ends, if there is one; and the operations that are not among the multiply-accumulates."""

    sides: list[Side]
    not_counted: tuple[str, ...]
    ends: tuple[str, str] | None = None


class Kind(NamedTuple):
    """A kind of network that a method makes, and its sides.

    Attributes:
        method: its name, as of `cadsurgery convert --method`.
        network: the class.
        words: after "a network": "with exits".
        convert: makes one.
        compare: its sides in an evaluation, of the network on its device, the data and further arguments.
        time: its sides in a bench, of the network, the images, and shares of what is computed.
        run: its optimised copy on a batch, within so many milliseconds if it can: the output, and fields of the report.
        has_thresholds: True if `compare` takes thresholds.
    """

    method: str
    network: type[nn.Module]
    words: str
    convert: Callable[[Request], Conversion]
    compare: Callable[[Any, SegmentationData, Sequence[Any]], Comparison]
    time: Callable[[Any, Tensor, Sequence[float]], Timed]
    run: Callable[[Any, Tensor, float], tuple[Any, dict[str, Any]]]
    has_thresholds: bool = False
