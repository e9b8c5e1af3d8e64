"""Options that commands share, options from dataclasses, commands that call tasks, and parsers of option values."""

from __future__ import annotations

import functools
import importlib
import inspect
import re
from collections.abc import Callable, Iterator
from dataclasses import MISSING, Field, dataclass, fields, is_dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Annotated, Any, cast, get_type_hints

import typer

from cadsurgery.cli import screen
from cadsurgery.support.plain import docstring_of
from cadsurgery.tasks.task_options import Conversion as Conversion  # many commands take some of its options


def read_pair(text: str) -> tuple[int, int] | None:
    """Parse HIGH,LOW."""
    return _numbers(text, ",", "HIGH,LOW such as 8,32")


def read_size(text: str) -> tuple[int, int] | None:
    """Read HxW, or one number for a square."""
    if text.isdecimal():
        return int(text), int(text)
    return _numbers(text.lower(), "x", "HxW such as 512x1024, or one number for a square")


def _numbers(text: str, separator: str, form: str) -> tuple[int, int] | None:
    if not text:
        return None
    try:
        first, second = map(int, text.split(separator))
    except ValueError:
        raise typer.BadParameter(f"{text!r} is not {form}") from None
    return first, second


def read_fractions(text: str) -> list[float]:
    """Parse numbers separated by commas."""
    try:
        return [float(part) for part in text.split(",") if part.strip()]
    except ValueError:
        raise typer.BadParameter(f"{text!r} is not a list of numbers such as 1,0.5,0") from None


def read_threshold(text: str | float) -> float | tuple[float, ...]:
    """Parse one number, or several separated by commas."""
    numbers = read_fractions(str(text))
    return tuple(numbers) if len(numbers) != 1 else numbers[0]


def read_names(region: str) -> str | list[str]:
    """Parse a region: auto, heads, backbone, or names separated by commas."""
    return region if region in ("auto", "heads", "backbone") else [name.strip() for name in region.split(",")]


def read_bands(text: str) -> tuple[int, ...]:
    """Parse numbers of bands, separated by commas."""
    try:
        numbers = tuple(int(part) for part in text.split(",") if text)
    except ValueError:
        numbers = (0,)
    if any(number < 1 for number in numbers):
        raise typer.BadParameter(f"{text!r} is not a list of bands, counted from 1, such as 3,2,1")
    return numbers


def read_mean_and_std(text: str) -> tuple[list[float], list[float]] | str | None:
    """Parse MEAN/STD, each one number or several separated by commas; or the name of a normalisation."""
    if not text or text.isalpha():
        return text or None
    mean, _, std = text.partition("/")
    return read_fractions(mean), read_fractions(std)


_READERS: dict[str, Callable[[str], Any]] = {
    **{"pair": read_pair, "size": read_size, "names": read_names, "whole": int},
    "normalisation": read_mean_and_std,
    "bands": read_bands,
    "threshold": read_threshold,
    "fractions": read_fractions,
}


Network = Annotated[
    str,
    typer.Argument(
        metavar="model",
        help="a converted file, hf:owner/name, a torchvision or timm name, module:function, or an ONNX file",
    ),
]
Json = Annotated[bool, typer.Option("--json", help="print JSON")]
_TYPES: dict[str, type] = {kind.__name__: kind for kind in (bool, int, float, str, Path)}


@dataclass(frozen=True)
class OptionsFrom:
    """Marks a parameter of a command that stands for options: fields of a dataclass.

    The parameter receives their values by name or, if it is annotated with the dataclass, an instance. A parameter
    annotated with the dataclass alone needs no mark.

    Attributes:
        kind: the dataclass; its fields are declared with `option` of tasks, or with `part` for several options.
        names: names of the fields, in the order of the options; default: all fields.
        given: pass only options that the user has given, because defaults may come from elsewhere.
        defaults: other defaults than the fields', as texts, in the order of the names.
        apart: pass each value as an argument of its own instead of one parameter.
        about: beginning of the help of every option.
    """

    kind: type
    names: tuple[str, ...] = ()
    given: bool = False
    defaults: tuple[str, ...] = ()
    apart: bool = False
    about: str = ""

    def fields(self) -> list[Field[Any]]:
        """Return the fields, in the order of their options."""
        by_name = {field.name: field for field in fields(self.kind)}
        return [by_name[name] for name in self.names or by_name]

    def parameters(self, name: str = "") -> Iterator[inspect.Parameter]:
        """Yield the parameters from which typer creates options."""
        for field, changed in zip_longest(self.fields(), self.defaults):
            if part := field.metadata.get("part"):
                yield from OptionsFrom(**part).parameters()
            else:
                yield self._parameter(field, changed)

    def _parameter(self, field: Field[Any], default: str | None) -> inspect.Parameter:
        details, kind = field.metadata, _type_of(field)
        name = details.get("name", field.name)
        words = [f"--{name.replace('_', '-')}"]
        if kind is bool and field.default is True:
            words = []  # typer adds --no-...
        elif "short" in details:
            words.append(f"-{details['short']}")
        more = {key: details[key] for key in ("min", "max", "metavar") if key in details}
        if "read" in details:
            more["parser"] = _READERS[details["read"]]
        return inspect.Parameter(
            name,
            inspect.Parameter.KEYWORD_ONLY,
            default=None if self.given else default or _default_of(field),
            annotation=Annotated[
                kind | None, typer.Option(*words, help=self.about + details["help"], **more)
            ],
        )

    def take(self, arguments: dict[str, Any], name: str, hint: Any) -> None:
        """Replace the values of the fields among all arguments by that of the parameter, annotated with `hint`."""
        values = self._pop(arguments)
        is_whole = self.kind in (hint, getattr(hint, "__origin__", None))
        value = self.kind(**values) if is_whole else values
        arguments |= values if self.apart else {name: value}

    def _pop(self, arguments: dict[str, Any]) -> dict[str, Any]:
        """Remove the values of the options from all arguments, and return them by the names of the fields."""
        values: dict[str, Any] = {}
        for field in self.fields():
            details = field.metadata
            if part := details.get("part"):
                options = OptionsFrom(**part)
                own, make = options._pop(arguments), cast(Callable[..., Any], field.default_factory)
                values |= own if options.apart else {field.name: make(**own)}
                continue
            value = arguments.pop(details.get("name", field.name))
            if "none" in details and value == details["none"]:
                value = None
            if value is not None or not self.given:
                values[field.name] = value
        return values


def _annotation(field: Field[Any]) -> str:
    """Return the first name of the annotation, e.g. `int` of `int | None`."""
    text = field.type if isinstance(field.type, str) else inspect.formatannotation(field.type)
    return re.split(r"[\[ |]", text, maxsplit=1)[0].rpartition(".")[2]


def _type_of(field: Field[Any]) -> Any:
    """Return the type of an option: the annotated one, or text for those with readers and with choices."""
    kind = str if "read" in field.metadata else _TYPES.get(_annotation(field), str)
    return list[kind] if _annotation(field) == "Sequence" else kind  # type: ignore[valid-type]


def _default_of(field: Field[Any]) -> Any:
    """Return the default of an option, as it is typed if it is several numbers."""
    value = field.default
    if value is MISSING:
        return inspect.Parameter.empty
    if value is None:
        return field.metadata.get("none")
    if _annotation(field) == "Sequence":
        return list(value)
    if isinstance(value, tuple):
        return ("x" if field.metadata["read"] == "size" else ",").join(f"{number:g}" for number in value)
    return value


@dataclass(frozen=True)
class ArgumentOrOption:
    """Marks a parameter of a command that is an argument or, which is the same, an option: a network, or an image.

    Attributes:
        help: of the argument.
        is_needed: False if the command does without it.
        is_repeated: True if the parameter is a list.
        metavar: name of the argument; the option is --METAVAR.
        short: short form of the option, if there is one.
    """

    help: str = "torchvision or timm name, module:function, an ONNX file, a converted file, or hf:owner/name"
    is_needed: bool = True
    is_repeated: bool = False
    metavar: str = "model"
    short: tuple[str, ...] = ("-m",)

    def parameters(self, name: str) -> Iterator[inspect.Parameter]:
        """Yield the two parameters from which typer makes the argument and the option."""
        argument = typer.Argument(metavar=self.metavar, help=self.help, show_default=False)
        words = (f"--{self.metavar}", *self.short)
        option = typer.Option(*words, help="the same as the argument", show_default=False)
        kind: Any = list[str] if self.is_repeated else str
        for key, marked in ((name, argument), (f"{name}_by_option", option)):
            yield inspect.Parameter(
                key,
                inspect.Parameter.KEYWORD_ONLY,
                default=[] if self.is_repeated else "",
                annotation=Annotated[kind, marked],
            )

    def take(self, arguments: dict[str, Any], name: str, hint: Any) -> None:
        """Replace both values among all arguments by the one that was given."""
        argument, option = arguments.pop(name), arguments.pop(f"{name}_by_option")
        if argument and option and not self.is_repeated:
            raise typer.BadParameter(
                f"{argument} and --{self.metavar} {option} are two {self.metavar}s; give one"
            )
        if self.is_needed and not (argument or option):
            raise typer.BadParameter(f"missing argument '{self.metavar}'")
        arguments[name] = argument + option if self.is_repeated else argument or option


Model = Annotated[str, ArgumentOrOption()]


def command(function: Callable[..., None]) -> Callable[..., None]:
    """Convert a function of keyword arguments for typer: dataclasses and `OptionsFrom` parameters become options."""
    hints = get_type_hints(function, include_extras=True)
    marks: dict[str, OptionsFrom | ArgumentOrOption] = {}
    parameters: list[inspect.Parameter] = []
    for name, parameter in inspect.signature(function).parameters.items():
        annotations = getattr(hints[name], "__metadata__", ())
        mark = next((mark for mark in annotations if isinstance(mark, (OptionsFrom, ArgumentOrOption))), None)
        if is_dataclass(hints[name]):
            mark = OptionsFrom(hints[name])
        if mark is None:
            parameters.append(parameter.replace(annotation=hints[name]))
        else:
            marks[name] = mark
            parameters += mark.parameters(name)

    def run(**arguments: Any) -> None:
        for name, mark in marks.items():
            mark.take(arguments, name, hints[name])
        function(**arguments)

    run.__name__, run.__doc__ = function.__name__, docstring_of(function)
    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return run


def task(path: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Create a command that calls a task; the decorated function has no body and the task's parameter names.

    Args:
        path: the task, `module:function`, imported when the command runs. It is called with the options and the
            progress callback `step`, and returns the report to print.

    Progress is shown under the function's name, without the ending `_command`.
    """
    module, _, name = path.partition(":")

    def declare(function: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(function)
        def run(*, as_json: bool, **arguments: Any) -> None:
            with screen.steps(function.__name__.removesuffix("_command").replace("_", " ")) as step:
                report = getattr(importlib.import_module(module), name)(**arguments, step=step)
            screen.show_report(report, as_json)

        return command(run)

    return declare
