"""The report of the evaluation by matching: matching accuracy, work and time of each mask."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter
from rich.table import Table

from cadsurgery.support.rows import Row, strides_in_words
from cadsurgery.support.tables import Column, table
from cadsurgery.tasks.report import COLOURS, MeasuredReport, canvas

THRESHOLDS = tuple(range(1, 16))  # pixels
CORNERS = (1, 3, 5)  # thresholds of homography accuracy, in pixels


class Pair(NamedTuple):
    """The first image of a sequence matched with another one.

    Attributes:
        sequence: name of the sequence.
        kind: `illumination`, `viewpoint`, or empty.
        number: number of the other image.
        matches: number of mutual nearest neighbours.
        accuracy: share of matches within each of `THRESHOLDS` pixels.
        corner_error: corner error of the estimated homography, in pixels; infinite if none was found.
    """

    sequence: str
    kind: str
    number: int
    matches: int
    accuracy: tuple[float, ...]
    corner_error: float


class MatchingRow(Row):
    """One mask at one pair of output strides.

    Work is that of the first images of the sequences; time is the time to describe one image, for detector `own`
    also to detect its keypoints. Rows have the `mask`, the `output_stride`, the `active_fraction` of the fine maps,
    the `macs` of an image, where descriptors are read (`reads`: `elements`, or `dense map`), all `pairs`, the mean
    number of `keypoints` of an image, and as `homography` the share of pairs with a corner error up to each limit in
    pixels.
    """

    def mma(self, kind: str = "") -> list[float] | None:
        """Return the mean matching accuracy at each of `THRESHOLDS`, for one kind or all; None without pairs."""
        pairs = [pair.accuracy for pair in self.pairs if kind in ("", pair.kind)]
        return [sum(values) / len(pairs) for values in zip(*pairs, strict=True)] if pairs else None

    def at(self, limit: int, kind: str = "") -> float:
        """Return the mean matching accuracy at one of `THRESHOLDS`; 0 without pairs."""
        values = self.mma(kind)
        return values[THRESHOLDS.index(limit)] if values else 0.0

    @property
    def matches(self) -> float:
        """Mean number of matches per pair."""
        return sum(pair.matches for pair in self.pairs) / len(self.pairs)

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, for `--json`."""
        pairs = [
            {**pair._asdict(), "corner_error": error if math.isfinite(error := pair.corner_error) else None}
            for pair in self.pairs
        ]
        return {
            **super().to_dict(),
            "matches": self.matches,
            "mma": self.mma(),
            "mma_illumination": self.mma("illumination"),
            "mma_viewpoint": self.mma("viewpoint"),
            "pairs": pairs,
        }


@dataclass(frozen=True, kw_only=True)
class MatchingReport(MeasuredReport):
    """Matching against work: what was evaluated, on which data, and a row for each setting.

    Attributes:
        sequences: number of sequences.
        left_out: names of sequences that the published protocol leaves out.
        detector: detector of keypoints.
        count: maximum number of keypoints per image.
        reach: see `cadsurgery.read_at`.
        image: (height, width) of the image that was timed.
        rows: one row per setting, in the requested order.
    """

    sequences: int
    left_out: tuple[str, ...]
    detector: str
    count: int
    reach: str
    image: tuple[int, int]
    rows: tuple[MatchingRow, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, for `--json`."""
        return {**super().to_dict(), "thresholds": list(THRESHOLDS)}

    def subject(self) -> str:
        """Describe data, keypoints, device, and what was timed."""
        left = f", {len(self.left_out)} left out by the protocol" if self.left_out else ""
        return (
            f"{self.data}: {self.sequences} sequences{left}, {len(self.rows[0].pairs)} pairs; {self.detector}, at most "
            f"{self.count} keypoints; reach {self.reach}; on {self.device}{self.timed(self.image)}"
        )

    def tables(self) -> Iterator[Table]:
        """Yield the table of all settings."""

        def at(limit: int, kind: str = "") -> Callable[[MatchingRow], str]:
            return lambda row: f"{row.at(limit, kind):.4f}"

        kinds = [kind for kind in ("illumination", "viewpoint") if self.rows[0].mma(kind)]
        columns: list[Column[MatchingRow]] = [
            Column("mask", "mask", False),
            Column("strides", "output_stride", False, strides_in_words),
            *(Column(f"@{limit}", at(limit)) for limit in (1, 3, 5, 10)),
            *(Column(f"@3 {kind[:6]}.", at(3, kind)) for kind in kinds),
            Column("homogr.", lambda row: f"{row.homography[3]:.3f}"),
            Column("matches", "matches", form=".1f"),
            Column("active", "active_fraction", form=".3f"),
            Column("MACs", "macs", form=".3e"),
            Column("ms", "milliseconds", form=".0f"),
        ]
        title = "matching accuracy (MMA) at pixels; homography: corners within 3 pixels"
        yield table(self.rows, columns, title)

    def figure(self) -> Figure:
        """Draw matching accuracy against the threshold, and at 3 pixels against MACs."""
        figure = canvas(12, 4.8)
        curve, cost = figure.subplots(1, 2)
        for place, row in enumerate(self.rows):
            colour, style = COLOURS[place % len(COLOURS)], ("-", "--", ":")[place // len(COLOURS) % 3]
            curve.plot(THRESHOLDS, row.mma() or [], style, color=colour, label=row.label)
            spot = (row.macs, row.at(3))
            cost.plot(*spot, "o", color=colour, markersize=6)
            cost.annotate(str(place + 1), spot, (5, 4), textcoords="offset points", fontsize=8)
        curve.set(xlabel="threshold, pixels", ylabel="mean matching accuracy", ylim=(0, 1), xticks=THRESHOLDS)
        handles, labels = curve.get_legend_handles_labels()
        numbered = [f"{place + 1}  {label}" for place, label in enumerate(labels)]
        figure.legend(handles, numbered, loc="outside lower center", ncols=2, fontsize=8, frameon=False)
        cost.set(xlabel="MACs of one image", ylabel="mean matching accuracy at 3 pixels")
        cost.set_xlim(left=0)
        cost.margins(y=0.2)
        cost.xaxis.set_major_formatter(EngFormatter())
        for axis in (curve, cost):
            axis.spines[["top", "right"]].set_visible(False)
            axis.grid(alpha=0.25)
        pairs = len(self.rows[0].pairs)
        figure.suptitle(f"{self.model}, {self.sequences} sequences, {pairs} pairs", fontsize=10)
        return figure
