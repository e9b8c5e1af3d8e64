"""Sets of positions of maps: where values are computed, and which positions these read."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property, wraps
from typing import Any, Concatenate, ParamSpec, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from cadsurgery.elements.backends.works import WindowRead
from cadsurgery.elements.gaps import REACH, resolution
from cadsurgery.elements.kernel_map import Reading, Window, read_rows
from cadsurgery.elements.lattice import Geometry, Lattice, Part

P = ParamSpec("P")
T = TypeVar("T")
Size = tuple[int, int]


def remembered(method: Callable[Concatenate[Any, P], T]) -> Callable[Concatenate[Any, P], T]:
    """Let a method compute its result for the same arguments once, as long as its object lives."""

    @wraps(method)
    def call(self: Any, *args: P.args, **kwargs: P.kwargs) -> T:
        known, key = self.__dict__.setdefault("_known", {}), (method, *args, *kwargs.items())
        if key not in known:
            known[key] = method(self, *args, **kwargs)
        found: T = known[key]
        return found

    return call


class Places:
    """A set of positions of maps of one size; rows of values at these positions are in raster order."""

    def __init__(self, mask: Tensor) -> None:
        """Take the positions as a bool map (B, H, W)."""
        self.mask = mask
        self.part = Part(mask.flatten())

    @property
    def size(self) -> Size:
        """Height and width of the maps."""
        return self.mask.shape[1], self.mask.shape[2]

    @cached_property
    def pixels(self) -> Tensor:
        """(N,) int64: flat indices of the positions in the batch."""
        return self.mask.flatten().nonzero().squeeze(1)

    @property
    def count(self) -> int:
        """Number of positions."""
        return self.pixels.shape[0]

    @cached_property
    def rows(self) -> Tensor:
        """(B*H*W,) int64: row number of each position that belongs to the set."""
        return self.mask.flatten().cumsum(0) - 1

    @remembered
    def places_of(self, some: Places) -> Tensor:
        """Return the row numbers of a subset."""
        return self.rows[some.pixels]

    @remembered
    def reading_of(self, some: Places) -> Reading:
        """Return the reading of a subset, one row per position."""
        return read_rows(self.places_of(some).int().unsqueeze(1))

    @cached_property
    def images(self) -> Tensor:
        """(N,) int64: image index of each row."""
        return self.pixels // (self.mask.shape[1] * self.mask.shape[2])


class Maps:
    """Lattices and window reads of the maps of a batch, of any size, created once each."""

    def __init__(self, batch: int, device: torch.device) -> None:
        self.batch, self.device = batch, device

    @remembered
    def everywhere(self, size: Size) -> Places:
        """Return all positions of maps of a size."""
        return Places(torch.ones(self.batch, *size, dtype=torch.bool, device=self.device))

    @remembered
    def whole(self, size: Size, stride: int) -> Lattice:
        """Return the lattice of all positions that a convolution of this stride reads on maps of a size."""
        if stride == 1:
            return resolution(self.batch, *size, self.device)
        return Geometry((stride,), fill="nearest").uniform(1, self.batch, size, self.device).at(0)

    def lattice(self, size: Size, places: Places | None = None, stride: int = 1) -> Lattice:
        """Return the lattice that a convolution of this stride reads on maps of a size: all positions, or some."""
        whole = self.whole(size, stride)
        return whole if places is None else whole.pyramid.lattice(0, size, places.part)

    def reading(
        self, size: Size, source: Places | None, window: Window, target: Places
    ) -> WindowRead | Reading:
        """Return the taps of a convolution for the `target` positions of its output, on (some positions of) a map; for
        a product the rows."""
        window = window.fit(size)
        if window.is_pointwise and size == target.size:
            return (source or self.everywhere(size)).reading_of(target)
        before = self.lattice(size, source, window.stride)
        stage, fine = (0, target.size) if window.stride == 1 else (1, window.output_size(size))
        return WindowRead(before, before.pyramid.lattice(stage, fine, target.part), window)


class Sites(Maps):
    """The positions that an exit leaves undecided, on maps of all sizes, and sets derived from them.

    A position that one exit decides is decided for later exits too: each set is part of the previous exit's set.

    Attributes:
        grid: stride along both axes of further positions that are computed in any case; 0 for none.
    """

    def __init__(self, undecided: Tensor, before: Sites | None = None, grid: int = 0) -> None:
        """Take the undecided positions (B, H, W), bool, at the size of the exit's logits, and the previous sites."""
        super().__init__(undecided.shape[0], undecided.device)
        self.grid, self._before = grid, before
        if before is not None:
            undecided = undecided & before.at((undecided.shape[1], undecided.shape[2])).mask
        self.undecided = undecided

    @remembered
    def at(self, size: Size) -> Places:
        """Return the undecided positions on maps of a size, by nearest interpolation of the logits' grid."""
        mask = self.undecided
        if tuple(mask.shape[1:]) != size:
            mask = F.interpolate(mask.unsqueeze(1).float(), size=size).squeeze(1) > 0
        return Places(mask if self._before is None else mask & self._before.at(size).mask)

    @remembered
    def computed(self, size: Size, needed: Places | None = None) -> Places:
        """Return the positions computed on maps of a size: undecided positions and the grid.

        Of the grid, only positions from which other `needed` positions are filled; all of it if `needed` is None.
        """
        left = self.at(size)
        if not self.grid:
            return left
        mask = torch.zeros_like(left.mask)
        mask[:, :: self.grid, :: self.grid] = left.mask.flatten(1).any(1).view(-1, 1, 1)
        if needed is not None:
            filled = (needed.mask & ~left.mask).unsqueeze(1).float()
            mask &= F.max_pool2d(filled, 2 * REACH + 1, 1, REACH).squeeze(1) > 0
        return Places(mask | left.mask)

    def union(self, places: Places, other: Places) -> Places:
        """Return the positions in either set."""
        return places if places is other else self._union(*sorted((places, other), key=id))

    @remembered
    def _union(self, places: Places, other: Places) -> Places:
        return _places(places.mask | other.mask, places, other)

    @remembered
    def read_by_window(self, places: Places, window: Window, size: Size) -> Places:
        """Return the positions of maps of a size that a window reads for these positions of its output."""
        window = window.fit(size)
        if window.is_pointwise and window.stride == 1 and places.size == size:
            return places
        mask = places.mask
        for axis, (length, before) in enumerate(zip(size, window.padding[::2], strict=True), 1):
            mask = _spread(mask, axis, length, before, window)
        return _places(mask, places)

    @remembered
    def read_by_resize(self, places: Places, size: Size) -> Places:
        """Return the positions of maps of a size that are read when the map is resized to the size of `places`."""
        if places.size == size:
            return places
        mask = places.mask.int()
        for axis, length in enumerate(size, 1):
            mask = _reached(mask, axis, length)
        return _places(mask > 0, places)


def _places(mask: Tensor, *sources: Places) -> Places:
    """Return the positions of a mask, reusing a source that is equal."""
    same = (source for source in sources if source.size == mask.shape[1:] and torch.equal(source.mask, mask))
    return next(same, None) or Places(mask)


def _spread(mask: Tensor, axis: int, length: int, before: int, window: Window) -> Tensor:
    """Mark the positions along an axis that a window reads for the marked positions of its output."""
    count, last = mask.shape[axis], window.dilation[axis - 1] * (window.kernel[axis - 1] - 1)
    shape = list(mask.shape)
    shape[axis] = max((count - 1) * window.stride + last + 1, before + length)
    out = mask.new_zeros(shape)
    for tap in range(window.kernel[axis - 1]):
        first = tap * window.dilation[axis - 1]
        read = out.narrow(axis, first, (count - 1) * window.stride + 1)
        read = read[:, :: window.stride] if axis == 1 else read[:, :, :: window.stride]
        read |= mask
    return out.narrow(axis, before, length)


def _reached(mask: Tensor, axis: int, length: int) -> Tensor:
    """Count, along an axis, how often positions of a map are read for the positions counted in `mask`.

    Covers all kinds of interpolation between neighbours. The result has `length` positions on the axis.
    """
    output_length = mask.shape[axis]
    numbers = torch.arange(output_length, device=mask.device, dtype=torch.float64)
    ratio = length / output_length
    centres, corners = (numbers + 0.5) * ratio - 0.5, numbers * (length - 1) / max(output_length - 1, 1)
    ends = torch.stack((centres, corners, numbers * ratio))
    low, high = ends.amin(0).floor().long(), ends.amax(0).floor().long() + 1
    shape = list(mask.shape)
    shape[axis] = length
    out = mask.new_zeros(shape)
    for step in range(int((high - low).max()) + 1):
        out.index_add_(axis, torch.minimum(low + step, high).clamp(0, length - 1), mask)
    return out
