"""Report of a recommendation: the settings as a table and a picture, the choice with its reasons, and its use."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from cadsurgery.support.rows import Plain, percent
from cadsurgery.support.tables import Column, table
from cadsurgery.tasks.judging import FOUND, Estimate
from cadsurgery.tasks.measuring import ERROR, FIDELITY, MIOU
from cadsurgery.tasks.recommend.settings import Setting
from cadsurgery.tasks.report import COLOURS, RunReport, canvas

WORDS = {MIOU: "mIoU", FIDELITY: "balanced fidelity", ERROR: "relative error", FOUND: "IoU by class"}


@dataclass(frozen=True)
class Requirement(Plain):
    """Condition on the choice; one of the two is set.

    Attributes:
        keep: the least share of the quality of the network as given; the fastest such setting is chosen.
        at_most: milliseconds; the best setting that takes no more is chosen.
    """

    keep: float | None = None
    at_most: float | None = None


@dataclass(frozen=True)
class SettingRow(Plain):
    """One setting as measured.

    Attributes:
        setting: the setting.
        quality: quality by the measure of the report, with its change relative to the network as given.
        milliseconds: time of a picture, the median over pictures.
        macs: multiply-accumulates of the whole network on the first picture.
        time_error: standard error of its time relative to that of the network as given; None for one picture.
        pixel_accuracy: share of pixels with the class of the network as given; None for values.
        balanced_fidelity: mean IoU against the classes of the network as given; None for values.
        loss: share of the mIoU of the network as given that fidelity lets expect to be lost, and its error; None for
            values.
        is_complete: False if it was dropped: another setting is faster and better beyond doubt.
        is_on_front: True if no other setting is faster and at least as good.
    """

    setting: Setting
    quality: Estimate
    milliseconds: float
    macs: int
    pixel_accuracy: float | None
    balanced_fidelity: float | None
    loss: tuple[float, float] | None
    time_error: float | None = None
    is_complete: bool = True
    is_on_front: bool = False

    @property
    def name(self) -> str:
        """The setting in words."""
        return self.setting.name


@dataclass(frozen=True, kw_only=True)
class Recommendation(RunReport):
    """The recommended setting, the settings it was compared with, and the reasons.

    Attributes:
        network: the network as the user typed it; empty for a module.
        options: `weights` and options of `adaptify` that the user gave, by name.
        data: spec of the pictures, or their folder.
        images: number of pictures that were measured.
        of_images: number of pictures that there are.
        image: shape (3, H, W) of a picture.
        resized: True if some pictures had another size.
        measure: name of the quality, see `cadsurgery.tasks.measuring`, or `found`, the `balanced_fidelity` of a map of
            probabilities.
        request: condition on the choice.
        runtime, precision: runtime and precision of all settings.
        rows: the settings, the network as given first.
        chosen: row of the recommended setting; the network as given if the times do not decide.
        reasons: sentences, the recommendation first.
        images_needed: number of pictures that would decide where these leave doubt; None: they do not.
        end: why measuring ended early; empty: it did not.
        refused: settings that could not be run, and why.
        folder: of the run.
        is_decided: False if the times do not decide; nothing is recommended then.
    """

    network: str
    options: Mapping[str, Any]
    data: str
    images: int
    of_images: int
    image: tuple[int, ...]
    resized: bool
    measure: str
    request: Requirement
    runtime: str
    precision: str
    rows: tuple[SettingRow, ...]
    chosen: SettingRow
    reasons: tuple[str, ...]
    images_needed: int | None
    end: str
    refused: Mapping[str, str]
    folder: Path
    failed: tuple[dict[str, str], ...] = ()
    is_decided: bool = True

    @property
    def is_conversion(self) -> bool:
        """True if a conversion is recommended."""
        return self.chosen.setting.kind == "adaptive"

    def to_dict(self) -> dict[str, Any]:
        """As plain values, for `--json`."""
        more = {"is_conversion": self.is_conversion, "command": self.command, "python": self.python}
        return {**super().to_dict(), "chosen": self.chosen.name, **more}

    @property
    def command(self) -> str:
        """The command that makes what is recommended; empty where none is needed."""
        return self.chosen.setting.command(self.network or "MODEL", self.options)

    @property
    def python(self) -> list[str]:
        """Lines of Python that use it."""
        return self.chosen.setting.lines(self.precision, self.options, self.runtime)

    def parts(self) -> Iterator[RenderableType]:
        """The table, the choice with its reasons, and how to use it."""
        yield self.heading()
        yield Text(self.subject(), style="dim")
        yield self.table()
        for reason in self.reasons:
            yield Text(reason, style="bold" if reason is self.reasons[0] else "")
        if self.random:
            yield Text("random weights: times hold, quality means nothing.", style="yellow")
        if self.command:
            yield Text(f"\n{self.command}\n", style="green")
        else:
            yield Text("")
        yield Text("\n".join(self.python))
        for why in dict.fromkeys(self.refused.values()):
            names = "; ".join(name for name, reason in self.refused.items() if reason == why)
            yield Text(f"not tried: {names}: {why}", style="yellow")
        yield from self.failures()
        yield Text(f"\n{self.folder}: report.json, curve.png", style="dim")

    def subject(self) -> str:
        """Pictures, device and what was measured, in a line."""
        size = "x".join(map(str, self.image[1:]))
        resized = ", resized" if self.resized else ""
        early = f" ({self.end}; {self.of_images} there are)" if self.end else ""
        engine = f" in {self.runtime}" if self.runtime != "torch" else ""
        against = "labels" if self.measure == MIOU else "the network as given"
        return (
            f"{self.data}, {self.images} pictures of {size}{resized}{early}, {self.precision}{engine} on "
            f"{self.device}; quality against {against}; ± one standard error over pictures; ms: median"
        )

    def table(self) -> Table:
        """The settings, fastest last, as they lie on the front or do not."""
        given = self.rows[0]
        columns: list[Column[SettingRow]] = [
            Column("setting", lambda row: row.name, False),
            Column(WORDS[self.measure], lambda row: percent(row.quality.value)),
            Column(
                "change",
                lambda row: "" if row.setting.kind == "given" else change_in_words(row, self.measure),
            ),
        ]
        if self.measure == FIDELITY:
            columns.append(Column("expected mIoU", _expected))
        columns += [
            Column("ms", lambda row: f"{row.milliseconds:.0f}"),
            Column("of given", lambda row: f"{row.milliseconds / given.milliseconds:.2f}{_time_error(row)}"),
            Column("MACs of given", lambda row: f"{row.macs / max(1, given.macs):.2f}"),
            Column("", self._mark, False),
        ]
        rows = sorted(self.rows, key=lambda row: -row.milliseconds)
        return table(rows, columns, style=lambda row: "" if row.is_on_front else "dim")

    def _mark(self, row: SettingRow) -> str:
        if self.is_decided and row.name == self.chosen.name:
            return "recommended"
        return "on the front" if row.is_on_front else "beaten" if row.is_complete else "beaten, dropped"

    def figure(self) -> Figure:
        """Quality against milliseconds: the front joined, each setting with its error."""
        figure = canvas(12, 5.5)
        axis = figure.subplots()
        kinds = {
            "given": ("as given", "#222222", "s"),
            "compiled": ("as given, by torch.compile", COLOURS[2], "s"),
            "size": ("pictures of another size", COLOURS[4], "o"),
            "dense": ("dense, other output stride", COLOURS[1], "o"),
            "adaptive": ("converted", COLOURS[0], "o"),
        }

        def place(row: SettingRow) -> tuple[float, float]:
            return row.milliseconds, 100 * row.quality.value

        front = sorted((row for row in self.rows if row.is_on_front), key=lambda row: row.milliseconds)
        axis.plot(*zip(*map(place, front), strict=True), color="#999999", linewidth=1, zorder=0)
        for kind, (label, colour, marker) in kinds.items():
            if some := [row for row in self.rows if row.setting.kind == kind]:
                x, y = zip(*map(place, some), strict=True)
                errors = [0 if math.isnan(row.quality.error) else 100 * row.quality.error for row in some]
                axis.errorbar(x, y, errors, fmt=marker, color=colour, elinewidth=1, markersize=5, label=label)
        lines = []
        for number, row in enumerate(front if self.chosen in front else [*front, self.chosen], 1):
            corner, unit = (-4, 7), "offset points"
            axis.annotate(str(number), place(row), corner, textcoords=unit, fontsize=8, ha="right")
            lines.append(
                f"{number}  {row.name}{' (recommended)' if self._mark(row) == 'recommended' else ''}"
            )
        axis.text(1.01, 0.99, "\n".join(lines), transform=axis.transAxes, fontsize=8, va="top")
        axis.set_xlabel("milliseconds for a picture")
        axis.set_ylabel(f"{WORDS[self.measure]}, %")
        axis.set_xlim(left=0, right=1.25 * max(row.milliseconds for row in self.rows))
        axis.spines[["top", "right"]].set_visible(False)
        axis.legend(frameon=False, fontsize=8, loc="lower left", bbox_to_anchor=(1.0, 0.0))
        axis.set_title(f"{self.model}, {self.images} pictures, {self.precision}", fontsize=10)
        return figure


def change_in_words(row: SettingRow, measure: str, error: str = " ±{:.2f}") -> str:
    """Return how a quality changes, in points, and its standard error."""
    change = -row.quality.change if measure == ERROR else row.quality.change
    more = "" if math.isnan(row.quality.error) else error.format(100 * row.quality.error)
    return f"{100 * change:+z.2f}{more}"


def _time_error(row: SettingRow) -> str:
    return "" if row.time_error is None or row.setting.kind == "given" else f" ±{row.time_error:.2f}"


def _expected(row: SettingRow) -> str:
    if row.loss is None or row.setting.kind == "given":
        return ""
    return f"{-100 * row.loss[0]:+z.1f} ±{100 * row.loss[1]:.1f}"
