"""Image filters that masks are built from."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from cadsurgery.elements.sizes import constant, most
from cadsurgery.masks.provider import FineMapSpec

GREY = (0.299, 0.587, 0.114)


def grey_of(image: Tensor) -> Tensor:
    """Return the grey image (B, H, W): published weights for 3 channels, otherwise the mean over channels."""
    if image.shape[1] != 3:
        return image.mean(1)
    weights = constant(GREY, image.dtype, image.device)
    return torch.einsum("bchw,c->bhw", image, weights)


def differences(grey: Tensor, outside: str) -> tuple[Tensor, Tensor]:
    """Compute the signed central differences of (B, H, W) to the right and downwards, not halved, as published.

    Args:
        grey: grey images.
        outside: padding mode: `"constant"` for zeros, as published, or `"replicate"`.
    """
    padded = F.pad(grey.unsqueeze(1), (1, 1, 1, 1), mode=outside).squeeze(1)
    right = padded[..., 1:-1, 2:] - padded[..., 1:-1, :-2]
    down = padded[..., 2:, 1:-1] - padded[..., :-2, 1:-1]
    return right, down


def blur(values: Tensor, sigma: float) -> Tensor:
    """Smooth (B, H, W) with a Gaussian of standard deviation `sigma` in samples, truncated at 3 sigma."""
    if sigma == 0:
        return values
    half = math.ceil(3 * sigma)
    bell = [math.exp(-(place**2) / (2 * sigma**2)) for place in range(-half, half + 1)]
    weights = constant(tuple(weight / sum(bell) for weight in bell), values.dtype, values.device)
    padded = F.pad(values.unsqueeze(1), (half,) * 4, mode="replicate")
    return F.conv2d(F.conv2d(padded, weights.view(1, 1, 1, -1)), weights.view(1, 1, -1, 1)).squeeze(1)


def window_maximum(values: Tensor, side: int, stride: int = 1) -> Tensor:
    """Compute the maximum of (B, H, W) in a side x side window (odd) around every `stride`-th pixel, from the first
    on.

    The maximum is taken over columns, then over rows, on unfolded views: many times faster than max-pooling.

    Returns:
        (B, ceil(H / stride), ceil(W / stride)).
    """
    half = min(side // 2, max(values.shape[1:]))  # a window beyond the map sees no more, and needs memory
    side = 2 * half + 1
    tall = F.pad(values, (0, 0, half, half), value=-math.inf).unfold(1, side, stride).amax(-1)
    return F.pad(tall, (half, half), value=-math.inf).unfold(2, side, stride).amax(-1)


def near(values: Tensor, side: int, grid: FineMapSpec) -> Tensor:
    """Compute the maximum of image-sized values (B, H, W) in a side x side window around the pixel of each sample.

    The result (B, h, w) is cropped or replicated to the size of the fine map.
    """
    sampled = window_maximum(values, side, grid.output_stride)
    height, width = grid.size
    missing = (most(0, width - sampled.shape[2]), most(0, height - sampled.shape[1]))
    if any(missing):
        padded = F.pad(sampled.unsqueeze(1), (0, missing[0], 0, missing[1]), mode="replicate")
        sampled = padded.squeeze(1)
    return sampled[..., :height, :width]


def resize(values: Tensor, size: tuple[int, int]) -> Tensor:
    """Resize (B, H, W) to (B, h, w), bilinear with antialiasing; unchanged if the size is the same."""
    if tuple(values.shape[1:]) == size:
        return values
    return F.interpolate(values.unsqueeze(1), size=size, mode="bilinear", antialias=True).squeeze(1)


def on_samples(cells: Tensor, side: int, size: tuple[int, int]) -> Tensor:
    """Expand block values (..., ceil(h / side), ceil(w / side)) to a map (..., h, w), constant in each block."""
    repeated = cells.repeat_interleave(side, -2).repeat_interleave(side, -1)
    return repeated[..., : size[0], : size[1]]


def mean_of_patches(samples: Tensor, patch: int) -> Tensor:
    """Compute the mean of each aligned patch of a map (..., h, w); a border patch counts its samples only.

    It is computed with sums because few inference engines pool in float64.

    Returns:
        (..., ceil(h / patch), ceil(w / patch)).
    """
    padded = F.pad(samples, (0, -samples.shape[-1] % patch, 0, -samples.shape[-2] % patch))
    sums = padded.unflatten(-2, (-1, patch)).unflatten(-1, (-1, patch)).sum((-3, -1))
    down, across = (
        (length - torch.arange(0, length, patch, device=samples.device)).clamp(max=patch)
        for length in samples.shape[-2:]
    )
    return sums / (down.unsqueeze(1) * across)


def closeness(reached: Tensor) -> Tensor:
    """Compute minus the distance (maximum of both axes) of each sample to the nearest sample where the map is 1.

    Args:
        reached: (B, h, w) floating-point, 0 or 1. Where a map is 0 everywhere, the result is minus its longer side.
    """
    longest = max(reached.shape[1:])
    scores = torch.full_like(reached, -longest)
    for _ in range(longest):
        scores += reached
        reached = window_maximum(reached, 3)
    return scores
