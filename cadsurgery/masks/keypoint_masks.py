"""Masks around keypoints: full resolution where descriptors are read."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from cadsurgery.masks.basic import name_of
from cadsurgery.masks.context import call_context, first_pass_output
from cadsurgery.masks.detectors import call_detector, points_of, sift
from cadsurgery.masks.filters import closeness, grey_of
from cadsurgery.masks.graded import SteppedMask
from cadsurgery.masks.mask_options import between, check_options, several
from cadsurgery.masks.provider import FineMapSpec, mask_provider
from cadsurgery.support.describe import describe
from cadsurgery.support.divergence import is_map
from cadsurgery.support.errors import InvalidInput, UnknownName
from cadsurgery.support.provenance import function_at

SIFT, GIVEN, OWN = "sift", "given", "own"
OF_POINTS = "keypoints"  # what a mask needs that keeps high what lies near given points
_CALL = "with cadsurgery.masks.keypoints_at(points): net(image)"


class WindowSide(float):
    """Side of a window in pixels: a whole number; 0 for no window, `inf` for the whole image."""

    def __new__(cls, value: Any) -> WindowSide:
        """Convert a number or text; raise ValueError if it is not a side."""
        side = super().__new__(cls, value)
        if not (side == math.inf or (side >= 0 and side.is_integer())):
            raise ValueError(value)
        return side

    def __str__(self) -> str:
        return "inf" if self == math.inf else str(int(self))

    __repr__ = __str__


_DILATIONS = (WindowSide(51),)


@mask_provider(
    "keypoints", source="Hesse et al., CVPRW 2023, D2-Net: dilations 25/51/51 at output strides 1 to 8"
)
class KeypointMask(SteppedMask):
    """Keep high what lies near keypoints; several dilations give graded levels.

    Args:
        detector: `sift`, OpenCV's SIFT on the grey image; `given`, the points of `keypoints_at` (or of
            `cadsurgery.read_at`); `own`, the score map that the network itself returns in a first pass with
            everything downsampled; `module:function`; or a function of the image batch (B, C, H, W) in the unit of
            masks (`masks.unit`). A function returns for each image a tensor (n, 2) of x and y in image pixels, the
            best point first, or for the batch a floating-point score map (B, 1, h, w), or (B, h, w) with w above 2.
        count: maximum number of keypoints per image; the best are used. In a score map, keypoints are the largest
            values that are the maximum of the 5 x 5 around them. Given points are all used.
        dilations: odd side in image pixels of the window around a keypoint that gets level i; 0 for no window, inf
            for the whole image. Everything else gets the lowest level.

    Raises:
        UnknownName: there is no such detector.
        InvalidInput: the detector is not a function, the count is below one, or a dilation is not odd.
    """

    image_only = True
    counted = "dilations"

    def __init__(
        self,
        detector: str | Callable[[Tensor], Any] = SIFT,
        count: int = 512,
        dilations: Any = _DILATIONS,
    ) -> None:
        super().__init__()
        try:
            self.dilations = tuple(map(WindowSide, several(dilations)))
        except (TypeError, ValueError):
            self.dilations = ()
        if not self.dilations or any(side not in (0, math.inf) and side % 2 == 0 for side in self.dilations):
            raise InvalidInput(
                f"dilations={dilations!r} are not odd sides.",
                where="mask keypoints",
                next="give an odd side for each level, 0 for none or inf for all, e.g. 25/51/51.",
            )
        check_options("keypoints", count=(count, between(1, math.inf, "512")))
        self._kind = detector if isinstance(detector, str) and detector in (SIFT, GIVEN, OWN) else ""
        self._function: Any = detector
        if isinstance(detector, str) and not self._kind:
            if ":" not in detector:
                kinds = (SIFT, GIVEN, OWN)
                raise UnknownName("detector of mask 'keypoints'", detector, kinds, next="or module:function.")
            example = "keypoints:detector=my_module:my_function"
            self._function = function_at(detector, "mask keypoints", example)
        if not (self._kind or callable(self._function)):
            raise InvalidInput(
                f"{describe(detector)} is not a detector.",
                where="mask keypoints",
                next="give sift, given, own, module:function, or a function image -> points.",
            )
        self.detector, self.count = detector if isinstance(detector, str) else name_of(detector), count
        self.has_own_function = not isinstance(detector, str)

    @property
    def needs(self) -> str:  # type: ignore[override]
        """Name the input that the points come from, which a compiled graph cannot contain."""
        named = {GIVEN: OF_POINTS, OWN: "a first pass of the network"}
        return named.get(self._kind, "a detector outside the network")

    @property
    def judges_each_image(self) -> bool:
        """True for detectors that look at an image alone, not for given points or the network's own output."""
        return self._kind in (SIFT, "")

    @property
    def sees_image(self) -> bool:
        """True if the points are detected in the picture."""
        return self._kind not in (GIVEN, OWN)

    def first_passes(self, lowest: int) -> frozenset[int]:
        """Return the lowest level if the network's own scores are used, otherwise nothing."""
        return frozenset({lowest} if self._kind == OWN else ())

    def steps(self, image: Tensor, features: Tensor, grid: FineMapSpec) -> list[Tensor]:
        """Mark the samples within dilation i of a keypoint.

        The window is cut at pixels, not at samples. After the map is made legal, this is the published patch rule:
        level i in every block of R_(i+1) samples that has a sample of level i.

        Raises:
            InvalidInput: no points were given for `detector=given`, or the detector did not return points.
        """
        points = self.points(image, grid)
        return [_mark_windows(points, side, grid, image) for side in self.dilations]

    def scores(self, image: Tensor, features: Tensor, grid: FineMapSpec) -> Tensor:
        """Return minus the distance in samples to the nearest keypoint: (B, h, w) float32.

        The distance is the larger of both axes. In an image without a keypoint it is the longer side of the map.
        """
        occupied = _mark_windows(
            self.points(image, grid), WindowSide(2 * grid.output_stride - 1), grid, image
        )
        return closeness(occupied.float())

    def points(self, image: Tensor, grid: FineMapSpec) -> list[Tensor]:
        """Return the keypoints of each image of a batch, (n, 2) x and y in image pixels."""
        where = "mask keypoints"
        if self._kind == OWN:
            detected: Any = own_scores(first_pass_output(where), grid.batch, where)
        elif self._kind == GIVEN:
            detected = call_context().points
            if detected is None:
                raise InvalidInput(
                    "there are no keypoints.",
                    where=where,
                    why="detector=given keeps high what lies near points that are provided with the image.",
                    next=f"write {_CALL}, or use cadsurgery.read_at; or let detector=sift find them.",
                )
        elif self._kind == SIFT:
            detected = sift_of_normalised(image, self.count)
        else:
            detected = call_detector(self._function, image)
        points = points_of(detected, image, self.count, where)
        return points if self._kind == GIVEN else [part[: self.count] for part in points]


def sift_of_normalised(image: Tensor, count: int) -> list[Tensor]:
    """Detect SIFT keypoints in images (B, C, H, W) of any range; each grey image is stretched to 0..255 first."""
    grey = grey_of(image.detach().float())
    low, high = grey.flatten(1).aminmax(dim=1)
    stretched = (grey - low.view(-1, 1, 1)) / (high - low).clamp(min=1e-12).view(-1, 1, 1)
    bytes_ = (255 * stretched).round().to(torch.uint8).cpu().numpy()
    return [torch.from_numpy(sift(picture, count)[0]) for picture in bytes_]


def named_outputs(output: Any) -> dict[Any, Any]:
    """Return the outputs of a network by key or position; a single output gets the empty name."""
    if isinstance(output, (tuple, list)):
        return dict(enumerate(output))
    return output if isinstance(output, dict) else {"": output}


def own_scores(output: Any, batch: int, where: str) -> Tensor:
    """Return the only score map, (B, 1, h, w) floating-point, among the outputs of a network.

    Raises:
        InvalidInput: there is no such map, or more than one.
    """
    outputs = named_outputs(output).values()
    maps = [value for value in outputs if is_map(value, batch) and value.shape[1] == 1]
    if len(maps) != 1:
        raise InvalidInput(
            f"the network returns {len(maps)} maps of one channel.",
            where=where,
            why="detector=own looks for the one score map (B, 1, h, w) among its outputs.",
            next="use another detector, such as sift.",
        )
    return maps[0]


def _mark_windows(points: Sequence[Tensor], side: WindowSide, grid: FineMapSpec, image: Tensor) -> Tensor:
    """Mark (B, h, w) the samples whose first pixel lies in a window of this side around a keypoint's pixel.

    Each window adds +1 and -1 at its corners; cumulative sums over both axes fill it.
    """
    height, width = grid.size
    if side in (0, math.inf):
        return torch.full((grid.batch, height, width), side != 0, device=image.device)
    corners = torch.zeros(grid.batch, height + 1, width + 1, dtype=torch.int32, device=image.device)
    half, stride = int(side) // 2, grid.output_stride
    for index, points_of_image in enumerate(points):
        pixel = (points_of_image + 0.5).floor().long()
        low = ((pixel - half + stride - 1).div(stride, rounding_mode="floor")).clamp(min=0)
        past = (pixel + half).div(stride, rounding_mode="floor") + 1
        size = torch.tensor([width, height], device=pixel.device)
        low, past = torch.minimum(low, size), torch.minimum(past.clamp(min=0), size)
        in_map = (low < past).all(1)
        (x0, y0), (x1, y1) = low[in_map].unbind(1), past[in_map].unbind(1)
        one = torch.ones_like(x0, dtype=torch.int32)
        for y, x, sign in ((y0, x0, 1), (y0, x1, -1), (y1, x0, -1), (y1, x1, 1)):
            corners[index].index_put_((y, x), sign * one, accumulate=True)
    return corners.cumsum(1).cumsum(2)[:, :height, :width] > 0
