"""Check plain values from a file against type annotations, parse `option=value` texts, and read docstrings."""

from __future__ import annotations

import ast
import contextlib
import inspect
import math
import textwrap
from collections.abc import Mapping
from dataclasses import is_dataclass
from functools import cache
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from cadsurgery.support.errors import InvalidInput, UnknownName

_LARGEST = 2**63  # limit of an integer's magnitude, so that it can be printed and divided as a float
_hints = cache(get_type_hints)


def read_as(hint: Any, value: Any, what: str) -> Any:
    """Convert a JSON value to an annotated type: lists to (named) tuples, objects to dataclasses or dictionaries.

    Fields may be missing if the constructor has defaults for them. A bool is not an integer, and NaN is not a number.

    Args:
        hint: the type annotation.
        value: the value as parsed from JSON.
        what: name of the value in error messages.

    Raises:
        ValueError: the value has another type, or an unknown field.
        TypeError: a field without default is missing.
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
    """Convert each field of a JSON object with `read_as`.

    Raises:
        ValueError: not an object, an unknown field, or a field of another type.
    """
    if type(values) is not dict:
        raise ValueError(f"{what} is no object")
    for name in values:
        if name not in hints:
            raise ValueError(f"{what} has an unknown field {name!r:.60}")
    return {name: read_as(hints[name], value, f"{name!r} of {what}") for name, value in values.items()}


def split_options(text: str, known: Mapping[str, Any], of: str, *, next: str = "") -> dict[str, str]:
    """Parse a text `option=value,...` into a dictionary.

    Args:
        text: the options as above; may be empty.
        known: the accepted options.
        of: owner of the options, for messages.
        next: advice for the user if an option is unknown.

    Raises:
        UnknownName: no such option.
        InvalidInput: an option has no value, or is given twice.
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
    """True if a scalar value has the annotated type."""
    if get_origin(hint) is Literal:
        return isinstance(value, str) and value in get_args(hint)
    if hint is float and type(value) is float:
        return not math.isnan(value)
    if hint in (int, float):
        return type(value) is int and abs(value) < _LARGEST
    return hint is Any or isinstance(value, NoneType if hint is None else hint)


def docstring_of(value: Any) -> str:
    """Return the docstring of a class or function, without its indentation; also where Python has dropped it
    (`python -OO`, `PYTHONOPTIMIZE=2`), as long as the source is there."""
    text = vars(value).get("__doc__") if isinstance(value, type) else value.__doc__
    if text is not None:
        return inspect.cleandoc(text)
    try:
        source = ast.parse(textwrap.dedent(inspect.getsource(value)))
    except (OSError, TypeError, SyntaxError):  # it has no source file, or is no class or function
        return ""
    definition: Any = source.body[0]
    return (ast.get_docstring(definition) or "") if hasattr(definition, "name") else ""
