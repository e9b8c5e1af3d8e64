"""The report of `cadsurgery bench`: times, work, and the verdict on the law, as values, lines and tables."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from cadsurgery.support.counting import describe_not_counted
from cadsurgery.support.rows import SLOWER, Row, macs_columns, plain, ratio, strides_in_words, time_columns
from cadsurgery.support.tables import Column, table
from cadsurgery.tasks.report import COLOURS, MeasuredReport, Report, against_macs, canvas, panels


@dataclass(frozen=True)
class NetworkBench:
    """A network with one fill: its dense twins, its budgets, and whether time follows work.

    Rows have the `macs` of a call and the `active_fraction` of the fine map. Rows of budgets include the mask and have

    - `fraction`: the requested share of the patches;
    - `law_milliseconds`: the straight line between the dense twins at these MACs; `law_ratio`: time over that line;
    - `realised`: how much of the saving in MACs became a saving in time: (t_high / t) / (M_high / M);
    - `speedup`: t_high / t.

    Attributes:
        model: name of the network.
        weights: description of the weights.
        fill: how its maps are read.
        output_stride: (high, low).
        band: multiple of the line that the law allows.
        high, low: the dense twins, i.e. networks with one level everywhere.
        given_macs: MACs of the network as given; None if they could not be counted.
        twin: label of the dense network that is the network as given; empty if neither is.
        rows: one row per budget.
        notes: facts that a reader needs to judge the figures.
        sides: the dense networks in other engines and on smaller pictures, and sides of the user.
    """

    model: str
    weights: str
    fill: str
    output_stride: tuple[int, int]
    band: float
    high: Row
    low: Row
    rows: tuple[Row, ...]
    notes: tuple[str, ...] = ()
    sides: tuple[Row, ...] = ()
    given_macs: int | None = None
    twin: str = ""

    @property
    def given_milliseconds(self) -> float | None:
        """Time of the network as given; None if it is neither of the dense networks, and was not timed."""
        return {row.label: row.milliseconds for row in (self.high, self.low)}.get(self.twin)

    @property
    def worst(self) -> Row:
        """The row with the largest time relative to the line."""
        return max(self.rows, key=lambda row: row.law_ratio)

    @property
    def holds(self) -> bool:
        """True if every row is within the band."""
        return bool(self.worst.law_ratio <= self.band)

    @property
    def slower(self) -> tuple[Row, ...]:
        """Rows that are slower than dense high by more than 3 %."""
        limit = SLOWER * (self.high.milliseconds or 0.0)
        return tuple(row for row in self.rows if (row.milliseconds or 0.0) > limit)

    def verdict(self) -> str:
        """State whether time follows work, and the worst row."""
        worst = f"fraction {self.worst.fraction:g} takes {self.worst.law_ratio:.3f} of the line"
        law = "time follows work" if self.holds else "time does not follow work (MISSED)"
        text = f"{law}: at worst {worst} between the dense twins, {self.band:.2f} are allowed"
        listed = ", ".join(f"{row.fraction:g}" for row in self.slower)
        slower = f"slower than dense high by more than 3 %: fraction {listed}" if listed else ""
        return f"{text}; {slower or 'nothing is slower than dense high by more than 3 %'}"

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, for `--json`."""
        return {
            **self._head(),
            "rows": plain(self.rows),
            "law": {
                "holds": self.holds,
                "worst_ratio": self.worst.law_ratio,
                "worst_fraction": self.worst.fraction,
                "slower_than_high": [row.fraction for row in self.slower],
                "verdict": self.verdict(),
            },
            **({"sides": plain(self.sides)} if self.sides else {}),
            "notes": list(self.notes),
        }

    def lines(self) -> list[dict[str, Any]]:
        """Return each row as self-contained plain values, for JSON Lines."""
        return [{**self._head(), **row.to_dict()} for row in self.rows]

    def _head(self) -> dict[str, Any]:
        values = {name: getattr(self, name) for name in ("model", "weights", "fill", "output_stride", "band")}
        given = {"macs": self.given_macs, "milliseconds": self.given_milliseconds, "twin": self.twin}
        return plain({**values, "given": given, "dense_high": self.high, "dense_low": self.low})


@dataclass(frozen=True)
class BenchSetting:
    """The conditions of a measurement; `commit` is empty outside a checkout, `images` for generated street scenes.

    `processor` and `instruction_sets` come from `describe_run`; for several runs with different instruction sets, see
    `BenchReport`.
    """

    mask: str
    image: tuple[int, ...]
    dtype: str
    device: str
    threads: int
    rounds: int
    versions: dict[str, str]
    commit: str
    date: str
    runtime: str = "torch"
    clock: str = "wall"
    images: str = ""
    processor: dict[str, str] = field(default_factory=dict)
    instruction_sets: dict[str, str] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, without what is unknown or not given."""
        optional = ("commit", "processor", "instruction_sets", "images")
        return {name: plain(value) for name, value in vars(self).items() if name not in optional or value}

    def __str__(self) -> str:
        size = "x".join(map(str, self.image[2:]))
        numbers = ", ".join(f"{name} {number}" for name, number in self.versions.items())
        commit = f", commit {self.commit}" if self.commit else ""
        clock = ", processor time" if self.clock != "wall" else ""
        of = f" ({self.images})" if self.images else ""
        return (
            f"{self.image[0]} image{'s' * (self.image[0] > 1)} of {size}{of}, {self.dtype}, mask {self.mask}, best and "
            f"median of {self.rounds} interleaved rounds{clock}, runtime {self.runtime}\n{self.device}; {self.threads} "
            f"threads; {numbers}{commit}; {self.date}"
        )


@dataclass(frozen=True)
class BenchReport(Report):
    """The report of `cadsurgery bench`.

    Attributes:
        setting: conditions of all measurements.
        networks: one entry per network and fill.
    """

    setting: BenchSetting
    networks: tuple[NetworkBench, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, for `--json`."""
        networks = [network.to_dict() for network in self.networks]
        return {**self.setting.to_dict(), "networks": networks}

    def parts(self) -> Iterator[RenderableType]:
        """Yield the conditions, then for each network its table, the verdict and notes."""
        yield Text(str(self.setting))
        for network in self.networks:
            yield _table(network)
            good = network.holds and not network.slower
            yield Text(network.verdict(), style="green" if good else "bold red")
            yield from (Text(note, style="yellow") for note in network.notes)

    def figure(self) -> Figure:
        """Draw time against active fraction, a panel per network: the law's band, budgets and dense twins."""
        count = len(self.networks)
        figure, axes = panels(count, min(3, count), 5.5, 4.2, above=0.6)
        for axis, network in zip(axes, self.networks, strict=True):
            _draw(axis, network)
        figure.suptitle(textwrap.fill(str(self.setting), 75 * min(3, count)), fontsize=8)
        return figure


@dataclass(frozen=True, kw_only=True)
class MethodBench(MeasuredReport):
    """Time against work of a network made by a method; the first row is the original network.

    Rows have their `side`, the `macs` of a call, and the `line`: milliseconds of the straight line between the ends
    at these MACs, None if there are no ends.

    Attributes:
        image: shape (B, 3, H, W) of the images.
        clock: `wall`, or `processor`.
        rows: one row per side; sides were timed in turn.
        part: name of the part of the network whose MACs are counted; empty for the whole network.
        not_counted: operations that are not among the MACs, because no counting rule is known.
    """

    image: tuple[int, ...]
    clock: str
    rows: tuple[Row, ...]
    part: str = ""
    not_counted: tuple[str, ...] = ()

    def subject(self) -> str:
        """Describe images, device, and what was timed."""
        clock = "processor time" if self.clock == "processor" else "time"
        return (
            f"{self.data} {'x'.join(map(str, self.image))}, on {self.device}; best and median {clock} of {self.rounds} "
            f"interleaved rounds; commit {self.commit or 'unknown'}"
        )

    def tables(self) -> Iterator[Table]:
        """Yield a table with a row for each side."""
        whole = self.rows[0]
        columns: list[Column[Row]] = [
            Column("side", "side", False),
            *macs_columns("given", lambda row: whole, ".3f"),
            *time_columns("given", lambda row: whole, ".1f", has_median=True),
        ]
        if any(row.line is not None for row in self.rows):
            columns.append(Column("of line", lambda row: ratio(row.milliseconds, row.line)))
        yield table(self.rows, columns)

    def remarks(self) -> Iterator[str]:
        """Yield what the MACs refer to."""
        yield from macs_notes(self.part, self.not_counted)

    def lines(self) -> list[dict[str, Any]]:
        """Return each row as self-contained plain values, for JSON Lines."""
        values = self.to_dict()
        rows = values.pop("rows")
        return [{**values, **row} for row in rows]

    def figure(self) -> Figure:
        """Draw time against MACs, and the line."""
        figure = canvas(5.5, 4)
        axes = figure.subplots()
        for row, colour in zip(self.rows, ("#222222", *COLOURS * len(self.rows)), strict=False):
            axes.plot([row.macs], [row.milliseconds or 0.0], "o", color=colour, label=row.label)
        ends = sorted((row.macs, row.line) for row in self.rows if row.line is not None)
        axes.plot([macs for macs, _ in ends], [line for _, line in ends], color="#a6bddb", zorder=1)
        axes.set_ylim(bottom=0)
        against_macs(axes, "MACs", "milliseconds")
        figure.suptitle(self.model, fontsize=10)
        return figure


def macs_notes(part: str, not_counted: tuple[str, ...]) -> Iterator[str]:
    """Yield what MACs are not of: the rest of the network, and operations without a counting rule."""
    if part:
        yield f"MACs are those of the {part}, times those of the whole network."
    if left := describe_not_counted(not_counted):
        yield left


def _table(network: NetworkBench) -> Table:
    """Create the table of a network: twins, budgets and further sides; "of law" is time over the line."""
    high, low = network.high, network.low
    columns: list[Column[Row]] = [
        Column("side", lambda row: f"{row.label}{' (as given)' if row.label == network.twin else ''}", False),
        Column("active", "active_fraction", form=".3f"),
        Column("MACs", "macs", form=".3e"),
        Column("of given", lambda row: ratio(row.get("macs"), network.given_macs)),
        Column("ms", "milliseconds", form=".1f"),
        Column("of given", lambda row: ratio(row.milliseconds, network.given_milliseconds)),
        Column("median", "milliseconds_median", form=".1f"),
        Column("law ms", "law_milliseconds", form=".1f"),
        Column("of law", "law_ratio", form=".3f"),
        Column("realised", "realised", form=".2f"),
        Column(
            "faster than high", lambda row: "" if row is high else ratio(high.milliseconds, row.milliseconds)
        ),
    ]
    strides = strides_in_words(network.output_stride)
    title = f"{network.model}, {network.weights}, output stride {strides}, fill {network.fill}"
    return table([high, *network.rows, low, *network.sides], columns, title)


def _draw(axis: Any, network: NetworkBench) -> None:
    """Draw the panel of one network."""
    high, low = network.high, network.low
    rows = sorted(network.rows, key=lambda row: row.active_fraction)
    active = [0.0, *(row.active_fraction for row in rows), 1.0]
    twins = [low.milliseconds or 0.0, high.milliseconds or 0.0]
    law = np.array([twins[0], *(row.law_milliseconds for row in rows), twins[1]])
    label = f"law: 1.00 to {network.band:.2f}"
    axis.fill_between(active, law, network.band * law, color="#a6bddb", alpha=0.6, label=label)
    axis.plot(active, law, color="#2b8cbe", linewidth=1)
    places, best = active[1:-1], [row.milliseconds or 0.0 for row in rows]
    median = [row.milliseconds_median or 0.0 for row in rows]
    axis.vlines(places, best, median, color="#d7301f", linewidth=1)
    axis.plot(places, median, "_", color="#d7301f", markersize=9, label="median")
    axis.plot(places, best, "o", color="#d7301f", markersize=5, label="best")
    axis.plot([0, 1], twins, "s", color="#222222", markersize=6, zorder=1.9, label="dense low, high")
    for place, side in enumerate(network.sides):  # placed at their share of the work
        share = (side.macs - low.macs) / (high.macs - low.macs)
        axis.plot([share], [side.milliseconds], "^", color=COLOURS[1 + place % 4], label=side.label)
    axis.set_ylim(bottom=0)
    axis.set_xlabel("active fraction")
    axis.set_ylabel("ms")
    axis.set_title(
        f"{network.model}, {network.fill}: time {'follows work' if network.holds else 'MISSED the law'}"
    )
    axis.legend(loc="lower right", fontsize=8)
