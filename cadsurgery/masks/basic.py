"""Masks that do not analyse the image, and masks made from a tensor or a function of the user."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from cadsurgery.elements.sizes import divide_up
from cadsurgery.masks.filters import on_samples, resize
from cadsurgery.masks.mask_options import SHARE, between, check_options
from cadsurgery.masks.provider import FineMapSpec, MaskProvider, check_levels, mask_provider
from cadsurgery.support.describe import describe
from cadsurgery.support.errors import InvalidInput
from cadsurgery.support.provenance import function_at


class UniformMask(MaskProvider):
    """The same level everywhere."""

    image_only = ignores_image = True

    high: bool = True

    def forward(self, image: Tensor, features: Tensor, grid: FineMapSpec) -> Tensor:
        """Return a level map of zeros, or of the lowest level."""
        level = self.uniform_level(grid.max_level)
        return torch.full((grid.batch, *grid.size), level, dtype=torch.int8, device=features.device)

    def uniform_level(self, max_level: int) -> int:
        """Return 0, or the lowest level."""
        return 0 if self.high else max_level

    def reach(self, grid: FineMapSpec) -> int:
        """Return 0."""
        return 0

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
    bytes_per_pixel = 8

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
        return on_samples(
            torch.rand(grid.batch, *blocks, dtype=torch.float32, device="cpu", generator=generator),
            side,
            grid.size,
        )


def name_of(function: object) -> str:
    """Return the name of a function for messages."""
    return getattr(function, "__name__", type(function).__name__)


TENSOR = "a tensor"


class FixedMask(MaskProvider):
    """A level map given by the user, used in every call."""

    image_only = ignores_image = True
    bytes_per_pixel = 4

    storable = True  # the tensor is stored beside the mask's text
    judges_each_image = False  # it has a map for each image

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
    """A mask computed by a function of the user, which maps an image to a level map, a bool map or scores.

    Scores are a floating-point map (B, h, w) or (B, 1, h, w) of any size, which is resized to the fine map; a budget or
    thresholds behind the mask say what they keep.

    Args:
        function: maps the image batch (B, C, H, W) in the unit of masks (`masks.unit`) to a map. A callable, or the
            name `module:function` of an importable one, which is the mask's text form.

    Raises:
        UnknownName: there is no such module or function.
        InvalidInput: the function is not callable.
    """

    image_only = True

    def __init__(self, function: str | Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.has_own_function = not isinstance(function, str)
        self.function: Any = function
        if isinstance(function, str):
            self.function = function_at(function, "mask", "my_module:my_function")
        self.name = function if isinstance(function, str) else name_of(function)  # type: ignore[misc]
        if not callable(self.function):
            raise InvalidInput(
                f"{describe(self.function)} is not a function.",
                where=f"mask {self.name}",
                next="give a function image -> map, or the name module:function of one.",
            )

    def forward(self, image: Tensor, features: Tensor, grid: FineMapSpec) -> Tensor:
        """Return the function's result for the image."""
        return self.function(image)

    def scores(self, image: Tensor, features: Tensor, grid: FineMapSpec) -> Tensor:
        """Return the function's scores, at least float32, resized to the fine map (bilinear, with antialiasing); of a
        level map or bool map, the number of levels above the lowest.

        Raises:
            InvalidInput: the function returns no map.
        """
        scores = self.function(image)
        if not isinstance(scores, Tensor) or not scores.is_floating_point():
            return (grid.max_level - check_levels(scores, grid, self.name)).to(torch.float32)
        if scores.dim() == 4 and scores.shape[1] == 1:
            scores = scores.squeeze(1)
        if scores.dim() != 3 or scores.shape[0] != grid.batch or 0 in scores.shape:
            raise InvalidInput(
                f"the function {self.name} returned {describe(scores)}.",
                where=f"mask {self.name}",
                next=f"return a floating-point tensor ({grid.batch}, h, w) or ({grid.batch}, 1, h, w) of scores.",
            )
        scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
        return resize(scores, grid.size)

    @property
    def storable(self) -> bool:
        """True if the function is named, so that the text form says which it is."""
        return not self.has_own_function
