"""Interpolation of class scores from sampled locations back to the pixels of the image.

The position of each pixel among the samples is found by inverting the warp cell by cell, and the scores are
interpolated bilinearly there, on any device, for all scores of an image at once. The published way is piecewise linear
on the Delaunay triangulation of the samples, and takes some 50 times as long
(`recipes/resampling_mobilenetv2/published.py`); both are the same for affine scores where the grid does not fold.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from cadsurgery.elements.backends.native import ELEMENTS
from cadsurgery.kernels.dispatch import call, function
from cadsurgery.methods.resampling.locations import check_locations, check_size, normalise, upsample
from cadsurgery.support.describe import describe
from cadsurgery.support.errors import InvalidInput
from cadsurgery.support.running import running

_POLISHING = 8  # steps of Newton's method


def interpolate_back(scores: Tensor, locations: Tensor, output_size: int | tuple[int, int]) -> Tensor:
    """Interpolate the scores of a sampled image at the pixels of the image: (B, C, H, W).

    Affine scores are exact where the grid does not fold. Of a folded grid some .2 % of the pixels, at the ends of its
    sheets, are up to 7e-2 off.

    Args:
        scores: (B, C, h, w) of any size; row i and column j belong to location (i, j) of the grid upsampled to this
            size.
        locations: sampled locations (B, grid, grid, 2); they need not be normalised, and may be folded.
        output_size: (height, width) of the image, or one number for both.

    Where the grid is folded, several samples lie in one place, and one sheet of the fold is used. Next to the end of a
    sheet the smooth warp is followed, which the samples cut short.

    Raises:
        InvalidInput: scores, size or locations are invalid or do not fit each other.
    """
    shaped = isinstance(scores, Tensor) and scores.dim() == 4 and scores.is_floating_point()
    if not shaped or 0 in scores.shape or min(scores.shape[2:]) < 2:
        raise InvalidInput(
            f"the scores are {describe(scores)}.",
            next="give floating-point scores (batch, classes, height, width) of at least 2 x 2 samples.",
        )
    size, samples = check_size(output_size, "output_size"), (scores.shape[2], scores.shape[3])
    check_locations(locations, scores.shape[0])
    around = invert_warp(locations.detach(), samples, size).flip(0).to(scores.device)
    per_sample = around.new_tensor([2 / (samples[1] - 1), 2 / (samples[0] - 1)])
    around = around.mul_(per_sample.view(2, 1, 1, 1)).sub_(1).to(scores.dtype)
    return F.grid_sample(scores, around.permute(1, 2, 3, 0), align_corners=True, padding_mode="border")


def invert_warp(locations: Tensor, samples: tuple[int, int], size: tuple[int, int]) -> Tensor:
    """Invert the warp: find for each pixel of the image its fractional row and column among the samples, (2, B, H, W).

    Between locations the warp is bilinear, and its inverse in a cell is the root of a quadratic at which the cell is
    not turned over. A grid whose sides lie on the image's, however folded, has such a root for every pixel, because
    turned cells lie on others. If several cells cover a pixel, the cell in which it lies deepest is used. Samples
    next to a location lie on both sides of a kink, so Newton's method on the warp between samples follows there.

    Args:
        locations: (B, n, m, 2), as for `interpolate_back`.
        samples: numbers of sampled rows and columns.
        size: (height, width) of the image.
    """
    if samples[0] < locations.shape[1] or samples[1] < locations.shape[2]:
        locations = upsample(locations, samples).to(locations)  # locations between samples have no effect
    exact = torch.promote_types(locations.dtype, torch.float32)
    scale = locations.new_tensor([size[0] - 1, size[1] - 1], dtype=torch.float64)
    grid = (normalise(locations.double()) * scale).to(exact)
    points = (upsample(locations, samples) * scale).to(exact)
    cells = (grid.shape[1] - 1, grid.shape[2] - 1)
    bent = (_bent(samples[0] - 1, cells[0], grid.device), _bent(samples[1] - 1, cells[1], grid.device))
    enough = 16 * torch.finfo(exact).eps * max(size)
    if grid.is_cpu and not running.is_observed and (kernel := function("invert", ELEMENTS[exact])):
        return _invert_by_kernel(kernel, grid, points, bent, size, enough)
    rows = torch.arange(size[0], dtype=exact, device=grid.device).unsqueeze(1)
    columns = torch.arange(size[1], dtype=exact, device=grid.device)
    coarse = torch.stack([_invert(image_grid, rows, columns) for image_grid in grid], 1)
    per_cell = [(number - 1) / count for number, count in zip(samples, cells, strict=True)]
    return _polish(coarse * coarse.new_tensor(per_cell).view(2, 1, 1, 1), points, bent, enough)


def _invert_by_kernel(
    kernel: Any,
    grid: Tensor,
    samples: Tensor,
    bent: tuple[Tensor, Tensor],
    size: tuple[int, int],
    enough: float,
) -> Tensor:
    """Compute `invert_warp` by `warp.c`, for points (B, n, m, 2) and samples (B, h, w, 2) in pixels."""
    (batch, n, m, _), (h, w) = grid.shape, samples.shape[1:3]
    corners = torch.stack((grid[:, :-1, :-1], grid[:, 1:, :-1], grid[:, :-1, 1:], grid[:, 1:, 1:]))
    low, high = (corners.amin(0) - 1e-3).ceil().clamp_(min=0), (corners.amax(0) + 1e-3).floor()
    boxes, found = torch.cat((low, high), -1).int(), grid.new_empty(2, batch, *size)
    buffers = (grid.contiguous(), samples.contiguous(), boxes, *bent, found)
    call(kernel, (*buffers, batch, n, m, h, w, *size), enough)
    return found


def _bent(steps: int, cells: int, device: torch.device) -> Tensor:
    """Mark (steps,), uint8, the gaps between consecutive samples with a location inside, a kink of the warp."""
    first = torch.arange(steps, device=device)
    return ((first * cells // steps + 1) * steps < (first + 1) * cells).to(torch.uint8)


def _invert(grid: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Return (2, H, W): fractional row and column of each pixel in a grid (n, m, 2) of points in pixels."""
    size = (len(rows), len(columns))
    best = grid.new_full(size, math.inf)  # distance from the centre of the cell
    inverse = grid.new_zeros(2, *size)
    corners = torch.stack((grid[:-1, :-1], grid[1:, :-1], grid[:-1, 1:], grid[1:, 1:]), 2)
    low = (corners.amin(2) - 1e-3).ceil().long().clamp(min=0).tolist()
    high = (corners.amax(2) + 1e-3).floor().long().tolist()
    for i, line in enumerate(corners.tolist()):
        for j, (a, b, c, d) in enumerate(line):
            (top, left), (bottom, right) = low[i][j], high[i][j]
            y, x = rows[top : bottom + 1] - a[0], columns[left : right + 1] - a[1]
            if not len(y) or not len(x):
                continue
            box = (slice(top, bottom + 1), slice(left, right + 1))
            u, v = _solve(y, x, *(_minus(*pair) for pair in ((b, a), (c, a), (_minus(d, b), _minus(c, a)))))
            far = torch.maximum((u - 0.5).abs_(), (v - 0.5).abs_())
            closest = best[box]
            better = far < closest  # False for NaN
            torch.where(better, far, closest, out=closest)
            for coordinate, value in ((inverse[0][box], u.add_(i)), (inverse[1][box], v.add_(j))):
                torch.where(better, value, coordinate, out=coordinate)
    last = grid.new_tensor([grid.shape[0] - 1, grid.shape[1] - 1]).view(2, 1, 1)
    return inverse.clamp_(min=0).minimum(last)


Point = Sequence[float]


def _minus(point: Point, other: Point) -> Point:
    return point[0] - other[0], point[1] - other[1]


def _solve(y: Tensor, x: Tensor, b: Point, c: Point, d: Point) -> tuple[Tensor, Tensor]:
    """Solve (y, x) = u b + v c + u v d for u and v, each (H, W), where the cell is not turned over.

    The result is NaN where there is no solution. Rows y (H, 1) and columns x (W,) are relative to the first corner.

    With cross((y, x) - v c, b + v d) = q0 + q1 v + q2 v^2 = 0, v is the root at which the polynomial increases.
    """
    (by, bx), (cy, cx), (dy, dx) = b, c, d
    twice = y * (-2 * bx) - x * (-2 * by)  # -2 q0
    q1 = (y * dx + (by * cx - bx * cy)) - x * dy
    q2 = cx * dy - cy * dx
    root = (q1 * q1).add_(twice, alpha=2 * q2).sqrt_()
    v = twice / (q1 + root)
    if q2 and bool(q1.min() < 0):
        v = torch.where(q1 >= 0, v, (root - q1) / (2 * q2))
    down = v * dy + by
    if min(by, by + dy) > max(abs(bx), abs(bx + dx)):  # the row equation alone is well conditioned
        return torch.sub(y, v, alpha=cy) / down, v
    across = v * dx + bx
    along = torch.sub(y, v, alpha=cy) * down + torch.sub(x, v, alpha=cx) * across
    return along / (down * down + across * across), v


def _polish(inverse: Tensor, points: Tensor, bent: tuple[Tensor, ...], enough: float) -> Tensor:
    """Refine positions (2, B, H, W) among points (B, h, w, 2) of samples next to a location, by Newton's method."""
    (height, width), samples = inverse.shape[2:], points.shape[1:3]
    is_bent = inverse.new_zeros(inverse.shape[1:], dtype=torch.bool)
    for coordinate, kinks in zip(inverse, bent, strict=True):
        is_bent |= kinks.bool()[coordinate.int().clamp_(max=len(kinks) - 1)]
    places = is_bent.flatten().nonzero().squeeze(1)
    pixels = torch.stack((places // width % height, places % width)).to(inverse)
    image = places // (height * width) * samples[0]
    last = inverse.new_tensor([[samples[0] - 1], [samples[1] - 1]])
    points, inverse = points.flatten(0, 2), inverse.flatten(1)
    place, missed = inverse[:, places], pixels.new_full((len(places),), math.inf)
    for _ in range(_POLISHING):
        if not len(places):
            break
        cell = place.floor().minimum(last - 1)
        u, v = place - cell
        corner = (image + cell[0].long()) * samples[1] + cell[1].long()
        a, b, c, d = (points[corner + step].T for step in (0, samples[1], 1, samples[1] + 1))
        b, c, d = b - a, c - a, d - b - c + a
        left = pixels - (a + u * b + v * c + u * v * d)
        error = left.abs().amax(0)
        is_better = error < missed
        inverse[:, places[is_better]] = place[:, is_better]
        missed = error.minimum(missed)
        go_on = error > enough
        down, across, left = ((b + v * d)[:, go_on], (c + u * d)[:, go_on], left[:, go_on])
        area = down[0] * across[1] - down[1] * across[0]
        step = torch.stack((left[0] * across[1] - left[1] * across[0], down[0] * left[1] - down[1] * left[0]))
        step = torch.where(area == 0, 0, step / area).clamp(-1, 1)
        place = (place[:, go_on] + step).clamp(min=0).minimum(last)
        places, image, missed, pixels = places[go_on], image[go_on], missed[go_on], pixels[:, go_on]
    return inverse.view(2, -1, height, width)
