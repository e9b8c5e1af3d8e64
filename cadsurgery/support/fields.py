"""Fields of dataclasses that users set: how they are declared, and how their values are read from text.

Commands make options of them, and `--set NAME=VALUE` sets those without an option. Nothing here imports torch, so that
the command line starts quickly.
"""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import Field, field, fields
from pathlib import Path
from typing import Any, TypeVar

from cadsurgery.support.errors import InvalidInput, check_name
from cadsurgery.support.plain import docstring_of

D = TypeVar("D", bound=Any)
Reader = Callable[[str], Any]  # of the value that a user wrote
TYPES: dict[str, type] = {kind.__name__: kind for kind in (bool, int, float, str, Path)}
_SWITCHES = {"true": True, "false": False}


def option(default: Any, help: str, **more: Any) -> Any:
    """Declare a dataclass field that a command has an option for.

    Args:
        default: default of the field and of the option; `MISSING` if it must be given. A field annotated as a
            `Sequence` is an option that can be repeated.
        help: help of the option; `{default}` stands for the default.
        more: further properties of the option: `min`, `max`, `metavar`, a `name` other than the field's, a `short`
            letter, `read`, the name of the parser of its value, `none`, the value that stands for None, and
            `settable=True` for a field that has no option of its own, but is set by `--set NAME=VALUE`.
    """
    return field(default=default, metadata={"help": help.replace("{default}", str(default)), **more})


def part(kind: type, *names: str, is_whole: bool = False, **more: Any) -> Any:
    """Declare a dataclass field for several options of a command: fields of another dataclass.

    Args:
        kind: the other dataclass.
        names: names of its fields, in the order of the options.
        is_whole: the value is an instance of the other dataclass, not a dictionary.
        more: see `cadsurgery.cli.options.OptionsFrom`.
    """
    make: Callable[[], Any] = kind if is_whole else dict
    options = {"kind": kind, "names": names, **more}
    return field(default_factory=make, metadata={"help": f"see `{kind.__name__}`", "part": options})


def documented(kind: type[D]) -> type[D]:
    """Add the help of each field to the docstring of a dataclass, so that it is said once."""
    lines = (f"    {entry.name}: {entry.metadata['help']}" for entry in fields(kind))
    kind.__doc__ = "\n".join((f"{docstring_of(kind)}\n\nAttributes:", *lines))
    return kind


def name_of(field: Field[Any]) -> str:
    """Return the name by which a field is set: its own, or that of its option."""
    return str(field.metadata.get("name", field.name))


# -- values as texts -----------------------------------------------------------------------------------


def _refusal(text: str, form: str) -> InvalidInput:
    return InvalidInput(f"{text!r} is not {form}.", next="write it in this form.")


def read_pair(text: str) -> tuple[int, int] | None:
    """Parse HIGH,LOW."""
    return _two(text, ",", "HIGH,LOW such as 8,32")


def read_size(text: str) -> tuple[int, int] | None:
    """Read HxW, or one number for a square."""
    if text.isdecimal():
        return int(text), int(text)
    return _two(text.lower(), "x", "HxW such as 512x1024, or one number for a square")


def _two(text: str, separator: str, form: str) -> tuple[int, int] | None:
    if not text:
        return None
    try:
        first, second = map(int, text.split(separator))
    except ValueError:
        raise _refusal(text, form) from None
    return first, second


def read_numbers(text: str) -> list[float]:
    """Parse numbers separated by commas."""
    return _read_list(float, text, "a list of numbers such as 1,0.5,0")


def _read_list(kind: Callable[[str], Any], text: str, form: str) -> list[Any]:
    try:
        return [kind(part) for part in text.split(",") if part.strip()]
    except ValueError:
        raise _refusal(text, form) from None


def read_threshold(text: str | float) -> float | tuple[float, ...]:
    """Parse one number, or several separated by commas."""
    numbers = read_numbers(str(text))
    return tuple(numbers) if len(numbers) != 1 else numbers[0]


def read_names(text: str) -> str | list[str]:
    """Parse auto, heads, backbone, or names separated by commas."""
    return text if text in ("auto", "heads", "backbone") else [name.strip() for name in text.split(",")]


def read_bands(text: str) -> tuple[int, ...]:
    """Parse numbers of bands, separated by commas."""
    form = "a list of bands, counted from 1, such as 3,2,1"
    numbers = _read_list(int, text, form)
    if any(number < 1 for number in numbers):
        raise _refusal(text, form)
    return tuple(numbers)


def read_whole(text: str) -> list[int]:
    """Parse whole numbers separated by commas."""
    return _read_list(int, text, "a list of whole numbers such as 11,12,13")


def read_mean_and_std(text: str) -> tuple[list[float], list[float]] | str | None:
    """Parse MEAN/STD, each one number or several separated by commas; or the name of a normalisation."""
    if not text or text.isalpha():
        return text or None
    mean, _, std = text.partition("/")
    return read_numbers(mean), read_numbers(std)


def read_switch(text: str) -> bool:
    """Read true or false."""
    if text.lower() not in _SWITCHES:
        raise _refusal(text, "true or false")
    return _SWITCHES[text.lower()]


READERS: dict[str, Reader] = {
    **{"pair": read_pair, "size": read_size, "names": read_names, "whole": int},
    **{"normalisation": read_mean_and_std, "bands": read_bands, "threshold": read_threshold},
    "numbers": read_numbers,
}


def annotation_of(field: Field[Any]) -> str:
    """Return the first name of the annotation, e.g. `int` of `int | None`."""
    text = field.type if isinstance(field.type, str) else inspect.formatannotation(field.type)
    return re.split(r"[\[ |]", text, maxsplit=1)[0].rpartition(".")[2]


def read_entries(text: str) -> Any:
    """Parse the value of an entry NAME.ENTRY of a setting that is a dictionary: JSON, or else a text."""
    try:
        return json.loads(text)
    except ValueError:
        return text


def reader_of(field: Field[Any]) -> Reader:
    """Return the function that converts the text of a setting to the type of its field, and checks its range."""
    details, kind = field.metadata, annotation_of(field)
    if kind == "dict":
        return read_entries
    plain: dict[str, Reader] = {**TYPES, "bool": read_switch}
    read = READERS[details["read"]] if "read" in details else plain.get(kind, str)

    def convert(text: str) -> Any:
        value = read(text)
        if isinstance(value, (int, float)) and not details.get("min", value) <= value:
            raise _refusal(text, f"{details['min']} or more")
        return None if "none" in details and value == details["none"] else value

    return convert


def read_settings(readers: Mapping[str, Reader], texts: Iterable[str]) -> dict[str, Any]:
    """Read settings written as NAME=VALUE, or NAME.ENTRY=VALUE for one that is a dictionary.

    Args:
        readers: for each name the function that reads its value.
        texts: what was written.

    Raises:
        UnknownName: there is no such setting.
        InvalidInput: a text is not NAME=VALUE, or the value has another type, or is out of range.
    """
    values = dict[str, Any]()
    for text in texts:
        written, equals, value = (part.strip() for part in text.partition("="))
        name, _, entry = written.replace("-", "_").partition(".")
        if not name or not equals:
            example = name if name in readers else next(iter(readers), "NAME")
            raise InvalidInput(f"setting {text!r} is not NAME=VALUE.", next=f"write e.g. {example}=VALUE.")
        check_name("setting", name, readers)
        if (readers[name] is read_entries) != bool(entry):
            form = f"{name}.NAME" if readers[name] is read_entries else name
            raise InvalidInput(f"{written} is no setting.", next=f"write {form}={value}.")
        try:
            read = readers[name](value)
        except InvalidInput as error:
            raise InvalidInput(f"setting {text}: {error.what}", next=error.next) from None
        except ValueError:
            raise InvalidInput(f"setting {text} is no number of its kind.", next="give a number.") from None
        if entry:
            values.setdefault(name, {})[entry] = read
        else:
            values[name] = read
    return values
