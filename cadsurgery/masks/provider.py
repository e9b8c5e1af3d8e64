"""The protocol of mask providers, and their registry."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from cadsurgery.errors import InvalidInput
from cadsurgery.lattice import describe


class Grid(NamedTuple):
    """The fine map a level map is for.

    Attributes:
        batch: number of images.
        size: (height, width) in samples.
        output_stride: input pixels per sample.
        max_level: the lowest level allowed.
        patch: R_K, side in samples of a cell that every adaptive stage downsamples; aligned blocks of this side are
            legal at any level.
    """

    batch: int
    size: tuple[int, int]
    output_stride: int
    max_level: int
    patch: int

    @property
    def patches(self) -> int:
        """Number of patches of one image, those that stick out of the map included."""
        return -(-self.size[0] // self.patch) * -(-self.size[1] // self.patch)


class MaskProvider(nn.Module):
    """Base of all masks. `forward(image, features, grid)` yields levels or a bool map (True = keep high).

    `image` is the network's input (B, C, H, W), already normalised; `features` the map that enters the
    region; the result is (B, h, w) on the grid's size.
    """

    name: ClassVar[str] = ""
    static: ClassVar[bool] = False  # whether `kept_patches` is a number
    source: ClassVar[str] = ""

    def forward(self, image: Tensor, features: Tensor, grid: Grid) -> Tensor:
        """The level map (B, h, w)."""
        raise NotImplementedError

    def scores(self, image: Tensor, features: Tensor, grid: Grid) -> Tensor:
        """(B, h, w) floating-point: how much each sample is worth keeping high, for masks that choose by rank.

        Only the order counts. Here: how far the level map lies above the lowest level; masks with something
        finer to tell override it.
        """
        levels = checked_levels(self(image, features, grid), grid, self.name)
        return (grid.max_level - levels).to(torch.float32)

    def kept_patches(self, grid: Grid) -> int | None:
        """How many patches (`Grid.patch`) of a whole batch its maps keep at level 0, with everything else at the
        lowest level, if that depends on the grid alone; None otherwise. With a number, shapes are static.
        """
        return None

    def options(self) -> dict[str, Any]:
        """The options this provider was made with, by name: those of its constructor."""
        return {name: getattr(self, name) for name in options_of(type(self))}

    def spec(self) -> str:
        """The string form that `resolve_mask` reads back."""
        options = ",".join(f"{name}={format_option(value)}" for name, value in self.options().items())
        return f"{self.name}:{options}" if options else self.name

    def extra_repr(self) -> str:
        """The options, for `print`."""
        return ", ".join(f"{name}={value}" for name, value in self.options().items())


@dataclass(frozen=True)
class MaskInfo:
    """One line of `list_masks()`."""

    name: str
    summary: str
    options: dict[str, Any]
    source: str


PROVIDERS: dict[str, type[MaskProvider]] = {}
P = TypeVar("P", bound=type[MaskProvider])


def mask_provider(name: str, source: str = "") -> Callable[[P], P]:
    """Register a provider class under a name; its constructor's defaults are its options."""

    def register(provider: P) -> P:
        if name in PROVIDERS:
            raise ValueError(f"mask {name!r} is registered already")
        provider.name, provider.source = name, source
        PROVIDERS[name] = provider
        return provider

    return register


def list_masks() -> list[MaskInfo]:
    """All mask providers, with options, defaults and source."""
    return [
        MaskInfo(name, (cls.__doc__ or "").strip().partition("\n")[0], options_of(cls), cls.source)
        for name, cls in sorted(PROVIDERS.items())
    ]


def options_of(provider: type[MaskProvider]) -> dict[str, Any]:
    """Options of a provider class and their defaults: those of its constructor."""
    parameters = inspect.signature(provider.__init__).parameters.values()
    return {p.name: p.default for p in parameters if p.name != "self" and p.default is not p.empty}


def format_option(value: Any) -> str:
    """An option's value in the string form."""
    return "/".join(str(part) for part in value) if isinstance(value, tuple) else str(value)


def checked_levels(found: object, grid: Grid, provider: str) -> Tensor:
    """A provider's result as integer levels (B, h, w); a bool map keeps True high.

    Raises:
        InvalidInput: wrong type, size or, unless a graph is being compiled, values.
    """
    where = f"mask {provider}" if provider else "mask"
    size = f"({grid.batch}, {grid.size[0]}, {grid.size[1]})"
    expected = f"a bool or integer tensor of shape {size}: one value per {grid.output_stride} image pixels"
    if not isinstance(found, Tensor):
        raise InvalidInput(f"a mask cannot be {describe(found)}.", where=where, next=f"give {expected}.")
    if found.is_floating_point() or found.is_complex():
        raise InvalidInput(
            f"a mask cannot be {describe(found)}.",
            where=where,
            why="floating-point values are neither levels nor a yes or no.",
            next=f"threshold it, e.g. scores > 0.5; needed is {expected}.",
        )
    levels = found.unsqueeze(0) if found.dim() == 2 else found
    if levels.dim() == 3 and levels.shape[0] == 1:
        levels = levels.expand(grid.batch, -1, -1)
    if tuple(levels.shape) != (grid.batch, *grid.size):
        raise InvalidInput(
            f"the mask has shape {tuple(found.shape)}.",
            where=where,
            why=f"the fine map of this image has {grid.size[0]} x {grid.size[1]} samples.",
            next=f"give {expected}.",
        )
    if levels.dtype == torch.bool:
        return torch.where(levels, 0, grid.max_level)
    levels = levels.long()  # not all integer types can be compared
    if torch.compiler.is_compiling():  # values are unknown while a graph is made
        return levels
    low, high = (int(bound) for bound in torch.aminmax(levels))
    if low < 0 or high > grid.max_level:
        raise InvalidInput(
            f"the mask has levels {low}..{high}.",
            where=where,
            why=f"levels go from 0 (keep the high resolution) to {grid.max_level} (downsample everything).",
            next=f"clamp them: levels.clamp(0, {grid.max_level}).",
        )
    return levels
