"""From what a user gives as a mask to a provider.

The string form is `name:option=value,...`; wrappers follow behind pipes: `edges | budget:fraction=0.3`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from cadsurgery.errors import InvalidInput, UnknownName
from cadsurgery.lattice import describe
from cadsurgery.masks.basic import FixedMask, FunctionMask
from cadsurgery.masks.provider import PROVIDERS, MaskProvider, format_option, options_of

PIPE = "|"


class MaskWrapper(MaskProvider):
    """Base of masks made from another mask; the string form writes them behind it and a pipe.

    The first parameter of a subclass's constructor is the inner mask, the others are its options.
    """

    def __init__(self, mask: object) -> None:
        """Wrap anything `resolve_mask` takes.

        Args:
            mask: the inner mask.
        """
        super().__init__()
        self.mask = resolve_mask(mask)

    def spec(self) -> str:
        """The string form that `resolve_mask` reads back: the inner mask's, a pipe, its own."""
        return f"{self.mask.spec()} {PIPE} {self.own_spec()}"

    def own_spec(self) -> str:
        """What stands behind the pipe."""
        return super().spec()


def resolve_mask(mask: object) -> MaskProvider:
    """A provider from a name, a string with options, a provider, a callable image -> map, or a tensor.

    Raises:
        UnknownName: no such mask or option; the closest names are listed.
        InvalidInput: an option's value cannot be read, a wrapper stands where a mask belongs or the other
            way round, or `mask` is something else.
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


def wrapped(mask: MaskProvider, text: str) -> MaskProvider:
    """A mask in the wrapper that a string without an inner mask describes, e.g. `budget:fraction=0.3`."""
    name = _name(text)
    wrapper = PROVIDERS.get(name)
    if wrapper is None:
        raise UnknownName("mask wrapper", name, _wrappers(), next=f"write {_example_of_a_pipe()}.")
    if not issubclass(wrapper, MaskWrapper):
        raise InvalidInput(
            f"mask {name!r} cannot stand behind a pipe.",
            why="it is a mask of its own and takes no other.",
            next=f"write {text.strip()!r} alone, or a wrapper behind it: {_example_of_a_pipe(text)}.",
        )
    return wrapper(mask, **_options(name, text))


def _parse(text: str) -> MaskProvider:
    inner, *wrappers = text.split(PIPE)
    name = _name(inner)
    if issubclass(PROVIDERS.get(name, MaskProvider), MaskWrapper):
        raise InvalidInput(
            f"mask {name!r} needs another mask to work on.",
            next=f"write that before it and a pipe: {_example_of_a_pipe(wrapper=inner)}.",
        )
    if wrappers and not name:
        raise InvalidInput(
            f"nothing stands before the pipe in {text!r}.",
            next=f"write a mask there: {_example_of_a_pipe(wrapper=wrappers[0])}.",
        )
    if name not in PROVIDERS:
        raise UnknownName("mask", name, PROVIDERS)
    mask = PROVIDERS[name](**_options(name, inner))
    for wrapper in wrappers:
        mask = wrapped(mask, wrapper)
    return mask


def _name(text: str) -> str:
    return text.partition(":")[0].strip()


def _wrappers() -> list[str]:
    return [name for name, provider in PROVIDERS.items() if issubclass(provider, MaskWrapper)]


def _example_of_a_pipe(mask: str = "edges", wrapper: str = "budget:fraction=0.3") -> str:
    return f'"{mask.strip()} {PIPE} {wrapper.strip()}"'


def _options(name: str, text: str) -> dict[str, Any]:
    """The options that follow the name of a mask in its string form."""
    known = options_of(PROVIDERS[name])
    options = {}
    for part in filter(None, (part.strip() for part in text.partition(":")[2].split(","))):
        option, equals, value = (piece.strip() for piece in part.partition("="))
        if option not in known:
            example = f"e.g. {name}:{_example(known)}" if known else f"mask {name!r} takes no options."
            raise UnknownName(f"option of mask {name!r}", option, known, next=example)
        if not equals or not value:
            raise InvalidInput(
                f"option {option!r} of mask {name!r} has no value.", next=f"write {option}=VALUE."
            )
        options[option] = _value(name, option, value, known[option])
    return options


def _value(mask: str, option: str, text: str, default: Any) -> Any:
    """A number, a yes or no, or several separated by slashes."""
    kind = type(default[0]) if isinstance(default, tuple) else type(default)
    try:
        values = tuple(_READ.get(kind, kind)(part) for part in text.split("/"))
    except (ValueError, KeyError):
        raise InvalidInput(
            f"option {option}={text} of mask {mask!r} is not {_KINDS.get(kind, 'a number')}.",
            next=f"write e.g. {option}={format_option(default)}.",
        ) from None
    if len(values) > 1 and not isinstance(default, tuple):
        raise InvalidInput(
            f"option {option!r} of mask {mask!r} takes one value.", next=f"write {option}={values[0]}."
        )
    return values if isinstance(default, tuple) else values[0]


def _example(options: dict[str, Any]) -> str:
    return ",".join(f"{name}={format_option(value)}" for name, value in options.items())


_KINDS = {int: "an integer", bool: "True or False"}
_READ: dict[type, Callable[[str], Any]] = {
    bool: lambda text: {"true": True, "false": False}[text.strip().lower()]
}
