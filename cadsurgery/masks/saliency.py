"""Saliency of an image: a function that files and users name, `cadsurgery.masks.saliency:spectral_residual`."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from cadsurgery.masks.filters import blur, grey_of


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
    saliency = blur(torch.fft.ifft2(residual).abs().square(), 2.5)
    return saliency / saliency.mean((1, 2), keepdim=True).clamp(min=1e-12)
