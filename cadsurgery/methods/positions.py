"""Chosen positions of maps: where something is computed, and what those positions read."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from functools import cached_property, partial
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


class Maps:
    """The maps of a batch, of any size: their lattices, and what windows read of them."""

    def __init__(self, batch: int, device: torch.device) -> None:
        self.batch, self.device = batch, device
        self._known: dict[Hashable, Any] = {}

    def _once(self, key: Hashable, build: Callable[[], Any], *alive: object) -> Any:
        """The value that `build` gives, made once; objects whose `id` is in the key stay alive."""
        if key not in self._known:
            self._known[key] = (build(), alive)
        return self._known[key][0]

    def everywhere(self, size: Size) -> Places:
        """All positions of maps of a size."""
        mask = partial(torch.ones, self.batch, *size, dtype=torch.bool, device=self.device)
        places: Places = self._once(("everywhere", size), lambda: Places(mask()))
        return places

    def lattice(self, size: Size, places: Places | None = None, stride: int = 1) -> Lattice:
        """The lattice of maps of a size before a convolution of some stride: all positions, or some."""

        def build() -> Lattice:
            if stride == 1:
                return resolution(self.batch, *size, self.device)
            return Geometry((stride,), fill="nearest").uniform(1, self.batch, size, self.device).at(0)

        whole: Lattice = self._once(("lattice", size, stride), build)
        if places is None:
            return whole
        key, part = ("lattice", size, stride, id(places)), places.part
        lattice: Lattice = self._once(key, lambda: whole.pyramid.lattice(0, size, part), places)
        return lattice

    def reading(self, size: Size, source: Places | None, window: Window, target: Places) -> WindowRead:
        """Taps of a convolution for some positions of its output, in all or some of a map of a size."""
        window = window.fit(size)
        before = self.lattice(size, source, window.stride)
        if window.stride == 1 and target.size == size:
            return WindowRead(before, self.lattice(size, target), window)
        if window.stride == 1:
            return WindowRead(before, before.pyramid.lattice(0, target.size, target.part), window)
        fine = window.output_size(size)

        def build() -> Part:
            mask = target.mask.new_zeros(self.batch, *fine)
            mask[:, :: window.stride, :: window.stride] = target.mask
            return Part(mask.flatten())

        anchors = self._once(("anchors", id(target), window.stride, fine), build, target)
        return WindowRead(before, before.pyramid.lattice(1, fine, anchors), window)


class Sites(Maps):
    """The positions of maps of all sizes at which an exit leaves something to be computed, and sets around them.

    What one exit is confident of, later ones are: the positions are among those of the exit before.

    Attributes:
        grid: of the others, every how many along both axes are computed all the same; 0: none.
    """

    def __init__(self, undecided: Tensor, before: Sites | None = None, grid: int = 0) -> None:
        """Take the map (B, H, W), bool, on the grid of the exit's logits, and what the exit before left."""
        super().__init__(undecided.shape[0], undecided.device)
        self.grid, self._before = grid, before
        if before is not None:
            undecided = undecided & before.at((undecided.shape[1], undecided.shape[2])).mask
        self.undecided = undecided

    @cached_property
    def is_everything(self) -> bool:
        """True if everything is left."""
        return bool(self.undecided.all())

    @cached_property
    def is_nothing(self) -> bool:
        """True if nothing is left."""
        return not bool(self.undecided.any())

    def at(self, size: Size) -> Places:
        """The positions of maps of a size: nearest on the grid of the logits."""

        def build() -> Places:
            mask = self.undecided
            if tuple(mask.shape[1:]) != size:
                mask = F.interpolate(mask.unsqueeze(1).float(), size=size).squeeze(1) > 0
            return Places(mask if self._before is None else mask & self._before.at(size).mask)

        places: Places = self._once(("at", size), build)
        return places

    def computed(self, size: Size, needed: Places | None = None) -> Places:
        """The positions of maps of a size that are computed: those that are left and the grid, of which no more than
        what others that are needed are filled from; None: everything is needed."""
        left = self.at(size)
        if not self.grid:
            return left

        def build() -> Places:
            mask = torch.zeros_like(left.mask)
            mask[:, :: self.grid, :: self.grid] = left.mask.flatten(1).any(1).view(-1, 1, 1)
            if needed is not None:
                filled = (needed.mask & ~left.mask).unsqueeze(1).float()
                mask &= F.max_pool2d(filled, 2 * REACH + 1, 1, REACH).squeeze(1) > 0
            return Places(mask | left.mask)

        places: Places = self._once(("computed", size, id(needed)), build, needed)
        return places

    def union(self, one: Places, other: Places) -> Places:
        """The positions of either."""
        if one is other:
            return one
        key = ("union", *sorted((id(one), id(other))))
        return self._places(key, lambda: one.mask | other.mask, one, other)

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

        return self._places(("window", id(places), window, size), build, places)

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

        return self._places(("resize", id(places), size), build, places)

    def _places(self, key: Hashable, build: Callable[[], Tensor], *sources: Places) -> Places:
        """The places of a mask: one of the sources where it is the same."""

        def find() -> Places:
            mask = build()
            same = (one for one in sources if one.size == mask.shape[1:] and torch.equal(one.mask, mask))
            return next(same, None) or Places(mask)

        places: Places = self._once(key, find, *sources)
        return places


def _spread(mask: Tensor, axis: int, length: int, before: int, window: Window) -> Tensor:
    """Mask of the positions along an axis that a window reads for some of its output."""
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
