"""Keypoint detection: SIFT, peaks of score maps, and checks of what a detector returned."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from cadsurgery.support.describe import describe
from cadsurgery.support.errors import CadError, InvalidInput, describe_error, import_optional

if TYPE_CHECKING:
    from numpy.typing import NDArray


RETURNS = (
    "A detector gets the images (B, C, H, W) and returns a list with points (n, 2), x and y in pixels, for each image, "
    "or a floating-point score map (B, h, w)."
)


def opencv() -> Any:
    """Import OpenCV, an optional dependency that is slow to load.

    Raises:
        NotInstalled: OpenCV is not installed.
    """
    return import_optional("cv2", "SIFT needs OpenCV.", "pip install 'cadsurgery[keypoints]'")


def sift(grey: NDArray[np.uint8], count: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Detect SIFT keypoints (Lowe 2004, OpenCV's defaults) in a grey picture (H, W), as published for D2-Net.

    Coordinates are rounded to whole pixels, each pixel is returned once, the strongest first.

    Returns:
        (n, 2) x and y, and (n,) responses; n is at most `count`, and 0 if the picture has no keypoint.
    """
    cv2 = opencv()
    detected = sorted(cv2.SIFT_create().detect(grey, None), key=lambda point: -point.response)
    height, width = grey.shape
    responses: dict[tuple[int, int], float] = {}
    for point in detected:
        x, y = round(point.pt[0]), round(point.pt[1])
        if 0 <= x < width and 0 <= y < height:
            responses.setdefault((x, y), point.response)
        if len(responses) == count:
            break
    points = np.array(list(responses), dtype=np.float32).reshape(-1, 2)
    return points, np.array(list(responses.values()), dtype=np.float32)


def peaks(scores: Tensor, count: int, radius: int = 2, border: int = 0) -> list[tuple[Tensor, Tensor]]:
    """Find the largest local maxima of score maps (B, h, w).

    Args:
        scores: floating-point score maps.
        count: maximum number of peaks per map.
        radius: a peak is the largest value within this distance, in samples, on both axes; equal neighbours all count.
        border: width in samples of the margin without peaks.

    Returns:
        For each map (n, 2) x and y in samples, the highest peak first, and (n,) values.
    """
    side = 2 * radius + 1
    largest = F.max_pool2d(scores.unsqueeze(1), side, 1, radius).squeeze(1)
    is_peak = (scores == largest) & scores.isfinite()
    if border:
        inner = torch.zeros_like(is_peak)
        inner[:, border:-border, border:-border] = True
        is_peak &= inner
    peaks_of_maps = []
    for values, chosen in zip(scores, is_peak, strict=True):
        y, x = chosen.nonzero(as_tuple=True)
        strength, order = values[y, x].sort(descending=True, stable=True)
        order = order[:count]
        peaks_of_maps.append((torch.stack((x[order], y[order]), 1), strength[:count]))
    return peaks_of_maps


def in_pixels(places: Tensor, scores: Tensor, image: Tensor) -> Tensor:
    """Convert sample indices (n, 2) of a map (..., h, w) to pixel coordinates in images (..., H, W)."""
    sides = [whole / part for whole, part in zip(image.shape[-2:], scores.shape[-2:], strict=True)]
    step = image.new_tensor(sides[::-1], dtype=torch.float64)
    return (places.to(step) + 0.5) * step - 0.5


def call_detector(function: Callable[[Tensor], Any], image: Tensor) -> Any:
    """Return what a detector of the user returns for images (B, C, H, W).

    Raises:
        InvalidInput: it raises an error.
    """
    try:
        return function(image)
    except CadError:
        raise
    except Exception as error:  # code of the user raises errors of any type
        raise InvalidInput(
            f"the detector {getattr(function, '__name__', type(function).__name__)} fails on images of shape "
            f"{tuple(image.shape)}.",
            why=describe_error(error),
            next=f"mend it. {RETURNS}",
        ) from error


def points_of(returned: Any, image: Tensor, count: int, where: str) -> list[Tensor]:
    """Return the result of a detector as points (n, 2), x and y in pixels of the images (B, C, H, W), on their device.

    Args:
        returned: a sequence of point tensors or arrays, one for each image, one tensor of all (B, n, 2), or a score map
            (B, h, w) or (B, 1, h, w).
        image: the batch.
        count: points taken from a score map.
        where: caller, for error messages.

    Raises:
        InvalidInput: the result is neither points nor a score map.
    """
    batch = image.shape[0]
    if isinstance(returned, Tensor) and returned.dim() == 3 and returned.shape[2] == 2:
        returned = list(returned)  # the same number of points in each image
    if isinstance(returned, Tensor) and returned.is_floating_point() and returned.dim() in (3, 4):
        scores = returned.squeeze(1) if returned.dim() == 4 and returned.shape[1] == 1 else returned
        if scores.dim() == 3 and scores.shape[0] == batch and 0 not in scores.shape:
            return [in_pixels(places, scores, image) for places, _ in peaks(scores.detach(), count)]
    if isinstance(returned, Tensor) or not isinstance(returned, Sequence) or len(returned) != batch:
        several = isinstance(returned, (tuple, list))
        described = f"a {type(returned).__name__} of {len(returned)}" if several else describe(returned)
        raise InvalidInput(
            f"keypoints are {described} for a batch of {batch}.",
            where=where,
            next=RETURNS,
        )
    return [_check_points(part, index, image, where) for index, part in enumerate(returned)]


def _check_points(part: Any, index: int, image: Tensor, where: str) -> Tensor:
    """Check the points (n, 2) of one image; return them as float64 on its device."""
    try:
        points = part.detach() if isinstance(part, Tensor) else torch.as_tensor(part, device=image.device)
    except (TypeError, ValueError, RuntimeError):  # a detector may return anything
        points = torch.empty(0, device=image.device)
    if points.dim() == 2 and points.shape[1] == 2 and not points.is_complex():
        points = points.to(image.device, torch.float64)
        height, width = image.shape[2:]
        size = points.new_tensor([width, height])
        if bool(((points >= -0.5) & (points < size - 0.5)).all()):
            return points
        raise InvalidInput(
            "a keypoint is not in the image.",
            where=f"{where}, image {index}" if where else f"image {index}",
            why=f"x is 0..{width - 1} and y is 0..{height - 1} in pixels; 0 is the centre of the first pixel.",
            next="give x before y, in pixels of the image the network sees.",
        )
    raise InvalidInput(
        f"keypoints are {describe(part)}.",
        where=f"{where}, image {index}" if where else f"image {index}",
        next="give (n, 2): x and y in image pixels; (0, 2) for none.",
    )
