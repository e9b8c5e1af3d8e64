"""Chosen positions of maps: where an exit is not confident yet, and what those positions read."""

from __future__ import annotations

from collections.abc import Hashable
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from cadsurgery.elements.backends.choose import WindowRead
from cadsurgery.elements.gaps import REACH, resolution
from cadsurgery.elements.kernel_map import Reading, Window, read_rows
from cadsurgery.elements.lattice import Geometry, Lattice, Part

Size = tuple[int, int]


class Places:
    """Some positions of the maps of one size; the rows of values at them are in raster order."""

    def __init__(self, mask: Tensor) -> None:
        """Take the positions (B, H, W), bool."""
        self.mask = mask
        self.part = Part(mask.flatten())
        self._places: dict[Places, Tensor] = {}
        self._readings: dict[Places, Reading] = {}

    @property
    def size(self) -> Size:
        """Height and width of the maps."""
        return self.mask.shape[1], self.mask.shape[2]

    @cached_property
    def pixels(self) -> Tensor:
        """(N,) int64: flat numbers of the positions."""
        return self.part.pixels.nonzero().squeeze(1)

    @property
    def count(self) -> int:
        """How many there are."""
        return self.pixels.shape[0]

    @cached_property
    def rows(self) -> Tensor:
        """(B*H*W,) int64: the row of each position, where it is one of them."""
        return self.part.pixels.cumsum(0) - 1

    def places_of(self, some: Places) -> Tensor:
        """The rows of some of the positions."""
        if some not in self._places:
            self._places[some] = self.rows[some.pixels]
        return self._places[some]

    def reading_of(self, some: Places) -> Reading:
        """Each of some of the positions, read where it lies."""
        if some not in self._readings:
            self._readings[some] = read_rows(self.places_of(some).int().unsqueeze(1))
        return self._readings[some]

    @cached_property
    def images(self) -> Tensor:
        """(N,) int64: the image of each row."""
        return self.pixels // (self.mask.shape[1] * self.mask.shape[2])


class Sites:
    """The positions of maps of all sizes at which an exit leaves something to be computed, and sets around them.

    What one exit is confident of, later ones are: the positions are among those of the exit before.

    Attributes:
        grid: of the others, every how many along both axes are computed all the same; 0: none.
    """

    def __init__(self, unsure: Tensor, before: Sites | None = None, grid: int = 0) -> None:
        """Take the map (B, H, W), bool, on the grid of the exit's logits, and what the exit before left."""
        self.grid = grid
        self.unsure = (
            unsure if before is None else unsure & before.at((unsure.shape[1], unsure.shape[2])).mask
        )
        self._before = before
        self._known: dict[Hashable, Any] = {}

    @cached_property
    def is_everything(self) -> bool:
        """Whether everything is left."""
        return bool(self.unsure.all())

    @cached_property
    def is_nothing(self) -> bool:
        """Whether nothing is left."""
        return not bool(self.unsure.any())

    @property
    def batch(self) -> int:
        """Number of images."""
        return self.unsure.shape[0]

    def at(self, size: Size) -> Places:
        """The positions of maps of a size: nearest on the grid of the logits."""
        if ("at", size) not in self._known:
            mask = self.unsure
            if tuple(mask.shape[1:]) != size:
                mask = F.interpolate(mask.unsqueeze(1).float(), size=size).squeeze(1) > 0
            if self._before is not None:
                mask = mask & self._before.at(size).mask
            self._known["at", size] = Places(mask)
        places: Places = self._known["at", size]
        return places

    def computed(self, size: Size, needed: Places | None = None) -> Places:
        """The positions of maps of a size that are computed: those that are left and the grid, of which no more than
        what others that are needed are filled from; None: everything is needed."""
        left = self.at(size)
        if not self.grid:
            return left
        key = ("computed", size, id(needed))
        if key not in self._known:
            mask = torch.zeros_like(left.mask)
            mask[:, :: self.grid, :: self.grid] = left.mask.flatten(1).any(1).view(-1, 1, 1)
            if needed is not None:
                filled = (needed.mask & ~left.mask).unsqueeze(1).float()
                mask &= F.max_pool2d(filled, 2 * REACH + 1, 1, REACH).squeeze(1) > 0
            self._known[key] = (Places(mask | left.mask), needed)  # which stays alive: its number is the key
        places: Places = self._known[key][0]
        return places

    def everywhere(self, size: Size) -> Places:
        """All positions of maps of a size."""
        if ("everywhere", size) not in self._known:
            self._known["everywhere", size] = Places(self.unsure.new_ones(self.batch, *size))
        places: Places = self._known["everywhere", size]
        return places

    def union(self, one: Places, other: Places) -> Places:
        """The positions of either."""
        if one is other:
            return one
        key = ("union", *sorted((id(one), id(other))))
        if key not in self._known:
            mask = one.mask | other.mask
            same = next((places for places in (one, other) if torch.equal(places.mask, mask)), None)
            self._known[key] = (
                same or Places(mask),
                one,
                other,
            )  # both stay alive: their numbers are the key
        places: Places = self._known[key][0]
        return places

    def read_by_window(self, places: Places, window: Window, size: Size) -> Places:
        """The positions of maps of a size that a window reads for some of its output."""
        window = window.fit(size)
        if window.is_pointwise and window.stride == 1 and places.size == size:
            return places

        def build() -> Tensor:
            mask = places.mask
            for axis, (length, before) in enumerate(zip(size, window.padding[::2], strict=True), 1):
                mask = _spread(mask, axis, length, before, window)
            return mask

        return self._places(("window", id(places), window, size), places, build)

    def read_by_resize(self, places: Places, size: Size) -> Places:
        """The positions of maps of a size that are read where they are resized between neighbours, to the size of the
        places."""
        if places.size == size:
            return places

        def build() -> Tensor:
            mask = places.mask.int()
            for axis, length in enumerate(size, 1):
                mask = _reached(mask, axis, length)
            return mask > 0

        return self._places(("resize", id(places), size), places, build)

    def _places(self, key: Hashable, source: Places, build: Any) -> Places:
        if key not in self._known:
            mask = build()
            same = mask.shape == source.mask.shape and torch.equal(mask, source.mask)
            self._known[key] = (source if same else Places(mask), source)
        places: Places = self._known[key][0]
        return places

    def lattice(self, size: Size, places: Places | None = None, stride: int = 1) -> Lattice:
        """The lattice of maps of a size before a convolution of some stride: all positions, or some."""
        key = ("lattice", size, stride)
        if key not in self._known:
            device = self.unsure.device
            self._known[key] = (
                resolution(self.batch, *size, device)
                if stride == 1
                else Geometry((stride,), fill="nearest").uniform(1, self.batch, size, device).at(0)
            )
        whole: Lattice = self._known[key]
        return whole if places is None else whole.pyramid.lattice(0, size, places.part)

    def between(self, size: Size, source: Places | None, window: Window, target: Places) -> WindowRead:
        """What a convolution reads for some positions of its output, from some of a map of a size."""
        window = window.fit(size)
        before = self.lattice(size, source, window.stride)
        if window.stride == 1:
            return WindowRead(before, before.pyramid.lattice(0, target.size, target.part), window)
        fine = window.output_size(size)

        def build() -> Part:
            mask = target.mask.new_zeros(self.batch, *fine)
            mask[:, :: window.stride, :: window.stride] = target.mask
            return Part(mask.flatten())

        key = ("anchors", id(target), window.stride, fine)
        if key not in self._known:
            self._known[key] = (build(), target)
        return WindowRead(before, before.pyramid.lattice(1, fine, self._known[key][0]), window)


def _spread(mask: Tensor, axis: int, length: int, before: int, window: Window) -> Tensor:
    """Which positions along an axis a window reads for some of its output; others than along the axis stay."""
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
    """Counts above zero for positions along an axis of some length that are read, in any way of resizing between
    neighbours, for those of the mask, a map of counts."""
    want = mask.shape[axis]
    numbers = torch.arange(want, device=mask.device, dtype=torch.float64)
    ratio = length / want
    centres, corners = (numbers + 0.5) * ratio - 0.5, numbers * (length - 1) / max(want - 1, 1)
    ends = torch.stack((centres, corners, numbers * ratio))
    low, high = ends.amin(0).floor().long(), ends.amax(0).floor().long() + 1
    shape = list(mask.shape)
    shape[axis] = length
    out = mask.new_zeros(shape)
    for step in range(int((high - low).max()) + 1):
        out.index_add_(axis, torch.minimum(low + step, high).clamp(0, length - 1), mask)
    return out
