"""Interface to `warp.c`: the inverse of a warp in compiled code, in one pass over the pixels of an image."""

from __future__ import annotations

import torch
from torch import Tensor

from cadsurgery.kernels.dispatch import call, function
from cadsurgery.support.running import running

_ELEMENTS = {torch.float32: "float32", torch.float64: "float64"}


def supports(points: Tensor) -> bool:
    """Return True if there is a kernel for the points' device and dtype and torch traces or counts no operations."""
    if points.device.type != "cpu" or points.dtype not in _ELEMENTS or running.is_observed:
        return False
    return function("invert", _ELEMENTS[points.dtype]) is not None


def invert(
    grid: Tensor, samples: Tensor, bent: tuple[Tensor, Tensor], size: tuple[int, int], enough: float
) -> Tensor:
    """Return the position of each pixel among the samples, (2, B, H, W): fractional rows, then columns.

    Args:
        grid: (B, n, m, 2), grid points in pixels.
        samples: (B, h, w, 2), positions of the samples in pixels.
        bent: (h - 1) and (w - 1), uint8: whether a grid location lies between two samples.
        size: (height, width) of the image.
        enough: tolerance of the result, in pixels.
    """
    (batch, n, m, _), (h, w) = grid.shape, samples.shape[1:3]
    corners = torch.stack((grid[:, :-1, :-1], grid[:, 1:, :-1], grid[:, :-1, 1:], grid[:, 1:, 1:]))
    low, high = (corners.amin(0) - 1e-3).ceil().clamp_(min=0), (corners.amax(0) + 1e-3).floor()
    boxes = torch.cat((low, high), -1).int()
    grid, samples = grid.contiguous(), samples.contiguous()
    found = grid.new_empty(2, batch, *size)
    buffers = (grid, samples, boxes, *(part.contiguous() for part in bent), found)
    kernel = function("invert", _ELEMENTS[grid.dtype])
    assert kernel is not None
    call(kernel, (*buffers, batch, n, m, h, w, *size), enough)
    return found
