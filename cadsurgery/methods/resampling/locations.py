"""Where an image is sampled: grids of locations, and the one that lies near the boundaries of some classes.

Locations are (..., n, n, 2): row and column in 0..1, from the first to the last pixel of an image. Marin et al.,
Efficient Segmentation: Learning Downsampling Near Semantic Boundaries, ICCV 2019.
"""

from __future__ import annotations

import math
from collections.abc import Collection

import torch
import torch.nn.functional as F
from torch import Tensor

from cadsurgery.data.images import MOST_PIXELS
from cadsurgery.elements.lattice import describe
from cadsurgery.support.errors import InvalidInput

TARGETS = range(11, 19)  # person ... bicycle of Cityscapes
IGNORED = 255
# What the published code makes of smoothness 1: it takes the square root of its weight .5 twice.
PUBLISHED_SMOOTHNESS = (1 - math.sqrt(0.5)) / 0.5


def boundaries(
    labels: Tensor, targets: Collection[int] | None = TARGETS, ignore: int | None = IGNORED
) -> Tensor:
    """(..., H, W) bool: pixels of target classes with a neighbour above, below or beside them of another label.

    Args:
        labels: (H, W) or (B, H, W) integers, a class for each pixel.
        targets: classes whose pixels are marked; None for all, which marks both sides of a boundary.
        ignore: label of pixels that are never marked, though their neighbours are; None for no such.

    Raises:
        InvalidInput: no such labels.
    """
    if not isinstance(labels, Tensor) or labels.dim() not in (2, 3) or labels.is_floating_point():
        raise InvalidInput(
            f"the labels are {describe(labels)}.",
            next="give integers (height, width): a class for every pixel.",
        )
    marked = torch.zeros_like(labels, dtype=torch.bool)
    for axis in (-2, -1):
        length = labels.shape[axis]
        if length > 1:
            changes = labels.narrow(axis, 1, length - 1) != labels.narrow(axis, 0, length - 1)
            marked.narrow(axis, 1, length - 1).logical_or_(changes)
            marked.narrow(axis, 0, length - 1).logical_or_(changes)
    if ignore is not None:
        marked &= labels != ignore
    if targets is not None:
        marked &= torch.isin(labels, labels.new_tensor(list(targets)))
    return marked


def uniform_locations(grid: int, like: Tensor | None = None) -> Tensor:
    """(grid, grid, 2): equal distances; of the type and place of another tensor, or float64."""
    check_grid(grid)
    options = {"dtype": torch.float64} if like is None else {"dtype": like.dtype, "device": like.device}
    steps = torch.arange(grid, **options) / (grid - 1)
    return torch.stack(torch.meshgrid(steps, steps, indexing="ij"), -1)


def target_locations(boundary: Tensor, grid: int = 8, smoothness: float = 1.0) -> Tensor:
    """(grid, grid, 2) float64: locations near marked pixels, and smooth; those of (B, H, W) are (B, grid, grid, 2).

    The exact minimum of the energy: squared distances of locations from the marked pixel nearest to their
    place in the uniform grid, plus `smoothness` times those of neighbours in the grid from each other. The grid's sides
    stay on the image's, so that it covers the image.

    Args:
        boundary: (H, W) or (B, H, W) bool. Of several nearest pixels their mean is taken: transposed boundaries give
            transposed locations. Nothing marked gives the uniform grid.
        grid: locations on a side.
        smoothness: weight of the second term; 0 or more, infinity gives the uniform grid. The published code minimises
            with `PUBLISHED_SMOOTHNESS`.

    Raises:
        InvalidInput: no such map, a grid of less than two a side, or another smoothness.
    """
    shaped = isinstance(boundary, Tensor) and boundary.dim() in (2, 3) and boundary.dtype == torch.bool
    if not shaped or min(boundary.shape[-2:]) < 2 or 0 in boundary.shape:
        raise InvalidInput(
            f"the boundary is {describe(boundary)}.",
            next="give a bool map (height, width) of at least 2 x 2 pixels, as cadsurgery.resampling.boundaries does.",
        )
    uniform = uniform_locations(grid).to(boundary.device)
    maps = boundary if boundary.dim() == 3 else boundary.unsqueeze(0)
    found = torch.stack([_nearest(one, grid) if one.any() else uniform for one in maps])
    found = smooth(found, smoothness)
    found[~maps.flatten(1).any(1)] = uniform  # to the last bit
    return found if boundary.dim() == 3 else found[0]


def _nearest(boundary: Tensor, grid: int) -> Tensor:
    """(grid, grid, 2): mean of the marked pixels nearest to each place of a uniform grid, in pixels of the image."""
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
    """(B, n, n, 2): the minimum of the energy around wanted locations; two positive-definite solves (Cholesky).

    Raises:
        InvalidInput: a smoothness that is negative or not a number.
    """
    if not smoothness >= 0:
        raise InvalidInput(f"smoothness={smoothness}.", next="it must be 0 or more.")
    grid = wanted.shape[1]
    own = 1 / (1 + smoothness)  # weight of the first term, so that infinity has one too
    system = own * torch.eye(grid * grid, dtype=wanted.dtype) + (1 - own) * _laplacian(grid, wanted.dtype)
    fixed = torch.zeros(grid, grid, dtype=torch.bool)
    fixed[0] = fixed[-1] = True
    found = torch.empty_like(wanted)
    for axis, is_fixed in enumerate((fixed, fixed.T)):
        border, free = (where.flatten().to(wanted.device) for where in (is_fixed, ~is_fixed))
        values = normalise(wanted)[..., axis].flatten(1).T.clone()  # the sides are where they are to be
        matrix = system.to(wanted.device)
        right = own * wanted[..., axis].flatten(1).T[free] - matrix[free][:, border] @ values[border]
        values[free] = torch.cholesky_solve(right, torch.linalg.cholesky(matrix[free][:, free]))
        found[..., axis] = values.T.view_as(found[..., axis])
    return found


def _laplacian(grid: int, dtype: torch.dtype) -> Tensor:
    """(n², n²): of the graph of a grid, each location joined with those above, below and beside it."""
    step = torch.eye(grid, dtype=dtype).diff(dim=0)
    chain, one = step.T @ step, torch.eye(grid, dtype=dtype)
    return torch.kron(chain, one) + torch.kron(one, chain)


def normalise(locations: Tensor) -> Tensor:
    """Locations (..., n, m, 2) whose sides lie on the sides of the image, and none outside; they may be folded."""
    rows, columns = locations.unbind(-1)
    rows = torch.cat(
        (torch.zeros_like(rows[..., :1, :]), rows[..., 1:-1, :], torch.ones_like(rows[..., :1, :])), -2
    )
    columns = torch.cat(
        (torch.zeros_like(columns[..., :1]), columns[..., 1:-1], torch.ones_like(columns[..., :1])), -1
    )
    return torch.stack((rows, columns), -1).clamp(0, 1)


def upsample(locations: Tensor, size: tuple[int, int]) -> Tensor:
    """(B, h, w, 2) float64, normalised: a grid of locations (B, n, n, 2) at another size, bilinear between its corners.

    Published order: normalise, upsample, normalise.
    """
    maps = normalise(locations.double()).permute(0, 3, 1, 2)
    if tuple(maps.shape[2:]) != size:
        maps = F.interpolate(maps, size=size, mode="bilinear", align_corners=True)
    return normalise(maps.permute(0, 2, 3, 1))


_MOST = 1024  # locations on a side


def check_grid(grid: object) -> None:
    """Refuse what is no number of locations on a side.

    Raises:
        InvalidInput: no integer of at least 2, or more than a computer can compare with each other.
    """
    if not isinstance(grid, int) or isinstance(grid, bool) or not 2 <= grid <= _MOST:
        raise InvalidInput(f"grid={grid!r}.", next=f"give an integer of 2 to {_MOST}: locations on a side.")


def check_locations(locations: object, batch: int) -> Tensor:
    """Locations of a batch, once they are known to be some.

    Raises:
        InvalidInput: another shape or type, or values that are not finite.
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
    """A size as (height, width); one number is both.

    Raises:
        InvalidInput: it is none, or below `least`.
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
