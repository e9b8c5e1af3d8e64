"""The published way back of non-uniform sampling, to compare ours with: linear on a triangulation of the samples.

Marin et al., Efficient Segmentation: Learning Downsampling Near Semantic Boundaries, ICCV 2019.
"""

from __future__ import annotations

import numpy as np
import torch
from scipy.interpolate import LinearNDInterpolator
from torch import Tensor

from cadsurgery.methods.resampling.locations import check_size, normalise, upsample


def interpolate_back(scores: Tensor, locations: Tensor, size: int | tuple[int, int]) -> Tensor:
    """Interpolate the scores of a sampled image at the pixels of the image as the published code does, (B, C, H, W).

    Args:
        scores: (B, C, h, w); row i and column j belong to location (i, j) of the grid upsampled to this size.
        locations: sampled locations (B, n, m, 2), vertical first; they need not be normalised.
        size: (height, width) of the image, or one number for both.

    Returns:
        On the CPU and in the type of the scores. Where several samples lie in one place, or four on a circle, several
        triangulations are right; scipy's is taken.
    """
    height, width = check_size(size, "size")
    samples = (scores.shape[2], scores.shape[3])
    places = upsample(normalise(locations.detach().double()), samples)
    points = normalise(places) * places.new_tensor([height - 1, width - 1])
    pixels = np.mgrid[:height, :width].reshape(2, -1).T
    images = []
    for image, at in zip(scores.detach().cpu(), points.cpu(), strict=True):
        values = image.flatten(1).T.double().numpy()
        found = LinearNDInterpolator(at.reshape(-1, 2).numpy(), values)(pixels)
        images.append(torch.from_numpy(found).T.reshape(-1, height, width))
    return torch.stack(images).to(scores.dtype)
