"""Mask `content`: keeps what differs from a smooth background, for pictures that are mostly empty."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor

from cadsurgery.elements.sizes import divide_up
from cadsurgery.masks.context import call_context
from cadsurgery.masks.filters import differences, grey_of, on_samples
from cadsurgery.masks.mask_options import SHARE, between, check_options
from cadsurgery.masks.provider import FineMapSpec, MaskProvider, mask_provider

_SAMPLES = 64  # along each side, for the median of a picture


@mask_provider("content")
class ContentMask(MaskProvider):
    """Keep the cells in which the picture changes more than its own noise, and the cells around them.

    A pixel has content where its grey value changes by more than `noise` times the median change of the picture: paper,
    film grain, JPEG blocks and uneven light change everywhere, and so raise the median. A cell of the lowest resolution
    is kept if at least `share` of its pixels have content, or one within `margin` cells of it has.

    Args:
        noise: threshold, as a multiple of the picture's median change.
        least: smallest threshold, for pictures without noise, relative to the standard deviation of pictures: that of
            photos, or the one that the network's normalisation states if it is smaller.
        share: share of a cell's pixels that must have content.
        margin: cells kept around.
    """

    image_only = True

    def __init__(self, noise: float = 4.0, least: float = 0.2, share: float = 0.1, margin: int = 1) -> None:
        super().__init__()
        checked = {"noise": (noise, between(0, math.inf, "4")), "least": (least, between(0, math.inf, "0.2"))}
        checked |= {"share": (share, SHARE), "margin": (margin, between(0, math.inf, "1"))}
        check_options("content", **checked)
        self.noise, self.least, self.share, self.margin = noise, least, share, margin

    def forward(self, image: Tensor, features: Tensor, grid: FineMapSpec) -> Tensor:
        """Return a bool map (B, h, w) that is True in the kept cells."""
        cells = self._shares(image, grid) >= max(self.share, 1e-9)
        if self.margin:
            side = 2 * self.margin + 1
            cells = F.max_pool2d(cells.float(), side, 1, self.margin) > 0
        return on_samples(cells, grid.side, grid.size)

    def scores(self, image: Tensor, features: Tensor, grid: FineMapSpec) -> Tensor:
        """Return the share of pixels with content of each cell, repeated on its samples."""
        return on_samples(self._shares(image, grid), grid.side, grid.size)

    def contrast(self, image: Tensor, grid: FineMapSpec) -> tuple[Tensor, Tensor]:
        """Return the largest change (B,) of a picture, and the change from which on a pixel has content."""
        change, limit = self._changes(image, grid)
        return change.flatten(1).amax(1), limit

    def _changes(self, image: Tensor, grid: FineMapSpec) -> tuple[Tensor, Tensor]:
        """Return the change (B, H, W) at each pixel, and the threshold (B,) for it."""
        change, limit = _change(image), call_context().limits.get(self)
        return change, self._limit(samples_of(change), grid) if limit is None else limit

    def _limit(self, samples: Tensor, grid: FineMapSpec) -> Tensor:
        return (self.noise * median(samples)).clamp(min=self.least * grid.deviation)

    def reach(self, grid: FineMapSpec) -> int:
        """Return the margin, a cell that contains the sample, and the two pixels that a change depends on; the
        threshold comes from `limit_of_parts` then."""
        return (self.margin + 1) * grid.side * grid.output_stride + 2

    def limit_of_parts(
        self, parts: Iterable[tuple[int, int, Tensor]], height: int, grid: FineMapSpec
    ) -> Tensor:
        """Return the threshold (B,) of a whole picture, the multiple of the median change at `samples_of` it.

        The picture is given in parts: first row, the last one plus one, and these rows (B, C, rows, W) with two above
        and below, where there are any.
        """
        wanted, found = torch.arange(_SAMPLES) * height // _SAMPLES, []
        for first, end, rows in parts:
            above = min(first, 2)
            for row in wanted[(wanted >= first) & (wanted < end)].tolist():
                top = max(row - first + above - 2, 0)
                near = rows[:, :, top : row - first + above + 3]
                found.append(_change(near)[:, row - first + above - top])
        changes = torch.stack(found, 1)
        return self._limit(changes[:, :, _places(changes.shape[2], changes.device)], grid)

    def _shares(self, image: Tensor, grid: FineMapSpec) -> Tensor:
        """Return the share of pixels with content of each cell (B, rows, columns)."""
        change, limit = self._changes(image, grid)
        side = grid.side * grid.output_stride
        height, width = (divide_up(length, grid.side) * side for length in grid.size)
        has = (change > limit.view(-1, 1, 1)).float()
        has = F.pad(has, (0, width - has.shape[2], 0, height - has.shape[1]))
        return has.unflatten(1, (-1, side)).sum(2).unflatten(2, (-1, side)).sum(3) / side**2


def _sum_pairs(values: Tensor) -> Tensor:
    """Return the sums (B, H - 1, W - 1) of two by two neighbours."""
    across = values[:, :, 1:] + values[:, :, :-1]
    return across[:, 1:] + across[:, :-1]


def _change(image: Tensor) -> Tensor:
    """Return the largest difference (B, H, W) of neighbours of the smoothed grey picture."""
    framed = F.pad(grey_of(image).float().unsqueeze(1), (1, 1, 1, 1), mode="replicate").squeeze(1)
    smooth = _sum_pairs(_sum_pairs(framed)) / 16  # a quarter, a half, a quarter
    right, down = differences(smooth, "replicate")
    return right.abs().maximum(down.abs())


def _places(length: int, device: torch.device) -> Tensor:
    return torch.arange(_SAMPLES, device=device) * length // _SAMPLES


def samples_of(values: Tensor) -> Tensor:
    """Return a regular grid of the values of maps (B, H, W), of a fixed size.

    ONNX has no median, but can sort a fixed number of values of an image of any size.
    """
    rows, columns = (_places(length, values.device) for length in values.shape[1:])
    return values[:, rows][:, :, columns]


def median(samples: Tensor) -> Tensor:
    """Return the median (B,) of `samples_of` each map."""
    half = _SAMPLES * _SAMPLES // 2
    return samples.flatten(1).topk(half, 1, largest=False).values.amax(1)
