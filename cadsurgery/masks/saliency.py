"""Saliency of an image. Files and users refer to it as `cadsurgery.masks.saliency:spectral_residual`."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from cadsurgery.masks.filters import blur, grey_of


def spectral_residual(image: Tensor) -> Tensor:
    """Compute a saliency map (B, h, w) float32 whose short side is 64 (spectral residual: Hou and Zhang, CVPR 2007).

    The log amplitude of the small grey image's spectrum, minus its 3 x 3 mean, is transformed back, squared, smoothed
    (standard deviation 2.5) and divided by its mean over the image. Objects have values above 3.
    """
    height, width = image.shape[2:]
    scale = 64 / min(height, width)
    size = (max(1, round(height * scale)), max(1, round(width * scale)))
    grey = grey_of(image.float()).unsqueeze(1)
    small = F.interpolate(grey, size=size, mode="bilinear", antialias=True).squeeze(1)
    spectrum = torch.fft.fft2(small)
    amplitude = spectrum.abs().clamp(min=1e-6).log()
    padded = F.pad(amplitude.unsqueeze(1), (1, 1, 1, 1), mode="replicate")
    smooth = F.avg_pool2d(padded, 3, stride=1).squeeze(1)
    residual = torch.polar((amplitude - smooth).exp(), spectrum.angle())
    saliency = blur(torch.fft.ifft2(residual).abs().square(), 2.5)
    return saliency / saliency.mean((1, 2), keepdim=True).clamp(min=1e-12)
