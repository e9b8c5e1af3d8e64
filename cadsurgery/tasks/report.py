"""The one shape of reports: where figures come from, rows and columns; printed, as JSON, as lines, as a picture.

A report of a task is a frozen dataclass that derives from `Report` and says which parts it prints, and how it is drawn
if it is; the rest is the same for all.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Generic, Self, TypeVar

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter
from PIL import Image
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from cadsurgery.data.images import check_picture, write_picture
from cadsurgery.support.files import check_folder, write_whole

COLOURS = ("#d7301f", "#2b8cbe", "#238b45", "#88419d", "#cc7a00")  # of lines and points in figures

Shown = TypeVar("Shown")  # whatever a table has rows of


def plain(value: Any) -> Any:
    """A value as JSON knows it: sequences as lists, paths as text, what has `to_dict` by it."""
    if hasattr(value, "to_dict"):
        return value.to_dict()
    if isinstance(value, Mapping):
        return {key: plain(entry) for key, entry in value.items()}
    if isinstance(value, (tuple, list)):
        return [plain(entry) for entry in value]
    return str(value) if isinstance(value, Path) else value


class Plain:
    """Rows, and reports: dataclasses that are plain values too."""

    def to_dict(self) -> dict[str, Any]:
        """As plain values, for `--json`."""
        return {("random_weights" if key == "random" else key): plain(v) for key, v in vars(self).items()}


class Report(Plain):
    """The report of a task; `failed` are the items that could not be done, each an error as plain values."""

    failed: tuple[dict[str, str], ...] = ()

    def parts(self) -> Iterable[RenderableType]:
        """The printed parts, from top to bottom."""
        raise NotImplementedError

    def apart(self) -> Iterable[str]:
        """Lines for the error stream."""
        return ()

    def render(self) -> RenderableType:
        """The report for a terminal."""
        return Group(*self.parts())

    def figure(self) -> Figure:
        """The report as a picture."""
        raise NotImplementedError

    def write(self, output: Path | None = None, picture: Path | None = None) -> None:
        """Write it as JSON, draw it, or both.

        Raises:
            FileError: a path that cannot be written.
        """
        if output is not None:
            with write_whole(output) as temporary:
                temporary.write_text(json.dumps(self.to_dict(), indent=2) + "\n", encoding="utf-8")
        if picture is not None:
            write_picture(figure_picture(self.figure()), picture)


@dataclass(frozen=True)
class FilesReport(Report):
    """The results for several images, each a row of plain values, and in words; failures go to the error stream."""

    rows: tuple[dict[str, Any], ...]
    told: str
    failed: tuple[dict[str, str], ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """As plain values, for `--json`."""
        return {"images": list(self.rows), "failed": list(self.failed)}

    def parts(self) -> Iterable[RenderableType]:
        """The words."""
        return [Text(self.told)]

    def apart(self) -> Iterator[str]:
        """A line for each failure."""
        for failure in self.failed:
            image, what = failure["image"], failure["what"]
            yield f"[red]{'' if image in what else f'{image}: '}{what}[/red] {failure.get('why', '')}"


def check_outputs(output: Path | None, **pictures: Path | None) -> None:
    """Refuse files that cannot be written before work is done for them; pictures by the name of their option.

    Raises:
        FileError: no such folder, a folder in place of a file, or an ending of no format.
    """
    if output is not None:
        check_folder(output)
    for option, path in pictures.items():
        if path is not None:
            check_picture(path, f"--{option}")


@dataclass(frozen=True, kw_only=True)
class Row(Plain):
    """A side as measured: values by name, which are attributes too, and fields of the JSON.

    Attributes:
        label: a short name, for pictures.
        values: by name.
        milliseconds: of the first image, the best round; None if not measured.
        milliseconds_median: the usual round.
        curve: rows of one curve are joined in pictures; empty: of none.
    """

    label: str = field(kw_only=False)
    values: Mapping[str, Any] = field(kw_only=False)
    milliseconds: float | None = None
    milliseconds_median: float | None = None
    curve: str = ""

    def __getattr__(self, name: str) -> Any:
        values = self.__dict__.get("values", {})  # there are none yet while a row is copied
        if name in values:
            return values[name]
        raise AttributeError(f"a row of {', '.join(values)} has no {name}.")

    def get(self, name: str, default: Any = None) -> Any:
        """A value; the default if it has none of this name."""
        return self.values.get(name, default)

    def with_values(self, label: str, **values: Any) -> Self:
        """The row under another label and with other values."""
        return replace(self, label=label, values={**self.values, **values})

    def to_dict(self) -> dict[str, Any]:
        """As plain values, for `--json`."""
        taken = {name: getattr(self, name) for name in ("milliseconds", "milliseconds_median")}
        return {name: plain(value) for name, value in {**self.values, **taken}.items()}


@dataclass(frozen=True)
class Column(Generic[Shown]):
    """A column of a table.

    Attributes:
        title: above it.
        show: a function of a row; or the name of a value of it: empty where a row does not have it, "-" if it is None.
        is_number: True if it stands to the right.
        form: of a value by name: as of `format`, or a function.
    """

    title: str
    show: str | Callable[[Shown], str | Text]
    is_number: bool = True
    form: str | Callable[[Any], str] = ""

    def cell(self, row: Shown) -> str | Text:
        """The text of a row in this column."""
        if not isinstance(self.show, str):
            return self.show(row)
        value = getattr(row, self.show, "")
        if value is None or value == "":
            return "-" if value is None else ""
        return format(value, self.form) if isinstance(self.form, str) else self.form(value)


def table(
    rows: Iterable[Shown],
    columns: Iterable[Column[Shown]],
    title: str = "",
    style: Callable[[Shown], str] = lambda row: "",
) -> Table:
    """Rows under columns, numbers to the right."""
    shown, columns = Table(title=title or None, title_justify="left"), list(columns)
    for column in columns:
        shown.add_column(column.title, justify="right" if column.is_number else "left", overflow="fold")
    for row in rows:
        shown.add_row(*(column.cell(row) for column in columns), style=style(row))
    return shown


def number(value: float | None, form: str = ".0f") -> str:
    """A number in this form; "-" if there is none."""
    return "-" if value is None else format(value, form)


def percent(share: float | None) -> str:
    """A share as a percentage with two digits; "-" if there is none."""
    return "-" if share is None else f"{100 * share:.2f}"


def ratio(value: float | None, whole: float | None, form: str = ".2f") -> str:
    """One number over another; "-" if one is missing or the other is 0."""
    return "-" if value is None or not whole else format(value / whole, form)


def strides_in_words(pair: tuple[int, int]) -> str:
    """A pair of output strides."""
    return "{} to {}".format(*pair)


def accuracy_columns(pixels: str = "pixels") -> tuple[Column[Row], Column[Row]]:
    """Mean IoU, and the share of right pixels under a title."""
    return Column("mIoU", "miou", form=percent), Column(pixels, "pixel_accuracy", form=percent)


def macs_columns(of: str, whole: Callable[[Row], Row], form: str = ".2f") -> Iterator[Column[Row]]:
    """Multiply-accumulates, and their ratio to those of another row, which is called `of` so."""
    yield Column("MACs", "macs", form=".3e")
    yield Column(f"of {of}", lambda row: ratio(row.macs, whole(row).macs, form))


def time_columns(
    of: str, whole: Callable[[Row], Row], form: str = ".0f", has_median: bool = False
) -> Iterator[Column[Row]]:
    """Milliseconds, the median if it is asked for, and the ratio to those of another row, which is called `of` so."""
    yield Column("ms", "milliseconds", form=form)
    if has_median:
        yield Column("median", "milliseconds_median", form=form)
    yield Column(f"of {of}", lambda row: ratio(row.milliseconds, whole(row).milliseconds))


def heading(model: str, weights: str, random: bool) -> Text:
    """A network and its weights; random ones stand out."""
    return Text(f"{model}, {weights}", style="bold red" if random else "bold")


@dataclass(frozen=True, kw_only=True)
class RunReport(Report):
    """A report of something that was run: the device, the software and the date, see `describe_run`.

    Attributes:
        device: in words, with the instruction sets and the number of threads.
        processor: model, family and caches; empty in reports written before these were stated.
        instruction_sets: of the compiled code and of torch, and the variables that cap them; empty likewise.
        versions: of this package and its libraries.
        commit: of this package; empty outside a checkout.
        date: when it was done.
    """

    device: str
    processor: dict[str, str] = field(default_factory=dict)
    instruction_sets: dict[str, str] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    commit: str = ""
    date: str = ""

    def run_with(self) -> Text:
        """The device and the version of torch, in a line."""
        torch = f", torch {self.versions['torch']}" if "torch" in self.versions else ""
        return Text(f"on {self.device}{torch}", style="dim")


@dataclass(frozen=True, kw_only=True)
class MeasuredReport(RunReport):
    """A report on a network and data: where the figures come from.

    Attributes:
        model: source of the network.
        weights: which it has, in words.
        random: True if they are random.
        data: spec of the data, or its folder.
        rounds: of timing, 0 if not timed.
        normalisation: the range that masks take the network's input for, and where that is known from.
        failed: items that could not be used, each an error as plain values.
    """

    model: str
    weights: str
    random: bool
    data: str
    rounds: int
    normalisation: str = ""
    failed: tuple[dict[str, str], ...] = ()

    def subject(self) -> str:
        """The data and how it was measured, in a line."""
        raise NotImplementedError

    def tables(self) -> Iterable[Table]:
        """The rows."""
        raise NotImplementedError

    def parts(self) -> Iterator[RenderableType]:
        """Network and data, the rows, and what a reader must know."""
        yield heading(self.model, self.weights, self.random)
        yield Text(self.subject(), style="dim")
        if self.normalisation:
            yield Text(f"masks see {self.normalisation}", style="dim")
        yield from self.tables()
        if self.random:
            told = "random weights: unless they were trained since, these accuracies mean nothing."
            yield Text(told, style="yellow")
        for failure in self.failed:
            yield Text(f"{failure['what']} {failure.get('why', '')}", style="red")


def canvas(width: float, height: float) -> Figure:
    """An empty figure of so many inches that needs no screen."""
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def against_macs(axes: Axes, across: str, up: str) -> None:
    """Name the axes and what was drawn, the first in multiply-accumulates."""
    axes.set_xlabel(across)
    axes.set_ylabel(up)
    axes.xaxis.set_major_formatter(EngFormatter())
    axes.spines[["top", "right"]].set_visible(False)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False, fontsize=8)


def panels(
    count: int, columns: int, width: float, height: float, above: float = 0.0
) -> tuple[Figure, list[Axes]]:
    """A figure with so many panels in columns, each of so many inches, and room above."""
    rows = -(-count // columns)
    figure = canvas(width * columns, height * rows + above)
    axes = figure.subplots(rows, columns, squeeze=False).flatten()
    for axis in axes[count:]:
        axis.set_visible(False)
    return figure, list(axes[:count])


def figure_picture(figure: Figure, dpi: int = 90) -> Image.Image:
    """A figure as an image."""
    buffer = io.BytesIO()
    figure.draw_without_rendering()  # the layout knows how high titles are only once the pictures have their place
    figure.savefig(buffer, format="png", dpi=dpi)
    buffer.seek(0)
    return Image.open(buffer)
