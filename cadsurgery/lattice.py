"""The lattice: which cells of the fine map each image of a batch keeps, as an immutable value.

A level map T on the fine map (H x W, one sample per high output stride) says how often each place is
downsampled. After stage j the lattice has the levels min(T, j); a cell of level l covers R_l x R_l fine
pixels and is anchored at its top-left one. Everything else (element order, batch offsets, areas) follows
from the levels and is computed once, on demand.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from itertools import accumulate
from operator import mul
from typing import Any, Literal, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from cadsurgery.errors import InvalidInput

Fill = Literal["linear", "nearest"]
Anchor = Literal["corner", "center"]
Pool = Literal["atrous", "drop"]
Patch = Literal["quadtree", "block"]
Statistics = Literal["area", "element"]
T = TypeVar("T")

_CHOICES = {
    "fill": ("linear", "nearest"),
    "anchor": ("corner", "center"),
    "pool": ("atrous", "drop"),
    "patch": ("quadtree", "block"),
    "statistics": ("area", "element"),
}


@dataclass(frozen=True)
class Geometry:
    """The choices all lattices of one converted network share.

    Args:
        strides: stride r_j of each adaptive stage, in order.
        max_level: the lowest resolution allowed; later stages then only dilate. Default: all stages.
        fill: how a point inside a cell is read, `"linear"` (default) or `"nearest"` (as published).
        anchor: where the taps of a cell start, `"corner"` or, as in the published code, `"center"`.
        pool: what a max-pool stage does to cells it keeps: `"atrous"` pooling or `"drop"` (pass on).
        patch: how level maps are made legal: `"quadtree"` or `"block"` (as published).
        statistics: what batch norm weighs an element by in training: the `"area"` of its cell, so that the
            statistics estimate the dense network's, or each `"element"` the same (as published).
        dense_shortcut: run uniform maps as ordinary dense convolutions. Results are the same;
            verification switches it off to exercise the kernel maps.
    """

    strides: tuple[int, ...]
    max_level: int = -1
    fill: Fill = "linear"
    anchor: Anchor = "corner"
    pool: Pool = "atrous"
    patch: Patch = "quadtree"
    statistics: Statistics = "area"
    dense_shortcut: bool = True

    def __post_init__(self) -> None:
        for name, allowed in _CHOICES.items():
            if getattr(self, name) not in allowed:
                raise InvalidInput(
                    f"{name}={getattr(self, name)!r} is not a choice.",
                    next=f"use one of {', '.join(allowed)}.",
                )
        if self.anchor == "center" and self.fill != "nearest":
            raise InvalidInput(
                'anchor="center" needs fill="nearest".',
                why="it reproduces the published code, whose cells are located off the place their value is of.",
                next='add fill="nearest", or keep anchor="corner".',
            )
        if self.max_level < 0:
            object.__setattr__(self, "max_level", len(self.strides))
        if self.max_level > len(self.strides) or any(stride < 1 for stride in self.strides):
            raise InvalidInput(
                f"max_level={self.max_level} needs as many stages; strides are {self.strides}.",
                next="give one positive stride per stage.",
            )

    @property
    def sides(self) -> tuple[int, ...]:
        """R_0..R_K: side of a cell of each level, in fine pixels."""
        return tuple(accumulate(self.strides, mul, initial=1))

    def lattice(self, levels: Tensor) -> Lattice:
        """The lattice after the last stage, from any integer level map (B, H, W); see `legalise`."""
        if levels.dim() != 3 or levels.is_floating_point() or levels.is_complex() or 0 in levels.shape:
            raise InvalidInput(
                f"a level map is a non-empty (batch, height, width) integer tensor, not {describe(levels)}.",
                next="give 0 where the high output stride is kept and 1, 2, ... where it is downsampled.",
            )
        if levels.dtype == torch.bool:
            levels = torch.where(levels, 0, self.max_level)
        low, high = (int(bound) for bound in torch.aminmax(levels))
        if low < 0 or high > self.max_level:
            raise InvalidInput(
                f"the level map has values {low}..{high}.",
                why=f"levels are 0 (keep high) to {self.max_level} (downsample everything).",
                next=f"clamp it, e.g. levels.clamp(0, {self.max_level}).",
            )
        return Lattice(
            Pyramid(legalise(levels, self), self), len(self.strides), (levels.shape[1], levels.shape[2])
        )

    def uniform(
        self, level: int, batch: int, size: tuple[int, int], device: torch.device | str = "cpu"
    ) -> Lattice:
        """A lattice with one level everywhere on a fine map of `size` (height, width)."""
        return self.lattice(torch.full((batch, *size), level, dtype=torch.int8, device=device))

    def uniform_like(self, features: Tensor, level: int) -> Lattice:
        """The uniform lattice for a fine map (B, C, H, W); of real values even if the map has none."""
        batch, _, height, width = features.shape
        return self.uniform(level, batch, (height, width), "cpu" if features.is_meta else features.device)


def legalise(levels: Tensor, geometry: Geometry) -> Tensor:
    """Lower levels until every cell fits: a cell of level l exists only where all its pixels ask for l.

    `patch="quadtree"` splits only as far as needed; `patch="block"` keeps blocks of R_K pixels whole,
    either at level 0 or at the lowest allowed one (seed of the method: Hesse et al. 2023, edge masks).

    Args:
        levels: (B, H, W) integers in 0..max_level; cells at the border may stick out of the map.

    Returns:
        (B, H, W) int8 with `result <= levels`; idempotent.
    """
    if geometry.patch == "block":
        whole = _block_minimum(levels, geometry.sides[-1]) >= geometry.max_level
        return (whole * geometry.max_level).to(torch.int8)
    legal = torch.zeros_like(levels, dtype=torch.int8)
    for level in range(1, geometry.max_level + 1):
        fits = _block_minimum(levels, geometry.sides[level]) >= level
        legal = torch.where(fits, level, legal).to(torch.int8)
    return legal


def _block_minimum(levels: Tensor, side: int) -> Tensor:
    """Minimum of each aligned side x side block, on every pixel of the block."""
    _, height, width = levels.shape
    pad = (0, -width % side, 0, -height % side)
    padded = F.pad(levels.to(torch.int16), pad, value=torch.iinfo(torch.int16).max)
    minimum = padded.unflatten(1, (-1, side)).unflatten(3, (-1, side)).amin((2, 4))
    return minimum.repeat_interleave(side, 1).repeat_interleave(side, 2)[:, :height, :width]


@dataclass(frozen=True, eq=False)
class Pyramid:
    """A legal level map with everything computed from it: cells, areas, kernel maps.

    It lives as long as the lattices of one forward pass and holds values only, keyed by all their inputs.

    Attributes:
        levels: (B, H, W) int8, legal.
        geometry: the choices it is read with.
    """

    levels: Tensor
    geometry: Geometry
    _derived: dict[Hashable, Any] = field(default_factory=dict, repr=False)

    def derive(self, key: Hashable, build: Callable[[], T]) -> T:
        """What `build` returns, computed once per key."""
        if key not in self._derived:
            self._derived[key] = build()
        return self._derived[key]


def _derived(build: Callable[[Lattice], T]) -> property:
    """A property of a lattice that is computed once."""

    def get(self: Lattice) -> T:
        return self.pyramid.derive((build.__name__, self.stage, self.size), lambda: build(self))

    return property(get, doc=build.__doc__)


@dataclass(frozen=True)
class Lattice:
    """The cells of a batch after one stage. Rows of an `Elements` value are in its order.

    The order is raster order of the anchors, image after image, so a uniform lattice is exactly the
    memory of a dense channels_last map and batch is only an offset. Two lattices are equal if they are
    cut from the same level map at the same stage and size.

    Attributes:
        pyramid: the level map all stages share.
        stage: number of adaptive stages passed; levels are capped at it.
        size: fine size (height, width).
    """

    pyramid: Pyramid
    stage: int
    size: tuple[int, int]

    def at(self, stage: int, size: tuple[int, int] | None = None) -> Lattice:
        """The lattice of the same level map after `stage`, cut to the fine size (height, width)."""
        size = size or self.size
        if size[0] > self.size[0] or size[1] > self.size[1]:
            raise InvalidInput(
                f"a lattice of {self.size[0]}x{self.size[1]} fine pixels cannot grow to {size[0]}x{size[1]}.",
                next="convert with a region that ends before this operation.",
            )
        return Lattice(self.pyramid, stage, size)

    def resampled(self, stage: int, size: tuple[int, int]) -> Lattice:
        """The lattice of the same level map at any stage and any fine size up to the level map's own."""
        return Lattice(self.pyramid, stage, self.whole_size).at(stage, size)

    @property
    def geometry(self) -> Geometry:
        """The choices it is read with."""
        return self.pyramid.geometry

    @property
    def whole_size(self) -> tuple[int, int]:
        """Height and width of the level map it is cut from."""
        return self.pyramid.levels.shape[1], self.pyramid.levels.shape[2]

    @property
    def batch(self) -> int:
        """Number of images."""
        return self.pyramid.levels.shape[0]

    @_derived
    def levels(self) -> Tensor:
        """(B, H, W) int8: level of the cell each fine pixel lies in."""
        return self.pyramid.levels[:, : self.size[0], : self.size[1]].clamp(max=self.stage)

    @_derived
    def side_map(self) -> Tensor:
        """(B, H, W) int64: side of the cell each fine pixel lies in."""
        sides = torch.tensor(self.geometry.sides, device=self.levels.device)
        return sides[self.levels.long()]

    @_derived
    def _cells(self) -> tuple[Tensor, Tensor]:
        """Anchors (N,) as flat pixel numbers, and the (B*H*W,) row of the cell each pixel lies in."""
        (height, width), device = self.size, self.levels.device
        y = torch.arange(height, device=device).view(1, -1, 1)
        x = torch.arange(width, device=device).view(1, 1, -1)
        image = torch.arange(self.batch, device=device).view(-1, 1, 1)
        corner = (image * height + y - y % self.side_map) * width + x - x % self.side_map
        pixel = (image * height + y) * width + x
        is_anchor = (corner == pixel).flatten()
        row = is_anchor.cumsum(0) - 1
        return is_anchor.nonzero().squeeze(1), row[corner.flatten()].to(torch.int32)

    @property
    def anchors(self) -> Tensor:
        """(N,) int64: flat (image, y, x) pixel number of each element's anchor, ascending."""
        return self._cells[0]

    @property
    def index(self) -> Tensor:
        """(B*H*W,) int32: the element whose cell holds each fine pixel."""
        return self._cells[1]

    def __len__(self) -> int:
        return self.anchors.shape[0]

    @_derived
    def coordinates(self) -> tuple[Tensor, Tensor, Tensor]:
        """Image, y and x (each (N,) int64) of each element's anchor."""
        height, width = self.size
        return self.anchors // (height * width), self.anchors // width % height, self.anchors % width

    @_derived
    def uniform_level(self) -> int | None:
        """The level all cells of all images have, or None."""
        low, high = torch.aminmax(self.levels)
        return int(low) if bool(low == high) else None

    @_derived
    def weights(self) -> Tensor:
        """(N,) float64: how much each element counts in a mean over its image; sums to H*W per image.

        An element weighs the area of its cell inside the map. In an image with one level everywhere
        each counts the same, cut or not, because that image *is* its dense twin (laws 1 and 2).
        """
        height, width = self.size
        image, y, x = self.coordinates
        side = self.side_map.flatten()[self.anchors]
        area = torch.minimum(side, height - y) * torch.minimum(side, width - x)
        flat = self.levels.flatten(1)
        uniform = flat.amin(1) == flat.amax(1)
        counts = torch.bincount(image, minlength=self.batch)
        return torch.where(uniform[image], height * width / counts[image].double(), area.double())

    @_derived
    def membership(self) -> Tensor:
        """(B, N) float64: `weights` of each image's own elements, normalised to sum to one per image."""
        height, width = self.size
        rows = torch.zeros(self.batch, len(self), dtype=torch.float64, device=self.levels.device)
        rows[self.coordinates[0], torch.arange(len(self), device=rows.device)] = self.weights / (
            height * width
        )
        return rows

    @_derived
    def active_fraction(self) -> float:
        """Share of fine pixels at level 0."""
        return (self.levels == 0).double().mean().item()

    def grid(self, level: int) -> tuple[int, int]:
        """Height and width of a dense map with one sample per cell of `level`."""
        side = self.geometry.sides[level]
        return math.ceil(self.size[0] / side), math.ceil(self.size[1] / side)


def describe(value: object) -> str:
    """Type, dtype and shape of a value for messages."""
    if isinstance(value, Tensor):
        return f"a {str(value.dtype).removeprefix('torch.')} tensor of shape {tuple(value.shape)}"
    return f"{type(value).__name__} {value!r}"[:80]
