"""D2-Net's own heads (Dusmanu et al., CVPR 2019): detection, localisation and description of keypoints.

The CAD paper uses SIFT keypoints instead and reads the map at these (`recipe.py`).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

import cadsurgery as cs

EDGE = 5.0  # ratio of a channel's curvatures above which a maximum lies on an edge

# Kernels correlated with a channel: second differences down, across and mixed; first differences down and across.
_SECOND = (
    ((0, 1, 0), (0, -2, 0), (0, 1, 0)),
    ((0, 0, 0), (1, -2, 1), (0, 0, 0)),
    ((0.25, 0, -0.25), (0, 0, 0), (-0.25, 0, 0.25)),
)
_FIRST = (((0, -0.5, 0), (0, 0, 0), (0, 0.5, 0)), ((0, 0, 0), (-0.5, 0, 0.5), (0, 0, 0)))


def detect(features: Tensor) -> Tensor:
    """Detect keypoints (section 3.1): samples that are the maximum of all channels and of their 3 x 3 neighbours in a
    channel, and that do not lie on an edge of the channel.

    Args:
        features: (B, C, h, w) map of the network.

    Returns:
        (B, C, h, w) bool.
    """
    strongest = features == features.amax(1, keepdim=True)
    local = features == F.max_pool2d(features, 3, 1, 1)
    down, across, mixed = _differences(features, _SECOND)
    determinant, trace = down * across - mixed.square(), down + across
    blob = (determinant > 0) & (trace.square() / determinant <= (EDGE + 1) ** 2 / EDGE)
    return strongest & local & blob


def localise(features: Tensor) -> Tensor:
    """Localise maxima (section 3.1, after SIFT), (B, 2, C, h, w) down and across, in samples.

    The offset is that of the maximum of the parabola through a channel's neighbours.
    """
    down, across, mixed = _differences(features, _SECOND)
    along, aside = _differences(features, _FIRST)
    determinant = down * across - mixed.square()
    step_down = -(across * along - mixed * aside) / determinant
    step_across = -(down * aside - mixed * along) / determinant
    return torch.stack((step_down, step_across), 1)


def keypoints(features: Tensor, stride: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return D2-Net's own keypoints of one image.

    Args:
        features: (1, C, h, w) map of the network.
        stride: output stride of the map.

    Returns:
        (n, 2) x and y in image pixels, the strongest first; (n,) scores, the channel's values; (n, C) descriptors,
        interpolated and normalised.

    Raises:
        InvalidInput: the batch has more than one image.
    """
    if features.shape[0] != 1:
        raise cs.InvalidInput(
            f"{features.shape[0]} maps at once.",
            next="give one map (1, C, h, w): images differ in their keypoints.",
        )
    _, channel, y, x = detect(features).nonzero(as_tuple=True)
    step = localise(features)[0, :, channel, y, x].T
    near = (step.abs() < 0.5).all(1)
    channel, y, x, step = channel[near], y[near], x[near], step[near]
    place = torch.stack((y, x), 1) + step
    size = torch.tensor(features.shape[2:], device=features.device)
    inside = ((place >= 0) & (place <= size - 1)).all(1)
    channel, y, x, place = channel[inside], y[inside], x[inside], place[inside]
    scores, order = features[0, channel, y, x].sort(descending=True)
    place = place[order]
    grid = 2 * place.flip(1) / (size.flip(0) - 1).clamp(min=1) - 1
    found = F.grid_sample(features, grid.view(1, -1, 1, 2).to(features), align_corners=True)
    # Each pool centres a sample on its 2 x 2 pixels.
    points = place.flip(1) * stride + (stride - 1) / 2
    return points, scores, F.normalize(found[0, :, :, 0].T, dim=1)


def _differences(features: Tensor, kernels: tuple[tuple[tuple[float, ...], ...], ...]) -> list[Tensor]:
    """Correlate each channel of (B, C, h, w) with 3 x 3 kernels, zero-padded."""
    batch, channels, height, width = features.shape
    planes = features.reshape(batch * channels, 1, height, width)
    weight = torch.tensor(kernels, dtype=features.dtype, device=features.device).unsqueeze(1)
    out = F.conv2d(planes, weight, padding=1).view(batch, channels, len(kernels), height, width)
    return list(out.unbind(2))
