"""The oracle mask: high resolution along the boundaries of the labels."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor

from cadsurgery.elements.lattice import describe
from cadsurgery.masks.filters import closeness, near
from cadsurgery.masks.graded import GradedMask, check_odd, several
from cadsurgery.masks.provider import Grid, mask_provider
from cadsurgery.support.errors import InvalidInput

IGNORED = 255  # label of pixels that belong to no class
_LABELS: ContextVar[Tensor | None] = ContextVar("labels", default=None)
_CALL = "with cadsurgery.masks.labelled(labels): net(image)"


@contextmanager
def labelled(labels: Tensor) -> Iterator[None]:
    """Give the labels of the images that are masked within, in this thread; may be nested.

        with labelled(labels):
            y = net(image, mask="trimap:width=33")

    Args:
        labels: (B, H, W) integers, one per image pixel.

    Raises:
        InvalidInput: no such tensor.
    """
    wrong = not isinstance(labels, Tensor) or labels.dim() != 3 or 0 in labels.shape
    if wrong or labels.is_floating_point() or labels.is_complex():
        raise InvalidInput(
            f"the labels are {describe(labels)}.",
            next="give an integer tensor (batch, height, width): a class for every image pixel.",
        )
    token = _LABELS.set(labels)
    try:
        yield
    finally:
        _LABELS.reset(token)


@mask_provider(
    "trimap",
    source="oracle of Hesse et al., CVPRW 2023 (widths 33, 55); its code is unreleased: our definition",
)
class TrimapMask(GradedMask):
    """Keep high what lies near a boundary of the labels, an oracle; several widths give graded levels.

    A pixel is on a boundary if one of its four neighbours has another label, unless one of the two is to be ignored.
    Labels come through `labelled`.
    """

    counted = "widths"
    needs = "labels"

    def __init__(self, width: int | tuple[int, ...] = (33,), ignore: int = IGNORED) -> None:
        """Create the mask.

        Args:
            width: odd side in image pixels of the window that must hold a boundary for level i; everything else gets
                the lowest level.
            ignore: label that has no boundary with anything.

        Raises:
            InvalidInput: a width that is not odd and positive.
        """
        widths = several(width)
        check_odd("width", widths, "mask trimap")
        super().__init__((0.5,) * len(widths), widths)
        self.width, self.ignore = widths, ignore

    def strength(self, image: Tensor) -> Tensor:
        """(B, H, W) float32: 1 on boundaries of the labels, 0 elsewhere.

        Raises:
            InvalidInput: there are no labels, or they are of another size than the image.
        """
        labels = _LABELS.get()
        if labels is None:
            raise InvalidInput(
                "the trimap has no labels.",
                where="mask trimap",
                why="it keeps high what lies near a boundary of the labels, which a network is not given.",
                next=f"write {_CALL}; on the command line: --labels FILE.",
            )
        expected = (image.shape[0], *image.shape[2:])
        if tuple(labels.shape) != expected:
            raise InvalidInput(
                f"the labels have shape {tuple(labels.shape)}, the image batch {tuple(image.shape)}.",
                where="mask trimap",
                next=f"give labels of shape {expected}: {_CALL}.",
            )
        return boundaries(labels.to(image.device), self.ignore).to(torch.float32)

    def scores(self, image: Tensor, features: Tensor, grid: Grid) -> Tensor:
        """(B, h, w) float32: minus the distance to the nearest boundary (the larger of both axes) in samples, rounded
        down; everywhere minus the longer side of the map in an image without one."""
        reached = near(self.strength(image), 2 * grid.output_stride - 1, grid)
        return closeness(reached)


def boundaries(labels: Tensor, ignore: int = IGNORED) -> Tensor:
    """(B, H, W) bool: pixels with another label than one of their four neighbours, neither of the two `ignore`."""
    values = labels.long()  # not all integer types can be compared
    known = values != ignore
    found = torch.zeros_like(known)
    for axis in (1, 2):
        pairs = labels.shape[axis] - 1
        before, after = (
            (values.narrow(axis, place, pairs), known.narrow(axis, place, pairs)) for place in (0, 1)
        )
        differ = (before[0] != after[0]) & before[1] & after[1]
        for place in (0, 1):
            found.narrow(axis, place, pairs).logical_or_(differ)
    return found
