"""Masks by what interpolation would lose: detail of the features that enter the region."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from cadsurgery.errors import InvalidInput
from cadsurgery.masks.filters import blurred
from cadsurgery.masks.graded import check_count, check_thresholds, levels_of_scores, several
from cadsurgery.masks.provider import Grid, MaskProvider, mask_provider


@mask_provider("detail", source="ours; measured in recipes/camvid_mobilenetv2")
class DetailMask(MaskProvider):
    """Keep high where linear interpolation from every second sample misses the entering features most.

    The squared error is summed over channels, smoothed, so that kept areas are compact, and divided by its mean over
    the image: a threshold of 2 keeps what misses twice the average. No training, no labels, hardly any work.
    """

    def __init__(self, threshold: float | tuple[float, ...] = (1.5,), sigma: float = 2.0) -> None:
        """Create the mask.

        Args:
            threshold: on the relative error; the i-th decides what gets level i, everything else the lowest level.
            sigma: standard deviation of the smoothing, in samples of the fine map; 0 for none.

        Raises:
            InvalidInput: thresholds that are NaN or do not fall, or a negative sigma.
        """
        super().__init__()
        self.threshold, self.sigma = several(threshold), sigma
        check_thresholds(self.threshold, "mask detail", falling=True)
        if not 0 <= sigma < float("inf"):
            raise InvalidInput(
                f"sigma={sigma} is no width.",
                where="mask detail",
                next="give 0 or a positive number such as 2.",
            )

    def forward(self, image: Tensor, features: Tensor, grid: Grid) -> Tensor:
        """(B, h, w) int8: level i where the relative error reaches threshold i, the lowest elsewhere.

        Raises:
            InvalidInput: more thresholds than levels.
        """
        check_count(len(self.threshold), "thresholds", grid, "mask detail")
        return levels_of_scores(self.scores(image, features, grid), self.threshold, grid)

    def scores(self, image: Tensor, features: Tensor, grid: Grid) -> Tensor:
        """The smoothed error relative to its mean over the image."""
        error = blurred(interpolation_error(features), self.sigma)
        return error / error.mean((1, 2), keepdim=True).clamp(min=torch.finfo(error.dtype).tiny)


def interpolation_error(features: Tensor) -> Tensor:
    """(B, h, w), at least float32: squared distance of a map (B, C, h, w) from the bilinear interpolation of its every
    second sample, the border replicated, summed over channels."""
    features = features.to(torch.promote_types(features.dtype, torch.float32))
    height, width = features.shape[2:]
    kept = features[:, :, ::2, ::2]
    rows, columns = kept.shape[2:]
    size = (2 * rows - 1, 2 * columns - 1)
    between = F.interpolate(kept, size=size, mode="bilinear", align_corners=True)
    found = F.pad(between, (0, width - size[1], 0, height - size[0]), mode="replicate")
    return (features - found).square().sum(1)
