"""Sampling of an image at given locations."""

from __future__ import annotations

from typing import Literal, get_args

import torch.nn.functional as F
from torch import Tensor

from cadsurgery.methods.resampling.locations import check_locations, check_size, upsample
from cadsurgery.support.describe import describe
from cadsurgery.support.errors import InvalidInput, check_name

Mode = Literal["nearest", "bilinear"]


def sample(image: Tensor, locations: Tensor, size: int | tuple[int, int], mode: Mode = "nearest") -> Tensor:
    """Sample an image at a grid of locations that is upsampled bilinearly: (B, C, h, w).

    Args:
        image: (B, C, H, W); labels are (B, 1, H, W) integers.
        locations: (B, grid, grid, 2), row and column in 0..1; the grid's sides are moved to the image's, and
            locations outside the image inside.
        size: (height, width) of the result, or one number for both; may be larger than the image.
        mode: `nearest`, as published: the nearest pixel, halves to even; only the image gets gradients. With
            `bilinear` the locations get gradients too.

    Raises:
        InvalidInput: `image` is not an image, `size` is not a size, or the locations do not fit the batch.
        UnknownName: there is no such mode.
    """
    check_name("mode", mode, get_args(Mode))
    if not isinstance(image, Tensor) or image.dim() != 4 or 0 in image.shape or min(image.shape[2:]) < 2:
        raise InvalidInput(
            f"the image is {describe(image)}.",
            next="give a batch (batch, channels, height, width) of at least 2 x 2 pixels.",
        )
    height, width = check_size(size)
    places = upsample(check_locations(locations, image.shape[0]), (height, width)).to(image.device)
    if mode == "bilinear":
        if not image.is_floating_point():
            raise InvalidInput(
                f"the image is {describe(image)}.", next='sample integers with mode="nearest".'
            )
        around = (2 * places.flip(-1) - 1).to(image.dtype)
        return F.grid_sample(image, around, align_corners=True, padding_mode="border")
    rows = (places[..., 0] * (image.shape[2] - 1)).round().long()
    columns = (places[..., 1] * (image.shape[3] - 1)).round().long()
    pixels = (rows * image.shape[3] + columns).flatten(1).unsqueeze(1)
    sampled = image.flatten(2).gather(2, pixels.expand(-1, image.shape[1], -1))
    return sampled.view(*image.shape[:2], height, width)
