"""The protocol of mask providers, their registry, and the string form `name:option=value,...`."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from cadsurgery.errors import InvalidInput, UnknownName
from cadsurgery.lattice import describe


class Grid(NamedTuple):
    """The fine map a level map is for.

    Attributes:
        batch: number of images.
        size: (height, width) in samples.
        output_stride: input pixels per sample.
        max_level: the lowest level allowed.
    """

    batch: int
    size: tuple[int, int]
    output_stride: int
    max_level: int


class MaskProvider(nn.Module):
    """Base of all masks. `forward(image, features, grid)` yields levels or a bool map (True = keep high).

    `image` is the network's input (B, C, H, W), already normalised; `features` the map that enters the
    region; the result is (B, h, w) on the grid's size.
    """

    name: ClassVar[str] = ""
    source: ClassVar[str] = ""

    def forward(self, image: Tensor, features: Tensor, grid: Grid) -> Tensor:
        """The level map (B, h, w)."""
        raise NotImplementedError

    def options(self) -> dict[str, Any]:
        """The options this provider was made with, by name: those of its constructor."""
        return {name: getattr(self, name) for name in _options(type(self))}

    def spec(self) -> str:
        """The string form that `resolve_mask` reads back."""
        options = ",".join(f"{name}={_format(value)}" for name, value in self.options().items())
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


_PROVIDERS: dict[str, type[MaskProvider]] = {}
P = TypeVar("P", bound=type[MaskProvider])


def mask_provider(name: str, source: str = "") -> Callable[[P], P]:
    """Register a provider class under a name; its constructor's defaults are its options."""

    def register(provider: P) -> P:
        if name in _PROVIDERS:
            raise ValueError(f"mask {name!r} is registered already")
        provider.name, provider.source = name, source
        _PROVIDERS[name] = provider
        return provider

    return register


def list_masks() -> list[MaskInfo]:
    """All mask providers, with options, defaults and source."""
    return [
        MaskInfo(name, (cls.__doc__ or "").splitlines()[0], _options(cls), cls.source)
        for name, cls in sorted(_PROVIDERS.items())
    ]


def resolve_mask(mask: object) -> MaskProvider:
    """A provider from a name, a string with options, a provider, a callable image -> map, or a tensor.

    Raises:
        UnknownName: no such mask or option; the closest names are listed.
        InvalidInput: an option's value cannot be read, or `mask` is something else.
    """
    from cadsurgery.masks.basic import FixedMask, FunctionMask

    if isinstance(mask, MaskProvider):
        return mask
    if isinstance(mask, str):
        return _parse(mask)
    if isinstance(mask, Tensor):
        return FixedMask(mask)
    if callable(mask):
        return FunctionMask(mask)
    raise InvalidInput(
        f"{describe(mask)} is not a mask.",
        next='give a name such as "edges", a tensor, a provider or a function image -> map.',
    )


def _parse(text: str) -> MaskProvider:
    name, _, rest = text.partition(":")
    name = name.strip()
    if name not in _PROVIDERS:
        raise UnknownName("mask", name, _PROVIDERS)
    known = _options(_PROVIDERS[name])
    options = {}
    for part in filter(None, (part.strip() for part in rest.split(","))):
        option, equals, value = (piece.strip() for piece in part.partition("="))
        if option not in known:
            raise UnknownName(
                f"option of mask {name!r}", option, known, next=f"e.g. {name}:{_example(known)}"
            )
        if not equals or not value:
            raise InvalidInput(
                f"option {option!r} of mask {name!r} has no value.", next=f"write {option}=VALUE."
            )
        options[option] = _value(name, option, value, known[option])
    return _PROVIDERS[name](**options)


def _value(mask: str, option: str, text: str, default: Any) -> Any:
    """A number, or several separated by slashes."""
    kind = type(default[0]) if isinstance(default, tuple) else type(default)
    try:
        values = tuple(kind(part) for part in text.split("/"))
    except ValueError:
        raise InvalidInput(
            f"option {option}={text} of mask {mask!r} is not {'an integer' if kind is int else 'a number'}.",
            next=f"write e.g. {option}={_format(default)}.",
        ) from None
    if len(values) > 1 and not isinstance(default, tuple):
        raise InvalidInput(
            f"option {option!r} of mask {mask!r} takes one value.", next=f"write {option}={values[0]}."
        )
    return values if isinstance(default, tuple) else values[0]


def _options(provider: type[MaskProvider]) -> dict[str, Any]:
    parameters = inspect.signature(provider.__init__).parameters.values()
    return {p.name: p.default for p in parameters if p.name != "self" and p.default is not p.empty}


def _format(value: Any) -> str:
    return "/".join(str(part) for part in value) if isinstance(value, tuple) else str(value)


def _example(options: dict[str, Any]) -> str:
    return ",".join(f"{name}={_format(value)}" for name, value in options.items())


def checked_levels(found: object, grid: Grid, provider: str) -> Tensor:
    """A provider's result as integer levels (B, h, w); a bool map keeps True high.

    Raises:
        InvalidInput: wrong type, size or values.
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
    low, high = (int(bound) for bound in torch.aminmax(levels))
    if low < 0 or high > grid.max_level:
        raise InvalidInput(
            f"the mask has levels {low}..{high}.",
            where=where,
            why=f"levels go from 0 (keep the high resolution) to {grid.max_level} (downsample everything).",
            next=f"clamp them: levels.clamp(0, {grid.max_level}).",
        )
    return levels
