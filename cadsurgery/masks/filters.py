"""Filters of images and maps that masks are made of."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from cadsurgery.kernels.load import has_bf16_dot, is_observed
from cadsurgery.masks.provider import FineMapSpec

GREY = (0.299, 0.587, 0.114)


def grey_of(image: Tensor) -> Tensor:
    """(B, H, W): luminance of an image (B, 3, H, W) as published, the mean of any other number of channels."""
    if image.shape[1] != 3:
        return image.mean(1)
    weights = torch.tensor(GREY, dtype=image.dtype, device=image.device)
    if (
        image.device.type == "cpu"
        and image.stride(1) == 1
        and not is_observed()
        and has_bf16_dot(image.dtype)
    ):
        rows = image.permute(0, 2, 3, 1)  # of which the product has half the time as a convolution
        pixels = rows.flatten(0, 2).view(rows.shape).permute(0, 3, 1, 2)  # whose strides tell their layout
        return F.conv2d(pixels, weights.view(1, 3, 1, 1)).squeeze(1)
    return torch.einsum("bchw,c->bhw", image, weights)


def differences(grey: Tensor, outside: str) -> tuple[Tensor, Tensor]:
    """Signed central differences of (B, H, W) to the right and downwards, not halved, as published.

    Args:
        grey: the map.
        outside: `"constant"`, zero as published, or `"replicate"`, the nearest pixel.
    """
    padded = F.pad(grey.unsqueeze(1), (1, 1, 1, 1), mode=outside).squeeze(1)
    right = padded[:, 1:-1, 2:] - padded[:, 1:-1, :-2]
    down = padded[:, 2:, 1:-1] - padded[:, :-2, 1:-1]
    return right, down


def blur(values: Tensor, sigma: float) -> Tensor:
    """(B, H, W) smoothed by a Gaussian of standard deviation `sigma` in samples, cut at three; 0 leaves it as it is."""
    if sigma == 0:
        return values
    half = math.ceil(3 * sigma)
    places = torch.arange(-half, half + 1, dtype=torch.float64)
    bell = torch.exp(-places.square() / (2 * sigma**2))
    weights = (bell / bell.sum()).to(values)
    padded = F.pad(values.unsqueeze(1), (half,) * 4, mode="replicate")
    return F.conv2d(F.conv2d(padded, weights.view(1, 1, 1, -1)), weights.view(1, 1, -1, 1)).squeeze(1)


def window_maximum(values: Tensor, side: int, stride: int = 1) -> Tensor:
    """(B, ceil(H / stride), ceil(W / stride)): the largest of floating-point values (B, H, W) in the side x side window
    (odd) around every stride-th pixel from the first.

    Separable: the maximum over columns, then over rows; as views, many times faster than max-pooling.
    """
    half = min(side // 2, max(values.shape[1:]))  # a larger one sees no more, and needs memory
    side = 2 * half + 1
    tall = F.pad(values, (0, 0, half, half), value=-math.inf).unfold(1, side, stride).amax(-1)
    return F.pad(tall, (half, half), value=-math.inf).unfold(2, side, stride).amax(-1)


def near(values: Tensor, side: int, grid: FineMapSpec) -> Tensor:
    """(B, h, w) on the fine map: the largest of the values (B, H, W) in the side x side window around the pixel each
    sample stands on; cut or replicated to the size of the fine map."""
    sampled = window_maximum(values, side, grid.output_stride)
    height, width = grid.size
    missing = (max(0, width - sampled.shape[2]), max(0, height - sampled.shape[1]))
    if any(missing):
        padded = F.pad(sampled.unsqueeze(1), (0, missing[0], 0, missing[1]), mode="replicate")
        sampled = padded.squeeze(1)
    return sampled[:, :height, :width]


def resize(values: Tensor, size: tuple[int, int]) -> Tensor:
    """(B, h, w): values (B, H, W) at another size, bilinear with antialiasing; as they are if they have it."""
    if tuple(values.shape[1:]) == size:
        return values
    return F.interpolate(values.unsqueeze(1), size=size, mode="bilinear", antialias=True).squeeze(1)


def on_samples(cells: Tensor, side: int, size: tuple[int, int]) -> Tensor:
    """(..., h, w): the value of each aligned block (..., ceil(h / side), ceil(w / side)) on its samples."""
    repeated = cells.repeat_interleave(side, -2).repeat_interleave(side, -1)
    return repeated[..., : size[0], : size[1]]


def mean_of_patches(samples: Tensor, patch: int) -> Tensor:
    """(..., ceil(h / patch), ceil(w / patch)): mean of each aligned block of a map (..., h, w), at the border of the
    samples inside.

    As sums: few engines pool in float64.
    """
    padded = F.pad(samples, (0, -samples.shape[-1] % patch, 0, -samples.shape[-2] % patch))
    sums = padded.unflatten(-2, (-1, patch)).unflatten(-1, (-1, patch)).sum((-3, -1))
    down, across = (
        (length - torch.arange(0, length, patch, device=samples.device)).clamp(max=patch)
        for length in samples.shape[-2:]
    )
    return sums / (down.unsqueeze(1) * across)


def closeness(reached: Tensor) -> Tensor:
    """(B, h, w): minus the distance, the larger of both axes, of each sample to the nearest where a floating-point map
    is 1 and not 0; minus the longer side of the map where it is 0 everywhere."""
    longest = max(reached.shape[1:])
    scores = torch.full_like(reached, -longest)
    for _ in range(longest):
        scores += reached
        reached = window_maximum(reached, 3)
    return scores
