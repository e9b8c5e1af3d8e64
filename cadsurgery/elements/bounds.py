"""Bounds on the number of elements, computed from sizes alone, so that compiled graphs have static shapes."""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from cadsurgery.elements.lattice import Geometry, Lattice


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

    def of(self, lattice: Lattice) -> tuple[int, int]:
        """Return the smallest and largest number of elements of a lattice, given its stage and its cropped size."""
        (height, width), stage, (whole_height, whole_width) = lattice.size, lattice.stage, lattice.whole_size
        pixels = lattice.batch * height * width
        if stage == 0:
            return pixels, pixels
        if self.level is not None:
            side = lattice.geometry.sides[lattice.geometry.level_at(self.level, stage)]
            exact = lattice.batch * _cells(height, width, side)
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
