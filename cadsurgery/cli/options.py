"""Options that commands share, those that come from a dataclass, and how their texts are read."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from dataclasses import Field, dataclass, fields
from itertools import zip_longest
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import typer

from cadsurgery.tasks.options import Conversion

Network = Annotated[
    str, typer.Argument(help="a converted file, a torchvision or timm name, or module:function")
]
Model = Annotated[
    str, typer.Option("--model", "-m", help="torchvision or timm name, module:function, or a converted file")
]
Weights = Annotated[str, typer.Option(help="auto, none, a name of weights, or a file")]
Mask = Annotated[
    str,
    typer.Option(
        help='a name of cadsurgery list --masks, with options: "edges:threshold=0.15,dilation=11", '
        'wrappers: "edges | budget:fraction=0.3", several: "edges + gradient"'
    ),
]
Strides = Annotated[
    list[str],
    typer.Option("--output-stride", metavar="HIGH,LOW", help="repeatable: every mask at every pair"),
]
ImageOption = Annotated[
    Path | None, typer.Option("--image", help="image file; default: a generated street scene")
]
Size = Annotated[
    str, typer.Option(metavar="HxW", help="size of the image; default 512x1024, or the file's own")
]
Rounds = Annotated[int, typer.Option(min=0, help="timing rounds on the first image; 0 to skip")]
Report = Annotated[Path | None, typer.Option("--output", "-o", help="JSON file to write")]
Device = Annotated[str, typer.Option(help="cpu or cuda")]
Trust = Annotated[
    bool,
    typer.Option(
        "--trust",
        help="run code that the converted file names: a network or mask of its own, module:function",
    ),
]
Json = Annotated[bool, typer.Option("--json", help="print JSON")]


@dataclass(frozen=True)
class Of:
    """Marks a parameter of a command that stands for options: fields of a dataclass, whose values it gets by name.

    Attributes:
        kind: the dataclass; its fields are made by `cadsurgery.tasks.options.option`.
        names: of the fields, in the order of the options; default: all.
        given: only what the user has given reaches the command, since the defaults may come from elsewhere.
        defaults: as texts, other ones than those of the fields, in the order of the names.
    """

    kind: type
    names: tuple[str, ...] = ()
    given: bool = False
    defaults: tuple[str, ...] = ()

    def fields(self) -> Iterator[Field[Any]]:
        """The fields."""
        known = {field.name: field for field in fields(self.kind)}
        return map(known.__getitem__, self.names or known)

    def parameters(self) -> Iterator[inspect.Parameter]:
        """Those that typer makes options from."""
        for field, changed in zip_longest(self.fields(), self.defaults):
            told, default = field.metadata, changed or field.default
            name = told.get("name", field.name)
            kind: Any = str if "read" in told else type(default)
            words = (f"--{name}",) if kind is bool else ()  # no --no-...
            more = {key: told[key] for key in ("min", "metavar") if key in told}
            if self.given:
                kind, default = kind | None, None
            elif default is None:
                default = ""
            yield inspect.Parameter(
                name,
                inspect.Parameter.KEYWORD_ONLY,
                default=default,
                annotation=Annotated[kind, typer.Option(*words, help=told["help"], **more)],
            )

    def values(self, told: dict[str, Any]) -> dict[str, Any]:
        """The values of the fields, taken out of those of all options."""
        values = {}
        for field in self.fields():
            name = field.metadata.get("name", field.name)
            value, read = told.pop(name), field.metadata.get("read")
            if value is not None or not self.given:
                values[field.name] = _READERS[read](value, name) if read else value
        return values


Converted = Annotated[dict[str, Any], Of(Conversion)]


def command(function: Callable[..., None]) -> Callable[..., None]:
    """A function of keyword arguments as typer takes it: each parameter marked with `Of` replaced by its options."""
    hints = get_type_hints(function, include_extras=True)
    marks: dict[str, Of] = {}
    parameters: list[inspect.Parameter] = []
    for name, parameter in inspect.signature(function).parameters.items():
        mark = next((mark for mark in getattr(hints[name], "__metadata__", ()) if isinstance(mark, Of)), None)
        if mark is None:
            parameters.append(parameter.replace(annotation=hints[name]))
        else:
            marks[name] = mark
            parameters += mark.parameters()

    def run(**told: Any) -> None:
        taken = {name: mark.values(told) for name, mark in marks.items()}
        function(**told, **taken)

    run.__name__, run.__doc__ = function.__name__, function.__doc__
    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return run


def read_pair(text: str, option: str = "--output-stride") -> tuple[int, int] | None:
    """HIGH,LOW."""
    return _numbers(text, ",", "HIGH,LOW such as 8,32", option) if text else None


def read_size(text: str) -> tuple[int, int] | None:
    """HxW."""
    return _numbers(text.lower(), "x", "HxW such as 512x1024", "--size") if text else None


def _numbers(text: str, separator: str, form: str, option: str) -> tuple[int, int]:
    try:
        first, second = (int(part) for part in text.split(separator))
    except ValueError:
        raise typer.BadParameter(f"{text!r} is not {form}", param_hint=option) from None
    return first, second


def read_fractions(text: str) -> list[float]:
    """Numbers between commas."""
    try:
        return [float(part) for part in text.split(",") if part.strip()]
    except ValueError:
        raise typer.BadParameter(
            f"{text!r} is not a list of numbers such as 1,0.5,0", param_hint="--fractions"
        ) from None


def read_names(region: str, option: str = "--region") -> str | list[str]:
    """A region: auto, backbone, or names between commas."""
    return region if region in ("auto", "backbone") else [name.strip() for name in region.split(",")]


_READERS: dict[str, Callable[[str, str], Any]] = {"pair": read_pair, "names": read_names}
