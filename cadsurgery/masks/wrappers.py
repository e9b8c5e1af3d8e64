"""Masks made from other masks: larger, cut at thresholds, joined."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from cadsurgery.masks.filters import window_maximum
from cadsurgery.masks.graded import check_count, check_odd, check_thresholds, levels_of_scores, several
from cadsurgery.masks.provider import Grid, MaskProvider, checked_levels, checked_scores, mask_provider
from cadsurgery.masks.resolve import MaskWrapper, resolve_mask
from cadsurgery.masks.spec import joined
from cadsurgery.support.errors import InvalidInput


@mask_provider("dilate")
class Dilate(MaskWrapper):
    """Grow what another mask keeps, each level by the same window on the fine map."""

    image_only = True

    def __init__(self, mask: object, size: int = 3) -> None:
        """Create the mask.

        Args:
            mask: anything `adaptify` takes as a mask.
            size: odd side of the window in samples of the fine map; each gets the finest level in it.

        Raises:
            InvalidInput: a size that is not odd and positive.
        """
        super().__init__(mask)
        check_odd("size", (size,), "mask dilate")
        self.size = size

    def forward(self, image: Tensor, features: Tensor, grid: Grid) -> Tensor:
        """(B, h, w) int8: the finest level in the window around each sample."""
        levels = self.inner_levels(image, features, grid)
        return -window_maximum(-levels.to(torch.float32), self.size).to(torch.int8)

    def scores(self, image: Tensor, features: Tensor, grid: Grid) -> Tensor:
        """The highest score in the window around each sample."""
        return window_maximum(self.inner_scores(image, features, grid), self.size)


@mask_provider("threshold")
class Threshold(MaskWrapper):
    """Cut the scores of another mask at thresholds, one for each level above the lowest."""

    image_only = True

    def __init__(self, mask: object, at: float | tuple[float, ...] = (0.5,)) -> None:
        """Create the mask.

        Args:
            mask: gives the scores (`MaskProvider.scores`); anything `adaptify` takes as a mask.
            at: what reaches the i-th gets level i, everything else the lowest level; falling.

        Raises:
            InvalidInput: thresholds that are NaN or do not fall.
        """
        super().__init__(mask)
        self.at = several(at)
        check_thresholds(self.at, "mask threshold", falling=True)

    def forward(self, image: Tensor, features: Tensor, grid: Grid) -> Tensor:
        """(B, h, w) int8: level i where the scores reach threshold i, the lowest elsewhere.

        Raises:
            InvalidInput: more thresholds than levels, or the inner mask's scores are none.
        """
        check_count(len(self.at), "thresholds", grid, "mask threshold")
        return levels_of_scores(self.inner_scores(image, features, grid), self.at, grid)

    def scores(self, image: Tensor, features: Tensor, grid: Grid) -> Tensor:
        """Those of the inner mask."""
        return self.inner_scores(image, features, grid)


@mask_provider("union")
class Union(MaskProvider):
    """Keep each place at the finest level that any of several masks gives it."""

    image_only = True

    takes = "many"

    def __init__(self, *masks: object) -> None:
        """Join masks.

        Args:
            masks: two or more of anything `adaptify` takes as a mask.

        Raises:
            InvalidInput: fewer than two.
        """
        super().__init__()
        if len(masks) < 2:
            raise InvalidInput(
                f"a union of {len(masks)} masks.",
                where="mask union",
                next='give two or more: Union("edges", "gradient"), or "edges + gradient".',
            )
        self.masks = nn.ModuleList(resolve_mask(mask) for mask in masks)

    @property
    def parts(self) -> tuple[MaskProvider, ...]:
        """The joined masks."""
        return tuple(self.masks)  # type: ignore[arg-type]

    def spec(self) -> str:
        """The string form that `resolve_mask` reads back: those of the masks with a plus between them."""
        return joined([mask.spec() for mask in self.parts])

    def forward(self, image: Tensor, features: Tensor, grid: Grid) -> Tensor:
        """(B, h, w) int64: the finest level of any mask."""
        found = [checked_levels(mask(image, features, grid), grid, mask.name) for mask in self.parts]
        return torch.stack(found).amin(0)

    def scores(self, image: Tensor, features: Tensor, grid: Grid) -> Tensor:
        """(B, h, w) float64: a finer level always scores higher; among equal ones the highest rank in any mask counts.

        The rank is the share of samples of the same image that score lower, in 0..1: scores of different masks have no
        common scale.
        """
        ranks = []
        for mask in self.parts:
            found = checked_scores(mask.scores(image, features, grid), grid, mask.name, self.name)
            flat = found.double().flatten(1)
            lower = torch.searchsorted(flat.sort(dim=1).values, flat)
            ranks.append(lower.view_as(found) / flat.shape[1])
        levels = self(image, features, grid)
        return grid.max_level - levels + torch.stack(ranks).amax(0)
