"""What `cadsurgery eval` tells: accuracy beside work and time for each mask and pair of output strides."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter
from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from cadsurgery.tasks.report import (
    COLOURS,
    Column,
    MeasuredReport,
    MeasuredRow,
    canvas,
    number,
    ratio,
    table,
)


@dataclass(frozen=True, kw_only=True)
class EvaluationRow(MeasuredRow):
    """One mask at one pair of output strides.

    Attributes:
        anchor: whether it is a dense network: everything high, or everything low.
        miou: mean IoU, 0..1, like all accuracies here; None if nothing counted.
        iou: of each class by name; None for a class in neither predictions nor labels.
        pixel_accuracy: share of right pixels.
        boundary_iou: see `SegmentationMetrics`.
        trimap_iou: likewise.
        macs_of_high: relative to everything high.
        region_of_high: the same of the adaptive region alone, what the mask decides about.
    """

    anchor: bool
    miou: float | None
    iou: dict[str, float | None]
    pixel_accuracy: float | None
    boundary_iou: float | None
    trimap_iou: float | None
    macs_of_high: float
    region_of_high: float

    @property
    def label(self) -> str:
        """A short name: for an anchor the output stride it has everywhere."""
        high, low = self.output_stride
        return f"dense OS {high if self.active_fraction == 1 else low}" if self.anchor else super().label


@dataclass(frozen=True, kw_only=True)
class EvaluationReport(MeasuredReport):
    """Accuracy against work: what was evaluated, on what, and a row for each setting.

    Attributes:
        split: part of the data.
        images: how many counted.
        batch: images in one call.
        image: (3, H, W) of the image that was timed.
        processes: that shared the images.
        rows: in the order asked for, each pair of output strides between its dense anchors.
    """

    split: str
    images: int
    batch: int
    image: tuple[int, ...]
    processes: int
    rows: tuple[EvaluationRow, ...]

    def parts(self) -> Iterator[RenderableType]:
        """As of every such report, and how many images could be used if not all."""
        yield from super().parts()
        if self.failed:
            yield Text(f"{self.images} images done, {len(self.failed)} failed", style="red")

    def subject(self) -> str:
        """Data, device, and what was timed."""
        size = "x".join(map(str, self.image[1:]))
        timed = f"; ms: {size}, best of {self.rounds} interleaved rounds" if self.rounds else ""
        return f"{self.data}, split {self.split}, {self.images} images, on {self.device}{timed}"

    def tables(self) -> Iterator[Table]:
        """All settings, and the classes."""
        high = {row.output_stride: row.milliseconds for row in reversed(self.rows) if row.anchor}
        columns: list[Column[EvaluationRow]] = [
            Column("mask", lambda row: row.mask, False),
            Column("output stride", lambda row: row.strides, False),
            Column("mIoU", lambda row: percent(row.miou)),
            Column("boundary", lambda row: percent(row.boundary_iou)),
            Column("trimap", lambda row: percent(row.trimap_iou)),
            Column("pixel acc.", lambda row: percent(row.pixel_accuracy)),
            Column("active", lambda row: f"{row.active_fraction:.3f}"),
            Column("MACs", lambda row: f"{row.macs:.3e}"),
            Column("of high", lambda row: f"{row.macs_of_high:.2f}"),
            Column("region", lambda row: f"{row.region_of_high:.2f}"),
            Column("ms", lambda row: number(row.milliseconds)),
            Column("of high", lambda row: ratio(row.milliseconds, high[row.output_stride])),
        ]
        yield table(self.rows, columns, style=lambda row: "dim" if row.anchor else "")

        def iou(row: EvaluationRow) -> Callable[[str], str]:
            return lambda name: percent(row.iou[name])

        numbered = [Column(str(place), iou(row)) for place, row in enumerate(self.rows, 1)]
        classes: list[Column[str]] = [Column("class", str, False), *numbered]
        yield table(self.rows[0].iou, classes, "IoU of each class, columns as the rows above")

    def figure(self) -> Figure:
        """Mean IoU against MACs: the dense networks joined by a line, the masks around it, each with its name."""
        figure = canvas(8, 5)
        axes = figure.subplots()
        rows = [row for row in self.rows if row.miou is not None]
        shown = [(row, row.macs, 100 * (row.miou or 0)) for row in rows]
        # The dense high network of two pairs is one network: it is drawn and named once.
        dense = {(row.label, round(y, 3)): (x, y) for row, x, y in shown if row.anchor}
        line = sorted(dense.values())
        axes.plot(*zip(*line, strict=True), "s-", color="#222222", linewidth=1, markersize=6)
        for (label, _), (x, y) in dense.items():
            axes.annotate(label, (x, y), (6, -12), textcoords="offset points", fontsize=8, color="#222222")
        widest = max((x for _, x, _ in shown), default=1)
        pairs = list(dict.fromkeys(row.output_stride for row in rows))
        for row, x, y in shown:
            if not row.anchor:
                colour = COLOURS[pairs.index(row.output_stride) % len(COLOURS)]
                place, side = ((-6, 5), "right") if x > widest / 2 else ((6, 5), "left")
                axes.plot(x, y, "o", color=colour, markersize=6)
                axes.annotate(
                    row.label, (x, y), place, textcoords="offset points", ha=side, fontsize=8, color=colour
                )
        axes.spines[["top", "right"]].set_visible(False)
        axes.margins(x=0.15, y=0.15)
        axes.set_xlim(left=0)
        axes.xaxis.set_major_formatter(EngFormatter())
        axes.set_xlabel("MACs of one image")
        axes.set_ylabel("mean IoU, %")
        axes.set_title(f"{self.model}, {self.images} images", fontsize=10)
        return figure


def percent(share: float | None) -> str:
    """A share as a percentage with two digits; "-" if there is none."""
    return "-" if share is None else f"{100 * share:.2f}"
