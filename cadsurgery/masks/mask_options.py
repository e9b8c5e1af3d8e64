"""Options of masks: their text form and the checks of their values."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, NamedTuple, TypeVar

from cadsurgery.support.errors import InvalidInput

N = TypeVar("N", int, float)


def options_of(provider: type) -> dict[str, Any]:
    """Return the options of a provider class with their defaults: the parameters of its constructor."""
    parameters = inspect.signature(provider).parameters.values()
    return {p.name: p.default for p in parameters if p.default is not p.empty}


def format_option(value: Any) -> str:
    """Format an option's value as text."""
    return "/".join(str(part) for part in value) if isinstance(value, tuple) else str(value)


def format_options(options: dict[str, Any]) -> str:
    """Format options as text."""
    return ",".join(f"{name}={format_option(value)}" for name, value in options.items())


def read_option(mask: str, option: str, text: str, default: Any) -> Any:
    """Parse the text of an option: a number, True or False, a string, or several values separated by slashes.

    Raises:
        InvalidInput: the text does not have the type of the default, or has several values where one is allowed.
    """
    kind = type(default[0]) if isinstance(default, tuple) else type(default)
    try:
        values = tuple(
            _YES_OR_NO[part.strip().lower()] if kind is bool else kind(part) for part in text.split("/")
        )
    except (ValueError, KeyError):
        described = {int: "an integer", bool: "True or False"}.get(kind, "a number")
        raise InvalidInput(
            f"option {option}={text} of mask {mask!r} is not {described}.",
            next=f"write e.g. {option}={format_option(default)}.",
        ) from None
    if isinstance(default, tuple):
        return values
    if len(values) > 1:
        raise InvalidInput(
            f"option {option!r} of mask {mask!r} takes one value.", next=f"write {option}={values[0]}."
        )
    return values[0]


_YES_OR_NO = {"true": True, "false": False}


def several(value: N | Sequence[N]) -> tuple[N, ...]:
    """Return one number or several as a tuple."""
    return tuple(value) if isinstance(value, (tuple, list)) else (value,)  # type: ignore[return-value]


class Allowed(NamedTuple):
    """A rule for an option's values: a test, the message for values that fail it, and an example."""

    holds: Callable[[Any], bool]
    refusal: str
    example: str


def between(least: float, most: float, example: str) -> Allowed:
    """Allow values from `least` to `most`; NaN is refused."""
    return Allowed(lambda value: least <= value <= most, f"is not in {least}..{most}.", example)


NUMBER = Allowed(lambda value: not math.isnan(value), "is NaN or missing.", "0.35, or several: 0.8/0.2")
ODD = Allowed(lambda side: side >= 1 and side % 2 == 1, "is not odd and positive.", "11")
SHARE = between(0, 1, "0.3")
WIDTH = between(0, 1000, "1, or 0 for none")  # a standard deviation; the window's side is six times as long


def check_options(mask: str, **options: tuple[Any, Allowed]) -> None:
    """Check the values of a mask's options.

    Raises:
        InvalidInput: for the first value that is not allowed.
    """
    for option, (value, allowed) in options.items():
        values = several(value)
        if not values or not all(_holds(allowed, one) for one in values):
            raise InvalidInput(
                f"{option}={format_option(value)} {allowed.refusal}",
                where=f"mask {mask}",
                next=f"write e.g. {option}={allowed.example}.",
            )


def _holds(allowed: Allowed, value: Any) -> bool:
    try:
        return allowed.holds(value)
    except TypeError:  # no number at all
        return False


def check_falling(mask: str, thresholds: Sequence[float]) -> None:
    """Check that thresholds on one map fall, so that each decides something."""
    if any(later >= earlier for earlier, later in pairwise(thresholds)):
        raise InvalidInput(
            f"the thresholds {format_option(tuple(thresholds))} do not fall.",
            where=f"mask {mask}",
            why="the i-th gives level i, so what reaches a later one must include what reaches an earlier one.",
            next=f"write {format_option(tuple(sorted(set(thresholds), reverse=True)))}.",
        )


def check_count(mask: str, counted: str, count: int, max_level: int) -> None:
    """Check that there are no more thresholds, widths, ... than levels above the lowest."""
    most = max(max_level, 1)
    if count > most:
        raise InvalidInput(
            f"{count} {counted} for {max_level} levels below the high one.",
            where=f"mask {mask}",
            next=f"give at most {most} {counted}, or a larger output stride range.",
        )
