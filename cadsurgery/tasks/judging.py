"""The quality of settings, picture by picture, so that the difference between two settings has an error.

Quality is one of five measures, all 0..1:

- `miou`: mean IoU against labels;
- `fidelity`: mean IoU against the classes that the network as given predicts, see
  `cadsurgery.tasks.segmentation.fidelity.balanced_fidelity`;
- `found`: the same for a map of probabilities, such as a text detector's, with the two classes absent and present;
- `agreement`: share of pixels, or of whole pictures, with the class that the network as given predicts;
- `accuracy` of values such as depth: 1 minus the relative error against the output of the network as given.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any, Literal

import torch
from torch import Tensor

from cadsurgery.data.datasets import IGNORED
from cadsurgery.support.divergence import divergence, kind_of, maps_of, resize
from cadsurgery.support.rows import Plain
from cadsurgery.tasks.segmentation.fidelity import NO_CLASS, balanced_fidelity
from cadsurgery.tasks.segmentation.metrics import SegmentationMetrics

LABELS, CLASSES, FOUND, AGREEMENT, VALUES = "miou", "fidelity", "found", "agreement", "accuracy"
JudgedKind = Literal["auto", "classes", "found", "values"]
FEW = 10  # pictures below which no small difference can be told
_RESAMPLES = 1000
_SURE = 0.1  # a probability is decided within so much of 0 or 1; so is a map, if all but so many of its places are


@dataclass(frozen=True)
class Judgement:
    """Counts of one setting on one picture.

    Attributes:
        milliseconds: time of the call.
        same: share of pixels with the class that the network as given predicts; 0 for values.
        error: mean squared difference from the network as given, relative to its mean square; 0 for class scores.
        fidelity: (3, C) pixels of each class in both predictions, in either, and in that of the network as given.
        labels: (3, C), as `fidelity`, against the labels; empty without labels.
    """

    milliseconds: float
    same: float = 0.0
    error: float = 0.0
    fidelity: tuple[tuple[int, ...], ...] = ()
    labels: tuple[tuple[int, ...], ...] = ()


def judge(
    milliseconds: float,
    output: Any,
    given: Any,
    labels: Tensor | None,
    size: tuple[int, int],
    kind: JudgedKind,
) -> Judgement:
    """Compare the output of a setting for one picture with the network as given and with labels.

    Args:
        milliseconds: time of the call.
        output: output of the setting.
        given: output of the network as given.
        labels: (1, H, W), or None.
        size: (height, width) of the picture, at which classes are compared.
        kind: of the outputs, `classes`, `values`, or `found` for probabilities of one class.
    """
    if kind == "values":
        target = maps_of(given)[0]
        maps = [resize(maps_of(output)[0], target.shape[2:])]
        return Judgement(milliseconds, error=float(divergence([target], maps, "values").mean()))
    read = _found if kind == "found" else _classes
    ours, theirs = (read(scores, size) for scores in (output, given))
    count = 2 if kind == "found" else maps_of(given)[0].shape[1]
    return Judgement(
        milliseconds,
        same=float((ours == theirs).double().mean()),
        fidelity=_areas(_compare(ours, theirs, count, NO_CLASS)),
        labels=_areas(_compare(ours, labels, count)) if labels is not None else (),
    )


_MULTIPLE = 32  # the largest number of pixels that sides of pictures in files are usually multiples of


def in_rows(given: Any, output: Any, size: tuple[int, int], is_resized: bool) -> str:
    """Describe outputs that are rows, as detectors return the boxes of all anchors (B, C, N); "" for maps and vectors.

    Rows of a resized picture, or of another output stride, are other places: to resize them along the anchors would
    compare numbers that have nothing to do with each other. The sides of a map are in proportion to those of the
    picture, and change together with them.

    Args:
        given: output of the network as given.
        output: output of a setting for the same picture.
        size: (height, width) of the picture.
        is_resized: True if the setting resizes the picture.
    """
    target, ours = (maps_of(each)[0] for each in (given, output))
    before, after = target.shape[2:], ours.shape[2:]
    if before.numel() == 1 or (before == after and not is_resized):
        return ""
    steps = [side / length for side, length in zip(before, size, strict=True)]
    ratios = [side / length for side, length in zip(after, before, strict=True)]
    is_unchanged = before == after
    wanted, slack = (
        (steps, [1 / length for length in size]) if is_unchanged else (ratios, [1 / side for side in before])
    )
    # A side may be rounded up, or lack a border; pictures in files are resized to multiples of a number of pixels.
    together = abs(wanted[0] - wanted[1]) <= sum(slack)
    if not is_unchanged and 1 not in ratios:
        together |= abs(ratios[0] - ratios[1]) <= sum(_MULTIPLE / side for side in size)
    is_map = together and max(steps) <= 2 * min(steps) + max(1 / length for length in size)
    if is_map:
        return ""
    shape = tuple(before) if target.shape[1] == 1 else tuple(target.shape[1:])
    return f"its output {(len(target), *shape)} is rows, no map (batch, channels, height, width)"


def kind_to_judge(output: Any) -> JudgedKind:
    """Return the kind of an output: `found` for a single map of probabilities, else that of `kind_of`.

    Probabilities are near 0 or 1 in nearly all places, and near both in some; depth and disparity are not.
    """
    maps = maps_of(output)
    if len(maps) == 1 and maps[0].shape[1] == 1 and _is_decided(maps[0]):
        return "found"
    return kind_of(output)


def _is_decided(values: Tensor) -> bool:
    if values.min() < 0 or values.max() > 1:
        return False
    absent, present = ((values < _SURE).float().mean(), (values > 1 - _SURE).float().mean())
    return bool(absent > 0 and present > 0 and absent + present > 1 - _SURE)


def _classes(output: Any, size: tuple[int, int]) -> Tensor:
    return _at_size(output, size).argmax(1)


def _found(output: Any, size: tuple[int, int]) -> Tensor:
    return (_at_size(output, size)[:, 0] > 0.5).long()


def _at_size(output: Any, size: tuple[int, int]) -> Tensor:
    scores = maps_of(output)[0]
    return scores if scores.shape[2:].numel() == 1 else resize(scores, size)


def _compare(ours: Tensor, theirs: Tensor, classes: int, ignored: int = IGNORED) -> SegmentationMetrics:
    metrics = SegmentationMetrics(classes, ignored=ignored)
    metrics.update(ours, theirs)
    return metrics


def _areas(metrics: SegmentationMetrics) -> tuple[tuple[int, ...], ...]:
    return tuple(tuple(row) for row in metrics.areas().tolist())


@dataclass(frozen=True)
class Estimate(Plain):
    """A quality, and how far it is above that of the network as given, or another setting, on the same pictures.

    Attributes:
        value: 0..1.
        change: relative to that network; negative: it is worse.
        error: standard error of the change, by a paired bootstrap over the pictures; NaN for one picture.
        images: number of pictures.
    """

    value: float
    change: float
    error: float
    images: int

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON, which has no NaN."""
        return {**vars(self), "error": None if math.isnan(self.error) else self.error}


def estimate(ours: Sequence[Judgement], given: Sequence[Judgement], measure: str) -> Estimate:
    """Estimate the quality of a setting from its judgements, and those of the network as given on the same pictures.

    Against itself a network has the quality 1, so that the change of `fidelity` and `accuracy` is their lack of 1.
    """
    count = len(ours)
    draws = torch.randint(count, (_RESAMPLES, count), generator=torch.Generator().manual_seed(0))
    weights = torch.zeros(1 + _RESAMPLES, count, dtype=torch.float64)
    weights[0] = 1
    weights[1:].scatter_add_(1, draws, torch.ones_like(draws, dtype=torch.float64))
    values, base = (_quality(judged, weights, measure) for judged in (ours, given[:count]))
    changes = values - base
    error = float(changes[1:].std()) if count > 1 else float("nan")
    return Estimate(float(values[0]), float(changes[0]), error, count)


def _quality(judged: Sequence[Judgement], weights: Tensor, measure: str) -> Tensor:
    """Return the quality (k,) for k weightings (k, n) of the pictures."""
    if measure == VALUES:
        errors = torch.tensor([judgement.error for judgement in judged], dtype=torch.float64)
        return 1 - ((weights @ errors) / weights.sum(1)).sqrt()
    if measure == AGREEMENT:
        return (
            weights @ torch.tensor([judgement.same for judgement in judged], dtype=torch.float64)
        ) / weights.sum(1)
    pixels = [judgement.labels if measure == LABELS else judgement.fidelity for judgement in judged]
    counts = torch.tensor(pixels, dtype=torch.float64)
    hits, either, truth = (weights @ counts.flatten(1)).view(len(weights), 3, -1).unbind(1)
    # Against labels a class that they lack counts if it is predicted, as usual.
    return balanced_fidelity(hits, either, either if measure == LABELS else truth)


def median_time(judged: Sequence[Judgement]) -> float:
    """Return the median over pictures of the time, in milliseconds."""
    return median(judgement.milliseconds for judgement in judged)


def time_error(ours: Sequence[Judgement], given: Sequence[Judgement]) -> float | None:
    """Return the standard error of the time of a setting relative to another's, on the same pictures.

    Both ran on a picture one after the other, so that a change of the machine's speed affects both. The error is that
    of the median ratio, by a bootstrap over the pictures; None for one picture.
    """
    count = len(ours)
    if count < 2:
        return None
    pairs = zip(ours, given[:count], strict=True)
    ratios = torch.tensor([one.milliseconds / max(other.milliseconds, 1e-9) for one, other in pairs])
    draws = torch.randint(count, (_RESAMPLES, count), generator=torch.Generator().manual_seed(0))
    return float(ratios[draws].quantile(0.5, dim=1).std())
