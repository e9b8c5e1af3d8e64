"""What `cadsurgery eval` tells: accuracy beside work and time for each mask and pair of output strides."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text


@dataclass(frozen=True)
class EvaluationRow:
    """One mask at one pair of output strides.

    Attributes:
        mask: its spec.
        output_stride: (high, low).
        anchor: whether it is a dense network: everything high, or everything low.
        miou: mean IoU, 0..1, like all accuracies here; None if nothing counted.
        iou: of each class by name; None for a class in neither predictions nor labels.
        pixel_accuracy: share of right pixels.
        boundary_iou: see `SegmentationMetrics`.
        trimap_iou: likewise.
        active_fraction: share of the fine maps of all images kept high.
        macs: of one image, mean over images; the whole network.
        macs_of_high: relative to everything high.
        region_of_high: the same of the adaptive region alone, what the mask decides about.
        milliseconds: of the first image, the best round; None if not measured.
        milliseconds_median: the usual round.
    """

    mask: str
    output_stride: tuple[int, int]
    anchor: bool
    miou: float | None
    iou: dict[str, float | None]
    pixel_accuracy: float | None
    boundary_iou: float | None
    trimap_iou: float | None
    active_fraction: float
    macs: float
    macs_of_high: float
    region_of_high: float
    milliseconds: float | None = None
    milliseconds_median: float | None = None

    @property
    def label(self) -> str:
        """A short name: for an anchor the output stride it has everywhere."""
        high, low = self.output_stride
        if self.anchor:
            return f"dense OS {high if self.active_fraction == 1 else low}"
        return f"{self.mask} {high}->{low}"

    def to_dict(self) -> dict[str, Any]:
        """As plain values, for `--json`."""
        return {**vars(self), "output_stride": list(self.output_stride)}


@dataclass(frozen=True)
class EvaluationReport:
    """Accuracy against work: what was evaluated, on what, and a row for each setting.

    Attributes:
        model: source of the network.
        weights: which it has, in words.
        random: whether they are random.
        data: spec of the data.
        split: part of it.
        images: how many counted.
        batch: images in one call.
        image: (3, H, W) of the image that was timed.
        rounds: of timing, 0 if not timed.
        processes: that shared the images.
        device: in words, with threads.
        versions: of this package and its libraries.
        commit: of this package; empty outside a checkout.
        date: when it was done.
        rows: in the order asked for, each pair of output strides between its dense anchors.
        failed: images that could not be used, each an error as plain values.
    """

    model: str
    weights: str
    random: bool
    data: str
    split: str
    images: int
    batch: int
    image: tuple[int, ...]
    rounds: int
    processes: int
    device: str
    versions: dict[str, str]
    commit: str
    date: str
    rows: tuple[EvaluationRow, ...]
    failed: tuple[dict[str, str], ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """As plain values, for `--json`."""
        values = {
            ("random_weights" if name == "random" else name): value for name, value in vars(self).items()
        }
        return {
            **values,
            "image": list(self.image),
            "rows": [row.to_dict() for row in self.rows],
            "failed": list(self.failed),
        }

    def render(self) -> RenderableType:
        """The report for a terminal."""
        title = f"{self.model}, {self.weights}"
        size = "x".join(map(str, self.image[1:]))
        timed = f"; ms: {size}, best of {self.rounds} interleaved rounds" if self.rounds else ""
        parts: list[RenderableType] = [
            Text(title, style="bold red" if self.random else "bold"),
            Text(
                f"{self.data}, split {self.split}, {self.images} images, on {self.device}{timed}", style="dim"
            ),
            self._overview(),
            self._classes(),
        ]
        if self.random:
            parts.append(
                Text(
                    "random weights: unless they were trained since, these accuracies mean nothing.",
                    style="yellow",
                )
            )
        parts += [Text(f"{failure['what']} {failure.get('why', '')}", style="red") for failure in self.failed]
        if self.failed:
            parts.append(Text(f"{self.images} images done, {len(self.failed)} failed", style="red"))
        return Group(*parts)

    def _overview(self) -> Table:
        table = Table(title_justify="left")
        numbers = (
            "mIoU",
            "boundary",
            "trimap",
            "pixel acc.",
            "active",
            "MACs",
            "of high",
            "region",
            "ms",
            "of high",
        )
        for column in ("mask", "output stride", *numbers):
            table.add_column(column, justify="right" if column in numbers else "left", overflow="fold")
        for row in self.rows:
            high = next(
                other for other in self.rows if other.output_stride == row.output_stride and other.anchor
            )
            timed = row.milliseconds is not None and high.milliseconds is not None
            accuracies = (row.miou, row.boundary_iou, row.trimap_iou, row.pixel_accuracy)
            table.add_row(
                row.mask,
                "{} to {}".format(*row.output_stride),
                *map(percent, accuracies),
                f"{row.active_fraction:.3f}",
                f"{row.macs:.3e}",
                f"{row.macs_of_high:.2f}",
                f"{row.region_of_high:.2f}",
                f"{row.milliseconds:.0f}" if row.milliseconds is not None else "-",
                f"{row.milliseconds / high.milliseconds:.2f}" if timed else "-",  # type: ignore[operator]
                style="dim" if row.anchor else "",
            )
        return table

    def _classes(self) -> Table:
        """IoU of each class; columns are the rows of the other table, by number."""
        table = Table(title="IoU of each class, columns as the rows above", title_justify="left")
        table.add_column("class")
        for number in range(len(self.rows)):
            table.add_column(str(number + 1), justify="right")
        for name in self.rows[0].iou:
            table.add_row(name, *(percent(row.iou[name]) for row in self.rows))
        return table


def percent(share: float | None) -> str:
    """A share as a percentage with two digits; "-" if there is none."""
    return "-" if share is None else f"{100 * share:.2f}"
