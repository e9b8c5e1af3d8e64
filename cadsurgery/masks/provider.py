"""The protocol of mask providers, and their registry."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from cadsurgery.elements.lattice import Geometry, as_levels, describe
from cadsurgery.elements.sizes import divide_up
from cadsurgery.masks.options import format_options, options_of
from cadsurgery.support.errors import InvalidInput
from cadsurgery.support.provenance import same_place


class FineMapSpec(NamedTuple):
    """The fine map a level map is for.

    Attributes:
        batch: number of images.
        size: (height, width) in samples.
        output_stride: input pixels per sample.
        max_level: the lowest level allowed.
        patch: R_K, side in samples of a cell that every adaptive stage downsamples; aligned blocks of this side are
            legal at any level.
        side: R_max_level, side in samples of a cell of the lowest level allowed; less than `patch` where the low
            output stride stops before the last stage.
    """

    batch: int
    size: tuple[int, int]
    output_stride: int
    max_level: int
    patch: int
    side: int

    @classmethod
    def of(cls, geometry: Geometry, batch: int, size: tuple[int, int], output_stride: int) -> FineMapSpec:
        """The grid of lattices of a geometry."""
        low, sides = geometry.max_level, geometry.sides
        return cls(batch, size, output_stride, low, sides[-1], sides[low])

    @property
    def patches(self) -> int:
        """Number of patches of one image, those that stick out of the map included."""
        return divide_up(self.size[0], self.patch) * divide_up(self.size[1], self.patch)


Grid = FineMapSpec  # the name that providers of users may have


class MaskProvider(nn.Module):
    """Base of all masks. `forward(image, features, grid)` yields levels or a bool map (True = keep high).

    `image` is the picture that the network is given (B, C, H, W), in the unit of `masks.unit` whatever the network
    takes: in colour, after ImageNet's mean and standard deviation. `features` is the map that enters the region; the
    result is (B, h, w) on the grid's size.
    """

    name: ClassVar[str] = ""
    source: ClassVar[str] = ""
    takes: ClassVar[Literal["none", "one", "many"]] = "none"  # other masks: how the string form writes it
    image_only: ClassVar[bool] = False  # does not look at the features, which then need not be computed
    ignores_image: ClassVar[bool] = False  # does not look at the picture, whose unit then need not be known
    needs: ClassVar[str] = ""  # what its maps depend on besides image and features, e.g. "earlier images"
    has_own_function: bool = False  # was given a function that its options do not say where to find

    def forward(self, image: Tensor, features: Tensor, grid: FineMapSpec) -> Tensor:
        """The level map (B, h, w)."""
        raise NotImplementedError

    def scores(self, image: Tensor, features: Tensor, grid: FineMapSpec) -> Tensor:
        """(B, h, w) floating-point: how much each sample is worth keeping high, for masks that choose by rank.

        Only the order counts. Here: how far the level map lies above the lowest level; masks with something
        finer to tell override it.
        """
        levels = check_levels(self(image, features, grid), grid, self.name)
        return (grid.max_level - levels).to(torch.float32)

    def kept_patches(self, grid: FineMapSpec) -> tuple[int, ...] | None:
        """Number of patches (`FineMapSpec.patch`) of a whole batch that its maps keep at level 0, at level 1 or finer,
        and so on, with everything else at the lowest level, if that depends on the grid alone; None otherwise. With
        numbers, shapes are static.
        """
        return None

    @property
    def static(self) -> bool:
        """True if `kept_patches` gives numbers and a compiled graph can hold the mask."""
        return type(self).kept_patches is not MaskProvider.kept_patches and not self.dependence

    @property
    def parts(self) -> tuple[MaskProvider, ...]:
        """The masks it is made from."""
        return ()

    @property
    def sees_features(self) -> bool:
        """True if it, or a mask it is made from, looks at the features that enter the region."""
        return not self.image_only or any(part.sees_features for part in self.parts)

    def first_passes(self, lowest: int) -> frozenset[int]:
        """The levels, 0..`lowest`, at which it, or a mask it is made from, wants to see what the network gives with
        everything at that level."""
        return frozenset().union(*(part.first_passes(lowest) for part in self.parts))

    @property
    def sees_image(self) -> bool:
        """True if it, or a mask it is made from, looks at the picture."""
        return not self.ignores_image or any(part.sees_image for part in self.parts)

    @property
    def looks_ahead(self) -> bool:
        """True if it wants a first pass of the network at all."""
        return bool(self.first_passes(1))

    @property
    def dependence(self) -> str:
        """Name of the input that it, or the first mask it is made from, needs besides image and features; or empty."""
        return self.needs or next((part.dependence for part in self.parts if part.dependence), "")

    @property
    def storable(self) -> bool:
        """True if `spec()` says everything that makes it, learned tensors apart."""
        is_known = PROVIDERS.get(self.name) is type(self) and not self.has_own_function
        return is_known and all(part.storable for part in self.parts)

    def options(self) -> dict[str, Any]:
        """The options this provider was made with, by name: those of its constructor."""
        return {name: getattr(self, name) for name in options_of(type(self))}

    def spec(self) -> str:
        """The string form that `resolve_mask` reads back."""
        options = format_options(self.options())
        return f"{self.name}:{options}" if options else self.name

    def extra_repr(self) -> str:
        """The options, for `print`."""
        return ", ".join(f"{name}={value}" for name, value in self.options().items())


@dataclass(frozen=True)
class MaskInfo:
    """One line of `list_masks()`.

    Attributes:
        name: in the string form.
        summary: what it keeps high.
        options: with their defaults.
        source: where it is from.
        form: how it is written, other masks as MASK: `edges`, `MASK | budget`, `MASK + MASK`.
    """

    name: str
    summary: str
    options: dict[str, Any]
    source: str
    form: str


PROVIDERS: dict[str, type[MaskProvider]] = {}
P = TypeVar("P", bound=type[MaskProvider])


def mask_provider(name: str, source: str = "") -> Callable[[P], P]:
    """Register a provider class under a name; its constructor's defaults are its options.

    The same class defined again, as by a cell of a notebook that is run twice, takes the place of the first.

    Raises:
        ValueError: another class has the name.
    """

    def register(provider: P) -> P:
        known = PROVIDERS.get(name, provider)
        if not same_place(known, provider):
            raise ValueError(
                f"mask {name!r} is registered already, by {known.__module__}.{known.__qualname__}; choose another name"
            )
        provider.name, provider.source = name, source
        PROVIDERS[name] = provider
        return provider

    return register


def list_masks() -> list[MaskInfo]:
    """All mask providers, with options, defaults and source."""
    return [
        MaskInfo(name, _summary(cls), options_of(cls), cls.source, _FORMS[cls.takes].format(name=name))
        for name, cls in sorted(PROVIDERS.items())
    ]


_FORMS = {"none": "{name}", "one": "MASK | {name}", "many": "MASK + MASK"}


def _summary(provider: type[MaskProvider]) -> str:
    """The first paragraph of its docstring, as one line."""
    return " ".join((provider.__doc__ or "").partition("\n\n")[0].split())


def check_levels(returned: object, grid: FineMapSpec, provider: str) -> Tensor:
    """A provider's result as integer levels (B, h, w); a bool map keeps True high.

    Raises:
        InvalidInput: wrong type, size or, unless a graph is being compiled, values.
    """
    where = f"mask {provider}" if provider else "mask"
    size = f"({grid.batch}, {grid.size[0]}, {grid.size[1]})"
    expected = f"a bool or integer tensor of shape {size}: one value per {grid.output_stride} image pixels"
    if not isinstance(returned, Tensor):
        raise InvalidInput(f"a mask cannot be {describe(returned)}.", where=where, next=f"give {expected}.")
    if returned.is_floating_point() or returned.is_complex():
        raise InvalidInput(
            f"a mask cannot be {describe(returned)}.",
            where=where,
            why="floating-point values are neither levels nor a yes or no.",
            next=f"threshold it, e.g. scores > 0.5; needed is {expected}.",
        )
    levels = returned.unsqueeze(0) if returned.dim() == 2 else returned
    if levels.dim() == 3 and levels.shape[0] == 1:
        levels = levels.expand(grid.batch, -1, -1)
    if tuple(levels.shape) != (grid.batch, *grid.size):
        raise InvalidInput(
            f"the mask has shape {tuple(returned.shape)}.",
            where=where,
            why=f"the fine map of this image has {grid.size[0]} x {grid.size[1]} samples.",
            next=f"give {expected}.",
        )
    return as_levels(levels, grid.max_level, where)


def check_scores(scores: object, grid: FineMapSpec, provider: str, user: str) -> Tensor:
    """A provider's scores (B, h, w), once they are known to be scores; `user` is the mask that ranks by them.

    Raises:
        InvalidInput: wrong type or size or, unless a graph is being compiled, NaN.
    """
    where = f"mask {user}, scores of mask {provider}"
    shape = (grid.batch, *grid.size)
    if not isinstance(scores, Tensor) or not scores.is_floating_point() or tuple(scores.shape) != shape:
        raise InvalidInput(
            f"the scores are {describe(scores)}.",
            where=where,
            next=f"give a floating-point tensor of shape {shape}.",
        )
    if not torch.compiler.is_compiling() and scores.isnan().any():
        raise InvalidInput(
            "the scores hold NaN.",
            where=where,
            why="what is not a number has no rank.",
            next="check the image and the mask that gives the scores.",
        )
    return scores
