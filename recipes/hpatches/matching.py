"""Matching of descriptors between two images of a plane, and the error of the matches."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cadsurgery.masks.detectors import opencv
from cadsurgery.support.describe import describe
from cadsurgery.support.errors import InvalidInput


def mutual_matches(first: Tensor, second: Tensor) -> Tensor:
    """Find mutual nearest neighbours under the inner product, as published for D2-Net.

    For normalised descriptors these are also the nearest neighbours by Euclidean distance.

    Args:
        first: (n, C) descriptors of one image.
        second: (m, C) descriptors of the other.

    Returns:
        (k, 2) int64: rows of the first and of the second, ascending; among equal neighbours the first counts.

    Raises:
        InvalidInput: the numbers of channels differ.
    """
    if first.dim() != 2 or second.dim() != 2 or first.shape[1:] != second.shape[1:]:
        raise InvalidInput(
            f"{describe(first)} cannot be matched with {describe(second)}.",
            next="give descriptors (n, C) and (m, C) of one network.",
        )
    if not len(first) or not len(second):
        return torch.empty(0, 2, dtype=torch.long, device=first.device)
    likeness = first @ second.T
    forward, backward = likeness.argmax(1), likeness.argmax(0)
    rows = torch.arange(len(first), device=first.device)
    mutual = backward[forward] == rows
    return torch.stack((rows[mutual], forward[mutual]), 1)


def warped(points: Tensor, homography: Tensor) -> Tensor:
    """Map points (n, 2), x and y, by a homography (3, 3); points at infinity become infinite."""
    points = points.to(torch.float64)
    homography = homography.to(points)
    whole = torch.cat((points, torch.ones_like(points[:, :1])), 1) @ homography.T
    return whole[:, :2] / whole[:, 2:]


def match_errors(first: Tensor, second: Tensor, matches: Tensor, homography: Tensor) -> Tensor:
    """Return the distance of each match from its true position by the homography: (k,) float64, in pixels.

    Args:
        first: (n, 2) points of one image.
        second: (m, 2) points of the other.
        matches: (k, 2) rows of both.
        homography: (3, 3), from the first image to the second.
    """
    expected = warped(first[matches[:, 0]], homography)
    distances = (expected - second[matches[:, 1]].to(expected)).norm(dim=1)
    return distances.nan_to_num(nan=math.inf, posinf=math.inf)


def matching_accuracy(errors: Tensor, thresholds: Sequence[float]) -> list[float]:
    """Return the share of a pair's matches with an error of at most each threshold in pixels; 0 without matches.

    The mean over pairs is the mean matching accuracy, MMA (Mikolajczyk and Schmid 2005, as of D2-Net).
    """
    count = len(errors)
    return [float((errors <= limit).sum()) / count if count else 0.0 for limit in thresholds]


def corner_error(
    first: Tensor, second: Tensor, matches: Tensor, homography: Tensor, size: tuple[int, int]
) -> float:
    """Return the mean error, in pixels, of the first image's corners under the homography estimated from the matches.

    OpenCV's RANSAC (3 pixels) estimates it; infinite if it finds none.

    The share of pairs with an error of at most a few pixels is the homography accuracy (DeTone et al., CVPRW 2018).

    Args:
        first: (n, 2) points of the first image.
        second: (m, 2) points of the second.
        matches: (k, 2) rows of both.
        homography: (3, 3), the true one.
        size: (height, width) of the first image.
    """
    if len(matches) < 4:
        return math.inf
    cv2: Any = opencv()
    cv2.setRNGSeed(0)
    points = [part.double().cpu().numpy() for part in (first[matches[:, 0]], second[matches[:, 1]])]
    estimate, _ = cv2.findHomography(*points, cv2.RANSAC, 3.0, maxIters=5000, confidence=0.9999)
    if estimate is None or not np.isfinite(estimate).all():
        return math.inf
    height, width = size
    corners = torch.tensor([[0, 0], [width - 1, 0], [0, height - 1], [width - 1, height - 1]])
    apart = warped(corners, torch.from_numpy(estimate)) - warped(corners, homography.cpu())
    return float(apart.norm(dim=1).mean().nan_to_num(nan=math.inf, posinf=math.inf))
