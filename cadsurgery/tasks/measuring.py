"""The one loop that measures quality: sides run on pictures, and what is counted of each picture merges.

`eval`, `recommend`, `mask --compare`, `explore` and the validation of a training choose what they show of it. A quality
has one name everywhere:

- `miou`: mean IoU, against labels or the classes of the dense network;
- `balanced_fidelity`: mean IoU over the classes of the dense network, see the function;
- `pixel_accuracy`: share of pixels with the class of the labels, or of the dense network;
- `relative_error`: of values such as depth: root mean square of the differences from the dense network's, relative to
  these.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from cadsurgery.data.datasets import IGNORED
from cadsurgery.masks import labelled
from cadsurgery.methods.side import Metrics, Side
from cadsurgery.support.divergence import Kind as DivergenceKind
from cadsurgery.support.divergence import class_scores, divergence, kind_of, maps_of, resize
from cadsurgery.support.errors import CadError, InvalidInput, describe_error
from cadsurgery.support.timing import now
from cadsurgery.tasks.segmentation.metrics import SegmentationMetrics

MIOU, FIDELITY, AGREEMENT, ERROR = "miou", "balanced_fidelity", "pixel_accuracy", "relative_error"
Kind = Literal["auto", "classes", "values", "found"]
_NO_CLASS = -1  # so that no pixel of a prediction is ignored
_RESAMPLES, _MANY = 1000, 5000  # pictures from which on fewer samples tell the error as well


class Counts(NamedTuple):
    """Counts of one side on one picture.

    Attributes:
        divergence: from the dense network's output, see `cadsurgery.support.divergence`; 0 against labels.
        areas: (4, n) numbers of the n classes that there are, and the pixels of each in both maps, in either, and in
            the truth; None for values.
    """

    divergence: float = 0.0
    areas: np.ndarray | None = None


class Quality:
    """Quality of outputs against labels, or against the dense network's outputs; the counts of each picture merge.

    Attributes:
        kind: kind of the outputs: `classes`, `values`, or `found` for probabilities of one class; `auto` until the
            first output.
        of_labels: True if the truth is labels.
        pictures: counts of each picture.
        classes: `SegmentationMetrics` of maps of classes; None for others, and before the first picture.
    """

    def __init__(
        self, kind: Kind = "auto", *, of_labels: bool = False, classes: int = 0, data: str = ""
    ) -> None:
        """Start with no pictures.

        Args:
            kind: as in `cadsurgery.support.divergence.divergence`, or `found`.
            of_labels: True if the truth is labels.
            classes: number of classes of the labels; 0 for that of the outputs.
            data: name of the data, for errors.
        """
        self.kind: Kind = "classes" if of_labels else kind
        self.of_labels, self.pictures = of_labels, list[Counts]()
        self.classes: SegmentationMetrics | None = SegmentationMetrics(classes) if classes else None
        self._data = data

    def update(self, output: Any, truth: Any, size: tuple[int, int]) -> None:
        """Add a batch.

        Args:
            output: output of the side.
            truth: labels (B, H, W), or the output with everything kept high.
            size: (height, width) of the pictures, at which classes are compared.

        Raises:
            InvalidInput: the output has other classes than the labels, no maps, or other maps than the truth.
        """
        if self.of_labels:
            scores = class_scores(output).float()
            if self.classes is not None and scores.shape[1] != self.classes.classes:
                raise InvalidInput(
                    f"the network has {scores.shape[1]} classes and data {self._data} has {self.classes.classes}.",
                    next="evaluate a network trained on these classes, or open the data with its classes.",
                )
            prediction = resize(scores, truth.shape[1:]).argmax(1).to(truth.device)
            found, count, apart = (prediction, truth), scores.shape[1], [0.0] * len(truth)
            ignored = IGNORED
        else:
            self.kind = kind_of(truth) if self.kind == "auto" else self.kind
            of_scores: DivergenceKind = "classes" if self.kind == "classes" else "values"
            apart = divergence(truth, output, of_scores).double().mean((1, 2)).tolist()
            if self.kind == "values":
                self.pictures += [Counts(one) for one in apart]
                return
            maps = [maps_of(each)[0] for each in (output, truth)]
            count, ignored = 2 if self.kind == "found" else maps[1].shape[1], _NO_CLASS
            found = _classes(maps[0], self.kind, size), _classes(maps[1], self.kind, size)
        if found[0].shape[1:].numel() > 1 or self.of_labels:
            self.classes = self.classes or SegmentationMetrics(count, ignored=ignored)
            self.classes.update(*found)
        areas = (_areas(*pair, count, ignored) for pair in zip(*found, strict=True))
        self.pictures += [Counts(*of) for of in zip(apart, areas, strict=True)]

    def merge(self, other: Quality) -> None:
        """Add the pictures of another object.

        Raises:
            InvalidInput: the other object has outputs of another kind.
        """
        if not other.pictures:
            return
        if self.pictures and self.kind != other.kind:
            raise InvalidInput(
                f"some outputs are {self.kind} and others {other.kind}.",
                why="the kind is decided by the first image of each process.",
                next=f"name it: kind={other.kind}.",
            )
        self.kind = other.kind
        self.pictures += other.pictures
        if self.classes is None:
            self.classes = other.classes
        elif other.classes is not None:
            self.classes.merge(other.classes)

    def compute(self) -> dict[str, Any]:
        """Return the figures so far; None where nothing was counted.

        Returns:
            Of classes those of `SegmentationMetrics.compute`; against the dense network's also `balanced_fidelity`
            and `divergence`, the mean over pictures. Of values `relative_error`, the root of the mean divergence.
            `errors` has the standard error over pictures of each quality that was measured.
        """
        names = (MIOU, AGREEMENT, "boundary_iou", "trimap_iou", "divergence", ERROR)
        figures: dict[str, Any] = {**dict.fromkeys(names), "iou": []}
        if self.classes is not None:
            figures |= self.classes.compute()
        if not self.of_labels:
            figures[FIDELITY] = None
            if count := len(self.pictures):
                figures["divergence"] = math.fsum(one.divergence for one in self.pictures) / count
            if self.kind == "values" and count:
                figures[ERROR] = math.sqrt(figures["divergence"])
            if self.classes is not None:
                figures[FIDELITY] = float(balanced_fidelity(*self.classes.areas().double()))
            if areas := [one.areas for one in self.pictures if one.areas is not None]:
                _, hits, _, truth = (sum(of) for of in zip(*(one.sum(1) for one in areas), strict=True))
                figures[AGREEMENT] = int(hits) / int(truth)
        measured = [name for name in (MIOU, FIDELITY, AGREEMENT, ERROR) if figures.get(name) is not None]
        in_order = sorted(self.pictures, key=_as_key)  # whatever the order of the parts
        errors = {name: error_of(resampled(in_order, name)) for name in measured if len(in_order) > 1}
        return {**figures, "errors": errors}


def _as_key(counts: Counts) -> tuple[float, bytes]:
    return counts.divergence, b"" if counts.areas is None else counts.areas.tobytes()


def _classes(scores: Tensor, kind: Kind, size: tuple[int, int]) -> Tensor:
    """Return the class of each pixel (B, H, W), or of each pooled output (B, 1, 1)."""
    scores = scores if scores.shape[2:].numel() == 1 else resize(scores, size)
    return (scores[:, 0] > 0.5).long() if kind == "found" else scores.argmax(1)


def _areas(prediction: Tensor, truth: Tensor, classes: int, ignored: int) -> np.ndarray:
    """Count the pixels of each class, as `SegmentationMetrics.areas` does."""
    counted = truth != ignored
    ours, theirs = prediction[counted].long(), truth[counted].long()
    each = (theirs[ours == theirs], ours, theirs)
    hits, of_ours, of_theirs = (torch.bincount(some, minlength=classes) for some in each)
    numbers = (of_ours + of_theirs).nonzero().flatten()
    counts = (hits, of_ours + of_theirs - hits, of_theirs)
    return torch.stack([numbers, *(count[numbers] for count in counts)]).cpu().numpy()


def balanced_fidelity(hits: Tensor, either: Tensor, truth: Tensor) -> Tensor:
    """Return the mean over classes of the IoU of a prediction with the dense network's, for counts (..., C) of pixels.

    Every class that the dense network predicts counts the same, so that rare classes count, which the share of equal
    pixels hardly shows. Other classes do not count: a few pixels of one must not weigh as much as a whole class.

    Args:
        hits: pixels of each class in both predictions.
        either: in either prediction.
        truth: in that of the dense network.
    """
    counted = truth > 0
    return ((hits / either.clamp(min=1)) * counted).sum(-1) / counted.sum(-1).clamp(min=1)


# -- errors over pictures ------------------------------------------------------------------------------


def resampled(pictures: Sequence[Counts], quality: str) -> Tensor:
    """Return a quality of all pictures, and of 1,000 samples of as many with replacement, or 100: (1001,) float64.

    The samples depend on the number of pictures only, so that two sides are compared on the same ones (paired
    bootstrap).
    """
    count = len(pictures)
    samples = _RESAMPLES if count <= _MANY else _RESAMPLES // 10
    draws = torch.randint(count, (samples, count), generator=torch.Generator().manual_seed(0))
    weights = torch.zeros(1 + samples, count, dtype=torch.float64)
    weights[0] = 1
    weights[1:].scatter_add_(1, draws, torch.ones_like(draws, dtype=torch.float64))
    if quality == ERROR:
        errors = torch.tensor([one.divergence for one in pictures], dtype=torch.float64)
        return ((weights @ errors) / weights.sum(1)).sqrt()
    areas = [np.asarray(one.areas) for one in pictures]
    if quality == AGREEMENT:
        sums = torch.from_numpy(np.stack([one.sum(1) for one in areas])).double()
        _, hits, _, truth = (weights @ sums).unbind(1)
        return hits / truth.clamp(min=1)
    counts = torch.zeros(count, 3, 1 + max(int(one[0].max(initial=0)) for one in areas), dtype=torch.float64)
    for dense, one in zip(counts, areas, strict=True):
        dense[:, one[0]] = torch.from_numpy(one[1:]).double()
    hits, either, truth = (weights @ counts.flatten(1)).view(len(weights), 3, -1).unbind(1)
    # By mean IoU a class counts, too, that is predicted and not in the truth.
    return balanced_fidelity(hits, either, either if quality == MIOU else truth)


def error_of(values: Tensor) -> float:
    """Return the standard error of what `resampled` gave, or of a difference of two such."""
    return float(values[1:].std())


# -- the loop ------------------------------------------------------------------------------------------


class PictureBatch(NamedTuple):
    """PictureBatch of one size that run together.

    Attributes:
        images: (B, C, H, W), normalised, on the device of the sides; or what else their calls take.
        size: (height, width).
        labels: (B, H, W) on the device; None without labels.
        places: positions of the pictures in the data.
    """

    images: Any
    size: tuple[int, int]
    labels: Tensor | None = None
    places: tuple[int, ...] = (0,)


@dataclass
class Tally:
    """What is counted of one side on pictures; tallies of parts of the pictures merge exactly.

    Attributes:
        metrics: one or several.
        counts: sums, with the number of `images`.
        milliseconds: of the call on the pictures that were counted last; the best of several turns.
    """

    metrics: Sequence[Metrics]
    counts: Counter[str] = field(default_factory=Counter)
    milliseconds: float = 0.0

    def merge(self, other: Tally) -> None:
        """Add the sums of another tally."""
        for ours, theirs in zip(self.metrics, other.metrics, strict=True):
            ours.merge(theirs)
        self.counts.update(other.counts)


def measure(
    sides: Sequence[Side] | Callable[[], Sequence[Side]],
    pictures: Iterable[PictureBatch],
    metrics: Callable[[], Sequence[Metrics]],
    until: Callable[[], bool] = lambda: False,
    *,
    turns: int = 1,
    read: Callable[[Any], Any] = lambda output: output,
) -> Iterator[tuple[PictureBatch, list[Tally] | CadError]]:
    """Run all sides on pictures, and yield what was counted of each side; or the error if the first does not take them.

    Without labels the output of the last side before that `is_target`, else of the first one, is the truth.

    Args:
        sides: the sides; or a function that returns those for the next pictures.
        pictures: in the order in which they are measured.
        metrics: makes the metrics of a side that has none of its own.
        until: True to end before the next pictures.
        turns: number of times that each call is timed, all sides in turn.
        read: takes what is compared from an output.
    """
    for some in pictures:
        if until():
            return
        with torch.inference_mode(), as_labels(some.labels):
            running = sides() if callable(sides) else sides
            measured = _run(running, some, metrics, turns, read)
        yield some, measured


def _run(
    sides: Sequence[Side],
    pictures: PictureBatch,
    metrics: Callable[[], Sequence[Metrics]],
    turns: int,
    read: Callable[[Any], Any],
) -> list[Tally] | CadError:
    tallies, target = list[Tally](), None
    images, labels = pictures.images, pictures.labels
    for turn in range(turns):
        for place, side in enumerate(sides):
            start = now(time.perf_counter)
            try:
                output = side.call(images)
            except (CadError, RuntimeError) as error:  # networks refuse image sizes with errors of their own
                if place or turn:
                    raise
                return refuse_images(error, pictures.size)
            taken = 1e3 * (now(time.perf_counter) - start)
            if turn:
                tallies[place].milliseconds = min(taken, tallies[place].milliseconds)
                continue
            output = read(output)
            target = output if side.is_target or not place else target
            tally = Tally([side.metrics()] if side.metrics else metrics(), milliseconds=taken)
            for metric in tally.metrics:
                of_labels = metric.of_labels if isinstance(metric, Quality) else labels is not None
                metric.update(output, labels if of_labels else target, pictures.size)
            tally.counts.update({"images": len(pictures.places), **side.count(images)})
            tallies.append(tally)
    return tallies


def compare(output: Any, target: Any, size: tuple[int, int]) -> Mapping[str, Any]:
    """Return the figures of an output for one picture against the one with everything kept high.

    Raises:
        InvalidInput: they cannot be compared.
    """
    quality = Quality()
    quality.update(output, target, size)
    return quality.compute()


def as_labels(labels: Tensor | None) -> AbstractContextManager[None]:
    """Let masks and samplers see the labels in the block, if there are any."""
    return nullcontext() if labels is None else labelled(labels)


def refuse_images(error: Exception, size: Sequence[int]) -> CadError:
    """Return the error for images of a size on which a network does not run."""
    if isinstance(error, CadError):
        return error
    return InvalidInput(
        f"the network does not take an image of {size[0]}x{size[1]} pixels.",
        why=describe_error(error),
        next="resize or crop the images to a size that it takes, e.g. multiples of its strides (run: --size).",
    )
