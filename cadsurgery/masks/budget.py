"""A mask that keeps the best patches of another one, and always the same number of them."""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from cadsurgery.masks.graded import check_count, several
from cadsurgery.masks.provider import Grid, format_option, mask_provider
from cadsurgery.masks.resolve import MaskWrapper
from cadsurgery.support.errors import InvalidInput


@mask_provider("budget")
class Budget(MaskWrapper):
    """Keep exactly a fraction of the patches: those another mask scores highest; several fractions give levels.

    A patch is an aligned block of R_K x R_K samples (R_K: `Grid.patch`), so that no level changes when the map
    is made legal; where patches divide the map, the number of elements depends on its size alone. Given the
    scores, shapes and control flow depend on no values, as compilers and CUDA graphs want it.
    """

    image_only = True

    def __init__(
        self, mask: object, fraction: float | tuple[float, ...] = (0.3,), per_batch: bool = False
    ) -> None:
        """Create the mask.

        Args:
            mask: gives the scores (`MaskProvider.scores`); anything `adaptify` takes as a mask.
            fraction: of the patches to keep at level 0, 0..1; their number is rounded to the nearest, halves to even.
                Of several, rising, the i-th is the share that gets level i or finer; everything else the lowest. With
                `patch="block"` every patch is at level 0 or the lowest, and the last fraction counts.
            per_batch: the fraction is of all patches of a batch, the best of any image; otherwise of each image.

        Raises:
            InvalidInput: a fraction outside 0..1, or fractions that fall.
        """
        super().__init__(mask)
        self.fraction, self.per_batch = several(fraction), per_batch
        rising = all(fewer <= more for fewer, more in pairwise((0, *self.fraction, 1)))
        if not self.fraction or not rising:
            raise InvalidInput(
                f"a budget of fraction={format_option(self.fraction)}.",
                where="mask budget",
                next="give the share of patches to keep, 0..1, e.g. fraction=0.3, or rising shares: 0.1/0.3 keeps "
                ".1 at level 0 and .3 at level 1 or finer.",
            )

    @property
    def static(self) -> bool:
        """Unless the scores depend on more than image and features, such as labels, which a graph would fix."""
        return not self.dependence

    def forward(self, image: Tensor, features: Tensor, grid: Grid) -> Tensor:
        """(B, h, w) int8: level i in the patches kept for it, the lowest elsewhere.

        Raises:
            InvalidInput: the inner mask's scores have the wrong type or size, or are NaN; more fractions than levels.
        """
        check_count(len(self.fraction), "fractions", grid, "mask budget")
        found = self._of_patches(self.inner_scores(image, features, grid), grid)
        flat = found.flatten(0 if self.per_batch else 1)
        levels = self._levels_of_ranks(flat, grid).view(found.shape)
        height, width = grid.size
        return levels.repeat_interleave(grid.patch, 1).repeat_interleave(grid.patch, 2)[:, :height, :width]

    def kept_patches(self, grid: Grid) -> tuple[int, ...]:
        """The fractions of the patches of each image, or of the batch."""
        images, patches = (1, grid.batch * grid.patches) if self.per_batch else (grid.batch, grid.patches)
        return tuple(images * count for count in self._counts(patches))

    def _counts(self, patches: int) -> list[int]:
        """How many of so many patches get level 0, level 1 or finer, ..."""
        return [round(fraction * patches) for fraction in self.fraction]

    def _levels_of_ranks(self, scores: Tensor, grid: Grid) -> Tensor:
        """Int8, of the shape of the scores (..., N): levels by rank in each row; of equal scores the first leads."""
        order = scores.sort(dim=-1, descending=True, stable=True).indices
        by_rank = torch.full(scores.shape[-1:], grid.max_level, dtype=torch.int8, device=scores.device)
        for level, count in reversed(list(enumerate(self._counts(scores.shape[-1])))):
            by_rank[:count] = min(level, grid.max_level)
        return torch.empty_like(scores, dtype=torch.int8).scatter(-1, order, by_rank.expand_as(order))

    def _of_patches(self, scores: Tensor, grid: Grid) -> Tensor:
        """The scores by patch, once they are known to have a rank."""
        found = patch_scores(scores, grid.patch)
        if not torch.compiler.is_compiling() and found.isnan().any():
            raise InvalidInput(
                "the scores hold infinities of both signs in one patch.",
                where=f"mask budget, scores of mask {self.mask.name}",
                why="their mean is not a number and has no rank.",
                next="check the image and the mask that gives the scores.",
            )
        return found


def patch_scores(scores: Tensor, patch: int) -> Tensor:
    """(B, ceil(h / patch), ceil(w / patch)) float64: mean of the scores (B, h, w) in each aligned block.

    A block at the border counts the samples inside the map. In float64, where sums of equal float32 values are
    exact: equal scores stay equal whatever the size of their blocks.
    """
    samples = scores.double().unsqueeze(1)
    return F.avg_pool2d(samples, patch, ceil_mode=True, count_include_pad=False).squeeze(1)
