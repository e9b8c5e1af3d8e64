"""Bounds of the number of elements, from sizes alone: what makes every shape static, for graphs that are compiled."""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from cadsurgery.elements.lattice import Geometry, Lattice


class Bounds(NamedTuple):
    """How many elements a level map can have, from its size alone: what makes every shape static.

    A lattice with bounds has as many rows as there can be elements; the rows beyond the real ones are padding.
    Padding elements repeat the first element's place, are read by nothing and weigh nothing in image-wide
    operations, so that their values reach no real element.

    Attributes:
        least: elements of all images after each stage 0..K, at least.
        most: likewise, at most.
        level: the level of all cells of all images, if it is known to be the same.
    """

    least: tuple[int, ...]
    most: tuple[int, ...]
    level: int | None = None

    @staticmethod
    def of_patches(geometry: Geometry, batch: int, size: tuple[int, int], kept: tuple[int, ...]) -> Bounds:
        """Bounds of maps of patches (aligned R_K x R_K blocks), each with one level, of a batch with fine maps of
        `size`: `kept[i]` of them, any, have level i or finer, all others the lowest level. A patch that sticks out of
        the map has fewer elements.
        """
        if geometry.patch == "block":  # what is not the lowest level becomes level 0
            kept = kept[-1:]
        patch, pixels = geometry.sides[-1], batch * size[0] * size[1]
        whole, rest = zip(*(divmod(length, patch) for length in size), strict=True)
        # Kinds of patches by height and width inside the map, and how many there are of each.
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
            sides = [geometry.sides[min(level, stage)] for stage in range(len(geometry.sides))]
            exact = tuple(batch * _cells(*size, side) for side in sides)
            return Bounds(exact, exact, level)
        least, most = [], []
        for stage in range(len(geometry.sides)):
            side = geometry.sides[min(stage, geometry.max_level)]
            few = many = batch * _cells(*size, side)
            # The patches of level i or finer are among those of level i + 1 or finer, and have more elements.
            for count, (fine, coarse) in zip(kept, pairwise(levels), strict=True):
                sides = [geometry.sides[min(stage, level)] for level in (fine, coarse)]
                gains = sorted((_cells(h, w, sides[0]) - _cells(h, w, sides[1]), n) for h, w, n in kinds)
                few += _sum_of_first(gains, count)
                many += _sum_of_first(gains[::-1], count)
            least.append(min(pixels, few))
            most.append(min(pixels, many))
        return Bounds(tuple(least), tuple(most))

    def of(self, lattice: Lattice) -> tuple[int, int]:
        """Least and largest number of elements of a lattice, of the level map and the stage and size it is cut to."""
        (height, width), stage, (whole_height, whole_width) = lattice.size, lattice.stage, lattice.whole_size
        pixels = lattice.batch * height * width
        if stage == 0:
            return pixels, pixels
        if self.level is not None:
            exact = lattice.batch * _cells(height, width, lattice.geometry.sides[min(self.level, stage)])
            return exact, exact
        lost = lattice.batch * whole_height * whole_width - pixels
        if lost < 0:  # beyond the level map each pixel can be an element, or none more
            return self.least[stage], min(self.most[stage] - lost, pixels)
        return max(self.least[stage] - lost, 0), min(self.most[stage], pixels)


def _cells(height: int, width: int, side: int) -> int:
    """How many cells of a side cover height x width pixels."""
    return -(-height // side) * -(-width // side)


def _sum_of_first(values: list[tuple[int, int]], count: int) -> int:
    """Sum of the first `count` of values that are given with how often each occurs."""
    total = 0
    for value, many in values:
        total += value * min(many, count)
        count -= min(many, count)
    return total
