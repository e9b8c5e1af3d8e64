"""Boxes in pictures: what users give, and how boxes are joined and found."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import reduce
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from cadsurgery.support.describe import describe
from cadsurgery.support.errors import InvalidInput

Span = tuple[int, int]  # rows or columns [first, end)


class Box(NamedTuple):
    """A box in a picture: rows [top, bottom) and columns [left, right), in pixels."""

    top: int
    bottom: int
    left: int
    right: int

    @property
    def spans(self) -> tuple[Span, Span]:
        """Its rows and columns."""
        return self[:2], self[2:]

    @property
    def area(self) -> int:
        """Its pixels."""
        return max(self.bottom - self.top, 0) * max(self.right - self.left, 0)

    def joined(self, other: Box) -> Box:
        """Return the smallest box around both."""
        return Box(
            min(self.top, other.top),
            max(self.bottom, other.bottom),
            min(self.left, other.left),
            max(self.right, other.right),
        )

    def of_map(self, size: tuple[int, int], picture: tuple[int, int]) -> Box:
        """Return the box of a map of a size that covers this one of a picture."""
        found = list[int]()
        for (first, end), length, of in zip(self.spans, size, picture, strict=True):
            found += [first * length // of, -(-end * length // of) if end > first else first * length // of]
        return Box(*found)


BOXES = "a list with a tensor (n, 4) of x0, y0, x1, y1 in pixels for each image"


def boxes_of(boxes: Any, image: Tensor) -> list[list[Box]]:
    """Return boxes in whole pixels, for each image.

    Raises:
        InvalidInput: they are no boxes, are for another number of images, or reach beyond the image.
    """
    if isinstance(boxes, Tensor) and boxes.dim() == 2 and len(image) == 1:
        boxes = [boxes]
    if not isinstance(boxes, (list, tuple)) and not (isinstance(boxes, Tensor) and boxes.dim() == 3):
        raise InvalidInput(f"boxes are {describe(boxes)}.", next=f"give {BOXES}.")
    if len(boxes) != len(image):
        raise InvalidInput(
            f"boxes are given for {len(boxes)} images, and there are {len(image)}.", next=f"give {BOXES}."
        )
    return [_boxes_in(of_image, number, image) for number, of_image in enumerate(boxes)]


def _boxes_in(boxes: Any, number: int, image: Tensor) -> list[Box]:
    height, width = image.shape[2:]
    where = f"boxes of image {number}"
    try:
        given = torch.as_tensor(boxes)
    except Exception as error:  # whatever torch refuses
        raise InvalidInput(f"they are {describe(boxes)}.", where=where, next=f"give {BOXES}.") from error
    if given.numel() == 0:
        return []
    if given.dim() != 2 or given.shape[1] != 4 or given.is_complex() or given.dtype == torch.bool:
        raise InvalidInput(f"they are {describe(boxes)}.", where=where, next=f"give {BOXES}.")
    given = given.detach().cpu().double()
    if not bool(given.isfinite().all()):
        raise InvalidInput("a coordinate is NaN or infinite.", where=where, next=f"give {BOXES}.")
    found = []
    for x0, y0, x1, y1 in given.tolist():
        text = f"({x0:g}, {y0:g}, {x1:g}, {y1:g})"
        if x1 < x0 or y1 < y0:
            raise InvalidInput(
                f"the box {text} ends before it begins.",
                where=where,
                why="boxes are x0, y0, x1, y1: left, top, right, bottom.",
                next="exchange its corners; x, y, width, height become x, y, x + width, y + height.",
            )
        if min(x0, y0) < 0 or x1 > width or y1 > height:
            raise InvalidInput(
                f"the box {text} reaches beyond the image, which has {width} x {height} pixels.",
                where=where,
                next="cut it at the border: boxes[:, 0::2].clamp(0, width), boxes[:, 1::2].clamp(0, height).",
            )
        left, top = math.floor(x0), math.floor(y0)
        right, bottom = (math.ceil(x1) if x1 > x0 else left), (math.ceil(y1) if y1 > y0 else top)
        found.append(Box(top, bottom, left, right))
    return found


def runs_of(blocks: Tensor) -> list[Box]:
    """Return boxes that cover the blocks (h, w) of a picture that are true: runs in a row, together with the same runs
    in the rows below."""
    rows, runs, found = blocks.cpu().numpy(), dict[tuple[int, int], int](), list[Box]()
    for row in range(len(rows) + 1):
        now = list[tuple[int, int]]()
        if row < len(rows):
            ends = np.flatnonzero(np.diff(rows[row].astype(np.int8), prepend=0, append=0)).tolist()
            now = list(zip(ends[::2], ends[1::2], strict=True))
        for run in [run for run in runs if run not in now]:
            found.append(Box(runs.pop(run), row, *run))
        for run in now:
            runs.setdefault(run, row)
    return found


def around(boxes: Sequence[Box]) -> Box:
    """Return the smallest box around some."""
    return reduce(Box.joined, boxes)
