"""The error of interpolated maps as one operation, in graphs for engines that load this package's kernels alone."""

from __future__ import annotations

import torch
from torch import Tensor

_LIBRARY = torch.library.Library("cadsurgery", "FRAGMENT")
_LIBRARY.define("interpolation_error(Tensor maps) -> Tensor")


@torch.library.register_fake("cadsurgery::interpolation_error")
def _error(maps: Tensor) -> Tensor:
    return maps.new_empty(maps.shape[:3])


def squared_error(maps: Tensor) -> Tensor:
    """Compute the squared error of bilinear interpolation of maps (B, C, h, w) float32 from every second sample, summed
    over channels: (B, h, w)."""
    error: Tensor = torch.ops.cadsurgery.interpolation_error(maps.permute(0, 2, 3, 1))
    return error
