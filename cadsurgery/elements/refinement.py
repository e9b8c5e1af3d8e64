"""Refinement: a small network that corrects a fine map where it is interpolated, using the features before the region.

A downsampled region has full-resolution values at its anchors as long as it contains convolutions only. Values between
anchors are interpolated, which blurs the edges of objects. The features that enter the region still have these edges.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cadsurgery.elements.elements import Elements, to_dense
from cadsurgery.elements.lattice import Lattice
from cadsurgery.elements.resizing import read_as_resized
from cadsurgery.elements.sizes import is_statically_true
from cadsurgery.support.errors import InvalidInput

REACH = 2  # receptive field of two 3x3 convolutions to each side, in fine pixels
PLACES = 3  # channels of `places`


class Refinement(nn.Module):
    """A residual for a fine map of a network: 1x1, depthwise 3x3, 1x1, depthwise 3x3 and 1x1 convolutions.

    Its inputs are the features that enter the region, the map and the positions of the cells. It changes the map
    within two pixels of downsampled cells. The last layer is zero at first, so the map is initially unchanged.

    Args:
        features: channels of the features that enter the region.
        channels: channels of the map.
        hidden: channels of the hidden layers.
        like: a tensor with the network's dtype and device.
    """

    def __init__(self, features: int, channels: int, hidden: int, like: Tensor) -> None:
        super().__init__()
        self.inside = nn.Conv2d(channels + features + PLACES - 1, hidden, 1)
        self.around = nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden)
        self.mixed = nn.Conv2d(hidden, hidden, 1)
        self.beyond = nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden)
        self.missing = nn.Conv2d(hidden, channels, 1)
        self.to(like)
        self.restart(0)

    def restart(self, seed: int) -> None:
        """Initialise the weights from a seed; the last layer is set to 0."""
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for layer in (self.inside, self.around, self.mixed, self.beyond):
                drawn = (
                    torch.rand(layer.weight.shape, generator=generator, dtype=torch.float32, device="cpu") * 2
                    - 1
                )
                layer.weight.copy_(drawn / layer.weight[0].numel() ** 0.5)
            for layer in (self.inside, self.around, self.mixed, self.beyond, self.missing):
                assert layer.bias is not None
                layer.bias.zero_()
            self.missing.weight.zero_()

    def forward(self, x: Tensor, features: Tensor, places: Tensor) -> Tensor:
        """Refine the map x (B, C, h, w); features are (B, D, h, w), places (B, 3, h, w) are from `places_of`."""
        hidden = F.relu(self.inside(torch.cat((x, features, places[:, 1:]), 1)))
        hidden = hidden + F.relu(self.mixed(self.around(hidden)))
        return x + places[:, :1] * self.missing(F.relu(self.beyond(hidden)))


def refine(x: Tensor, features: Tensor, lattice: Lattice, refinement: Refinement) -> Tensor:
    """Refine a fine map (B, C, h, w) near downsampled cells, using the features that enter the region (B, D, h, w).
    A map with everything at level 0 is unchanged.

    Raises:
        InvalidInput: the map and the features differ in size.
    """
    if lattice.uniform_level == 0:
        return x
    if not all(
        is_statically_true(one == two) for one, two in zip(x.shape[2:], features.shape[2:], strict=True)
    ):
        raise InvalidInput(
            f"a map of {tuple(x.shape[2:])} is to be refined by features of {tuple(features.shape[2:])}.",
            why="where the refinement was put, both were of one size; the image is not divisible by the strides.",
            next="pad the image to a multiple of the lowest output stride, or convert without a refinement.",
        )
    return refinement(x, features, places_of(lattice).to(x))


def refine_resized(
    resized: Tensor,
    x: Elements,
    spacing: int,
    features: Tensor,
    lattice: Lattice,
    refinement: Refinement,
    *,
    guide: Tensor | None = None,
    **scaling: Any,
) -> Tensor:
    """Refine the result of `resize_to_dense` for the same arguments: the correction that `refine` makes to the fine
    map of the elements x is resized in the same way and added."""
    if lattice.uniform_level == 0:
        return resized
    fine = to_dense(x, 1, guide=guide)
    return resized + read_as_resized(refine(fine, features, lattice, refinement) - fine, spacing, **scaling)


def places_of(lattice: Lattice) -> Tensor:
    """Return three channels (B, 3, h, w) float32: 1 within two pixels of a downsampled cell; the level, scaled to
    0..1; and the distance to the anchors in sides of the cell, where 1 is the middle between four anchors."""
    levels, sides = lattice.levels, lattice.side_map
    low = (levels > 0).float().unsqueeze(1)
    near = F.max_pool2d(low, 2 * REACH + 1, 1, REACH)
    away = torch.zeros_like(low)
    for axis in (1, 2):
        shape = [1, 1, 1]
        shape[axis] = levels.shape[axis]
        offset = torch.arange(levels.shape[axis], device=levels.device).view(shape) % sides
        away = away + (torch.minimum(offset, sides - offset) / sides).unsqueeze(1)
    return torch.cat((near, levels.unsqueeze(1) / lattice.geometry.max_level, away), 1)
