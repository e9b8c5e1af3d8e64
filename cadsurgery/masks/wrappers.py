"""Masks made from other masks: dilated, thresholded, joined, held to a budget, or steady over a video."""

from __future__ import annotations

import math
from collections import deque
from itertools import pairwise
from threading import local
from typing import Any

import torch
from torch import Tensor, nn

from cadsurgery.masks.filters import mean_of_patches, on_samples, window_maximum
from cadsurgery.masks.graded import SteppedMask
from cadsurgery.masks.mask_options import (
    NUMBER,
    ODD,
    between,
    check_count,
    check_falling,
    check_options,
    format_option,
    several,
)
from cadsurgery.masks.provider import (
    FineMapSpec,
    MaskProvider,
    check_levels,
    check_scores,
    mask_provider,
    no_rank,
)
from cadsurgery.masks.spec import PIPE, join, resolve_mask
from cadsurgery.support.device_checks import check
from cadsurgery.support.errors import InvalidInput
from cadsurgery.support.running import running


class MaskWrapper(MaskProvider):
    """Base of masks made from another mask. In the text form they follow that mask, after a pipe.

    The first constructor parameter of a subclass is the inner mask, anything `resolve_mask` accepts; the others are
    its options.
    """

    takes = "one"
    bytes_per_pixel = 32

    def __init__(self, mask: object) -> None:
        super().__init__()
        self.mask = resolve_mask(mask)

    @property
    def parts(self) -> tuple[MaskProvider, ...]:
        """The inner mask."""
        return (self.mask,)

    def spec(self) -> str:
        """Return the text form, which `resolve_mask` reads back: the inner mask, a pipe, this mask."""
        return f"{self.mask.spec()} {PIPE} {super().spec()}"

    def inner_levels(self, image: Tensor, features: Tensor, grid: FineMapSpec) -> Tensor:
        """Return the checked levels of the inner mask, (B, h, w) int64."""
        return check_levels(self.mask(image, features, grid), grid, self.mask.name)

    def inner_scores(self, image: Tensor, features: Tensor, grid: FineMapSpec) -> Tensor:
        """Return the checked scores of the inner mask, (B, h, w)."""
        return check_scores(self.mask.scores(image, features, grid), grid, self.mask.name, self.name)


@mask_provider("dilate")
class Dilate(MaskWrapper):
    """Grow the area another mask keeps, each level by the same window on the fine map.

    Args:
        mask: anything `adaptify` takes as a mask.
        size: odd side of the window in samples of the fine map; each sample gets the finest level in its window.
    """

    image_only = ignores_image = True

    def __init__(self, mask: object, size: int = 3) -> None:
        super().__init__(mask)
        check_options("dilate", size=(size, ODD))
        self.size = size

    def reach(self, grid: FineMapSpec) -> int | None:
        """Return the inner mask's, and half of the window."""
        inner = self.mask.reach(grid)
        return None if inner is None else inner + self.size // 2 * grid.output_stride

    def forward(self, image: Tensor, features: Tensor, grid: FineMapSpec) -> Tensor:
        """Return (B, h, w) int8: the finest level in the window around each sample."""
        levels = self.inner_levels(image, features, grid)
        return -window_maximum(-levels.to(torch.float32), self.size).to(torch.int8)

    def scores(self, image: Tensor, features: Tensor, grid: FineMapSpec) -> Tensor:
        """Return the highest score in the window around each sample."""
        return window_maximum(self.inner_scores(image, features, grid), self.size)


@mask_provider("threshold")
class Threshold(MaskWrapper, SteppedMask):
    """Cut the scores of another mask at thresholds, one for each level above the lowest.

    Args:
        mask: its scores (`MaskProvider.scores`) are used; anything `adaptify` accepts as a mask.
        at: falling thresholds; scores that reach the i-th get level i, everything else gets the lowest level.
    """

    image_only = ignores_image = True

    def __init__(self, mask: object, at: float | tuple[float, ...] = (0.5,)) -> None:
        super().__init__(mask)
        self.at = several(at)
        check_options("threshold", at=(self.at, NUMBER))
        check_falling("threshold", self.at)

    def reach(self, grid: FineMapSpec) -> int | None:
        """Return the inner mask's."""
        return self.mask.reach(grid)

    def steps(self, image: Tensor, features: Tensor, grid: FineMapSpec) -> list[Tensor]:
        """Mark where the inner mask's scores reach each threshold."""
        scores = self.inner_scores(image, features, grid)
        return [scores >= threshold for threshold in self.at]

    def scores(self, image: Tensor, features: Tensor, grid: FineMapSpec) -> Tensor:
        """Return the inner mask's scores."""
        return self.inner_scores(image, features, grid)


@mask_provider("union")
class Union(MaskProvider):
    """Keep each place at the finest level that any of several masks gives it.

    Args:
        masks: two or more masks, each anything `adaptify` accepts as a mask.
    """

    image_only = ignores_image = True

    takes = "many"

    def __init__(self, *masks: object) -> None:
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
        """Return the text form, which `resolve_mask` reads back: the masks with a plus between them."""
        return join([mask.spec() for mask in self.parts])

    def reach(self, grid: FineMapSpec) -> int | None:
        """Return the largest of the masks'."""
        every = [mask.reach(grid) for mask in self.parts]
        return None if None in every else max(one for one in every if one is not None)

    def forward(self, image: Tensor, features: Tensor, grid: FineMapSpec) -> Tensor:
        """Return (B, h, w) int64: the finest level of any mask."""
        levels = [check_levels(mask(image, features, grid), grid, mask.name) for mask in self.parts]
        return torch.stack(levels).amin(0)

    def scores(self, image: Tensor, features: Tensor, grid: FineMapSpec) -> Tensor:
        """Rank samples by level, and among equal levels by their highest rank in any mask: (B, h, w) float64.

        The rank in a mask is the share of samples of the image with a lower score, 0..1, because scores of different
        masks have no common scale.
        """
        ranks = []
        for mask in self.parts:
            scores = check_scores(mask.scores(image, features, grid), grid, mask.name, self.name)
            flat = scores.double().flatten(1)
            lower = torch.searchsorted(flat.sort(dim=1).values, flat)
            ranks.append(lower.view_as(scores) / flat.shape[1])
        levels = self(image, features, grid)
        return grid.max_level - levels + torch.stack(ranks).amax(0)


@mask_provider("budget")
class Budget(MaskWrapper):
    """Keep exactly a fraction of the patches: those another mask scores highest; several fractions give graded
    levels.

    A patch is an aligned block of R_K x R_K samples (R_K: `FineMapSpec.patch`), so no level changes when the map is
    made legal. Where patches divide the map, the number of elements depends only on its size. Shapes and control
    flow do not depend on the values of the scores, as compilers and CUDA graphs require.

    Args:
        mask: its scores (`MaskProvider.scores`) are used; anything `adaptify` accepts as a mask.
        fraction: share of the patches kept at level 0, 0..1; the number of patches is rounded, halves to even. With
            several rising fractions, the i-th is the share that gets level i or finer; everything else gets the
            lowest level. With `patch="block"` every patch is at level 0 or the lowest level, and the last fraction
            counts.
        per_batch: the fraction applies to all patches of a batch together instead of to each image.
    """

    image_only = ignores_image = True

    def __init__(
        self, mask: object, fraction: float | tuple[float, ...] = (0.3,), per_batch: bool = False
    ) -> None:
        super().__init__(mask)
        self.fraction, self.per_batch = several(fraction), per_batch
        is_number = all(isinstance(share, (int, float)) for share in self.fraction)
        rising = is_number and all(fewer <= more for fewer, more in pairwise((0, *self.fraction, 1)))
        if not self.fraction or not rising:
            raise InvalidInput(
                f"a budget of fraction={format_option(self.fraction)}.",
                where="mask budget",
                next="give the share of patches to keep, 0..1, e.g. fraction=0.3, or rising shares: 0.1/0.3 keeps "
                ".1 at level 0 and .3 at level 1 or finer.",
            )

    @property
    def judges_each_image(self) -> bool:
        """False for a budget of the batch."""
        return not self.per_batch and super().judges_each_image

    def forward(self, image: Tensor, features: Tensor, grid: FineMapSpec) -> Tensor:
        """Return (B, h, w) int8: level i in the patches kept for it, the lowest level elsewhere.

        Raises:
            InvalidInput: the inner mask's scores have the wrong type or size or are NaN, or there are more fractions
                than levels.
        """
        return self.levels_of_patches(self.patch_scores(image, features, grid), grid)

    def reach_of_patches(self, grid: FineMapSpec) -> int | None:
        """Return the distance in input pixels from which on the picture has no influence on the score of a patch; None
        if all of it counts, as for ranks among all places of a picture."""
        return self.mask.reach(grid) if self.find(Union) is None else None

    def patch_scores(self, image: Tensor, features: Tensor, grid: FineMapSpec) -> Tensor:
        """Return the score of each patch of a picture or a band of it, (B, rows, columns) float64."""
        check_count("budget", "fractions", len(self.fraction), grid.max_level)
        return self._of_patches(self.inner_scores(image, features, grid), grid)

    def levels_of_patches(self, scores: Tensor, grid: FineMapSpec) -> Tensor:
        """Return (B, h, w) int8 by the scores of all patches."""
        flat = scores.flatten(0 if self.per_batch else 1)
        levels = self._levels_of_ranks(flat, grid).view(scores.shape)
        return on_samples(levels, grid.patch, grid.size)

    def kept_patches(self, grid: FineMapSpec) -> tuple[int, ...]:
        """Return the fractions of the patches, of each image or of the batch, as numbers for the whole batch."""
        images, patches = (1, grid.batch * grid.patches) if self.per_batch else (grid.batch, grid.patches)
        return tuple(images * count for count in self._counts(patches))

    def _counts(self, patches: int) -> list[int]:
        """Return how many of `patches` patches get level 0, level 1 or finer, ..."""
        return [round(fraction * patches) for fraction in self.fraction]

    def _levels_of_ranks(self, scores: Tensor, grid: FineMapSpec) -> Tensor:
        """Return int8 levels by rank in each row of scores (..., N); of equal scores the first one ranks higher."""
        # The order itself is not used: OpenVINO's sort does not keep the order of equal scores.
        falling = scores.sort(dim=-1, descending=True).values
        number = torch.full((), scores.shape[-1], dtype=torch.float64, device=scores.device)
        levels = torch.full_like(scores, grid.max_level, dtype=torch.int8)
        for level, fraction in reversed(list(enumerate(self.fraction))):
            count = (number * fraction).round().long()  # as in `_counts`, but for sizes unknown to a graph
            lowest = falling.index_select(-1, (count - 1).clamp(min=0).view(1))  # score that is kept
            above, equal = scores > lowest, scores == lowest
            is_kept = above | (equal & (equal.cumsum(-1) <= count - above.sum(-1, keepdim=True)))
            levels = torch.where(is_kept, min(level, grid.max_level), levels).to(torch.int8)
        return levels

    def _of_patches(self, scores: Tensor, grid: FineMapSpec) -> Tensor:
        """Average scores (B, h, w) over patches: (B, ceil(h / patch), ceil(w / patch)) float64.

        A border patch counts its samples inside the map. Float64 sums of equal float32 values are exact, so equal
        scores stay equal whatever the size of their patches.
        """
        of_patches = mean_of_patches(scores.double(), grid.patch)
        if not running.in_graph:
            check(of_patches.isnan().any(), self._has_no_rank)
        return of_patches

    def _has_no_rank(self) -> InvalidInput:
        what = "the scores hold infinities of both signs in one patch."
        where = f"mask budget, scores of mask {self.mask.name}"
        return no_rank(what, where, "their mean is not a number and has no rank.")


@mask_provider("smooth")
class Smooth(MaskWrapper):
    """Over video frames, keep a sample until the inner mask has not asked for it for some frames (hysteresis).

    Every call counts as a frame, including that of `net.macs`. Each position in the batch is a video of its own, and so
    are the calls of each thread; for several videos in calls of one thread, or one video in calls of several, use one
    object per video, `net(frame, mask=smooth_of_this_video)`. A change of batch size, image size or device starts anew,
    as `reset()` does for all threads. State dicts, copies and files do not contain the frames.

    Args:
        mask: anything `adaptify` takes as a mask.
        hold: number of frames for which a sample keeps its level after the last request for it; 0 for none.
    """

    image_only = ignores_image = True

    needs = "earlier images"

    def __init__(self, mask: object, hold: int = 3) -> None:
        super().__init__(mask)
        check_options("smooth", hold=(hold, between(0, math.inf, "3")))
        self.hold = hold
        self.reset()

    def reset(self) -> None:
        """Forget all frames; the next frame is the first of its video."""
        self._levels, self._scores = _Frames(self.hold + 1), _Frames(self.hold + 1)

    def forward(self, image: Tensor, features: Tensor, grid: FineMapSpec) -> Tensor:
        """Return (B, h, w) int64: the finest level of this frame and the `hold` frames before it."""
        return self._levels.with_next(self.inner_levels(image, features, grid), grid).amin(0)

    def scores(self, image: Tensor, features: Tensor, grid: FineMapSpec) -> Tensor:
        """Return the highest score of this frame and the `hold` frames before it; not shared with `forward`."""
        return self._scores.with_next(self.inner_scores(image, features, grid), grid).amax(0)


class _Frames(local):
    """The most recent maps of a stream, in each thread of its own; cleared when the grid, dtype or device changes.

    A copy has none.
    """

    def __init__(self, count: int) -> None:  # runs again in each thread
        self.maps: deque[Tensor] = deque(maxlen=count)
        self.key: object = None

    def __reduce__(self) -> Any:
        return _Frames, (self.maps.maxlen,)

    def with_next(self, newest: Tensor, grid: FineMapSpec) -> Tensor:
        """Append a map and return all remembered maps, (frames, B, h, w)."""
        key = (grid, newest.dtype, newest.device)
        if key != self.key:
            self.maps.clear()
            self.key = key
        self.maps.append(newest.detach())
        return torch.stack(tuple(self.maps))
