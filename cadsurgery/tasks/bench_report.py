"""What `cadsurgery bench` tells: times, work, the law and whether it holds, as values, lines and tables."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

SLOWER = 1.03  # an entry counts as slower than dense high from this multiple of its time on


@dataclass(frozen=True)
class Twin:
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
class BenchRow:
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
class NetworkBench:
    """A network with one fill: its dense twins, its budgets, and whether the law holds.

    Attributes:
        model: its name.
        weights: which it has, in words.
        fill: how points inside a cell are read.
        output_stride: (high, low).
        band: multiple of the line that the law allows.
        high: the dense twin at the high output stride.
        low: the dense twin at the low one.
        rows: one for each fraction.
        notes: what a reader must know to judge the figures.
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
            "rows": [vars(row) for row in self.rows],
            "law": {
                "holds": self.holds,
                "worst_ratio": self.worst.law_ratio,
                "worst_fraction": self.worst.fraction,
                "slower_than_high": [row.fraction for row in self.slower],
                "verdict": self.verdict(),
            },
            "notes": list(self.notes),
        }

    def lines(self) -> list[dict[str, Any]]:
        """Each row as plain values that stand alone, for JSON Lines."""
        return [{**self._head(), **vars(row)} for row in self.rows]

    def _head(self) -> dict[str, Any]:
        return {
            "model": self.model,
            "weights": self.weights,
            "fill": self.fill,
            "output_stride": list(self.output_stride),
            "band": self.band,
            "dense_high": vars(self.high),
            "dense_low": vars(self.low),
        }


@dataclass(frozen=True)
class BenchSetting:
    """What a measurement was made with; `commit` is empty outside a checkout."""

    mask: str
    image: tuple[int, ...]
    dtype: str
    device: str
    threads: int
    rounds: int
    versions: dict[str, str]
    commit: str
    date: str

    def to_dict(self) -> dict[str, Any]:
        """As plain values; without the commit if there is none."""
        values = {**vars(self), "image": list(self.image)}
        return {name: value for name, value in values.items() if name != "commit" or value}

    def __str__(self) -> str:
        size = "x".join(map(str, self.image[2:]))
        numbers = ", ".join(f"{name} {number}" for name, number in self.versions.items())
        commit = f", commit {self.commit}" if self.commit else ""
        return (
            f"{self.image[0]} image{'s' * (self.image[0] > 1)} of {size}, {self.dtype}, mask {self.mask}, best and "
            f"median of {self.rounds} interleaved rounds\n{self.device}, {self.threads} threads; {numbers}{commit}; "
            f"{self.date}"
        )


@dataclass(frozen=True)
class BenchReport:
    """What `cadsurgery bench` tells; `costs` are those of convolutions that decided, see `backends.costs.record`."""

    setting: BenchSetting
    networks: tuple[NetworkBench, ...]
    costs: dict[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """As plain values, for `--json`."""
        networks = [network.to_dict() for network in self.networks]
        return {**self.setting.to_dict(), "networks": networks, "costs": self.costs}

    def render(self) -> RenderableType:
        """The report for a terminal."""
        parts: list[RenderableType] = [Text(str(self.setting))]
        for network in self.networks:
            parts += [
                _bench_table(network),
                Text(
                    network.verdict(), style="green" if network.holds and not network.slower else "bold red"
                ),
                *(Text(note, style="yellow") for note in network.notes),
            ]
        return Group(*parts)


def _bench_table(network: NetworkBench) -> Table:
    """Twins and budgets of a network; the law's column is time over the line between the twins."""
    high, low = network.output_stride
    table = Table(
        title=f"{network.model}, {network.weights}, output stride {high} to {low}, fill {network.fill}",
        title_justify="left",
    )
    columns = ["side", "active", "MACs", "ms", "median", "law ms", "of law", "realised", "speed-up"]
    remembers = network.high.memory_mib is not None
    for column in columns + ["MiB", "of high"] * remembers:
        table.add_column(column, justify="left" if column == "side" else "right")

    def add(side: str, active: float, run: Twin | BenchRow, law: Sequence[str]) -> None:
        memory: tuple[str, ...] = ()
        if run.memory_mib is not None and network.high.memory_mib:
            memory = (f"{run.memory_mib:.0f}", f"{run.memory_mib / network.high.memory_mib:.2f}")
        times = (f"{run.milliseconds:.1f}", f"{run.milliseconds_median:.1f}")
        table.add_row(side, f"{active:.3f}", f"{run.macs:.3e}", *times, *law, *memory)

    add("dense high", 1.0, network.high, ("", "", "", ""))
    for row in network.rows:
        law = (
            f"{row.law_milliseconds:.1f}",
            f"{row.law_ratio:.3f}",
            f"{row.realised:.2f}",
            f"{row.speedup:.2f}",
        )
        add(f"budget {row.fraction:g}", row.active_fraction, row, law)
    add(
        "dense low",
        0.0,
        network.low,
        ("", "", "", f"{network.high.milliseconds / network.low.milliseconds:.2f}"),
    )
    return table
