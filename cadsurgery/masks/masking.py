"""From an image to its lattice: provider, checks, geometry."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from cadsurgery.lattice import Geometry, Lattice
from cadsurgery.masks.provider import Grid, MaskProvider, checked_levels


@dataclass(frozen=True)
class Masking:
    """From an image and its fine map to the lattice: what the rewritten graph calls where the region begins."""

    provider: MaskProvider
    geometry: Geometry
    output_stride: int

    def __call__(self, image: Tensor, features: Tensor) -> Lattice:
        """The lattice for an image (B, C, H, W) whose fine map is `features`."""
        size = (features.shape[2], features.shape[3])
        grid = Grid(features.shape[0], size, self.output_stride, self.geometry.max_level)
        with torch.no_grad():
            found = self.provider(image, features, grid)
        return self.geometry.lattice(checked_levels(found, grid, self.provider.name))
