"""What `cadsurgery keypoints eval` tells: matching accuracy beside work and time for each mask."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

THRESHOLDS = tuple(range(1, 16))  # pixels
CORNERS = (1, 3, 5)  # pixels, of homography accuracy


class Pair(NamedTuple):
    """The first image of a sequence matched with another one.

    Attributes:
        sequence: its name.
        kind: `illumination`, `viewpoint`, or empty.
        number: of the other image.
        matches: mutual nearest neighbours.
        accuracy: share of matches within each of `THRESHOLDS` pixels.
        corner_error: of the homography found from the matches, in pixels; infinite if none was.
    """

    sequence: str
    kind: str
    number: int
    matches: int
    accuracy: tuple[float, ...]
    corner_error: float


@dataclass(frozen=True)
class MatchingRow:
    """One mask at one pair of output strides.

    Attributes:
        mask: its string.
        output_stride: (high, low).
        reads: where descriptors are read: `elements`, or `dense map`.
        pairs: all of them.
        keypoints: of an image, mean.
        active_fraction: share of the fine map kept high, mean over the first images of the sequences.
        macs: multiply-accumulates of the whole network, likewise.
        homography: share of pairs whose corner error is at most so many pixels.
        milliseconds: to describe the first image, the best round; None if not measured. With detector `own` they
            include detection.
        milliseconds_median: the usual round.
    """

    mask: str
    output_stride: tuple[int, int]
    reads: str
    pairs: tuple[Pair, ...]
    keypoints: float
    active_fraction: float
    macs: float
    homography: dict[int, float]
    milliseconds: float | None = None
    milliseconds_median: float | None = None

    def mma(self, kind: str = "") -> list[float] | None:
        """Mean matching accuracy at each of `THRESHOLDS`, of pairs of a kind or of all; None if there are none."""
        return mean_accuracy([pair for pair in self.pairs if kind in ("", pair.kind)])

    @property
    def matches(self) -> float:
        """Of a pair, mean."""
        return sum(pair.matches for pair in self.pairs) / len(self.pairs)

    @property
    def label(self) -> str:
        """A short name."""
        return f"{self.mask} {self.output_stride[0]}->{self.output_stride[1]}"

    def to_dict(self) -> dict[str, Any]:
        """As plain values, for `--json`."""
        pairs = [
            {
                **pair._asdict(),
                "corner_error": pair.corner_error if math.isfinite(pair.corner_error) else None,
            }
            for pair in self.pairs
        ]
        return {
            **vars(self),
            "output_stride": list(self.output_stride),
            "matches": self.matches,
            "mma": self.mma(),
            "mma_illumination": self.mma("illumination"),
            "mma_viewpoint": self.mma("viewpoint"),
            "pairs": pairs,
        }


def mean_accuracy(pairs: Sequence[Pair]) -> list[float] | None:
    """Mean over pairs at each of `THRESHOLDS`; None without pairs."""
    if not pairs:
        return None
    return [sum(values) / len(pairs) for values in zip(*(pair.accuracy for pair in pairs), strict=True)]


@dataclass(frozen=True)
class MatchingReport:
    """Matching against work: what was evaluated, on what, and a row for each setting.

    Attributes:
        model: source of the network.
        weights: which it has, in words.
        random: whether they are random.
        data: the folder.
        sequences: how many counted.
        left_out: names of those the published protocol leaves out.
        detector: of keypoints.
        count: keypoints of an image at most.
        reach: see `cadsurgery.read_at`.
        image: (height, width) of the image that was timed.
        rounds: of timing, 0 if not timed.
        device: in words, with threads.
        versions: of this package and its libraries.
        commit: of this package; empty outside a checkout.
        date: when it was done.
        rows: in the order asked for.
        failed: images or sequences that could not be used, each an error as plain values.
    """

    model: str
    weights: str
    random: bool
    data: str
    sequences: int
    left_out: tuple[str, ...]
    detector: str
    count: int
    reach: str
    image: tuple[int, int]
    rounds: int
    device: str
    versions: dict[str, str]
    commit: str
    date: str
    rows: tuple[MatchingRow, ...]
    failed: tuple[dict[str, str], ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """As plain values, for `--json`."""
        values = {("random_weights" if key == "random" else key): value for key, value in vars(self).items()}
        return {
            **values,
            "thresholds": list(THRESHOLDS),
            "image": list(self.image),
            "left_out": list(self.left_out),
            "rows": [row.to_dict() for row in self.rows],
            "failed": list(self.failed),
        }

    def render(self) -> RenderableType:
        """The report for a terminal."""
        pairs = len(self.rows[0].pairs)
        left = f", {len(self.left_out)} left out by the protocol" if self.left_out else ""
        timed = (
            "; ms: {}x{}, best of {} interleaved rounds".format(*self.image, self.rounds)
            if self.rounds
            else ""
        )
        parts: list[RenderableType] = [
            Text(f"{self.model}, {self.weights}", style="bold red" if self.random else "bold"),
            Text(
                f"{self.data}: {self.sequences} sequences{left}, {pairs} pairs; {self.detector}, at most {self.count} "
                f"keypoints; reach {self.reach}; on {self.device}{timed}",
                style="dim",
            ),
            self._table(),
        ]
        if self.random:
            parts.append(
                Text(
                    "random weights: unless they were trained since, these accuracies mean nothing.",
                    style="yellow",
                )
            )
        parts += [Text(f"{failure['what']} {failure.get('why', '')}", style="red") for failure in self.failed]
        return Group(*parts)

    def _table(self) -> Table:
        table = Table(
            title="matching accuracy (MMA) at pixels; homography: corners within 3 pixels",
            title_justify="left",
        )
        shown = (1, 3, 5, 10)
        kinds = [kind for kind in ("illumination", "viewpoint") if self.rows[0].mma(kind)]
        numbers = [
            *(f"@{limit}" for limit in shown),
            *(f"@3 {kind[:6]}." for kind in kinds),
            *("homogr.", "matches", "active", "MACs", "ms"),
        ]
        for column in ("mask", "strides", *numbers):
            table.add_column(column, justify="right" if column in numbers else "left", overflow="fold")
        for row in self.rows:
            every = row.mma() or []
            of_kinds = [(row.mma(kind) or [0.0] * len(THRESHOLDS))[THRESHOLDS.index(3)] for kind in kinds]
            table.add_row(
                row.mask,
                "{} to {}".format(*row.output_stride),
                *(f"{every[THRESHOLDS.index(limit)]:.4f}" for limit in shown),
                *(f"{value:.4f}" for value in of_kinds),
                f"{row.homography[3]:.3f}",
                f"{row.matches:.1f}",
                f"{row.active_fraction:.3f}",
                f"{row.macs:.3e}",
                f"{row.milliseconds:.0f}" if row.milliseconds is not None else "-",
            )
        return table
