"""Plain values read from a file, as the types they should have, and options in a text."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Mapping
from dataclasses import is_dataclass
from functools import cache
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from cadsurgery.support.errors import InvalidInput, UnknownName

_LARGEST = 2**63  # of an integer; what is printed or divided must be a number that a float can hold
_hints = cache(get_type_hints)


def read_as(hint: Any, value: Any, what: str) -> Any:
    """A value of JSON as an annotated type: lists as tuples or named tuples, objects as dataclasses or dictionaries.

    Fields may be absent: constructors know which they need. A bool is no integer, NaN no number.

    Args:
        hint: the type.
        value: as JSON gives it.
        what: it is called in the refusal.

    Raises:
        ValueError: it is of another type, or has a field that is not known.
        TypeError: a field without default is absent.
    """
    kind, parts = get_origin(hint), get_args(hint)
    if kind in (Union, UnionType):
        for part in parts:
            with contextlib.suppress(ValueError):
                return read_as(part, value, what)
    elif isinstance(hint, type) and is_dataclass(hint):
        return hint(**check_fields(value, _hints(hint), what))
    elif names := getattr(hint, "_fields", ()):
        if type(value) is list and len(value) <= len(names):
            return hint(**check_fields(dict(zip(names, value, strict=False)), _hints(hint), what))
    elif kind is tuple and type(value) is list:
        kinds = parts[:1] * len(value) if parts[-1] is ... else parts
        if len(kinds) == len(value):
            return tuple(read_as(part, entry, what) for part, entry in zip(kinds, value, strict=True))
    elif kind is dict and type(value) is dict:
        return {read_as(parts[0], key, what): read_as(parts[1], entry, what) for key, entry in value.items()}
    elif kind not in (tuple, dict) and _fits(value, hint):
        return value
    raise ValueError(f"{what} is {value!r:.60}")


def check_fields(values: object, hints: Mapping[str, Any], what: str) -> dict[str, Any]:
    """The values of an object by name, each as `read_as` gives it.

    Raises:
        ValueError: no object, a field that is not known, or one of another type.
    """
    if type(values) is not dict:
        raise ValueError(f"{what} is no object")
    for name in values:
        if name not in hints:
            raise ValueError(f"{what} has an unknown field {name!r:.60}")
    return {name: read_as(hints[name], value, f"{name!r} of {what}") for name, value in values.items()}


def split_options(text: str, known: Mapping[str, Any], of: str, *, next: str = "") -> dict[str, str]:
    """Parse a text `option=value,...` into values by option.

    Args:
        text: as above, or nothing.
        known: the options there are.
        of: what has them, for messages.
        next: the next step where one is not known.

    Raises:
        UnknownName: no such option.
        InvalidInput: one has no value, or is given twice.
    """
    values = dict[str, str]()
    for part in filter(None, map(str.strip, text.split(","))):
        option, _, value = map(str.strip, part.partition("="))
        if option not in known:
            raise UnknownName(f"option of {of}", option, known, next=next)
        if not value:
            raise InvalidInput(f"option {option!r} of {of} has no value.", next=f"write {option}=VALUE.")
        if option in values:
            raise InvalidInput(
                f"option {option!r} of {of} is given twice.",
                why=f"it is {values[option]} first and {value} then.",
                next=f"leave one of them out, e.g. {option}={value}.",
            )
        values[option] = value
    return values


def _fits(value: Any, hint: Any) -> bool:
    """True if a value that holds no others is of a type."""
    if get_origin(hint) is Literal:
        return isinstance(value, str) and value in get_args(hint)
    if hint is float and type(value) is float:
        return not math.isnan(value)
    if hint in (int, float):
        return type(value) is int and abs(value) < _LARGEST
    return hint is Any or isinstance(value, NoneType if hint is None else hint)
