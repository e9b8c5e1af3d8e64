"""Thresholds, windows and levels: what edges, gradients, trimaps, scores and budgets have in common."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import ClassVar, TypeVar

import torch
from torch import Tensor

from cadsurgery.masks.filters import near
from cadsurgery.masks.provider import Grid, MaskProvider, format_option
from cadsurgery.support.errors import InvalidInput

N = TypeVar("N", int, float)
_WIDEST = 1000  # samples of standard deviation; the window has six times as many on a side


class GradedMask(MaskProvider):
    """Base of masks that keep high what lies near strong places of an image-sized map; several thresholds give graded
    levels. A subclass gives the map (`strength`).
    """

    image_only = True

    counted: ClassVar[str] = "thresholds"  # what a message calls the options that decide about a level each

    def __init__(self, threshold: float | tuple[float, ...], dilation: int | tuple[int, ...]) -> None:
        """Create the mask.

        Args:
            threshold: on the strength; the i-th one decides what gets level i, everything else the lowest level.
            dilation: odd side in image pixels by which strong places are widened, one for all or one per threshold.

        Raises:
            InvalidInput: a threshold that is NaN, dilations that are not odd, or as many as fit nothing.
        """
        super().__init__()
        self.threshold, self.dilation = several(threshold), several(dilation)
        where = f"mask {self.name}"
        if len(self.dilation) not in (1, len(self.threshold)):
            raise InvalidInput(
                f"{len(self.threshold)} thresholds but {len(self.dilation)} dilations.",
                where=where,
                next="give one dilation for all thresholds or one for each, e.g. threshold=0.95/0.1,dilation=5/15.",
            )
        check_thresholds(self.threshold, where)
        check_odd("dilation", self.dilation, where)

    def strength(self, image: Tensor) -> Tensor:
        """(B, H, W) floating-point: the map of the image that thresholds are on."""
        raise NotImplementedError

    def forward(self, image: Tensor, features: Tensor, grid: Grid) -> Tensor:
        """(B, h, w) int8: level i within dilation i of a strength of at least threshold i, the lowest elsewhere.

        Raises:
            InvalidInput: more thresholds than levels.
        """
        check_count(len(self.threshold), self.counted, grid, f"mask {self.name}")
        strength = self.strength(image)
        dilations = self.dilation if len(self.dilation) > 1 else self.dilation * len(self.threshold)
        nearby = {side: near(strength, side, grid) for side in dict.fromkeys(dilations)}
        strong = (nearby[side] >= limit for side, limit in zip(dilations, self.threshold, strict=True))
        return levels_where(strong, grid)

    def scores(self, image: Tensor, features: Tensor, grid: Grid) -> Tensor:
        """The greatest strength within the first dilation: what `forward` gives level 0 is at least the threshold."""
        return near(self.strength(image), self.dilation[0], grid)


class ScoredMask(MaskProvider):
    """Base of masks that keep high what a map of scores says; several thresholds on it give graded levels. A subclass
    gives the map (`scores`).
    """

    def __init__(self, threshold: float | tuple[float, ...]) -> None:
        """Create the mask.

        Args:
            threshold: on the scores; the i-th decides what gets level i, everything else the lowest level.

        Raises:
            InvalidInput: thresholds that are NaN or do not fall.
        """
        super().__init__()
        self.threshold = several(threshold)
        check_thresholds(self.threshold, f"mask {self.name}", falling=True)

    def forward(self, image: Tensor, features: Tensor, grid: Grid) -> Tensor:
        """(B, h, w) int8: level i where the scores reach threshold i, the lowest elsewhere.

        Raises:
            InvalidInput: more thresholds than levels, or no scores.
        """
        check_count(len(self.threshold), "thresholds", grid, f"mask {self.name}")
        return levels_of_scores(self.scores(image, features, grid), self.threshold, grid)


def levels_where(chosen: Iterable[Tensor], grid: Grid) -> Tensor:
    """(B, h, w) int8: level i where the i-th bool map is True and none before it, the lowest level elsewhere."""
    maps = list(chosen)
    levels = torch.full((grid.batch, *grid.size), grid.max_level, dtype=torch.int8, device=maps[0].device)
    for level in reversed(range(len(maps))):
        levels = torch.where(maps[level], min(level, grid.max_level), levels)
    return levels.to(torch.int8)


def levels_of_scores(scores: Tensor, thresholds: Sequence[float], grid: Grid) -> Tensor:
    """(B, h, w) int8: level i where the scores reach the i-th threshold, the lowest level elsewhere."""
    return levels_where((scores >= threshold for threshold in thresholds), grid)


def several(value: N | Sequence[N]) -> tuple[N, ...]:
    """An option that may be one number or several."""
    return tuple(value) if isinstance(value, (tuple, list)) else (value,)  # type: ignore[return-value]


def check_thresholds(thresholds: Sequence[float], where: str, *, falling: bool = False) -> None:
    """Refuse thresholds that are NaN and, if they are `falling` on one map, those that do not decide anything."""
    if not thresholds or any(math.isnan(value) for value in thresholds):
        raise InvalidInput(
            "a threshold is NaN or missing.", where=where, next="use numbers such as 0.35 or 0.8/0.2."
        )
    if falling and any(later >= earlier for earlier, later in pairwise(thresholds)):
        given = format_option(tuple(thresholds))
        raise InvalidInput(
            f"the thresholds {given} do not fall.",
            where=where,
            why="the i-th gives level i, so what reaches a later one must include what reaches an earlier one.",
            next=f"write {format_option(tuple(sorted(set(thresholds), reverse=True)))}.",
        )


def check_odd(option: str, sides: Sequence[int], where: str) -> None:
    """Refuse sides of windows that have no middle."""
    if not sides or any(side < 1 or side % 2 == 0 for side in sides):
        raise InvalidInput(
            f"{option}={format_option(tuple(sides))} is not odd and positive.",
            where=where,
            next="use an odd number such as 11.",
        )


def check_sigma(sigma: float, where: str) -> None:
    """Refuse standard deviations that are no width."""
    if not 0 <= sigma <= _WIDEST:
        raise InvalidInput(
            f"sigma={sigma} is no width.",
            where=where,
            next=f"give 0 for none or a positive number such as 1, at most {_WIDEST}.",
        )


def check_count(count: int, counted: str, grid: Grid, where: str) -> None:
    """Refuse more thresholds, widths, ... than there are levels above the lowest."""
    most = max(grid.max_level, 1)
    if count > most:
        raise InvalidInput(
            f"{count} {counted} for {grid.max_level} levels below the high one.",
            where=where,
            next=f"give at most {most} {counted}, or a larger output stride range.",
        )
