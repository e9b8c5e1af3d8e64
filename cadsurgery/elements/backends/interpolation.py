"""The error of interpolated maps as one operation, in graphs for engines that load this package's kernels alone."""

from __future__ import annotations

import torch
from torch import Tensor

from cadsurgery.elements.axes import as_rows


def squared_error(maps: Tensor) -> Tensor:
    """Compute the squared error of bilinear interpolation of maps (B, C, h, w) float32 from every second sample, summed
    over channels: (B, h, w)."""
    batch, _, height, width = maps.shape
    rows = as_rows(maps)  # as the region's first rows, so that both are one value
    error: Tensor = torch.ops.cadsurgery.interpolation_error(rows, batch, height, width)
    return error
