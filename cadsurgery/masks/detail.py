"""Masks by what interpolation would lose: detail of the features that enter the region."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from cadsurgery.masks.filters import blurred
from cadsurgery.masks.graded import ScoredMask, check_sigma
from cadsurgery.masks.provider import Grid, mask_provider


@mask_provider("detail", source="ours; measured in recipes/camvid_mobilenetv2")
class DetailMask(ScoredMask):
    """Keep high where linear interpolation from every second sample misses the entering features most.

    The squared error is summed over channels, smoothed, so that kept areas are compact, and divided by its mean over
    the image: a threshold of 2 keeps what misses twice the average. No training, no labels, hardly any work.
    """

    def __init__(self, threshold: float | tuple[float, ...] = (1.5,), sigma: float = 2.0) -> None:
        """Create the mask.

        Args:
            threshold: on the relative error; several as in `ScoredMask`.
            sigma: standard deviation of the smoothing, in samples of the fine map; 0 for none.

        Raises:
            InvalidInput: thresholds that are NaN or do not fall, or a negative sigma.
        """
        super().__init__(threshold)
        check_sigma(sigma, "mask detail")
        self.sigma = sigma

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
