"""Options that commands share, options from dataclasses, and commands that call tasks."""

from __future__ import annotations

import functools
import importlib
import inspect
from collections.abc import Callable, Iterator
from dataclasses import MISSING, Field, dataclass, fields, is_dataclass
from itertools import zip_longest
from typing import Annotated, Any, cast, get_type_hints

import typer

from cadsurgery.cli import screen
from cadsurgery.support.errors import InvalidInput
from cadsurgery.support.fields import READERS, TYPES, annotation_of, name_of, read_settings, reader_of
from cadsurgery.support.plain import docstring_of
from cadsurgery.tasks.task_options import PUBLISHED
from cadsurgery.tasks.task_options import Conversion as Conversion  # many commands take some of its options

Network = Annotated[
    str,
    typer.Argument(
        metavar="model",
        help="a converted file, hf:owner/name, a torchvision or timm name, module:function, or an ONNX file",
    ),
]
Json = Annotated[bool, typer.Option("--json", help="print JSON")]
_SET = "set_"  # the parameter of --set
_PUBLISHED = "published"


@dataclass(frozen=True)
class OptionsFrom:
    """Marks a parameter of a command that stands for options: fields of a dataclass.

    The parameter receives their values by name or, if it is annotated with the dataclass, an instance. A parameter
    annotated with the dataclass alone needs no mark.

    Attributes:
        kind: the dataclass; its fields are declared with `option` of tasks, or with `part` for several options.
        names: names of the fields that have options, in the order of these; default: all, if none is `settable`.
        settable: names of fields that `--set NAME=VALUE` sets; True for all that have no option.
        given: pass only options that the user has given, because defaults may come from elsewhere.
        defaults: other defaults than the fields', as texts, in the order of the names.
        apart: pass each value as an argument of its own instead of one parameter.
        published: True for `--published`, which stands for several fields, see `PUBLISHED`.
    """

    kind: type
    names: tuple[str, ...] = ()
    settable: tuple[str, ...] | bool = False
    given: bool = False
    defaults: tuple[str, ...] = ()
    apart: bool = False
    published: bool = False

    def fields(self) -> list[Field[Any]]:
        """Return the fields that have options, in the order of these; also those that stand for several."""
        by_name = {field.name: field for field in fields(self.kind)}
        if self.names or self.settable:
            return [by_name[name] for name in self.names]
        return [field for field in by_name.values() if not field.metadata.get("settable")]

    def _settable(self) -> list[Field[Any]]:
        """Return the fields of this class that have no option, but are set by `--set`."""
        if self.settable is True:
            return [field for field in fields(self.kind) if field.name not in self.names]
        named = self.settable or ()
        return [field for field in fields(self.kind) if field.name in named or field.metadata.get("settable")]

    def all_settable(self) -> list[Field[Any]]:
        """Return the fields that `--set` sets, also of the parts."""
        parts = [OptionsFrom(**part) for field in self.fields() if (part := field.metadata.get("part"))]
        return [*self._settable(), *(field for part in parts for field in part.all_settable())]

    def parameters(self, name: str = "") -> Iterator[inspect.Parameter]:
        """Yield the parameters from which typer creates options."""
        for field, changed in zip_longest(self.fields(), self.defaults):
            if part := field.metadata.get("part"):
                yield from OptionsFrom(**part).parameters()
            else:
                yield self._parameter(field, changed)
        if self.published:
            help = (
                f"as the published code: {', '.join(f'{name} {value}' for name, value in PUBLISHED.items())}"
            )
            yield _keyword(_PUBLISHED, False, bool, typer.Option(f"--{_PUBLISHED}", help=help))

    def _parameter(self, field: Field[Any], default: str | None) -> inspect.Parameter:
        details, kind = field.metadata, _type_of(field)
        words = [f"--{name_of(field).replace('_', '-')}"]
        if kind is bool and field.default is True:
            words = []  # typer adds --no-...
        elif "short" in details:
            words.append(f"-{details['short']}")
        more = {key: details[key] for key in ("min", "max", "metavar") if key in details}
        if "read" in details:
            more["parser"] = _parser(READERS[details["read"]])
        default = None if self.given else default or _default_of(field)
        option = typer.Option(*words, help=details["help"], **more)
        return _keyword(name_of(field), default, kind | None, option)

    def take(self, arguments: dict[str, Any], name: str, hint: Any) -> None:
        """Replace the values of the fields among all arguments by that of the parameter, annotated with `hint`."""
        values = self._pop(arguments)
        is_whole = self.kind in (hint, getattr(hint, "__origin__", None))
        value = self.kind(**values) if is_whole else values
        arguments |= values if self.apart else {name: value}

    def _pop(self, arguments: dict[str, Any]) -> dict[str, Any]:
        """Remove the values of the fields from all arguments, and return them by the names of the fields."""
        is_published = self.published and arguments.pop(_PUBLISHED)
        values: dict[str, Any] = dict(PUBLISHED) if is_published else {}
        for field in self._settable():
            if name_of(field) in arguments[_SET]:
                values[field.name] = arguments[_SET][name_of(field)]
            elif not self.given and field.default is not MISSING:
                values.setdefault(field.name, field.default)
        for field in self.fields():
            details = field.metadata
            if part := details.get("part"):
                options = OptionsFrom(**part)
                own, make = options._pop(arguments), cast(Callable[..., Any], field.default_factory)
                values |= own if options.apart else {field.name: make(**own)}
                continue
            value = arguments.pop(name_of(field))
            if "none" in details and value == details["none"]:
                value = None
            if value is not None or not self.given:
                values[field.name] = value
        return values


def _keyword(name: str, default: Any, kind: Any, marked: Any) -> inspect.Parameter:
    """Return the parameter of an argument or option of typer."""
    annotation = Annotated[kind, marked]
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


def _parser(read: Callable[[str], Any]) -> Callable[[str], Any]:
    """Let a refused value be wrong usage."""

    def parse(text: str) -> Any:
        try:
            return read(text)
        except InvalidInput as error:
            raise typer.BadParameter(error.what) from None

    return parse


def _type_of(field: Field[Any]) -> Any:
    """Return the type of an option: the annotated one, or text for those with readers and with choices."""
    kind = str if "read" in field.metadata else TYPES.get(annotation_of(field), str)
    return list[kind] if annotation_of(field) == "Sequence" else kind  # type: ignore[valid-type]


def _default_of(field: Field[Any]) -> Any:
    """Return the default of an option, as it is typed if it is several numbers."""
    value = field.default
    if value is MISSING:
        return inspect.Parameter.empty
    if value is None:
        return field.metadata.get("none")
    if annotation_of(field) == "Sequence":
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
            yield _keyword(key, kind(), kind, marked)

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
    kinds = [mark for mark in marks.values() if isinstance(mark, OptionsFrom)]
    settable = {name_of(field): field for mark in kinds for field in mark.all_settable()}
    readers = {name: reader_of(field) for name, field in settable.items()}
    if settable:
        words: dict[str, Any] = {
            "metavar": "NAME=VALUE",
            "help": f"repeatable: {', '.join(sorted(settable))}",
        }
        parameters.insert(-1, _keyword(_SET, [], list[str], typer.Option("--set", **words)))

    def run(**arguments: Any) -> None:
        texts = arguments.pop(_SET, ())
        arguments[_SET] = read_settings(readers, texts)
        for name, mark in marks.items():
            mark.take(arguments, name, hints[name])
        del arguments[_SET]
        function(**arguments)

    run.settable = {name: field.metadata["help"] for name, field in settable.items()}  # type: ignore[attr-defined]
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
