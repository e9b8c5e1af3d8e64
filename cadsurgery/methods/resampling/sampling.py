"""An image at given locations."""

from __future__ import annotations

from typing import Literal, get_args

import torch.nn.functional as F
from torch import Tensor

from cadsurgery.elements.lattice import describe
from cadsurgery.methods.resampling.locations import check_locations, check_size, upsample
from cadsurgery.support.errors import InvalidInput, check_name

Mode = Literal["nearest", "bilinear"]


def sample(image: Tensor, locations: Tensor, size: int | tuple[int, int], mode: Mode = "nearest") -> Tensor:
    """(B, C, h, w): an image at locations, upsampled to a size bilinearly.

    Args:
        image: (B, C, H, W); of labels, (B, 1, H, W) integers.
        locations: (B, grid, grid, 2), row and column in 0..1; sides are put on the image's and the rest inside it.
        size: (height, width) of what is sampled, or one number for both; may be larger than the image.
        mode: `nearest` pixel, half to even, as published: gradients go to the image alone. `bilinear`: to the
            locations too.

    Raises:
        InvalidInput: what is no image, no size, or no locations of this batch.
        UnknownName: no such mode.
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
    found = image.flatten(2).gather(2, pixels.expand(-1, image.shape[1], -1))
    return found.view(*image.shape[:2], height, width)
