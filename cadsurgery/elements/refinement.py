"""Refinement: what a small network on the entering features adds to a fine map where it is interpolated.

The values of a downsampled region at its anchors are those of full resolution as long as convolutions alone come
between; what lies between anchors is interpolated, and the edges of things are lost. The entering features still have
them.
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

REACH = 2  # fine pixels that two 3x3 convolutions see to each side
PLACES = 3  # channels of `places`


class Refinement(nn.Module):
    """A residual for a fine map of a network: 1x1, 3x3 of each channel, 1x1, 3x3 of each channel, 1x1.

    It sees the entering features, the map and where cells lie, and changes the map within two pixels of what is below
    full resolution. It adds nothing at first.

    Args:
        features: channels of the entering features.
        channels: of the map.
        hidden: channels in between.
        like: a tensor of the type and on the device of the network.
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
        """Weights from a seed, the last of them 0."""
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for layer in (self.inside, self.around, self.mixed, self.beyond):
                drawn = torch.rand(layer.weight.shape, generator=generator) * 2 - 1
                layer.weight.copy_(drawn / layer.weight[0].numel() ** 0.5)
            for layer in (self.inside, self.around, self.mixed, self.beyond, self.missing):
                assert layer.bias is not None
                layer.bias.zero_()
            self.missing.weight.zero_()

    def forward(self, x: Tensor, features: Tensor, places: Tensor) -> Tensor:
        """(B, C, h, w): the map x refined; features (B, D, h, w), see `places_of` for places (B, 3, h, w)."""
        hidden = F.relu(self.inside(torch.cat((x, features, places[:, 1:]), 1)))
        hidden = hidden + F.relu(self.mixed(self.around(hidden)))
        return x + places[:, :1] * self.missing(F.relu(self.beyond(hidden)))


def refine(x: Tensor, features: Tensor, lattice: Lattice, refinement: Refinement) -> Tensor:
    """A fine map (B, C, h, w) refined by the entering features (B, D, h, w) near what the lattice has below full
    resolution; with everything at level 0 as it is.

    Raises:
        InvalidInput: the map has another size than the features.
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
    """Refine the result of `resize_to_dense` for elements x with these arguments: the correction that `refine` adds to
    their fine map is read at the same places."""
    if lattice.uniform_level == 0:
        return resized
    fine = to_dense(x, 1, guide=guide)
    return resized + read_as_resized(refine(fine, features, lattice, refinement) - fine, spacing, **scaling)


def places_of(lattice: Lattice) -> Tensor:
    """(B, 3, h, w) float32: 1 within two pixels of what is below full resolution; the level, 1 the lowest; and how far
    the anchors are, in sides of the cell, 1 the middle between four."""
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
