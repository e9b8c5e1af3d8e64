"""Plain values read from a file, held against the types they should have, and options in a text."""

from __future__ import annotations

import math
from collections.abc import Mapping
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin

from cadsurgery.support.errors import InvalidInput, UnknownName

_LARGEST = 2**63  # of an integer; what is printed or divided must be a number that a float can hold


def as_tuples(value: Any) -> Any:
    """Lists as tuples, however deep: JSON does not know tuples."""
    return tuple(as_tuples(part) for part in value) if type(value) is list else value


def fits(value: Any, hint: Any) -> bool:
    """Whether a plain value, its lists as tuples, is of an annotated type; a bool is no integer, NaN no number."""
    kind, parts = get_origin(hint), get_args(hint)
    if hint is Any:
        return True
    if kind is Literal:
        return isinstance(value, str) and value in parts
    if kind in (Union, UnionType):
        return any(fits(value, part) for part in parts)
    if kind is tuple and parts[-1] is ...:
        return type(value) is tuple and all(fits(entry, parts[0]) for entry in value)
    if kind is tuple:
        same = type(value) is tuple and len(value) == len(parts)
        return same and all(fits(entry, part) for entry, part in zip(value, parts, strict=True))
    if kind is dict:
        return type(value) is dict and all(
            fits(key, parts[0]) and fits(entry, parts[1]) for key, entry in value.items()
        )
    if hint is None or hint is type(None):
        return value is None
    if hint is float:
        return fits(value, int) or (type(value) is float and not math.isnan(value))
    if hint is int:
        return type(value) is int and abs(value) < _LARGEST
    return isinstance(value, hint)


def check_fields(values: object, hints: Mapping[str, Any], what: str) -> dict[str, Any]:
    """The values of an object by name, lists as tuples. Fields may be absent: constructors know which they need.

    Raises:
        ValueError: no object, a field that is not known, or one of another type.
    """
    if type(values) is not dict:
        raise ValueError(f"{what} is no object")
    for name in values:
        if name not in hints:
            raise ValueError(f"{what} has an unknown field {name!r:.60}")
    tuples = {name: as_tuples(value) for name, value in values.items()}
    for name, value in tuples.items():
        if not fits(value, hints[name]):
            raise ValueError(f"{name!r} of {what} is {value!r:.60}")
    return tuples


def split_options(text: str, known: Mapping[str, Any], of: str, *, next: str = "") -> dict[str, str]:
    """What a text `option=value,...` says, by option.

    Args:
        text: as above, or nothing.
        known: the options there are.
        of: what has them, for messages.
        next: the next step where one is not known.

    Raises:
        UnknownName: no such option.
        InvalidInput: one has no value.
    """
    values = {}
    for part in filter(None, map(str.strip, text.split(","))):
        option, _, value = map(str.strip, part.partition("="))
        if option not in known:
            raise UnknownName(f"option of {of}", option, known, next=next)
        if not value:
            raise InvalidInput(f"option {option!r} of {of} has no value.", next=f"write {option}=VALUE.")
        values[option] = value
    return values
