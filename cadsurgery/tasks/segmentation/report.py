"""What `cadsurgery eval` tells: accuracy or fidelity beside work and time for each mask and pair of output strides."""

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

    Without labels accuracies are agreement with what the dense network of the high output stride gives.

    Attributes:
        anchor: whether it is a dense network: everything high, or everything low.
        miou: mean IoU, 0..1, like all accuracies here; None if nothing counted, and of maps that are no class scores.
        iou: of each class by name; None for a class in neither predictions nor labels.
        pixel_accuracy: share of right pixels.
        boundary_iou: see `SegmentationMetrics`.
        trimap_iou: likewise.
        macs_of_high: relative to everything high.
        region_of_high: the same of the adaptive region alone, what the mask decides about.
        divergence: without labels, mean over pixels and images; see `cadsurgery.support.divergence.divergence`.
        relative_error: without labels, of maps that are no class scores; see `FidelityMetrics`.
    """

    anchor: bool
    miou: float | None
    iou: dict[str, float | None]
    pixel_accuracy: float | None
    boundary_iou: float | None
    trimap_iou: float | None
    macs_of_high: float
    region_of_high: float
    divergence: float | None = None
    relative_error: float | None = None

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
        fidelity: None with labels; without, what the outputs are: `classes` or `values`.
        images: how many counted.
        batch: images in one call.
        image: (3, H, W) of the image that was timed.
        processes: that shared the images.
        rows: in the order asked for, each pair of output strides between its dense anchors.
    """

    split: str
    fidelity: str | None
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
        against = "; compared with the dense network of the high output stride" if self.fidelity else ""
        return f"{self.data}, split {self.split}, {self.images} images, on {self.device}{timed}{against}"

    def tables(self) -> Iterator[Table]:
        """All settings, and the classes."""
        high = {row.output_stride: row.milliseconds for row in reversed(self.rows) if row.anchor}
        columns: list[Column[EvaluationRow]] = [
            Column("mask", lambda row: row.mask, False),
            Column("output stride", lambda row: row.strides, False),
            *self._accuracies(),
            Column("active", lambda row: f"{row.active_fraction:.3f}"),
            Column("MACs", lambda row: f"{row.macs:.3e}"),
            Column("of high", lambda row: f"{row.macs_of_high:.2f}"),
            Column("region", lambda row: f"{row.region_of_high:.2f}"),
            Column("ms", lambda row: number(row.milliseconds)),
            Column("of high", lambda row: ratio(row.milliseconds, high[row.output_stride])),
        ]
        yield table(self.rows, columns, style=lambda row: "dim" if row.anchor else "")
        if self.fidelity:
            return

        def iou(row: EvaluationRow) -> Callable[[str], str]:
            return lambda name: percent(row.iou[name])

        numbered = [Column(str(place), iou(row)) for place, row in enumerate(self.rows, 1)]
        classes: list[Column[str]] = [Column("class", str, False), *numbered]
        yield table(self.rows[0].iou, classes, "IoU of each class, columns as the rows above")

    def _accuracies(self) -> Iterator[Column[EvaluationRow]]:
        if self.fidelity:
            yield Column("divergence", lambda row: number(row.divergence, ".4f"))
        if self.fidelity == "values":
            yield Column("relative error", lambda row: percent(row.relative_error))
            return
        if self.fidelity:
            yield Column("agreement", lambda row: percent(row.pixel_accuracy))
        yield Column("mIoU", lambda row: percent(row.miou))
        yield Column("boundary", lambda row: percent(row.boundary_iou))
        yield Column("trimap", lambda row: percent(row.trimap_iou))
        if not self.fidelity:
            yield Column("pixel acc.", lambda row: percent(row.pixel_accuracy))

    def figure(self) -> Figure:
        """Mean IoU (without labels agreement, or relative error) against MACs: the dense networks joined by a line, the
        masks around it, each with its name."""
        figure = canvas(8, 5)
        axes = figure.subplots()
        drawn = {"classes": "pixel_accuracy", "values": "relative_error"}.get(self.fidelity or "", "miou")
        rows = [row for row in self.rows if getattr(row, drawn) is not None]
        shown = [(row, row.macs, 100 * getattr(row, drawn)) for row in rows]
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
        words = {"miou": "mean IoU", "pixel_accuracy": "agreement", "relative_error": "relative error"}
        axes.set_ylabel(f"{words[drawn]}, %")
        axes.set_title(f"{self.model}, {self.images} images", fontsize=10)
        return figure


def percent(share: float | None) -> str:
    """A share as a percentage with two digits; "-" if there is none."""
    return "-" if share is None else f"{100 * share:.2f}"
