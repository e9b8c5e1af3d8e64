"""Masks by differences of the grey image: edges as published (Hesse et al. 2023, supplementary; reference code
`segmentation/main.py`) and the magnitude of the gradient.

Both look at the tensor the network sees: RGB in [0, 1] after the ImageNet mean and standard deviation. On raw pixels
other thresholds are needed.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cadsurgery.masks.filters import blurred, differences, grey_of
from cadsurgery.masks.graded import GradedMask, check_sigma
from cadsurgery.masks.provider import mask_provider


@mask_provider("edges", source="Hesse et al., CVPRW 2023: thresholds 0.15, 0.35, 0.95 with dilation 11")
class EdgeMask(GradedMask):
    """Keep high what lies near an edge of the image; several thresholds give graded levels."""

    def __init__(
        self, threshold: float | tuple[float, ...] = (0.35,), dilation: int | tuple[int, ...] = (11,)
    ) -> None:
        """Create the mask; see `GradedMask`."""
        super().__init__(threshold, dilation)

    def strength(self, image: Tensor) -> Tensor:
        """(B, H, W): the larger of the signed central differences to the right and downwards, zero outside.

        Signed as published: only steps from dark to bright count.
        """
        return torch.maximum(*differences(grey_of(image), "constant"))


@mask_provider("gradient", source="after the published edges, without sign")
class GradientMask(GradedMask):
    """Keep high what lies near a steep place of the image, rising or falling; several thresholds give levels."""

    def __init__(
        self,
        threshold: float | tuple[float, ...] = (0.35,),
        dilation: int | tuple[int, ...] = (11,),
        sigma: float = 0.0,
    ) -> None:
        """Create the mask; threshold and dilation as in `GradedMask`.

        Args:
            threshold: on the length of the vector of central differences: a step across one axis is as strong as
                to `edges`, whatever its sign.
            dilation: odd side in image pixels.
            sigma: standard deviation in pixels of a Gaussian that smooths the grey image first; 0 for none.

        Raises:
            InvalidInput: as `GradedMask`; a negative or infinite sigma.
        """
        super().__init__(threshold, dilation)
        check_sigma(sigma, "mask gradient")
        self.sigma = sigma

    def strength(self, image: Tensor) -> Tensor:
        """(B, H, W): length of the vector of the central differences, the border replicated."""
        right, down = differences(blurred(grey_of(image), self.sigma), "replicate")
        return (right.square() + down.square()).sqrt()
