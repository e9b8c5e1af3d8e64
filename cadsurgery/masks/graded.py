"""Masks that keep high the surroundings of edges, of steep gradients, or of label boundaries (an oracle).

Edges are as published (Hesse et al. 2023, supplementary; reference code `segmentation/main.py`). Edges and gradients
are computed on the picture in the unit of `masks.unit`: RGB in [0, 1], normalised by ImageNet's mean and standard
deviation, whatever normalisation the network takes.
"""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from torch import Tensor

from cadsurgery.data.datasets import IGNORED
from cadsurgery.data.labels import as_classes
from cadsurgery.masks.context import labels_of
from cadsurgery.masks.filters import blur, closeness, differences, grey_of, near
from cadsurgery.masks.mask_options import NUMBER, ODD, WIDTH, check_count, check_options, several
from cadsurgery.masks.provider import FineMapSpec, MaskProvider, mask_provider
from cadsurgery.support.errors import InvalidInput


class SteppedMask(MaskProvider):
    """Base of masks with one threshold (or width, ...) per level. A subclass computes the maps (`steps`)."""

    counted: ClassVar[str] = "thresholds"  # name of the thresholds in error messages

    def steps(self, image: Tensor, features: Tensor, grid: FineMapSpec) -> list[Tensor]:
        """Compute bool maps (B, h, w), the i-th for level i; where several are True, the first one decides."""
        raise NotImplementedError

    def forward(self, image: Tensor, features: Tensor, grid: FineMapSpec) -> Tensor:
        """Return (B, h, w) int8: level i where the i-th step is the first that is True, the lowest level elsewhere.

        Raises:
            InvalidInput: there are more steps than levels.
        """
        steps = self.steps(image, features, grid)
        check_count(self.name, self.counted, len(steps), grid.max_level)
        size = (grid.batch, *grid.size)
        levels = torch.full(size, grid.max_level, dtype=torch.int8, device=steps[0].device)
        for level in reversed(range(len(steps))):
            levels = torch.where(steps[level], min(level, grid.max_level), levels)
        return levels.to(torch.int8)


class GradedMask(SteppedMask):
    """Base of masks that keep high the surroundings of high values in an image-sized map, which a subclass computes
    (`strength`). Several thresholds give graded levels.

    Args:
        threshold: the i-th threshold on the strength decides which samples get level i; all others get the lowest
            level.
        dilation: odd side in image pixels of the surroundings, one for all thresholds or one per threshold.

    Raises:
        InvalidInput: a threshold is NaN, a dilation is not odd, or the numbers of both do not match.
    """

    image_only = True

    def __init__(
        self, threshold: float | tuple[float, ...] = (0.35,), dilation: int | tuple[int, ...] = (11,)
    ) -> None:
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
        """Compute the map (B, H, W), floating-point, that the thresholds apply to."""
        raise NotImplementedError

    @property
    def spread(self) -> int | None:
        """Input pixels around a pixel that its strength depends on; None if they are all."""
        return None

    def reach(self, grid: FineMapSpec) -> int | None:
        """Return half of the largest dilation, and the pixels that the strength there depends on."""
        return None if self.spread is None else max(self.dilation) // 2 + self.spread

    def steps(self, image: Tensor, features: Tensor, grid: FineMapSpec) -> list[Tensor]:
        """Mark the samples within dilation i of a strength of at least threshold i."""
        strength = self.strength(image)
        dilations = self.dilation if len(self.dilation) > 1 else self.dilation * len(self.threshold)
        nearby = {side: near(strength, side, grid) for side in dict.fromkeys(dilations)}
        return [nearby[side] >= limit for side, limit in zip(dilations, self.threshold, strict=True)]

    def contrast(self, image: Tensor, grid: FineMapSpec) -> tuple[Tensor, Tensor]:
        """Return the greatest strength (B,) of a picture, and the lowest threshold."""
        strongest = self.strength(image).flatten(1).amax(1)
        return strongest, torch.full_like(strongest, min(self.threshold))

    def scores(self, image: Tensor, features: Tensor, grid: FineMapSpec) -> Tensor:
        """Return the greatest strength within the first dilation; `forward` thresholds it for level 0."""
        return near(self.strength(image), self.dilation[0], grid)


@mask_provider("edges", source="Hesse et al., CVPRW 2023: thresholds 0.15, 0.35, 0.95 with dilation 11")
class EdgeMask(GradedMask):
    """Keep high what lies near an edge of the image; several thresholds give graded levels."""

    spread = 1

    def strength(self, image: Tensor) -> Tensor:
        """Compute (B, H, W), the larger of the signed central differences to the right and downwards, zero-padded.

        They are signed as published: only steps from dark to bright count.
        """
        return torch.maximum(*differences(grey_of(image), "constant"))


@mask_provider("gradient", source="after the published edges, without sign")
class GradientMask(GradedMask):
    """Keep high what lies near a steep place of the image, rising or falling; several thresholds give graded levels.

    Args:
        threshold: on the length of the vector of central differences. A step along one axis is as strong as for
            `edges`, whatever its sign. Several thresholds as in `GradedMask`.
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

    @property
    def spread(self) -> int:
        """The neighbours, and three standard deviations of the Gaussian."""
        return 1 + math.ceil(3 * self.sigma)

    def strength(self, image: Tensor) -> Tensor:
        """Compute the length (B, H, W) of the vector of central differences, with replicated borders."""
        right, down = differences(blur(grey_of(image), self.sigma), "replicate")
        return (right.square() + down.square()).sqrt()


@mask_provider(
    "trimap",
    source="oracle of Hesse et al., CVPRW 2023 (widths 33, 55); its code is unreleased: our definition",
)
class TrimapMask(GradedMask):
    """Keep high what lies near a boundary of the labels, an oracle; several widths give graded levels.

    A pixel is on a boundary if one of its four neighbours has another label, unless one of the two is to be ignored.
    Labels are provided with `labelled`.

    Args:
        width: odd side in image pixels. Samples with a boundary within the i-th width get level i; all others get the
            lowest level.
        ignore: label that forms no boundary.
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
        """Compute (B, H, W) float32: 1 on boundaries of the labels, 0 elsewhere.

        Raises:
            InvalidInput: there are no labels, or their size differs from the image's.
        """
        return boundaries(labels_of(image, "mask trimap"), self.ignore).to(torch.float32)

    def scores(self, image: Tensor, features: Tensor, grid: FineMapSpec) -> Tensor:
        """Return minus the distance in samples, rounded down, to the nearest boundary: (B, h, w) float32.

        The distance is the larger of both axes. In an image without a boundary it is the longer side of the map.
        """
        reached = near(self.strength(image), 2 * grid.output_stride - 1, grid)
        return closeness(reached)


def boundaries(labels: Tensor, ignore: int | None = IGNORED) -> Tensor:
    """Mark (..., H, W) the pixels whose label differs from one of their four neighbours', neither being `ignore`."""
    values = as_classes(labels)  # some integer types do not support comparison
    marked = torch.zeros_like(values, dtype=torch.bool)
    for axis in (-2, -1):
        sides = [values.narrow(axis, place, values.shape[axis] - 1) for place in (0, 1)]
        differ = sides[0] != sides[1]
        if ignore is not None:
            differ &= (sides[0] != ignore) & (sides[1] != ignore)
        for place in (0, 1):
            marked.narrow(axis, place, differ.shape[axis]).logical_or_(differ)
    return marked
