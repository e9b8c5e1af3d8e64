"""Masks that do not analyse the image, and masks made from a tensor or a function of the user."""

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
    """The same level everywhere."""

    image_only = ignores_image = True

    high: bool = True

    def forward(self, image: Tensor, features: Tensor, grid: FineMapSpec) -> Tensor:
        """Return a level map of zeros, or of the lowest level."""
        level = 0 if self.high else grid.max_level
        return torch.full((grid.batch, *grid.size), level, dtype=torch.int8, device=features.device)

    def kept_patches(self, grid: FineMapSpec) -> tuple[int, ...]:
        """Return the number of all patches, or 0."""
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
        seed: every call draws the same blocks; with -1 each call draws new blocks from torch's global generator.
    """

    image_only = ignores_image = True

    def __init__(self, fraction: float = 0.3, block: int = 4, seed: int = -1) -> None:
        super().__init__()
        checked = {"fraction": (fraction, SHARE), "block": (block, between(1, math.inf, "4"))}
        check_options("random", **checked, seed=(seed, between(-1, 2**63 - 1, "0")))
        self.fraction, self.block, self.seed = fraction, block, seed

    def forward(self, image: Tensor, features: Tensor, grid: FineMapSpec) -> Tensor:
        """Return a bool map that is True in the chosen blocks."""
        return self._draw(grid).to(features.device) < self.fraction

    def scores(self, image: Tensor, features: Tensor, grid: FineMapSpec) -> Tensor:
        """Return one random number per block; the blocks that `forward` keeps have the highest."""
        return -self._draw(grid).to(features.device)

    def _draw(self, grid: FineMapSpec) -> Tensor:
        """Draw uniform random numbers (B, h, w) in 0..1, constant within a block."""
        generator = torch.Generator().manual_seed(self.seed) if self.seed >= 0 else None
        side = min(self.block, max(grid.size))
        blocks = [divide_up(length, side) for length in grid.size]
        return on_samples(torch.rand(grid.batch, *blocks, generator=generator), side, grid.size)


def name_of(function: object) -> str:
    """Return the name of a function for messages."""
    return getattr(function, "__name__", type(function).__name__)


TENSOR = "a tensor"


class FixedMask(MaskProvider):
    """A level map given by the user, used in every call."""

    image_only = ignores_image = True

    storable = True  # the tensor is stored beside the mask's text

    def __init__(self, levels: Tensor) -> None:
        super().__init__()
        self.register_buffer("levels", levels)
        self.levels: Tensor

    def forward(self, image: Tensor, features: Tensor, grid: FineMapSpec) -> Tensor:
        """Return the user's map on the device of the features."""
        return self.levels.to(features.device)

    def spec(self) -> str:
        """Return the placeholder for a tensor in the text form of a mask."""
        return TENSOR


class FunctionMask(MaskProvider):
    """A mask computed by a function of the user, which maps an image to a level map or bool map."""

    image_only = True

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function
        self.name = name_of(function)  # type: ignore[misc]

    def forward(self, image: Tensor, features: Tensor, grid: FineMapSpec) -> Tensor:
        """Return the function's result for the image."""
        return self.function(image)
