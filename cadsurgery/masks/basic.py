"""Masks that need no image: uniform, random, given tensors and functions."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from cadsurgery.elements.sizes import divide_up
from cadsurgery.masks.filters import on_samples
from cadsurgery.masks.options import SHARE, between, check_options
from cadsurgery.masks.provider import FineMapSpec, MaskProvider, mask_provider


class UniformMask(MaskProvider):
    """One level everywhere."""

    image_only = ignores_image = True

    high: bool = True

    def forward(self, image: Tensor, features: Tensor, grid: FineMapSpec) -> Tensor:
        """Level 0 or the lowest."""
        level = 0 if self.high else grid.max_level
        return torch.full((grid.batch, *grid.size), level, dtype=torch.int8, device=features.device)

    def kept_patches(self, grid: FineMapSpec) -> tuple[int, ...]:
        """All or none."""
        return (grid.batch * grid.patches if self.high else 0,)


@mask_provider("all")
class KeepAll(UniformMask):
    """Keep everything at the high output stride."""


@mask_provider("none")
class KeepNone(UniformMask):
    """Downsample everything to the low output stride."""

    high = False


@mask_provider("random")
class RandomMask(MaskProvider):
    """Keep random blocks high: for tests, timing and any-budget training.

    Args:
        fraction: expected share of blocks kept high, 0..1.
        block: side of a block in samples of the fine map.
        seed: makes every call the same; -1 draws anew from torch's generator.
    """

    image_only = ignores_image = True

    def __init__(self, fraction: float = 0.3, block: int = 4, seed: int = -1) -> None:
        super().__init__()
        checked = {"fraction": (fraction, SHARE), "block": (block, between(1, math.inf, "4"))}
        check_options("random", **checked, seed=(seed, between(-1, 2**63 - 1, "0")))
        self.fraction, self.block, self.seed = fraction, block, seed

    def forward(self, image: Tensor, features: Tensor, grid: FineMapSpec) -> Tensor:
        """Levels 0 in chosen blocks, the lowest elsewhere."""
        return self._draw(grid).to(features.device) < self.fraction

    def scores(self, image: Tensor, features: Tensor, grid: FineMapSpec) -> Tensor:
        """Random numbers, one per block; what `forward` keeps has the highest."""
        return -self._draw(grid).to(features.device)

    def _draw(self, grid: FineMapSpec) -> Tensor:
        """(B, h, w) in 0..1, the same within a block."""
        generator = torch.Generator().manual_seed(self.seed) if self.seed >= 0 else None
        side = min(self.block, max(grid.size))
        blocks = [divide_up(length, side) for length in grid.size]
        return on_samples(torch.rand(grid.batch, *blocks, generator=generator), side, grid.size)


def name_of(function: object) -> str:
    """Return the name of a function for messages."""
    return getattr(function, "__name__", type(function).__name__)


TENSOR = "a tensor"


class FixedMask(MaskProvider):
    """A given level map, the same for every call."""

    image_only = ignores_image = True

    storable = True  # its tensor is stored beside its spec

    def __init__(self, levels: Tensor) -> None:
        super().__init__()
        self.register_buffer("levels", levels)
        self.levels: Tensor

    def forward(self, image: Tensor, features: Tensor, grid: FineMapSpec) -> Tensor:
        """The given map."""
        return self.levels.to(features.device)

    def spec(self) -> str:
        """Return the text that stands for a tensor in the string form of a mask."""
        return TENSOR


class FunctionMask(MaskProvider):
    """A user's function image -> map."""

    image_only = True

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function
        self.name = name_of(function)  # type: ignore[misc]

    def forward(self, image: Tensor, features: Tensor, grid: FineMapSpec) -> Tensor:
        """Return what the function returns for the image."""
        return self.function(image)
