"""From what a user gives as a mask to a provider; the string form `name:option=value,...`."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from cadsurgery.errors import InvalidInput, UnknownName
from cadsurgery.lattice import describe
from cadsurgery.masks.basic import FixedMask, FunctionMask
from cadsurgery.masks.provider import PROVIDERS, MaskProvider, format_option, options_of


def resolve_mask(mask: object) -> MaskProvider:
    """A provider from a name, a string with options, a provider, a callable image -> map, or a tensor.

    Raises:
        UnknownName: no such mask or option; the closest names are listed.
        InvalidInput: an option's value cannot be read, or `mask` is something else.
    """
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
    if name not in PROVIDERS:
        raise UnknownName("mask", name, PROVIDERS)
    known = options_of(PROVIDERS[name])
    options = {}
    for part in filter(None, (part.strip() for part in rest.split(","))):
        option, equals, value = (piece.strip() for piece in part.partition("="))
        if option not in known:
            example = f"e.g. {name}:{_example(known)}" if known else f"mask {name!r} takes no options."
            raise UnknownName(f"option of mask {name!r}", option, known, next=example)
        if not equals or not value:
            raise InvalidInput(
                f"option {option!r} of mask {name!r} has no value.", next=f"write {option}=VALUE."
            )
        options[option] = _value(name, option, value, known[option])
    return PROVIDERS[name](**options)


def _value(mask: str, option: str, text: str, default: Any) -> Any:
    """A number, or several separated by slashes."""
    kind = type(default[0]) if isinstance(default, tuple) else type(default)
    try:
        values = tuple(kind(part) for part in text.split("/"))
    except ValueError:
        raise InvalidInput(
            f"option {option}={text} of mask {mask!r} is not {'an integer' if kind is int else 'a number'}.",
            next=f"write e.g. {option}={format_option(default)}.",
        ) from None
    if len(values) > 1 and not isinstance(default, tuple):
        raise InvalidInput(
            f"option {option!r} of mask {mask!r} takes one value.", next=f"write {option}={values[0]}."
        )
    return values if isinstance(default, tuple) else values[0]


def _example(options: dict[str, Any]) -> str:
    return ",".join(f"{name}={format_option(value)}" for name, value in options.items())
