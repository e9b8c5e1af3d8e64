"""The common form of reports: provenance, rows and columns; printed, as JSON, as lines, as a picture.

The report of a task is a frozen dataclass that derives from `Report`. It defines the parts that are printed and, if
there is a picture, how it is drawn; everything else is shared.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Annotation
from matplotlib.ticker import EngFormatter
from matplotlib.transforms import Bbox
from PIL import Image
from rich.console import Console, Group, RenderableType
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from cadsurgery.data.images import check_picture, write_picture
from cadsurgery.support.files import check_folder, write_whole
from cadsurgery.support.rows import Plain

# Distinct to readers who are colour-blind (Okabe and Ito), on light and on dark pages.
COLOURS = ("#d55e00", "#2b8cbe", "#009e73", "#cc79a7", "#e69f00")  # of lines and points in figures


class Report(Plain):
    """The report of a task.

    Attributes:
        failed: the items that failed, each an error as plain values.
        interrupted: True if Ctrl-C ended the work early, and this is the report of what was done.
    """

    failed: tuple[dict[str, str], ...] = ()
    interrupted: bool = False

    def parts(self) -> Iterable[RenderableType]:
        """Return the printed parts, from top to bottom."""
        raise NotImplementedError

    def apart(self) -> Iterable[str]:
        """Return lines for the error stream."""
        return ()

    def render(self) -> RenderableType:
        """Return the report for a terminal."""
        return Group(*self.parts())

    def __str__(self) -> str:
        """The report as a terminal of 120 columns shows it."""
        console = Console(file=io.StringIO(), width=120)
        with console.capture() as captured:
            console.print(self.render())
        return captured.get()

    def figure(self) -> Figure:
        """Draw the report."""
        raise NotImplementedError

    def write(self, output: Path | None = None, picture: Path | None = None) -> None:
        """Write the report as JSON, draw it, or both.

        Raises:
            FileError: a path cannot be written.
        """
        if output is not None:
            with write_whole(output) as temporary:
                temporary.write_text(json.dumps(self.to_dict(), indent=2) + "\n", encoding="utf-8")
        if picture is not None:
            write_picture(figure_picture(self.figure()), picture)


@dataclass(frozen=True)
class FilesReport(Report):
    """The results for several images, each as plain values, and as text; failures go to the error stream.

    `skipped` is the number of images whose results were there; None if none may be skipped. `counts` are the numbers of
    images that were done and that failed, if there may be more than rows and failures.
    """

    rows: tuple[dict[str, Any], ...]
    text: str
    failed: tuple[dict[str, str], ...] = ()
    interrupted: bool = False
    skipped: int | None = None
    counts: tuple[int, int] | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, for `--json`."""
        skipped = {} if self.skipped is None else {"skipped": self.skipped}
        counts = dict(zip(("count_done", "count_failed"), self.counts or (), strict=False))
        return {"images": list(self.rows), "failed": list(self.failed), **skipped, **counts}

    def parts(self) -> Iterable[RenderableType]:
        """Return the text."""
        return [Text(self.text)]

    def apart(self) -> Iterator[str]:
        """Yield a line for each failure."""
        for failure in self.failed:
            image, what = failure["image"], failure["what"]
            reason = " ".join(failure[part] for part in ("why", "next") if part in failure)
            yield f"[red]{escape(what if image in what else f'{image}: {what}')}[/red] {escape(reason)}"


def check_outputs(output: Path | None, **pictures: Path | None) -> None:
    """Refuse output files that cannot be written, before any work is done; pictures by the name of their option.

    Raises:
        FileError: the folder does not exist, the path is a folder, or the ending belongs to no format.
    """
    if output is not None:
        check_folder(output)
    for option, path in pictures.items():
        if path is not None:
            check_picture(path, f"--{option}")


@dataclass(frozen=True, kw_only=True)
class RunReport(Report):
    """A report of a run of a network: device, software and date, see `describe_run`.

    Attributes:
        model: source of the network.
        weights: description of its weights.
        random: True if the weights are random.
        device: description with the instruction sets and the number of threads.
        processor: model, family and caches; empty in older reports.
        instruction_sets: instruction sets of the compiled code and of torch, and the variables that cap them; empty
            in older reports.
        versions: versions of this package and its libraries.
        commit: commit of this package; empty outside a checkout.
        date: date of the run.
    """

    model: str
    weights: str
    random: bool
    device: str
    processor: dict[str, str] = field(default_factory=dict)
    instruction_sets: dict[str, str] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    commit: str = ""
    date: str = ""

    def heading(self) -> Text:
        """Describe the network and its weights; random weights stand out."""
        return Text(f"{self.model}, {self.weights}", style="bold red" if self.random else "bold")

    def failures(self) -> Iterator[Text]:
        """Yield a line for each item that failed."""
        for failure in self.failed:
            yield Text(f"{failure['what']} {failure.get('why', '')}", style="red")


@dataclass(frozen=True, kw_only=True)
class MeasuredReport(RunReport):
    """A report on a network and data, with the provenance of its figures.

    Attributes:
        data: spec of the data, or its folder.
        rounds: timing rounds, 0 if not timed.
        normalisation: normalisation of the network's input assumed by masks, and how it is known.
        failed: items that could not be used, each an error as plain values.
    """

    data: str
    rounds: int
    normalisation: str = ""
    failed: tuple[dict[str, str], ...] = ()

    def subject(self) -> str:
        """Describe the data and the measurement, in one line."""
        raise NotImplementedError

    def tables(self) -> Iterable[Table]:
        """Return the tables of rows."""
        raise NotImplementedError

    def remarks(self) -> Iterator[str]:
        """Yield what a reader must know to judge the figures."""
        if self.random:
            yield "random weights: unless they were trained since, these accuracies mean nothing."

    def parts(self) -> Iterator[RenderableType]:
        """Yield network and data, the tables, and the remarks."""
        yield self.heading()
        yield Text(self.subject(), style="dim")
        if self.normalisation:
            yield Text(f"masks see {self.normalisation}", style="dim")
        yield from self.tables()
        yield from (Text(remark, style="yellow") for remark in self.remarks())
        yield from self.failures()

    def timed(self, size: Iterable[int]) -> str:
        """Describe the timing of an image of this size; empty without it."""
        pixels = "x".join(map(str, size))
        return f"; ms: {pixels}, best of {self.rounds} interleaved rounds" if self.rounds else ""


def canvas(width: float, height: float) -> Figure:
    """Create an empty figure of this size in inches; it needs no screen."""
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def against_macs(axes: Axes, across: str, up: str) -> None:
    """Label the axes, whose horizontal one shows multiply-accumulates, and add a legend."""
    axes.set_xlabel(across)
    axes.set_ylabel(up)
    axes.xaxis.set_major_formatter(EngFormatter())
    axes.spines[["top", "right"]].set_visible(False)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False, fontsize=8)


def panels(
    count: int, columns: int, width: float, height: float, above: float = 0.0
) -> tuple[Figure, list[Axes]]:
    """Create a figure with `count` panels in columns, each of this size in inches, and space above."""
    rows = -(-count // columns)
    figure = canvas(width * columns, height * rows + above)
    axes = figure.subplots(rows, columns, squeeze=False).flatten()
    for axis in axes[count:]:
        axis.set_visible(False)
    return figure, list(axes[:count])


def spread_labels(figure: Figure) -> None:
    """Move labels of points up until none lies on another."""
    figure.draw_without_rendering()
    step = 3.0  # points
    moved = step * figure.dpi / 72  # pixels
    placed: list[Bbox] = []
    for label in (text for axes in figure.axes for text in axes.texts if isinstance(text, Annotation)):
        box = label.get_window_extent()
        while any(box.overlaps(other) for other in placed):
            across, up = label.xyann
            label.xyann = (across, up + step)
            box = Bbox.from_extents(box.x0, box.y0 + moved, box.x1, box.y1 + moved)
        placed.append(box)


def figure_picture(figure: Figure) -> Image.Image:
    """Render a figure as an image."""
    buffer = io.BytesIO()
    figure.draw_without_rendering()  # the layout measures titles only once the pictures are placed
    figure.savefig(buffer, format="png", dpi=90)
    buffer.seek(0)
    return Image.open(buffer)
