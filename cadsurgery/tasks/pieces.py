"""Which rectangles of a large picture are computed, where not all of it has data or is asked for.

Rectangles that cover what is wanted are chosen such that the least is computed, with the margin around each that its
values depend on. Each is then a picture of its own, in bands of rows; its values are those of the whole picture.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from torch import Tensor

from cadsurgery.network.boxes import Box
from cadsurgery.network.regions import PictureParts
from cadsurgery.support.errors import CannotConvert

# Pixels a side of blocks, at least, and rows of blocks, at most, in which wanted pixels are found.
_SIDE, _MOST = 64, 128
_GAP = 256  # rows of a picture that are not wanted, which are computed if they are fewer
_EXTRA = 1 << 16  # pixels whose computation takes as long as planning another rectangle
# Share of the pixels of whole rows from which on rectangles are not worth it: where what is beside them costs as much,
# and where it has no data, so that its cells are coarse already.
_LESS, _LESS_OF_COARSE = 0.95, 0.6
# Pixels, and the share of a side, by which networks round up the sides of pictures to whole samples, at most.
_ROUNDED, _SHARE_ROUNDED = 63, 0.125
Blocks = np.ndarray[Any, np.dtype[np.bool_]]


class Sliced(Protocol):
    """A picture (C, H, W) of which a part is read by `picture[:, top:bottom, left:right]`; `size` is what of it is no
    padding."""

    shape: tuple[int, ...]
    size: tuple[int, int]

    @property
    def lacks(self) -> bool:
        """True if some pixels have no data."""

    def __getitem__(self, place: tuple[slice, ...]) -> Tensor: ...


@dataclass(frozen=True)
class Piece:
    """A rectangle of the result.

    Attributes:
        box: its rows and columns in the result.
        part: the part of the picture that it is computed from; None for all columns.
        offset: row and column of the result at which the result of the part begins.
        mask: the mask for the part; None for the network's.
    """

    box: Box
    part: Box | None = None
    offset: tuple[int, int] = (0, 0)
    mask: Any = None


class PartOfPicture:
    """A part of a picture, of which rows are read where it is sliced."""

    def __init__(self, picture: Sliced, part: Box) -> None:
        self._picture, self._part = picture, part
        self.size = part.bottom - part.top, part.right - part.left
        self.shape = (picture.shape[0], *self.size)

    def __getitem__(self, place: tuple[slice, slice]) -> Tensor:
        """Return rows (C, rows, W)."""
        first, end, _ = place[1].indices(self.shape[1])
        top = self._part.top
        return self._picture[:, top + first : top + end, self._part.left : self._part.right]


def step_of(pixels: int, samples: int) -> float:
    """Return how many pixels of a picture lie between the samples of a result.

    Networks stride by powers of two and round lengths up: the result of 150 pixels has 19 samples at stride 8, whose
    last one ends behind the picture. Samples of another number cover the picture from side to side.
    """
    step = 2.0 ** round(math.log2(pixels / samples))
    is_rounded = 0 <= step * samples - pixels <= min(_ROUNDED, _SHARE_ROUNDED * pixels)
    return step if is_rounded else pixels / samples


def block_side(height: int) -> int:
    """Return the side in pixels of the blocks in which wanted pixels of a picture are found."""
    return max(_SIDE, math.ceil(height / _MOST))


def find_pieces(
    net: Any, picture: Sliced, wanted: Blocks, size: tuple[int, int], steps: tuple[float, float], mask: Any
) -> list[Piece]:
    """Return the rectangles that are computed for blocks of the picture: whole rows if these are no more work, or the
    network depends on all of each row.

    Args:
        net: the network.
        picture: the picture, as the network is given it.
        wanted: which blocks of `block_side` have pixels that are wanted, (rows, columns).
        size: (height, width) of the result.
        steps: pixels between its samples, down and across.
        mask: levels (1, h, w) of the picture; None for a network whose level is the same everywhere.
    """
    height, width = picture.shape[1:]
    side = block_side(height)
    image = picture[:, :1].new_zeros(()).expand(1, *picture.shape)
    runs = _runs(np.flatnonzero(wanted.any(1)), _GAP // side)
    down, across = ((side, *lengths) for lengths in zip(picture.size, size, steps, strict=True))
    rows = [Piece(Box(*_samples_of(run[0], run[-1] + 1, *down), 0, size[1])) for run in runs]

    def region_of(box: Box) -> PictureParts:
        found: PictureParts = net.in_region(image, [[box]], lambda region: region, _refused, mask)
        return found

    try:
        margin = _margin_of(region_of, (height, width), side)
    except CannotConvert:  # what depends on the size of the picture, or on the place in it
        return rows
    found, work = _rectangles(wanted, side, margin, (height, width))
    of_rows = sum((run[-1] - run[0] + 1) * side * width for run in runs)
    if work > (_LESS_OF_COARSE if mask is not None and picture.lacks else _LESS) * of_rows:
        return rows
    pieces = list[Piece]()
    for top, bottom, left, right in found:
        (a, b), (c, d) = _samples_of(top, bottom, *down), _samples_of(left, right, *across)
        if a >= b or c >= d:
            continue
        box = Box(
            math.floor(a * steps[0]),
            min(math.ceil(b * steps[0]), height),
            math.floor(c * steps[1]),
            min(math.ceil(d * steps[1]), width),
        )
        try:
            region = region_of(box)
        except CannotConvert:
            return rows
        (part,) = region.parts
        offset = int(part.top / steps[0]), int(part.left / steps[1])
        pieces.append(Piece(Box(a, b, c, d), part, offset, region.mask_of(part)))
    return pieces


def _refused(refusal: CannotConvert, _: object) -> Any:
    raise refusal


def _samples_of(first: int, end: int, side: int, pixels: int, samples: int, step: float) -> tuple[int, int]:
    """Return the samples [first, end) whose middles are in blocks; the last block has all that are behind it."""
    places = (block * side for block in (first, end))
    first, end = (math.ceil(at / step - 0.5) if at < pixels else samples for at in places)
    return max(first, 0), min(end, samples)


def _margin_of(region_of: Any, size: tuple[int, int], side: int) -> tuple[int, int]:
    """Return the pixels above or below, and beside, a block in the middle that its values depend on."""
    spans = [(max(length // 2 - side // 2, 0), min(length // 2 + side // 2, length)) for length in size]
    box = Box(*spans[0], *spans[1])
    part = region_of(box).reads.part_for(box)  # whatever the levels there
    across = max(box.left - part.left, part.right - box.right)
    return max(box.top - part.top, part.bottom - box.bottom), across


def _runs(index: np.ndarray[Any, Any], gap: int) -> list[np.ndarray[Any, Any]]:
    """Split increasing numbers where more than `gap` are missing."""
    return np.split(index, np.flatnonzero(np.diff(index) > gap + 1) + 1) if index.size else []


def _rectangles(
    wanted: Blocks, side: int, margin: tuple[int, int], size: tuple[int, int]
) -> tuple[list[tuple[int, int, int, int]], float]:
    """Return disjoint rectangles in blocks (top, bottom, left, right) that cover what is wanted with the least work,
    and that work in pixels."""
    (down, across), (height, width) = margin, size
    gap = 2 * across // side

    def spans_of(together: Blocks) -> Iterator[tuple[int, int]]:
        for run in _runs(np.flatnonzero(together), gap):
            yield int(run[0]), int(run[-1]) + 1

    def reach(first: int, end: int, margin: int, length: int) -> int:
        return min(end * side + margin, length) - max(first * side - margin, 0)

    def work_of(together: Blocks, begin: int, end: int) -> float:
        tall = reach(begin, end, down, height)
        return sum(tall * reach(*span, across, width) + _EXTRA for span in spans_of(together))

    # The least work of the first so many rows of blocks, and where its last group of rows begins.
    least, begins = [0.0], [0]
    for end in range(1, len(wanted) + 1):
        together, found = np.zeros(wanted.shape[1], bool), (math.inf, end - 1)
        for begin in range(end - 1, -1, -1):
            together = together | wanted[begin]
            found = min(found, (least[begin] + work_of(together, begin, end), begin))
        least.append(found[0])
        begins.append(found[1])
    rectangles, end = list[tuple[int, int, int, int]](), len(wanted)
    while end:
        begin = begins[end]
        spans = [*spans_of(np.logical_or.reduce(wanted[begin:end]))]
        rectangles += [(begin, end, *span) for span in reversed(spans)]
        end = begin
    return rectangles[::-1], least[-1]
