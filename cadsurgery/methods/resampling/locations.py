"""Grids of sampling locations, the grid near the boundaries of given classes, and sampling of an image at a grid.

Locations are (..., n, n, 2): row and column in 0..1, from the first to the last pixel of an image. See Marin et al.,
Efficient Segmentation: Learning Downsampling Near Semantic Boundaries, ICCV 2019.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from cadsurgery.data.datasets import IGNORED
from cadsurgery.data.labels import as_classes
from cadsurgery.data.limits import MOST_PIXELS
from cadsurgery.masks import graded
from cadsurgery.support.describe import describe
from cadsurgery.support.errors import InvalidInput, check_name

Mode = Literal["nearest", "bilinear"]
TARGETS = range(11, 19)  # person ... bicycle of Cityscapes
# The published code's smoothness 1 has this effect, because the code takes the square root of its weight .5 twice.
PUBLISHED_SMOOTHNESS = (1 - math.sqrt(0.5)) / 0.5


def boundaries(
    labels: Tensor, targets: Collection[int] | None = TARGETS, ignore: int | None = IGNORED
) -> Tensor:
    """Mark (..., H, W) the pixels of target classes that have another label above, below or beside them.

    Args:
        labels: (H, W) or (B, H, W) whole numbers, one class per pixel.
        targets: classes whose pixels are marked; None for all, which marks both sides of a boundary.
        ignore: label of pixels that are never marked, although their neighbours are; None for no such label.

    Raises:
        InvalidInput: `labels` is not such a tensor.
    """
    if not isinstance(labels, Tensor) or labels.dim() not in (2, 3):
        raise InvalidInput(
            f"the labels are {describe(labels)}.",
            next="give integers (height, width): a class for every pixel.",
        )
    labels = as_classes(labels)
    marked = graded.boundaries(labels, None)
    if ignore is not None:
        marked &= labels != ignore
    if targets is not None:
        marked &= torch.isin(labels, labels.new_tensor(list(targets)))
    return marked


def uniform_locations(grid: int, like: Tensor | None = None) -> Tensor:
    """Return locations (grid, grid, 2) at equal distances; dtype and device of another tensor, or float64."""
    check_grid(grid)
    options = {"dtype": torch.float64} if like is None else {"dtype": like.dtype, "device": like.device}
    steps = torch.arange(grid, **options) / (grid - 1)
    return torch.stack(torch.meshgrid(steps, steps, indexing="ij"), -1)


def target_locations(boundary: Tensor, grid: int = 8, smoothness: float = 1.0) -> Tensor:
    """Compute smooth locations near marked pixels, float64: (grid, grid, 2), or (B, grid, grid, 2) for (B, H, W).

    They are the exact minimum of an energy: the squared distances of each location from the marked pixel nearest to
    its place in the uniform grid, plus `smoothness` times the squared distances between neighbours in the grid. The
    grid's sides stay on the image's, so that it covers the image.

    Args:
        boundary: (H, W) or (B, H, W) bool. The mean of several nearest pixels is taken, so transposed boundaries give
            transposed locations. Without marked pixels the result is the uniform grid.
        grid: number of locations per side.
        smoothness: weight of the second term; 0 or more, infinity gives the uniform grid. The published code
            minimises with `PUBLISHED_SMOOTHNESS`.

    Raises:
        InvalidInput: the boundary, the grid or the smoothness is invalid.
    """
    shaped = isinstance(boundary, Tensor) and boundary.dim() in (2, 3) and boundary.dtype == torch.bool
    if not shaped or min(boundary.shape[-2:]) < 2 or 0 in boundary.shape:
        raise InvalidInput(
            f"the boundary is {describe(boundary)}.",
            next="give a bool map (height, width) of at least 2 x 2 pixels, as cadsurgery.resampling.boundaries does.",
        )
    uniform = uniform_locations(grid).to(boundary.device)
    maps = boundary if boundary.dim() == 3 else boundary.unsqueeze(0)
    nearest = torch.stack([_nearest(marked, grid) if marked.any() else uniform for marked in maps])
    locations = smooth(nearest, smoothness)
    locations[~maps.flatten(1).any(1)] = uniform  # bit for bit
    return locations if boundary.dim() == 3 else locations[0]


def _nearest(boundary: Tensor, grid: int) -> Tensor:
    """Return the mean of the marked pixels nearest to each place of a uniform grid: (grid, grid, 2) in 0..1."""
    places = boundary.nonzero()
    last = boundary.new_tensor([length - 1 for length in boundary.shape], dtype=torch.int64)
    # Anchors are rounded down, as published.
    anchors = torch.arange(grid, device=boundary.device).unsqueeze(1) * last // (grid - 1)
    away = (places.unsqueeze(1) - anchors).square()  # (N, grid, 2)
    rows = []
    for row in range(grid):
        distance = away[:, row, 0].unsqueeze(1) + away[:, :, 1]
        is_nearest = (distance == distance.amin(0)).double()
        rows.append((is_nearest.T @ places.double()) / is_nearest.sum(0).unsqueeze(1))
    return torch.stack(rows) / last


def smooth(wanted: Tensor, smoothness: float) -> Tensor:
    """Minimise the energy around the `wanted` locations: (B, n, n, 2), by two Cholesky solves.

    Raises:
        InvalidInput: the smoothness is negative or NaN.
    """
    if not smoothness >= 0:
        raise InvalidInput(f"smoothness={smoothness}.", next="it must be 0 or more.")
    grid = wanted.shape[1]
    own = 1 / (1 + smoothness)  # weight of the first term, scaled so that infinite smoothness works
    system = own * torch.eye(grid * grid, dtype=wanted.dtype) + (1 - own) * _laplacian(grid, wanted.dtype)
    fixed = torch.zeros(grid, grid, dtype=torch.bool)
    fixed[0] = fixed[-1] = True
    smoothed = torch.empty_like(wanted)
    for axis, is_fixed in enumerate((fixed, fixed.T)):
        border, free = (region.flatten().to(wanted.device) for region in (is_fixed, ~is_fixed))
        values = normalise(wanted)[..., axis].flatten(1).T.clone()  # includes the fixed sides
        matrix = system.to(wanted.device)
        right = own * wanted[..., axis].flatten(1).T[free] - matrix[free][:, border] @ values[border]
        values[free] = torch.cholesky_solve(right, torch.linalg.cholesky(matrix[free][:, free]))
        smoothed[..., axis] = values.T.view_as(smoothed[..., axis])
    return smoothed


def _laplacian(grid: int, dtype: torch.dtype) -> Tensor:
    """Return the graph Laplacian (n², n²) of a grid whose neighbours above, below and beside are connected."""
    step = torch.eye(grid, dtype=dtype).diff(dim=0)
    chain, identity = step.T @ step, torch.eye(grid, dtype=dtype)
    return torch.kron(chain, identity) + torch.kron(identity, chain)


def normalise(locations: Tensor) -> Tensor:
    """Move the sides of a grid (..., n, m, 2) to the image's sides, and all locations inside; they may be folded."""
    inside = locations.clamp(0, 1)
    inside[..., 0, :, 0] = inside[..., 0, 1] = 0
    inside[..., -1, :, 0] = inside[..., -1, 1] = 1
    return inside


def upsample(locations: Tensor, size: tuple[int, int]) -> Tensor:
    """Upsample a grid of locations (B, n, n, 2) bilinearly to (B, h, w, 2), float64, with corners kept; normalised.

    Published order: normalise, upsample, normalise.
    """
    maps = normalise(locations.double()).permute(0, 3, 1, 2)
    if tuple(maps.shape[2:]) != size:
        maps = F.interpolate(maps, size=size, mode="bilinear", align_corners=True)
    return normalise(maps.permute(0, 2, 3, 1))


_MOST = 1024  # locations on a side


def check_grid(grid: object) -> None:
    """Check the number of locations per side.

    Raises:
        InvalidInput: it is not an integer of at least 2, or is too large.
    """
    if not isinstance(grid, int) or isinstance(grid, bool) or not 2 <= grid <= _MOST:
        raise InvalidInput(f"grid={grid!r}.", next=f"give an integer of 2 to {_MOST}: locations on a side.")


def check_locations(locations: object, batch: int) -> Tensor:
    """Check the locations of a batch and return them.

    Raises:
        InvalidInput: shape or type are wrong, or values are not finite.
    """
    shaped = isinstance(locations, Tensor) and locations.dim() == 4 and locations.shape[3] == 2
    if not isinstance(locations, Tensor) or not shaped or not locations.is_floating_point():
        raise InvalidInput(
            f"the locations are {describe(locations)}.",
            next=f"give a floating-point tensor ({batch}, grid, grid, 2): row and column in 0..1.",
        )
    if locations.shape[0] != batch or min(locations.shape[1:3]) < 2:
        raise InvalidInput(
            f"the locations have shape {tuple(locations.shape)}.",
            next=f"give ({batch}, grid, grid, 2), a grid of at least 2 x 2 for each image.",
        )
    if not locations.is_meta and not locations.isfinite().all():
        raise InvalidInput(
            "the locations hold NaN or infinite values.",
            next="check the sampler that gives them, and its weights.",
        )
    return locations


def check_size(size: object, name: str = "size", least: int = 2) -> tuple[int, int]:
    """Return a size as (height, width); one number stands for both.

    Raises:
        InvalidInput: it is not a size, or is below `least`.
    """
    pair = (size, size) if isinstance(size, int) else size
    numbers = isinstance(pair, (tuple, list)) and len(pair) == 2 and all(type(part) is int for part in pair)
    if not isinstance(pair, (tuple, list)) or not numbers or min(pair) < least:
        raise InvalidInput(
            f"{name}={size!r}.", next=f"give an integer of at least {least}, or (height, width)."
        )
    if pair[0] * pair[1] > MOST_PIXELS:
        raise InvalidInput(
            f"{name}={size!r} is too large.",
            why=f"at most {MOST_PIXELS} pixels are made.",
            next="give a smaller size, or cut the image into tiles.",
        )
    return (pair[0], pair[1])


def sample(image: Tensor, locations: Tensor, size: int | tuple[int, int], mode: Mode = "nearest") -> Tensor:
    """Sample an image at a grid of locations that is upsampled bilinearly: (B, C, h, w).

    Args:
        image: (B, C, H, W); labels are (B, 1, H, W) integers.
        locations: (B, grid, grid, 2), row and column in 0..1; the grid's sides are moved to the image's, and
            locations outside the image inside.
        size: (height, width) of the result, or one number for both; may be larger than the image.
        mode: `nearest`, as published: the nearest pixel, halves to even; only the image gets gradients. With
            `bilinear` the locations get gradients too.

    Raises:
        InvalidInput: `image` is not an image, `size` is not a size, or the locations do not fit the batch.
        UnknownName: there is no such mode.
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
    sampled = image.flatten(2).gather(2, pixels.expand(-1, image.shape[1], -1))
    return sampled.view(*image.shape[:2], height, width)
