"""Masks by any function from an image to a score map."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from cadsurgery.elements.lattice import describe
from cadsurgery.masks.filters import blurred, grey_of
from cadsurgery.masks.graded import ScoredMask
from cadsurgery.masks.provider import Grid, checked_scores, mask_provider
from cadsurgery.support.errors import InvalidInput
from cadsurgery.support.provenance import function_at

SPECTRAL = "cadsurgery.masks.saliency:spectral_residual"


@mask_provider("saliency", source="default function: spectral residual, Hou and Zhang, CVPR 2007")
class SaliencyMask(ScoredMask):
    """Keep high what a function of the image scores at least the threshold; several thresholds give levels."""

    image_only = True

    def __init__(
        self,
        function: str | Callable[[Tensor], Tensor] = SPECTRAL,
        threshold: float | tuple[float, ...] = (1.0,),
    ) -> None:
        """Create the mask.

        Args:
            function: from the image batch (B, C, H, W), normalised as the network sees it, to a floating-point map
                (B, h, w) or (B, 1, h, w) of any size, which is resized to the fine map; a callable, or the name
                `module:function` of one that can be imported.
            threshold: on the map; several as in `ScoredMask`.

        Raises:
            UnknownName: no such module or function.
            InvalidInput: no function, or thresholds that are NaN or do not fall.
        """
        super().__init__(threshold)
        example = f"saliency:function={SPECTRAL}"
        self._function: Any = function
        if isinstance(function, str):  # its own is no import, so that every file may name it
            own = function == SPECTRAL
            self._function = spectral_residual if own else function_at(function, "mask saliency", example)
        if not callable(self._function):
            raise InvalidInput(
                f"{describe(self._function)} is no function.",
                where="mask saliency",
                next="give a function image -> scores, or the name module:function of one.",
            )
        self.function = function if isinstance(function, str) else _name_of(function)
        self._named = isinstance(function, str)

    def scores(self, image: Tensor, features: Tensor, grid: Grid) -> Tensor:
        """The function's map, at least float32, resized to the fine map (bilinear, with antialiasing).

        Raises:
            InvalidInput: the function returns no score map.
        """
        found = self._function(image)
        if isinstance(found, Tensor) and found.dim() == 4 and found.shape[1] == 1:
            found = found.squeeze(1)
        wrong = not isinstance(found, Tensor) or not found.is_floating_point() or found.dim() != 3
        if wrong or found.shape[0] != grid.batch or 0 in found.shape:
            raise InvalidInput(
                f"the function {self.function} returned {describe(found)}.",
                where="mask saliency",
                next=f"return a floating-point tensor ({grid.batch}, h, w) or ({grid.batch}, 1, h, w) of scores.",
            )
        scores = found.to(torch.promote_types(found.dtype, torch.float32))
        if tuple(scores.shape[1:]) != grid.size:
            resized = F.interpolate(scores.unsqueeze(1), size=grid.size, mode="bilinear", antialias=True)
            scores = resized.squeeze(1)
        return checked_scores(scores, grid, self.function, "saliency")

    @property
    def storable(self) -> bool:
        """Only if the function was given by name."""
        return self._named


def spectral_residual(image: Tensor) -> Tensor:
    """(B, h, w) float32, the short side 64: what is unlike the rest of the image (Hou and Zhang, CVPR 2007).

    The spectrum of the small grey image, its log amplitude minus that smoothed by 3 x 3, transformed back, squared,
    smoothed (standard deviation 2.5) and divided by its mean over the image; there objects are above 3.
    """
    height, width = image.shape[2:]
    scale = 64 / min(height, width)
    size = (max(1, round(height * scale)), max(1, round(width * scale)))
    grey = grey_of(image.float()).unsqueeze(1)
    small = F.interpolate(grey, size=size, mode="bilinear", antialias=True).squeeze(1)
    spectrum = torch.fft.fft2(small)
    amplitude = spectrum.abs().clamp(min=1e-6).log()
    smooth = F.avg_pool2d(F.pad(amplitude.unsqueeze(1), (1, 1, 1, 1), mode="replicate"), 3, stride=1).squeeze(
        1
    )
    residual = torch.polar((amplitude - smooth).exp(), spectrum.angle())
    saliency = blurred(torch.fft.ifft2(residual).abs().square(), 2.5)
    return saliency / saliency.mean((1, 2), keepdim=True).clamp(min=1e-12)


def _name_of(function: Callable[[Tensor], Tensor]) -> str:
    return getattr(function, "__name__", type(function).__name__)
