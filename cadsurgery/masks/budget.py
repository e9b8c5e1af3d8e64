"""A mask that keeps the best patches of another one, and always the same number of them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from cadsurgery.errors import InvalidInput
from cadsurgery.lattice import describe
from cadsurgery.masks.provider import Grid, mask_provider
from cadsurgery.masks.resolve import MaskWrapper


@mask_provider("budget")
class Budget(MaskWrapper):
    """Keep exactly a fraction of the patches: those another mask scores highest.

    A patch is an aligned block of R_K x R_K samples (R_K: `Grid.patch`), so that no level changes when the map
    is made legal; where patches divide the map, the number of elements depends on its size alone. Given the
    scores, shapes and control flow depend on no values, as compilers and CUDA graphs want it.
    """

    static = True

    def __init__(self, mask: object, fraction: float = 0.3, per_batch: bool = False) -> None:
        """Create the mask.

        Args:
            mask: gives the scores (`MaskProvider.scores`); anything `adaptify` takes as a mask.
            fraction: of the patches to keep, 0..1; their number is rounded to the nearest, halves to even.
            per_batch: the fraction is of all patches of a batch, the best of any image; otherwise of each image.

        Raises:
            InvalidInput: a fraction outside 0..1.
        """
        super().__init__(mask)
        if not 0 <= fraction <= 1:
            raise InvalidInput(
                f"a budget of fraction={fraction}.",
                where="mask budget",
                next="give the share of patches to keep, 0..1, e.g. fraction=0.3.",
            )
        self.fraction, self.per_batch = fraction, per_batch

    def forward(self, image: Tensor, features: Tensor, grid: Grid) -> Tensor:
        """(B, h, w) int8: level 0 in the kept patches, the lowest elsewhere.

        Raises:
            InvalidInput: the inner mask's scores have the wrong type or size, or are NaN.
        """
        found = self._of_patches(self.mask.scores(image, features, grid), grid)
        keep = _best(found.flatten(0 if self.per_batch else 1), self.fraction).view(found.shape)
        height, width = grid.size
        keep = keep.repeat_interleave(grid.patch, 1).repeat_interleave(grid.patch, 2)[:, :height, :width]
        return torch.where(keep, 0, grid.max_level).to(torch.int8)

    def kept_patches(self, grid: Grid) -> int:
        """The fraction of the patches of each image, or of the batch."""
        if self.per_batch:
            return _count(self.fraction, grid.batch * grid.patches)
        return grid.batch * _count(self.fraction, grid.patches)

    def _of_patches(self, scores: Tensor, grid: Grid) -> Tensor:
        """The scores of the inner mask by patch, once they are known to be scores."""
        where = f"mask budget, scores of mask {self.mask.name}"
        if not scores.is_floating_point() or tuple(scores.shape) != (grid.batch, *grid.size):
            raise InvalidInput(
                f"the scores are {describe(scores)}.",
                where=where,
                next=f"give a floating-point tensor of shape {(grid.batch, *grid.size)}.",
            )
        found = patch_scores(scores, grid.patch)
        if not torch.compiler.is_compiling() and found.isnan().any():
            raise InvalidInput(
                "the scores hold NaN, or infinities of both signs in one patch.",
                where=where,
                why="what is not a number has no rank.",
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


def _count(fraction: float, patches: int) -> int:
    return round(fraction * patches)


def _best(scores: Tensor, fraction: float) -> Tensor:
    """Bool, of the shape of the scores (..., N): the highest of each row; of equal ones the first."""
    count = _count(fraction, scores.shape[-1])
    order = scores.sort(dim=-1, descending=True, stable=True).indices
    return torch.zeros_like(scores, dtype=torch.bool).scatter(-1, order[..., :count], True)
