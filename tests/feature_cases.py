"""What tests of masks that look at features share: a network, its fine grid, and the error of interpolation by hand."""

from __future__ import annotations

from typing import Any

import torch
from conftest import images
from networks import SureSegmenter, made_once
from torch import Tensor, nn

import cadsurgery as cs
from cadsurgery.masks import FineMapSpec, MaskProvider

SIZE = (65, 98)
NOTHING = torch.empty(0)


class Scored(MaskProvider):
    """Given scores."""

    def __init__(self, scores: Tensor) -> None:
        super().__init__()
        self.given = scores

    def scores(self, image: Tensor, features: Tensor, grid: FineMapSpec) -> Tensor:
        return self.given


def trunk(classes: int = 5) -> nn.Module:
    return SureSegmenter(classes).eval()


@made_once
def converted(mask: object = "none", model: nn.Module | None = None, **options: Any) -> cs.AdaptiveModel:
    """Strides 4 to 16, two levels below the high one."""
    options = {"output_stride": (4, 16), "example_input": images(1, *SIZE), "verify_laws": False, **options}
    return cs.adaptify(trunk() if model is None else model, mask, **options)


def grid_of(size: tuple[int, int], batch: int = 2, low: int = 2) -> FineMapSpec:
    return FineMapSpec(batch, size, 4, low, 2**low, 2**low)


def missed(features: Tensor) -> Tensor:
    """(B, h, w): the squared error, summed over channels, of reading each pixel between its even neighbours."""
    batch, _, height, width = features.shape
    found = torch.zeros(batch, height, width, dtype=features.dtype)
    for y in range(height):
        for x in range(width):
            rows = [y - y % 2, min(y + y % 2, (height - 1) // 2 * 2)]
            columns = [x - x % 2, min(x + x % 2, (width - 1) // 2 * 2)]
            between = sum(features[:, :, v, h] for v in rows for h in columns) / 4
            found[:, y, x] = (features[:, :, y, x] - between).square().sum(1)
    return found
