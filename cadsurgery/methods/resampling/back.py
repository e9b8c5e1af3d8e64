"""From class scores at locations back to the pixels of the image.

Two ways that agree where the grid does not fold. Published: piecewise linear on the Delaunay triangulation of the
points. Ours: each pixel's place among the samples, by inverting the warp cell by cell, and bilinear interpolation
there; no triangulation, on any device, and of all scores of an image at once.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Literal, get_args

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from cadsurgery.elements.backends import warp
from cadsurgery.elements.lattice import describe
from cadsurgery.methods.resampling.locations import check_locations, check_size, normalise, upsample
from cadsurgery.support.errors import InvalidInput, check_name

Back = Literal["triangulation", "inverse"]
_BLOCK = 2**20  # pairs of a triangle and a pixel that are looked at together
_THIN = 1e-6  # height in pixels of triangles that only rounding makes
_POLISHING = 8  # steps of Newton's method


def interpolate_back(
    scores: Tensor, locations: Tensor, output_size: int | tuple[int, int], method: Back = "triangulation"
) -> Tensor:
    """(B, C, H, W): scores of a sampled image, at the pixels of the image. Exact for what is affine in the image.

    Args:
        scores: (B, C, h, w), of any size: of the sample in row i and column j the locations upsampled to this size.
        locations: (B, grid, grid, 2) that were sampled at; they need not be normalised, and may be folded.
        output_size: (height, width) of the image, or one number for both.
        method: `triangulation`, as published; or `inverse` of the warp, many times faster. Where the grid is folded
            several samples lie in one place: triangulated, they are mixed; inverted, one sheet of the fold is seen, and
            next to where it ends the place is that of the smooth warp, which samples cut short.

    Raises:
        InvalidInput: what are no scores, no size, or no locations of this batch.
        UnknownName: no such method.
    """
    check_name("method", method, get_args(Back))
    shaped = isinstance(scores, Tensor) and scores.dim() == 4 and scores.is_floating_point()
    if not shaped or 0 in scores.shape or min(scores.shape[2:]) < 2:
        raise InvalidInput(
            f"the scores are {describe(scores)}.",
            next="give floating-point scores (batch, classes, height, width) of at least 2 x 2 samples.",
        )
    size, samples = check_size(output_size, "output_size"), (scores.shape[2], scores.shape[3])
    check_locations(locations, scores.shape[0])
    if method == "inverse":
        around = _places(locations.detach(), samples, size).flip(0).to(scores.device)
        per_sample = around.new_tensor([2 / (samples[1] - 1), 2 / (samples[0] - 1)])
        around = around.mul_(per_sample.view(2, 1, 1, 1)).sub_(1).to(scores.dtype)
        return F.grid_sample(scores, around.permute(1, 2, 3, 0), align_corners=True, padding_mode="border")
    points = upsample(locations.detach(), samples).cpu() * torch.tensor([size[0] - 1, size[1] - 1])
    images = []
    for one, places in zip(scores.flatten(2), points.flatten(1, 2), strict=True):
        corners, weights = (part.to(one.device) for part in _triangulate(places, size))
        images.append((one[:, corners] * weights.to(one.dtype)).sum(-1))
    return torch.stack(images).unflatten(2, size)


# -- the published way -----------------------------------------------------------------------------------


def _triangulate(points: Tensor, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """(H W, 3) points around each pixel, and their weights: corners of a Delaunay triangle of points (N, 2)."""
    from matplotlib.tri import Triangulation  # which has Qhull with it

    rows, columns = points.numpy().T
    corners = torch.from_numpy(Triangulation(columns, rows).triangles.astype(np.int64))
    best = torch.full((size[0] * size[1],), -math.inf, dtype=torch.float64)
    chosen = torch.zeros(len(best), 3, dtype=torch.int64)
    weights = torch.zeros(len(best), 3, dtype=torch.float64)
    for triangles, pixels, found in _inside(points, corners, size):
        least = found.amin(-1)  # the triangle that a pixel lies in deepest, which rounding makes no other
        deepest = best.scatter_reduce(0, pixels, least, "amax")
        is_deepest = (least == deepest[pixels]).nonzero().squeeze(1)
        winner = torch.full_like(best, -1, dtype=torch.int64)
        winner.scatter_reduce_(0, pixels[is_deepest], is_deepest, "amax")  # one of several
        winner = winner[winner >= 0]
        pixels, best = pixels[winner], deepest
        chosen[pixels], weights[pixels] = corners[triangles[winner]], found[winner]
    weights = weights.clamp(min=0)
    return chosen, weights / weights.sum(-1, keepdim=True)


def _inside(
    points: Tensor, corners: Tensor, size: tuple[int, int]
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Triangles and pixels in the box around them, and the weights of their corners there; in blocks."""
    first, second, third = (points[corner] for corner in corners.T)
    across, down = second - first, third - first
    area = across[:, 0] * down[:, 1] - across[:, 1] * down[:, 0]
    of_triangle = torch.stack((first, second, third))
    low = (of_triangle.amin(0) - 1e-9).ceil().long().clamp(min=0)
    high = (of_triangle.amax(0) + 1e-9).floor().long().minimum(torch.tensor(size) - 1)
    sides = (high - low + 1).clamp(min=0)
    longest = torch.stack((across, down, third - second)).square().sum(-1).amax(0)
    counts = torch.where(area.abs() > _THIN * longest.sqrt(), sides.prod(-1), 0)
    filled = counts.nonzero().squeeze(1)
    ends = counts[filled].cumsum(0)
    blocks = torch.searchsorted(ends, torch.arange(0, int(ends[-1]), _BLOCK)).tolist()
    for begin, end in pairwise([*blocks, len(filled)]):
        some = filled[begin:end]
        number = counts[some]
        triangles = some.repeat_interleave(number)
        within = torch.arange(len(triangles)) - (number.cumsum(0) - number).repeat_interleave(number)
        width = sides[triangles, 1]
        rows, columns = low[triangles, 0] + within // width, low[triangles, 1] + within % width
        away = torch.stack((rows, columns), -1) - first[triangles]
        step, fall = across[triangles], down[triangles]
        u = (away[:, 0] * fall[:, 1] - away[:, 1] * fall[:, 0]) / area[triangles]
        v = (step[:, 0] * away[:, 1] - step[:, 1] * away[:, 0]) / area[triangles]
        found = torch.stack((1 - u - v, u, v), -1)
        is_near = found.amin(-1) > -1e-3
        yield triangles[is_near], (rows * size[1] + columns)[is_near], found[is_near]


# -- ours ------------------------------------------------------------------------------------------------


def inverse_warp(locations: Tensor, samples: tuple[int, int], size: tuple[int, int]) -> Tensor:
    """(B, H, W, 2): row and column among the samples of each pixel of the image, as fractions: the warp's inverse.

    The warp is bilinear in the cells between locations: its inverse there is the root of a quadratic at which the cell
    is not turned over. A grid whose sides lie on the image's, however folded, has one for every pixel: turned cells
    lie on others. Where several do, the one is taken in whose cell the pixel lies deepest. Samples next to a location
    lie on both sides of a kink; there Newton's method on the warp between samples follows.

    Args:
        locations: (B, n, m, 2), as of `interpolate_back`.
        samples: rows and columns sampled.
        size: (height, width) of the image.

    Raises:
        InvalidInput: no locations, or a size of less than 2.
    """
    check_locations(locations, len(locations) if isinstance(locations, Tensor) and locations.dim() else 1)
    found = _places(locations.detach(), check_size(samples, "samples"), check_size(size))
    return found.permute(1, 2, 3, 0)


def _places(locations: Tensor, samples: tuple[int, int], size: tuple[int, int]) -> Tensor:
    """(2, B, H, W), of `inverse_warp`: in compiled code, or by torch."""
    if samples[0] < locations.shape[1] or samples[1] < locations.shape[2]:
        locations = upsample(locations, samples).to(locations)  # what is between samples is not seen
    exact = torch.promote_types(locations.dtype, torch.float32)
    scale = locations.new_tensor([size[0] - 1, size[1] - 1], dtype=torch.float64)
    grid = (normalise(locations.double()) * scale).to(exact)
    points = (upsample(locations, samples) * scale).to(exact)
    cells = (grid.shape[1] - 1, grid.shape[2] - 1)
    bent = (_bent(samples[0] - 1, cells[0], grid.device), _bent(samples[1] - 1, cells[1], grid.device))
    enough = 16 * torch.finfo(exact).eps * max(size)
    if warp.supports(grid):
        return warp.invert(grid, points, bent, size, enough)
    rows = torch.arange(size[0], dtype=exact, device=grid.device).unsqueeze(1)
    columns = torch.arange(size[1], dtype=exact, device=grid.device)
    found = torch.stack([_invert(one, rows, columns) for one in grid], 1)
    per_cell = [(number - 1) / of for number, of in zip(samples, cells, strict=True)]
    return _polish(found * found.new_tensor(per_cell).view(2, 1, 1, 1), points, bent, enough)


def _bent(steps: int, cells: int, device: torch.device) -> Tensor:
    """(steps), uint8: whether a location lies between a sample and the next, so that there is a kink."""
    first = torch.arange(steps, device=device)
    return ((first * cells // steps + 1) * steps < (first + 1) * cells).to(torch.uint8)


def _invert(grid: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """(2, H, W): row and column in a grid (n, m, 2) of points in pixels, as fractions."""
    size = (len(rows), len(columns))
    best = grid.new_full(size, math.inf)  # distance from the middle of the cell
    found = grid.new_zeros(2, *size)
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
            better = far < closest  # not what is no number
            torch.where(better, far, closest, out=closest)
            for of_axis, value in ((found[0][box], u.add_(i)), (found[1][box], v.add_(j))):
                torch.where(better, value, of_axis, out=of_axis)
    last = grid.new_tensor([grid.shape[0] - 1, grid.shape[1] - 1]).view(2, 1, 1)
    return found.clamp_(min=0).minimum(last)


Point = Sequence[float]


def _minus(one: Point, other: Point) -> Point:
    return one[0] - other[0], one[1] - other[1]


def _solve(y: Tensor, x: Tensor, b: Point, c: Point, d: Point) -> tuple[Tensor, Tensor]:
    """u and v, each (H, W), at which (y, x) = u b + v c + u v d, where the cell is not turned over; not a number where
    it does not reach. Rows y (H, 1) and columns x (W,) as seen from its first corner.

    With cross((y, x) - v c, b + v d) = q0 + q1 v + q2 v^2 = 0, v is the root at which this grows.
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
    if min(by, by + dy) > max(abs(bx), abs(bx + dx)):  # rows alone say it well
        return torch.sub(y, v, alpha=cy) / down, v
    across = v * dx + bx
    along = torch.sub(y, v, alpha=cy) * down + torch.sub(x, v, alpha=cx) * across
    return along / (down * down + across * across), v


def _polish(found: Tensor, points: Tensor, bent: tuple[Tensor, ...], enough: float) -> Tensor:
    """Places (2, B, H, W) among points (B, h, w, 2) of samples, those next to a location made exact."""
    (height, width), samples = found.shape[2:], points.shape[1:3]
    is_bent = found.new_zeros(found.shape[1:], dtype=torch.bool)
    for of_axis, kinks in zip(found, bent, strict=True):
        is_bent |= kinks.bool()[of_axis.int().clamp_(max=len(kinks) - 1)]
    places = is_bent.flatten().nonzero().squeeze(1)
    wanted = torch.stack((places // width % height, places % width)).to(found)
    image = places // (height * width) * samples[0]
    last = found.new_tensor([[samples[0] - 1], [samples[1] - 1]])
    points, found = points.flatten(0, 2), found.flatten(1)
    place, missed = found[:, places], wanted.new_full((len(places),), math.inf)
    for _ in range(_POLISHING):
        if not len(places):
            break
        cell = place.floor().minimum(last - 1)
        u, v = place - cell
        corner = (image + cell[0].long()) * samples[1] + cell[1].long()
        a, b, c, d = (points[corner + step].T for step in (0, samples[1], 1, samples[1] + 1))
        b, c, d = b - a, c - a, d - b - c + a
        left = wanted - (a + u * b + v * c + u * v * d)
        error = left.abs().amax(0)
        is_better = error < missed
        found[:, places[is_better]] = place[:, is_better]
        missed = error.minimum(missed)
        go_on = error > enough
        down, across, left = ((b + v * d)[:, go_on], (c + u * d)[:, go_on], left[:, go_on])
        area = down[0] * across[1] - down[1] * across[0]
        step = torch.stack((left[0] * across[1] - left[1] * across[0], down[0] * left[1] - down[1] * left[0]))
        step = torch.where(area == 0, 0, step / area).clamp(-1, 1)
        place = (place[:, go_on] + step).clamp(min=0).minimum(last)
        places, image, missed, wanted = places[go_on], image[go_on], missed[go_on], wanted[:, go_on]
    return found.view(2, -1, height, width)
