"""Masks that keep high what lies near strong places of the image: edges as published (Hesse et al. 2023, supplementary;
reference code `segmentation/main.py`), the magnitude of the gradient, and boundaries of labels, an oracle.

Edges and gradients look at the picture in the unit of `masks.unit`: RGB in [0, 1] after the ImageNet mean and standard
deviation, whatever the network takes.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from cadsurgery.masks.context import call_context
from cadsurgery.masks.filters import blur, closeness, differences, grey_of, near
from cadsurgery.masks.options import NUMBER, ODD, WIDTH, check_count, check_options, several
from cadsurgery.masks.provider import FineMapSpec, MaskProvider, mask_provider
from cadsurgery.support.errors import InvalidInput

IGNORED = 255  # label of pixels that belong to no class
_CALL = "with cadsurgery.masks.labelled(labels): net(image)"


class SteppedMask(MaskProvider):
    """Base of masks with several thresholds, widths, ..., each of which decides what gets one more level. A subclass
    gives the maps that decide (`steps`).
    """

    counted: ClassVar[str] = "thresholds"  # what a message calls them

    def steps(self, image: Tensor, features: Tensor, grid: FineMapSpec) -> list[Tensor]:
        """Bool maps (B, h, w): where level 0, level 1, ... is wanted, as far as no finer one is."""
        raise NotImplementedError

    def forward(self, image: Tensor, features: Tensor, grid: FineMapSpec) -> Tensor:
        """(B, h, w) int8: level i where the i-th step is True and none before it, the lowest level elsewhere.

        Raises:
            InvalidInput: more steps than levels.
        """
        steps = self.steps(image, features, grid)
        check_count(self.name, self.counted, len(steps), grid.max_level)
        size = (grid.batch, *grid.size)
        levels = torch.full(size, grid.max_level, dtype=torch.int8, device=steps[0].device)
        for level in reversed(range(len(steps))):
            levels = torch.where(steps[level], min(level, grid.max_level), levels)
        return levels.to(torch.int8)


class GradedMask(SteppedMask):
    """Base of masks that keep high what lies near strong places of an image-sized map; several thresholds give graded
    levels. A subclass gives the map (`strength`).

    Args:
        threshold: on the strength; the i-th one decides what gets level i, everything else the lowest level.
        dilation: odd side in image pixels by which strong places are widened, one for all or one per threshold.

    Raises:
        InvalidInput: a threshold that is NaN, dilations that are not odd, or as many as fit nothing.
    """

    image_only = True

    def __init__(self, threshold: float | tuple[float, ...], dilation: int | tuple[int, ...]) -> None:
        super().__init__()
        self.threshold, self.dilation = several(threshold), several(dilation)
        if len(self.dilation) not in (1, len(self.threshold)):
            raise InvalidInput(
                f"{len(self.threshold)} thresholds but {len(self.dilation)} dilations.",
                where=f"mask {self.name}",
                next="give one dilation for all thresholds or one for each, e.g. threshold=0.95/0.1,dilation=5/15.",
            )
        check_options(self.name, threshold=(self.threshold, NUMBER), dilation=(self.dilation, ODD))

    def strength(self, image: Tensor) -> Tensor:
        """(B, H, W) floating-point: the map of the image that thresholds are on."""
        raise NotImplementedError

    def steps(self, image: Tensor, features: Tensor, grid: FineMapSpec) -> list[Tensor]:
        """Within dilation i of a strength of at least threshold i."""
        strength = self.strength(image)
        dilations = self.dilation if len(self.dilation) > 1 else self.dilation * len(self.threshold)
        nearby = {side: near(strength, side, grid) for side in dict.fromkeys(dilations)}
        return [nearby[side] >= limit for side, limit in zip(dilations, self.threshold, strict=True)]

    def scores(self, image: Tensor, features: Tensor, grid: FineMapSpec) -> Tensor:
        """The greatest strength within the first dilation: what `forward` gives level 0 is at least the threshold."""
        return near(self.strength(image), self.dilation[0], grid)


@mask_provider("edges", source="Hesse et al., CVPRW 2023: thresholds 0.15, 0.35, 0.95 with dilation 11")
class EdgeMask(GradedMask):
    """Keep high what lies near an edge of the image; several thresholds give graded levels."""

    def __init__(
        self, threshold: float | tuple[float, ...] = (0.35,), dilation: int | tuple[int, ...] = (11,)
    ) -> None:
        super().__init__(threshold, dilation)

    def strength(self, image: Tensor) -> Tensor:
        """(B, H, W): the larger of the signed central differences to the right and downwards, zero outside.

        Signed as published: only steps from dark to bright count.
        """
        return torch.maximum(*differences(grey_of(image), "constant"))


@mask_provider("gradient", source="after the published edges, without sign")
class GradientMask(GradedMask):
    """Keep high what lies near a steep place of the image, rising or falling; several thresholds give levels.

    Args:
        threshold: on the length of the vector of central differences: a step across one axis is as strong as
            to `edges`, whatever its sign; like the dilation as in `GradedMask`.
        dilation: odd side in image pixels.
        sigma: standard deviation in pixels of a Gaussian that smooths the grey image first; 0 for none.
    """

    def __init__(
        self,
        threshold: float | tuple[float, ...] = (0.35,),
        dilation: int | tuple[int, ...] = (11,),
        sigma: float = 0.0,
    ) -> None:
        super().__init__(threshold, dilation)
        check_options("gradient", sigma=(sigma, WIDTH))
        self.sigma = sigma

    def strength(self, image: Tensor) -> Tensor:
        """(B, H, W): length of the vector of the central differences, the border replicated."""
        right, down = differences(blur(grey_of(image), self.sigma), "replicate")
        return (right.square() + down.square()).sqrt()


@mask_provider(
    "trimap",
    source="oracle of Hesse et al., CVPRW 2023 (widths 33, 55); its code is unreleased: our definition",
)
class TrimapMask(GradedMask):
    """Keep high what lies near a boundary of the labels, an oracle; several widths give graded levels.

    A pixel is on a boundary if one of its four neighbours has another label, unless one of the two is to be ignored.
    Labels come through `labelled`.

    Args:
        width: odd side in image pixels of the window that must hold a boundary for level i; everything else gets the
            lowest level.
        ignore: label that has no boundary with anything.
    """

    counted = "widths"
    needs = "labels"
    ignores_image = True

    def __init__(self, width: int | tuple[int, ...] = (33,), ignore: int = IGNORED) -> None:
        widths = several(width)
        check_options("trimap", width=(widths, ODD))
        super().__init__((0.5,) * len(widths), widths)
        self.width, self.ignore = widths, ignore

    def strength(self, image: Tensor) -> Tensor:
        """(B, H, W) float32: 1 on boundaries of the labels, 0 elsewhere.

        Raises:
            InvalidInput: there are no labels, or they are of another size than the image.
        """
        labels = call_context().labels
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

    def scores(self, image: Tensor, features: Tensor, grid: FineMapSpec) -> Tensor:
        """(B, h, w) float32: minus the distance to the nearest boundary (the larger of both axes) in samples, rounded
        down; everywhere minus the longer side of the map in an image without one."""
        reached = near(self.strength(image), 2 * grid.output_stride - 1, grid)
        return closeness(reached)


def boundaries(labels: Tensor, ignore: int = IGNORED) -> Tensor:
    """(B, H, W) bool: pixels with another label than one of their four neighbours, neither of the two `ignore`."""
    values = labels.long()  # not all integer types can be compared
    known = values != ignore
    on_boundary = torch.zeros_like(known)
    for axis in (1, 2):
        pairs = labels.shape[axis] - 1
        before, after = (
            (values.narrow(axis, place, pairs), known.narrow(axis, place, pairs)) for place in (0, 1)
        )
        differ = (before[0] != after[0]) & before[1] & after[1]
        for place in (0, 1):
            on_boundary.narrow(axis, place, pairs).logical_or_(differ)
    return on_boundary
