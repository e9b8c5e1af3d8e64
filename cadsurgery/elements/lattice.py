"""The lattice: the set of cells that each image of a batch keeps, as an immutable value.

A level map T on the fine map (H x W, one sample per high output stride) says how often each position is
downsampled. After stage j the lattice has the levels min(T, j). A cell of level l covers R_l x R_l fine
pixels, and its anchor is the top-left pixel. Everything else (element order, batch offsets, areas) follows
from the levels and is computed once, on demand.

Where T is a floor (`Geometry.floors`), it is clamped from the other side: no map is computed finer than T says. The
map on the network's own grid of R_j fine pixels has the stage j + 1 and the levels max(T, j); stage 0 is the dense map
that the region reads, the image.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, pairwise
from operator import mul
from typing import Any, ClassVar, Generic, Literal, NamedTuple, TypeVar, get_args, get_origin, get_type_hints

import torch
import torch.nn.functional as F
from torch import Tensor

from cadsurgery.elements.backends.choose import Work, compute
from cadsurgery.elements.backends.graph_sizes import quotients
from cadsurgery.elements.size_symbols import fresh_length, of_size
from cadsurgery.elements.sizes import constant, divide_up, is_at_most, is_statically_true, most
from cadsurgery.support import device_checks
from cadsurgery.support.describe import describe
from cadsurgery.support.errors import InvalidInput
from cadsurgery.support.running import running

Fill = Literal["linear", "nearest", "guided"]
Anchor = Literal["corner", "center"]
Pool = Literal["atrous", "drop"]
Patch = Literal["quadtree", "block"]
Statistics = Literal["area", "element"]
T = TypeVar("T")


class once(Generic[T]):
    """Decorate a method as an attribute that is computed when it is first read.

    Unlike `functools.cached_property` of Python 3.11 it takes no lock, which torch.compile cannot trace.
    """

    def __init__(self, build: Callable[[Any], T]) -> None:
        self.build, self.name, self.__doc__ = build, build.__name__, build.__doc__

    def __get__(self, owner: Any, kind: type) -> T:
        if owner is None:
            return self  # type: ignore[return-value]
        found = owner.__dict__[self.name] = self.build(owner)
        return found


@dataclass(frozen=True)
class Geometry:
    """Options that all lattices of one converted network share.

    Args:
        strides: stride r_j of each adaptive stage, in order.
        max_level: the highest level allowed, that is, the lowest resolution. Default: one level per stage.
        fill: how a point inside a cell is read, `"linear"` (default), `"nearest"` (as published) or `"guided"`:
            linear, but at the exit of the region weighted by similarity of the features that entered it.
        anchor: where the taps of a cell start, `"corner"` or, as in the published code, `"center"`.
        pool: what a max-pool stage does to cells it keeps: `"atrous"` pooling or `"drop"` (no pooling).
        patch: how level maps are made legal: `"quadtree"` or `"block"` (as published).
        statistics: weight of an element in batch norm statistics during training: the `"area"` of its cell, which
            estimates the dense network's statistics, or the same for each `"element"` (as published).
        dense_shortcut: run uniform maps as ordinary dense convolutions. The results are the same;
            verification switches this off to exercise the kernel maps.
        floors: level maps are floors: maps of the network's own grid are computed coarser where they say so, instead of
            finer.
    """

    strides: tuple[int, ...]
    max_level: int = -1
    fill: Fill = "linear"
    anchor: Anchor = "corner"
    pool: Pool = "atrous"
    patch: Patch = "quadtree"
    statistics: Statistics = "area"
    dense_shortcut: bool = True
    floors: bool = False

    def __post_init__(self) -> None:
        for name, hint in get_type_hints(Geometry).items():
            value, choices = getattr(self, name), get_args(hint)
            if get_origin(hint) is Literal and value not in choices:
                raise InvalidInput(
                    f"{name}={value!r} is not a choice.", next=f"use one of {', '.join(choices)}."
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
        _ = self.sides  # now, because torch.compile would compile again for an attribute that appears

    @property
    def interpolates(self) -> bool:
        """True if points inside a cell are interpolated from several cells."""
        return self.fill != "nearest"

    @once
    def sides(self) -> tuple[int, ...]:
        """Side of a cell of each level, R_0..R_K, in fine pixels."""
        return tuple(accumulate(self.strides, mul, initial=1))

    @property
    def stages(self) -> int:
        """Number of lattices of a level map: of stages 0 to `stages` - 1."""
        return len(self.sides) + self.floors

    @property
    def stage_of_levels(self) -> int:
        """The stage whose lattice has the levels of the level map itself."""
        return 1 if self.floors else len(self.strides)

    def level_at(self, level: int, stage: int) -> int:
        """Return the level that cells of a level of the level map have in the lattice of a stage."""
        if not self.floors:
            return min(level, stage)
        return max(level, stage - 1) if stage else 0

    def levels_at(self, levels: Tensor, stage: int) -> Tensor:
        """Return the levels of a level map in the lattice of a stage, see `level_at`."""
        if not self.floors:
            return levels.clamp(max=stage)
        return levels.clamp(min=stage - 1) if stage else torch.zeros_like(levels)

    def lattice(self, levels: Tensor, bounds: Bounds | None = None) -> Lattice:
        """Return the lattice of any integer level map (B, H, W), of the stage `stage_of_levels`; see `legalise`.

        With `bounds`, which must hold for the map, the number of rows does not depend on the map's values. Without,
        on a GPU, the cells are counted there and the counts are read once, instead of one after the other where they
        are needed.
        """
        if levels.dim() != 3 or levels.is_floating_point() or levels.is_complex() or 0 in levels.shape:
            raise InvalidInput(
                f"a level map is a non-empty (batch, height, width) integer tensor, not {describe(levels)}.",
                next="give 0 where the high output stride is kept and 1, 2, ... where it is downsampled.",
            )
        levels = as_levels(levels, self.max_level)
        legal, in_graph = legalise(levels, self), running.in_graph
        if bounds is None and legal.device.type == "cuda" and not in_graph:
            bounds = self._count(legal)
        pyramid = Pyramid(legal, self, bounds, in_graph)
        return pyramid.lattice(self.stage_of_levels, (levels.shape[1], levels.shape[2]))

    def _count(self, levels: Tensor) -> Bounds:
        """Return the numbers of elements of a legal level map (B, H, W) after each stage, read in one transfer."""
        if device_checks.is_capturing(levels.device):
            raise InvalidInput(
                "a CUDA graph has as many elements in every call, and this mask has not.",
                next='keep a fixed share of the patches, mask="edges | budget:fraction=0.3".',
            )
        y = torch.arange(levels.shape[1], device=levels.device).unsqueeze(1)
        x = torch.arange(levels.shape[2], device=levels.device)
        is_corner = torch.stack([(y % side == 0) & (x % side == 0) for side in self.sides])
        counts = [
            is_corner.gather(0, self.levels_at(levels, stage).long()).sum() for stage in range(self.stages)
        ]
        lowest, highest, *numbers = device_checks.read((*torch.aminmax(levels), *counts))
        return Bounds(tuple(numbers), tuple(numbers), lowest if lowest == highest else None)

    def uniform(
        self, level: int, batch: int, size: tuple[int, int], device: torch.device | str = "cpu"
    ) -> Lattice:
        """Return a lattice with one level everywhere on a fine map of `size` (height, width)."""
        levels, bounds = torch.full((batch, *size), level, dtype=torch.int8, device=device), None
        if levels.device.type == "cuda" and 0 <= level <= self.max_level:
            patches = batch * math.prod(divide_up(length, self.sides[-1]) for length in size)
            kept = tuple(patches if level <= at else 0 for at in range(self.max_level))
            bounds = Bounds.of_patches(self, batch, size, kept)
        return self.lattice(levels, bounds)

    def uniform_like(self, features: Tensor, level: int) -> Lattice:
        """Return the uniform lattice for a fine map (B, C, H, W); on the CPU if the map is a meta tensor."""
        batch, _, height, width = features.shape
        return self.uniform(level, batch, (height, width), "cpu" if features.is_meta else features.device)


def as_levels(levels: Tensor, max_level: int, where: str = "") -> Tensor:
    """Convert an integer map to signed levels. In a bool map True means level 0 and False the lowest resolution.

    Raises:
        InvalidInput: a level is outside 0..max_level, or the map may as well be a yes or no: zeros and ones in uint8,
            where there are more levels; `where` is quoted in the message.
    """
    if levels.dtype == torch.bool:
        if running.in_graph:  # engines do not multiply bytes
            return torch.where(levels, 0, max_level)
        return levels.logical_not().to(torch.int8).mul_(max_level)
    is_byte = levels.dtype == torch.uint8  # the type of masks in image files and of older comparisons
    if levels.dtype != torch.int8 or running.in_graph:  # large maps come in int8
        levels = levels.long()  # not all integer types can be compared
    if running.in_graph:  # values are unknown while a graph is made
        return levels
    low, high = torch.aminmax(levels)
    is_wrong = (low < 0) | (high > max_level)
    if is_byte and max_level > 1:
        is_wrong |= high <= 1
    device_checks.check(is_wrong, lambda: _wrong_levels(int(low), int(high), max_level, where, is_byte))
    return levels


def _wrong_levels(low: int, high: int, max_level: int, where: str, is_byte: bool) -> InvalidInput:
    if is_byte and high <= 1:
        return InvalidInput(
            "the map has only zeros and ones in uint8, which have two meanings.",
            where=where,
            why="1 may mean yes, keep the high resolution, or level 1, which is coarser than level 0.",
            next="give map.bool() if 1 marks what to keep, map.to(torch.int64) if these are levels.",
        )
    high_is_kept = "give map > 0, which is True where the high resolution is kept"
    if high == 255 and low >= 0:
        return InvalidInput(
            f"the map has values {low}..255, as masks in pictures have.",
            where=where,
            why=f"levels go the other way, from 0 (keep the high resolution) to {max_level} (downsample everything).",
            next=f"{high_is_kept}, if 255 marks what to keep; map == 0 if it marks the rest.",
        )
    return InvalidInput(
        f"the map has levels {low}..{high}.",
        where=where,
        why=f"levels go from 0 (keep the high resolution) to {max_level} (downsample everything).",
        next=f"if these are levels, clamp them: levels.clamp(0, {max_level}). If larger values mark what to keep, "
        f"{high_is_kept} (bool).",
    )


_LARGE = 1 << 20  # samples of a level map whose cells are counted before they are found
_AT_ONCE = 1 << 16  # samples of a row of blocks that are made legal at once


def legalise(levels: Tensor, geometry: Geometry) -> Tensor:
    """Lower levels until every cell fits: a cell of level l exists only where all its pixels have level l or more.

    `patch="quadtree"` splits only as far as needed. `patch="block"` gives each block of R_K pixels one level, either
    0 or the highest allowed (as the edge masks of Hesse et al. 2023).

    Args:
        levels: (B, H, W) integers in 0..max_level; cells at the border may extend beyond the map.

    Returns:
        (B, H, W) int8 with `result <= levels`; the function is idempotent.
    """
    is_read = levels.device.type == "cpu" and not running.in_graph
    if is_read and levels.numel() > _AT_ONCE * geometry.sides[-1]:  # blocks do not depend on each other
        rows = divide_up(_AT_ONCE, levels.shape[0] * levels.shape[2]) * geometry.sides[-1]
        if levels.shape[1] > rows:
            found = torch.empty_like(levels, dtype=torch.int8)
            for part, legal in zip(levels.split(rows, 1), found.split(rows, 1), strict=True):
                legal.copy_(legalise(part, geometry))
            return found
    if geometry.patch == "block":
        whole = _block_minimum(levels, geometry.sides[-1]) >= geometry.max_level
        return (whole * geometry.max_level).to(torch.int8)
    if geometry.floors and is_read and _is_by_cell(levels, geometry):
        return levels.to(torch.int8)
    legal = torch.zeros_like(levels, dtype=torch.int8)
    for level in range(1, geometry.max_level + 1):
        fits = _block_minimum(levels, geometry.sides[level]) >= level
        legal = torch.where(fits, level, legal).to(torch.int8)
    return legal


def _is_by_cell(levels: Tensor, geometry: Geometry) -> bool:
    """True if each cell of the coarsest level has one level, either 0 or the coarsest, so that the map is legal."""
    side, width = geometry.sides[geometry.max_level], levels.shape[2]
    small = levels.to(torch.int8)
    cells = small[..., ::side, ::side]
    if bool(((cells > 0) & (cells < geometry.max_level)).any()):
        return False
    rows = cells.repeat_interleave(side, 2)[..., :width]
    return all(
        bool((small[:, column * side : (column + 1) * side] == rows[:, column : column + 1]).all())
        for column in range(cells.shape[1])
    )


def _block_minimum(levels: Tensor, side: int) -> Tensor:
    """Compute the minimum of each aligned side x side block, repeated on every pixel of the block."""
    _, height, width = levels.shape
    rows, columns = (fresh_length(divide_up(length, side)) for length in (height, width))
    pad = (0, columns * side - width, 0, rows * side - height)
    # More than any level; OpenVINO pads integers through float32, in which the largest integer becomes the smallest.
    padded = F.pad(levels.to(torch.int32), pad, value=1 << 30)
    minimum = padded.reshape(-1, rows, side, columns, side).amin((2, 4), keepdim=True)
    # One axis at a time: ONNX Runtime takes ten times as long to expand two.
    in_rows = minimum.expand(-1, -1, -1, -1, side).reshape(-1, rows, 1, columns * side)
    whole = in_rows.expand(-1, -1, side, -1).reshape_as(padded)
    return of_size(whole[..., :height, :width], (height, width))


class Bounds(NamedTuple):
    """Bounds on the number of elements of a level map, known from its size alone; they make every shape static.

    A lattice with bounds has as many rows as there can be elements; the surplus rows are padding. Padding elements
    repeat the position of the first element. No window reads them and they have weight zero in image-wide
    operations, so their values never reach a real element.

    Attributes:
        least: smallest number of elements of the whole batch after each stage 0..K.
        most: largest number of elements of the whole batch after each stage 0..K.
        level: the common level of all cells of all images; None if the levels can differ.
    """

    least: tuple[int, ...]
    most: tuple[int, ...]
    level: int | None = None

    @staticmethod
    def of_patches(geometry: Geometry, batch: int, size: tuple[int, int], kept: tuple[int, ...]) -> Bounds:
        """Return the bounds for a batch of fine maps of `size`, whose patches (aligned R_K x R_K blocks) have one
        level each. `kept[i]` patches, no matter which, have level i or finer; all others have the lowest resolution.
        A patch that extends beyond the map has fewer elements.
        """
        if geometry.patch == "block":  # patches that are not fully downsampled become level 0
            kept = kept[-1:]
        patch, pixels = geometry.sides[-1], batch * size[0] * size[1]
        whole, rest = zip(*(divmod(length, patch) for length in size), strict=True)
        # Patches grouped by their height and width inside the map, with the number of patches in each group.
        rows, columns = (
            [(patch, count), (cut, 1)] if cut else [(patch, count)]
            for count, cut in zip(whole, rest, strict=True)
        )
        kinds = [(h, w, batch * many * times) for h, many in rows for w, times in columns]
        total = sum(many for *_, many in kinds)
        levels = [*(min(level, geometry.max_level) for level in range(len(kept))), geometry.max_level]
        occurring = [
            level
            for level, (finer, so_far) in zip(levels, pairwise((0, *kept, total)), strict=True)
            if so_far > finer
        ]
        if len(set(occurring)) == 1:
            level = occurring[0]
            sides = [geometry.sides[geometry.level_at(level, stage)] for stage in range(geometry.stages)]
            exact = tuple(batch * _cells(*size, side) for side in sides)
            return Bounds(exact, exact, level)
        least, most = [], []
        for stage in range(geometry.stages):
            side = geometry.sides[geometry.level_at(geometry.max_level, stage)]
            few = many = batch * _cells(*size, side)
            # Patches of level i or finer are a subset of the patches of level i + 1 or finer, with more elements.
            for count, (fine, coarse) in zip(kept, pairwise(levels), strict=True):
                sides = [geometry.sides[geometry.level_at(level, stage)] for level in (fine, coarse)]
                gains = sorted((_cells(h, w, sides[0]) - _cells(h, w, sides[1]), n) for h, w, n in kinds)
                few += _sum_of_first(gains, count)
                many += _sum_of_first(gains[::-1], count)
            least.append(min(pixels, few))
            most.append(min(pixels, many))
        return Bounds(tuple(least), tuple(most))

    def level_at(self, stage: int, geometry: Geometry) -> int | None:
        """Return the common level of all cells of the lattice of a stage; None if the levels can differ."""
        levels = (0, geometry.max_level) if self.level is None else (self.level,)
        common = {geometry.level_at(level, stage) for level in levels}
        return common.pop() if len(common) == 1 else None

    def of(self, lattice: Lattice) -> tuple[int, int]:
        """Return the smallest and largest number of elements of a lattice, given its stage and its cropped size."""
        (height, width), stage, (whole_height, whole_width) = lattice.size, lattice.stage, lattice.whole_size
        pixels = lattice.batch * height * width
        level = self.level_at(stage, lattice.geometry)
        if level is not None:
            exact = lattice.batch * _cells(height, width, lattice.geometry.sides[level])
            return exact, exact
        lost = lattice.batch * whole_height * whole_width - pixels
        if lost < 0:  # each pixel beyond the level map may or may not be an additional element
            return self.least[stage], min(self.most[stage] - lost, pixels)
        return max(self.least[stage] - lost, 0), min(self.most[stage], pixels)


def _cells(height: int, width: int, side: int) -> int:
    """Return how many cells of size side x side cover height x width pixels."""
    return -(-height // side) * -(-width // side)


def _sum_of_first(values: list[tuple[int, int]], count: int) -> int:
    """Return the sum of the first `count` values of a list of (value, number of occurrences)."""
    total = 0
    for value, many in values:
        total += value * min(many, count)
        count -= min(many, count)
    return total


@dataclass(frozen=True, eq=False)
class Pyramid:
    """A legal level map with everything computed from it: cells, areas, kernel maps.

    A pyramid lives as long as the lattices of one forward pass. Cached values must not reference these lattices: a
    reference cycle would stay in memory until the garbage collector runs.

    Attributes:
        levels: (B, H, W) int8, legal.
        geometry: options of the converted network.
        bounds: bounds on the numbers of elements, if shapes must not depend on the map.
        in_graph: True if the pyramid was created while a graph is traced, where sizes may be symbols.
    """

    levels: Tensor
    geometry: Geometry
    bounds: Bounds | None = None
    in_graph: bool = False
    _derived: dict[Hashable, dict[Hashable, Any]] = field(default_factory=dict, repr=False)

    def forget_cells(self) -> None:
        """Free what lattices know of their cells, which is found again where it is asked for. Kernel maps and numbers
        stay."""
        for derived in self._derived.values():
            for name in [
                name for name, value in derived.items() if isinstance(name, str) and not _is_small(value)
            ]:
                del derived[name]

    def lattice(self, stage: int, size: tuple[int, int], part: Part | None = None) -> Lattice:
        """Return the lattice after a stage, cut to the fine size (height, width), with all cells or a part of them."""
        key: Hashable = (stage, size, part)
        key = str(key) if self.in_graph else key  # symbolic sizes cannot be hashed
        return Lattice(self, stage, size, part, key, self._derived.setdefault(key, {}))


def _is_small(value: Any) -> bool:
    return value is None or isinstance(value, int)


def _cover(count: int, length: int, spacing: int) -> int:
    """Return the pixels covered by `count` samples of `spacing` pixels each, or `length` if the map has exactly that
    many samples. Computed without a branch, because symbolic sizes cannot be compared."""
    all_of_it = divide_up(length, spacing)
    is_all = most(0, 1 - most(count - all_of_it, all_of_it - count))
    return count * spacing - (all_of_it * spacing - length) * is_all


class _derive(once[T]):
    """Decorate a method of a lattice as an attribute that is computed once for all equal lattices."""

    def __get__(self, owner: Any, kind: type) -> T:
        if owner is None:
            return self  # type: ignore[return-value]
        derived = owner._derived
        if self.name not in derived:
            derived[self.name] = self.build(owner)
        found: T = derived[self.name]
        owner.__dict__[self.name] = found  # read without a call next time
        return found


@dataclass(frozen=True, eq=False)
class Part:
    """The subset of a lattice's cells that is present.

    Attributes:
        rows: which rows of the whole lattice: (N,) bool; or a slice, of a part that is computed and that nothing reads.
    """

    rows: Tensor | slice


@dataclass(frozen=True, eq=False)
class Lattice:
    """The cells of a batch after one stage. The rows of an `Elements` value are in the lattice's order.

    The order is raster order of the anchors, image after image, so a uniform lattice is exactly the
    memory of a dense channels_last map and each image is an offset. Two lattices are equal if they have the same level
    map, stage, size and cells; equal lattices share a cache of derived values.
    `Pyramid.lattice` creates lattices.

    Attributes:
        pyramid: the level map that all stages share.
        stage: number of adaptive stages passed; levels are capped at it, see `Geometry.levels_at`.
        size: fine size (height, width).
        part: the cells that are present; None for all. Windows treat missing cells like positions outside the map.
        key: identifies the lattice among the lattices of its level map.
    """

    pyramid: Pyramid
    stage: int
    size: tuple[int, int]
    part: Part | None
    key: Hashable
    _derived: dict[Hashable, Any] = field(repr=False)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Lattice) and self._derived is other._derived

    def __hash__(self) -> int:
        return id(self._derived)

    def derive(self, key: Hashable, build: Callable[[], T]) -> T:
        """Return what `build` returns, computed once for this lattice and key."""
        key = str(key) if self.pyramid.in_graph else key
        if key not in self._derived:
            self._derived[key] = build()
        return self._derived[key]

    @once
    def is_open(self) -> bool:
        """True while a graph is traced without bounds, so that the number of elements depends on the level map."""
        return self.pyramid.in_graph and self.pyramid.bounds is None

    @once
    def has_known_counts(self) -> bool:
        """True if `counts` are known numbers, so that rows can be split by image; False while a graph is traced or if
        only bounds are known."""
        return self.pyramid.bounds is None and not self.is_open

    @property
    def whole(self) -> Lattice:
        """The same lattice with all cells present."""
        return self.pyramid.lattice(self.stage, self.size)

    def choose(self, pixels: Tensor) -> Lattice:
        """Return the part of a lattice whose anchors are True in `pixels` (B, H, W) bool."""
        rows = pixels.flatten()[self.anchors]
        return self.of_rows(rows if self.real is None else rows & self.real)

    def of_rows(self, rows: Tensor | slice) -> Lattice:
        """Return the part of a lattice that has some of its rows."""
        return self.pyramid.lattice(self.stage, self.size, Part(rows))

    def forget_tables(self, window: Hashable) -> None:
        """Free the kernel maps of a window that reads this lattice."""
        for key in [key for key in self._derived if isinstance(key, tuple) and window in key]:
            del self._derived[key]

    def at(self, stage: int, size: tuple[int, int] | None = None) -> Lattice:
        """Return the lattice of the same level map after `stage`, cropped to the fine size, with all cells present."""
        size = size or self.size
        if not self.pyramid.in_graph and self.part is None and (stage, size) == (self.stage, self.size):
            return self
        if size is not self.size and (
            is_statically_true(size[0] > self.size[0]) or is_statically_true(size[1] > self.size[1])
        ):
            raise InvalidInput(
                f"a lattice of {self.size[0]}x{self.size[1]} fine pixels cannot grow to {size[0]}x{size[1]}.",
                next="convert with a region that ends before this operation.",
            )
        return self.pyramid.lattice(stage, self._in_symbols(size) if self.pyramid.in_graph else size)

    def _in_symbols(self, size: tuple[int, int]) -> tuple[int, int]:
        """Return a size without expressions of symbols, see `fresh_length`."""
        height, width = (
            fresh_length(length, own, whole)
            for length, own, whole in zip(size, self.size, self.whole_size, strict=True)
        )
        return height, width

    def resample(self, stage: int, size: tuple[int, int]) -> Lattice:
        """Return the lattice of the same level map at any stage and any fine size up to `most_size`.

        Beyond the level map its border is replicated, so that cells that extend beyond it are complete.
        """
        return self.pyramid.lattice(stage, self.most_size).at(stage, size)

    @once
    def geometry(self) -> Geometry:
        """Options of the converted network."""
        return self.pyramid.geometry

    @property
    def whole_size(self) -> tuple[int, int]:
        """Height and width of the level map, before cropping."""
        return self.pyramid.levels.shape[1], self.pyramid.levels.shape[2]

    @property
    def most_size(self) -> tuple[int, int]:
        """Height and width of the level map, rounded up to whole cells of the largest side."""
        height, width = (divide_up(length, self.geometry.sides[-1]) for length in self.whole_size)
        return height * self.geometry.sides[-1], width * self.geometry.sides[-1]

    def pixels(self, image: Tensor, y: Tensor, x: Tensor) -> Tensor:
        """Return flat numbers of fine pixels; positions beyond the map are clamped to its lower or right border."""
        height, width = self.size
        return (image * height + y.clamp(max=height - 1)) * width + x.clamp(max=width - 1)

    def samples(self, spacing: int) -> tuple[int, int]:
        """Return height and width of a map with a sample on every `spacing`-th fine pixel."""
        return divide_up(self.size[0], spacing), divide_up(self.size[1], spacing)

    def holding(self, counts: Sequence[int], spacing: int) -> tuple[int, int]:
        """Return the fine size of a map with `counts` samples, `spacing` fine pixels apart: the size of the level map
        if it has exactly that many samples."""
        height, width = (
            length
            if is_statically_true(count == divide_up(length, spacing))
            else _cover(count, length, spacing)
            for count, length in zip(counts, self.whole_size, strict=True)
        )
        return height, width

    @property
    def batch(self) -> int:
        """Number of images."""
        return self.pyramid.levels.shape[0]

    @_derive
    def levels(self) -> Tensor:
        """(B, H, W) int8: level of the cell each fine pixel lies in."""
        levels = self.pyramid.levels[..., : self.size[0], : self.size[1]]
        for axis, (length, whole) in enumerate(zip(self.size, self.whole_size, strict=True), 1):
            if not is_at_most(length, whole):
                pixels = torch.arange(length, device=levels.device).clamp(max=whole - 1)
                levels = levels.index_select(axis, pixels)
        return self.geometry.levels_at(of_size(levels, self.size), self.stage)

    @_derive
    def side_map(self) -> Tensor:
        """(B, H, W) int64: side of the cell each fine pixel lies in."""
        return constant(self.geometry.sides, torch.int64, self.levels.device)[self.levels.long()]

    @_derive
    def capacity(self) -> tuple[int, int] | None:
        """Smallest and largest number of elements if bounds are known, else None. With bounds there are as many rows
        as the largest number."""
        bounds = self.pyramid.bounds
        return bounds.of(self) if bounds is not None else None

    @property
    def has_all_pixels(self) -> bool:
        """True if rows are the pixels of maps on the CPU, before the first stage of floors, outside of graphs."""
        is_dense = self.geometry.floors and self.stage == 0 and self.part is None
        return is_dense and self.is_counted_on_cpu and not running.is_exported

    @once
    def is_counted_on_cpu(self) -> bool:
        """True if the map is on the CPU and its cells are counted, not bounded."""
        return self.levels.device.type == "cpu" and self.pyramid.bounds is None and not self.is_open

    @_derive
    def _side_of_uniform(self) -> int:
        """Where level maps are floors: the side of the cells if it is the same everywhere; otherwise 0."""
        if not self.geometry.floors or self.capacity is not None or self.is_open:
            return 0
        return self.uniform_side

    def _cells_of_uniform(self, side: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return `_cells` of a lattice whose cells all have the same side."""
        (height, width), (rows, columns), device = self.size, self.samples(side), self.levels.device
        image, y, x = (torch.arange(count, device=device) for count in (self.batch, rows, columns))
        anchors = (image.view(-1, 1, 1) * height + y.view(-1, 1) * side) * width + x * side
        index = torch.arange(anchors.numel(), dtype=torch.int32, device=device).view(anchors.shape)
        if side > 1:
            index = index.repeat_interleave(side, 1)[:, :height].repeat_interleave(side, 2)[..., :width]
        return anchors.flatten(), index.flatten(), torch.full_like(image, rows * columns)

    @_derive
    def _cells(self) -> tuple[Tensor, Tensor, Tensor]:
        """Anchors (N,) as flat pixel numbers, the row of the cell that contains each pixel (B*H*W,), and the number of
        elements of each image (B,)."""
        if self.part is not None:
            return self._cells_of_part(self.part.rows)
        if side := self._side_of_uniform or not self.geometry.strides:  # then every pixel is a cell
            return self._cells_of_uniform(int(side))
        cells: tuple[Tensor, Tensor, Tensor] = compute(CellSearch(self.levels, self))
        return cells

    def _cells_of_part(self, rows: Tensor | slice) -> tuple[Tensor, Tensor, Tensor]:
        """Return `_cells` of some rows of the whole lattice."""
        whole = self.whole
        if isinstance(rows, slice):
            return whole.anchors[rows], whole.index[:0], whole.counts.new_tensor([rows.stop - rows.start])
        if self.capacity is None:
            numbers = rows.nonzero().squeeze(1)
        else:
            numbers = torch.nonzero_static(rows, size=self.capacity[1], fill_value=0).squeeze(1)
        index = (rows.cumsum(0) - 1).to(torch.int32)[whole.index]
        counts = torch.zeros_like(whole.counts).index_add_(0, whole.coordinates[0], rows.long())
        return whole.anchors[numbers], index, counts

    @property
    def anchors(self) -> Tensor:
        """(N,) int64: flat (image, y, x) pixel number of each element's anchor; 0 for padding."""
        return self._cells[0]

    @property
    def index(self) -> Tensor:
        """(B*H*W,) int32: the element whose cell holds each fine pixel."""
        return self._cells[1]

    @property
    def counts(self) -> Tensor:
        """(B,) int64: number of elements of each image."""
        return self._cells[2]

    @_derive
    def real(self) -> Tensor | None:
        """(N,) bool: True for rows that are elements rather than padding; None if there is no padding."""
        if self.capacity is None or self.capacity[0] == self.capacity[1]:
            return None
        return torch.arange(self.count, device=self.levels.device) < self.counts.sum()

    def __len__(self) -> int:
        """Return `count`; use `count` itself in graphs for any size, where it is a symbol."""
        return self.count

    @_derive
    def count(self) -> int:
        """Number of rows: elements and, if only bounds are known, padding."""
        if side := self._side_of_uniform:
            return self.batch * math.prod(self.samples(side))
        if self.capacity is not None:
            return self.capacity[1]
        # Tables of positions are large, and slow to make where compiled kernels may not run: often only the number is
        # asked for.
        is_dear = self.is_counted_on_cpu and (self.levels.numel() > _LARGE or running.is_observed)
        if is_dear and self.part is None and self.geometry.strides and "_cells" not in self._derived:
            return self._count_corners()
        return self.anchors.shape[0]

    def _count_corners(self) -> int:
        """Count the cells by their corners."""
        every = enumerate(self.geometry.sides)
        return sum(int((self.levels[:, ::side, ::side] == level).sum()) for level, side in every)

    @_derive
    def level_of_rows(self) -> Tensor:
        """(N,) int32: level of each element's cell."""
        return self.levels.flatten()[self.anchors].int()

    @_derive
    def level_shares(self) -> Tensor:
        """(B, levels + 1) float64: share of each image's fine pixels at each level."""
        every = range(self.geometry.max_level + 1)
        return torch.stack([(self.levels == level).double().mean((1, 2)) for level in every], 1)

    @_derive
    def coordinates(self) -> tuple[Tensor, Tensor, Tensor]:
        """Image, y and x (each (N,) int64) of each element's anchor."""
        (height, width), at = self.size, self.anchors
        return quotients(at, height * width), quotients(at, width) % height, at % width

    @_derive
    def uniform_level(self) -> int | None:
        """The common level of all cells of all images; None if levels differ, cells are missing, or the levels are
        unknown while a graph is traced."""
        if self.part is not None:
            return None
        if self.pyramid.bounds is not None:
            return self.pyramid.bounds.level_at(self.stage, self.geometry)
        if self.is_open:
            return None
        if self.geometry.floors and self.stage == 0:
            return 0
        # Of the level map itself, beyond which its border is repeated: a large one is not copied for the levels of a
        # stage, nor by `aminmax`, which copies what is cut or expanded.
        levels = self.pyramid.levels[:, : self.size[0], : self.size[1]]
        levels = levels if any(levels.stride()) else levels[:1, :1, :1]
        low, high = (self.geometry.level_at(int(end), self.stage) for end in (levels.amin(), levels.amax()))
        return low if low == high else None

    @property
    def uniform_side(self) -> int:
        """Common side of all cells in fine pixels; 0 if `uniform_level` is None."""
        return 0 if self.uniform_level is None else self.geometry.sides[self.uniform_level]

    @_derive
    def areas(self) -> Tensor:
        """(N,) int64: fine pixels of each element's cell inside the map."""
        height, width = self.size
        _, y, x = self.coordinates
        side = constant(self.geometry.sides, torch.int64, self.levels.device)[self.level_of_rows.long()]
        return torch.minimum(side, height - y) * torch.minimum(side, width - x)

    @_derive
    def weights(self) -> Tensor:
        """(N,) float64: weight of each element in a mean over its image; sums to H*W per image.

        The weight is the area of the cell inside the map. In an image with one level everywhere all elements weigh
        the same, cropped or not, because that image *is* its dense counterpart (laws 1 and 2). Padding weighs zero.
        """
        height, width = self.size
        image, area = self.coordinates[0], self.areas
        flat = self.levels.flatten(1)
        uniform = flat.amin(1) == flat.amax(1)
        weights = torch.where(uniform[image], height * width / self.counts[image].double(), area.double())
        return weights if self.real is None else weights * self.real

    @_derive
    def membership(self) -> Tensor:
        """(B, N) float64: `weights` of each image's own elements, normalised to sum to one per image."""
        height, width = self.size
        rows = torch.zeros(self.batch, self.count, dtype=torch.float64, device=self.levels.device)
        numbers = torch.arange(self.count, device=rows.device)
        rows[self.coordinates[0], numbers] = self.weights / (height * width)
        return rows

    @_derive
    def active_fraction(self) -> float:
        """Share of fine pixels at level 0."""
        return (self.levels == 0).double().mean().item()


@dataclass(frozen=True, eq=False)
class CellSearch(Work):
    """All cells of a lattice: their anchors (N,) int64 as pixel numbers, ascending, and 0 behind the last where only
    bounds are known; the row of the cell that holds each pixel (B*H*W,) int32; the number of cells of each image (B,).

    Attributes:
        rows: the levels (B, H, W) of the lattice.
    """

    lattice: Lattice
    task: ClassVar[str] = "find_cells"

    @property
    def is_counted(self) -> bool:
        """True if the number of cells is known, not bounded."""
        return self.lattice.capacity is None

    @property
    def case(self) -> tuple[Hashable, ...]:
        """The device, and what is known of the number of cells."""
        return *super().case, self.is_counted
