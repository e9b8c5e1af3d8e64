"""What `cadsurgery bench` tells: times, work, the law and whether it holds, as values, lines and tables."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from cadsurgery.support.processor import sets_in_words
from cadsurgery.tasks.report import Column, Plain, Report, number, panels, plain, ratio, table
from cadsurgery.tasks.slowest import SLOWER


@dataclass(frozen=True)
class Twin(Plain):
    """A dense twin: the network with one level everywhere.

    Attributes:
        macs: of one call.
        milliseconds: the best round.
        milliseconds_median: the usual round.
        memory_mib: by which a call raises the peak of the resident set; None if not measured.
    """

    macs: int
    milliseconds: float
    milliseconds_median: float
    memory_mib: float | None = None


@dataclass(frozen=True)
class BenchRow(Plain):
    """A network under one budget.

    Attributes:
        fraction: of the patches, asked for.
        active_fraction: share of the fine map kept high, measured.
        macs: of one call.
        milliseconds: the best round, the mask included.
        milliseconds_median: the usual round.
        law_milliseconds: the straight line between the dense twins at these MACs.
        law_ratio: time over that line.
        realised: share of the MACs ratio to dense high that became time: (t_high / t) / (M_high / M).
        speedup: t_high / t.
        memory_mib: as for a twin.
        memory_ratio: to dense high.
    """

    fraction: float
    active_fraction: float
    macs: int
    milliseconds: float
    milliseconds_median: float
    law_milliseconds: float
    law_ratio: float
    realised: float
    speedup: float
    memory_mib: float | None = None
    memory_ratio: float | None = None


@dataclass(frozen=True)
class Rival(Plain):
    """The dense networks in another engine.

    Attributes:
        engine: its name.
        dtype: of its weights and features.
        high: milliseconds, best and median, at the high output stride.
        low: and at the low one.
    """

    engine: str
    dtype: str
    high: tuple[float, float]
    low: tuple[float, float]


@dataclass(frozen=True)
class NetworkBench:
    """A network with one fill: its dense twins, its budgets, and whether the law holds; `rivals` beside it.

    `band` is the multiple of the line that the law allows; `notes` are what a reader must know to judge the figures.
    `isa` is the instruction set that CADSURGERY_ISA capped the run to; "" if nothing capped it.
    """

    model: str
    weights: str
    fill: str
    output_stride: tuple[int, int]
    band: float
    high: Twin
    low: Twin
    rows: tuple[BenchRow, ...]
    notes: tuple[str, ...] = ()
    rivals: tuple[Rival, ...] = ()
    isa: str = ""

    @property
    def label(self) -> str:
        """The network, and the instruction set that the run was capped to."""
        return f"{self.model} with {self.isa}" if self.isa else self.model

    @property
    def worst(self) -> BenchRow:
        """The row farthest above the line."""
        return max(self.rows, key=lambda row: row.law_ratio)

    @property
    def holds(self) -> bool:
        """Whether every row is within the band."""
        return self.worst.law_ratio <= self.band

    @property
    def slower(self) -> tuple[BenchRow, ...]:
        """Rows slower than dense high by more than 3 %."""
        return tuple(row for row in self.rows if row.milliseconds > SLOWER * self.high.milliseconds)

    def verdict(self) -> str:
        """Whether the law holds, in words."""
        worst = f"fraction {self.worst.fraction:g} takes {self.worst.law_ratio:.3f} of the line"
        law = "holds" if self.holds else "is MISSED"
        told = f"the law {law}: at worst {worst} between the dense twins, {self.band:.2f} are allowed"
        listed = ", ".join(f"{row.fraction:g}" for row in self.slower)
        slower = f"slower than dense high by more than 3 %: fraction {listed}" if listed else ""
        return f"{told}; {slower or 'nothing is slower than dense high by more than 3 %'}"

    def to_dict(self) -> dict[str, Any]:
        """As plain values, for `--json`."""
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
            "against": plain(self.rivals),
            "notes": list(self.notes),
        }

    def lines(self) -> list[dict[str, Any]]:
        """Each row as plain values that stand alone, for JSON Lines."""
        return [{**self._head(), **vars(row)} for row in self.rows]

    def _head(self) -> dict[str, Any]:
        values = {
            name: getattr(self, name) for name in ("model", "isa", "weights", "fill", "output_stride", "band")
        }
        return plain({**values, "dense_high": self.high, "dense_low": self.low})


@dataclass(frozen=True)
class BenchSetting:
    """What a measurement was made with; `commit` is empty outside a checkout.

    `processor` and `instruction_sets` are those of `describe_run`; of several runs, each with instruction sets of its
    own, see `BenchReport`.
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
    processor: dict[str, str] = field(default_factory=dict)
    instruction_sets: dict[str, str] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """As plain values; without those that are not known here: commit, processor, instruction sets."""
        optional = ("commit", "processor", "instruction_sets")
        return {name: plain(value) for name, value in vars(self).items() if name not in optional or value}

    def __str__(self) -> str:
        size = "x".join(map(str, self.image[2:]))
        numbers = ", ".join(f"{name} {number}" for name, number in self.versions.items())
        commit = f", commit {self.commit}" if self.commit else ""
        clock = ", processor time" if self.clock != "wall" else ""
        return (
            f"{self.image[0]} image{'s' * (self.image[0] > 1)} of {size}, {self.dtype}, mask {self.mask}, best and "
            f"median of {self.rounds} interleaved rounds{clock}, runtime {self.runtime}\n{self.device}; {self.threads} "
            f"threads; {numbers}{commit}; {self.date}"
        )


@dataclass(frozen=True)
class BenchReport(Report):
    """What `cadsurgery bench` tells.

    Attributes:
        setting: what all networks were measured with.
        networks: a network with one fill each.
        costs: those that decided, see `backends.costs.record`; with `caps` those of all runs.
        caps: by the name of each instruction set that a run was capped to: the instruction sets of that run.
        notes: what a reader must know of all figures.
    """

    setting: BenchSetting
    networks: tuple[NetworkBench, ...]
    costs: dict[str, Any] = field(default_factory=dict)
    caps: dict[str, dict[str, str]] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """As plain values, for `--json`."""
        networks = [network.to_dict() for network in self.networks]
        capped = {"caps": self.caps, "notes": list(self.notes)} if self.caps else {}
        return {**self.setting.to_dict(), **capped, "networks": networks, "costs": self.costs}

    def parts(self) -> Iterator[RenderableType]:
        """What was measured with, then each network: its table, the law and notes."""
        yield Text(str(self.setting))
        yield from (Text(f"{name}: {sets_in_words(sets)}") for name, sets in self.caps.items())
        yield from (Text(note, style="yellow") for note in self.notes)
        for network in self.networks:
            yield _table(network)
            good = network.holds and not network.slower
            yield Text(network.verdict(), style="green" if good else "bold red")
            if network.rivals:
                yield _table_of_rivals(network)
            yield from (Text(note, style="yellow") for note in network.notes)

    def figure(self) -> Figure:
        """Time against active fraction, a panel for each network: the law's band, budgets and dense twins."""
        count = len(self.networks)
        figure, axes = panels(count, min(3, count), 5.5, 4.2, above=0.6)
        for axis, network in zip(axes, self.networks, strict=True):
            _draw(axis, network)
        figure.suptitle(str(self.setting), fontsize=8)
        return figure


Line = tuple[str, float, Twin | BenchRow]  # side, active fraction, what it took


def _table(network: NetworkBench) -> Table:
    """Twins and budgets of a network; the law's column is time over the line between the twins."""

    def of_budget(form: Callable[[BenchRow], str]) -> Callable[[Line], str]:
        return lambda line: form(line[2]) if isinstance(line[2], BenchRow) else ""

    def speedup(line: Line) -> str:
        return "" if line[2] is high else f"{high.milliseconds / line[2].milliseconds:.2f}"

    high, low = network.high, network.low
    columns: list[Column[Line]] = [
        Column("side", lambda line: line[0], False),
        Column("active", lambda line: f"{line[1]:.3f}"),
        Column("MACs", lambda line: f"{line[2].macs:.3e}"),
        Column("ms", lambda line: f"{line[2].milliseconds:.1f}"),
        Column("median", lambda line: f"{line[2].milliseconds_median:.1f}"),
        Column("law ms", of_budget(lambda row: f"{row.law_milliseconds:.1f}")),
        Column("of law", of_budget(lambda row: f"{row.law_ratio:.3f}")),
        Column("realised", of_budget(lambda row: f"{row.realised:.2f}")),
        Column("speed-up", speedup),
    ]
    if (whole := high.memory_mib) is not None:
        columns += [
            Column("MiB", lambda line: number(line[2].memory_mib)),
            Column("of high", lambda line: ratio(line[2].memory_mib, whole)),
        ]
    budgets: list[Line] = [(f"budget {row.fraction:g}", row.active_fraction, row) for row in network.rows]
    strides = "{} to {}".format(*network.output_stride)
    title = f"{network.label}, {network.weights}, output stride {strides}, fill {network.fill}"
    return table([("dense high", 1.0, high), *budgets, ("dense low", 0.0, low)], columns, title)


def _table_of_rivals(network: NetworkBench) -> Table:
    """The dense networks in other engines, and each budget relative to their dense high."""

    def share(row: BenchRow) -> Callable[[Rival], str]:
        return lambda rival: f"{row.milliseconds / rival.high[0]:.2f}"

    columns: list[Column[Rival]] = [
        Column("dense in", lambda rival: f"{rival.engine}, {rival.dtype}", False),
        Column("high ms", lambda rival: f"{rival.high[0]:.1f}"),
        Column("median", lambda rival: f"{rival.high[1]:.1f}"),
        Column("low ms", lambda rival: f"{rival.low[0]:.1f}"),
        *(Column(f"budget {row.fraction:g} of high", share(row)) for row in network.rows),
    ]
    return table(list(network.rivals), columns, f"{network.label}, dense in other engines")


def _draw(axis: Any, network: NetworkBench) -> None:
    """One network's panel."""
    high, low = network.high, network.low
    rows = sorted(network.rows, key=lambda row: row.active_fraction)
    active = [0.0, *(row.active_fraction for row in rows), 1.0]
    law = np.array([low.milliseconds, *(row.law_milliseconds for row in rows), high.milliseconds])
    label = f"law: 1.00 to {network.band:.2f}"
    axis.fill_between(active, law, network.band * law, color="#a6bddb", alpha=0.6, label=label)
    axis.plot(active, law, color="#2b8cbe", linewidth=1)
    places, best = active[1:-1], [row.milliseconds for row in rows]
    median = [row.milliseconds_median for row in rows]
    axis.vlines(places, best, median, color="#d7301f", linewidth=1)
    axis.plot(places, median, "_", color="#d7301f", markersize=9, label="median")
    axis.plot(places, best, "o", color="#d7301f", markersize=5, label="best")
    twins = [low.milliseconds, high.milliseconds]
    axis.plot([0, 1], twins, "s", color="#222222", markersize=6, zorder=1.9, label="dense low, high")
    axis.set_ylim(bottom=0)
    axis.set_xlabel("active fraction")
    axis.set_ylabel("ms")
    axis.set_title(f"{network.label}, {network.fill}: law {'holds' if network.holds else 'MISSED'}")
    axis.legend(loc="lower right", fontsize=8)
