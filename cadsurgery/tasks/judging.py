"""Quality and time of settings, picture by picture, so that the difference between two settings has an error."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cadsurgery.support.divergence import kind_of, maps_of
from cadsurgery.support.rows import Plain
from cadsurgery.tasks.measuring import (
    ERROR,
    FIDELITY,
    MIOU,
    Counts,
    Kind,
    Quality,
    Tally,
    error_of,
    resampled,
)

# `balanced_fidelity` of a map of probabilities, such as a text detector's, with the classes absent and present.
FOUND = "found"
FEW = 10  # pictures below which no small difference can be told
_RESAMPLES = 1000
_SURE = 0.1  # a probability is decided within so much of 0 or 1; so is a map, if all but so many of its places are

_NOTHING = Counts()


@dataclass(frozen=True)
class Judgement:
    """What was counted of one setting on one picture.

    Attributes:
        milliseconds: time of the call.
        given: against the network as given.
        labels: against the labels; None without.
    """

    milliseconds: float
    given: Counts = _NOTHING
    labels: Counts | None = None

    @staticmethod
    def of(tally: Tally) -> Judgement:
        """Take the counts of one picture from a tally, whose metrics are against the network as given, and labels."""
        counts = [metric.pictures[0] for metric in tally.metrics if isinstance(metric, Quality)]
        return Judgement(tally.milliseconds, *counts)

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, for the journal."""
        areas = {"fidelity": self.given.areas, "labels": self.labels.areas if self.labels else None}
        plain = {name: None if value is None else np.asarray(value).tolist() for name, value in areas.items()}
        return {"milliseconds": self.milliseconds, "divergence": self.given.divergence, **plain}

    @staticmethod
    def from_dict(values: Mapping[str, Any]) -> Judgement:
        """Return what `to_dict` gave."""
        fidelity, labels = (
            None if values[name] is None else np.array(values[name]) for name in ("fidelity", "labels")
        )
        of_labels = None if labels is None else Counts(areas=labels)
        return Judgement(values["milliseconds"], Counts(values["divergence"], fidelity), of_labels)


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


def kind_to_judge(output: Any) -> Kind:
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


@dataclass(frozen=True)
class Estimate(Plain):
    """A quality, and how much better it is than that of the network as given, or another setting, on the same pictures.

    Attributes:
        value: the quality, 0..1; of `relative_error` less is better.
        change: how much better than that network; negative: it is worse.
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

    Against itself a network has the fidelity 1 and the error 0.
    """
    count = len(ours)
    quality = FIDELITY if measure == FOUND else measure
    values, base = (
        resampled([(measure == MIOU and one.labels) or one.given for one in some], quality)
        for some in (ours, given[:count])
    )
    changes = base - values if measure == ERROR else values - base
    error = error_of(changes) if count > 1 else float("nan")
    return Estimate(float(values[0]), float(changes[0]), error, count)


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
