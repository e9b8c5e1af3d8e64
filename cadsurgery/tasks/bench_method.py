"""Does time follow work in what a method made? It beside the network it was made from, in one interleaved run.

Of gates, besides, at shares of open positions: the straight line in multiply-accumulates between all closed (but the
grid) and all open is what time would be if it followed work.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from rich.console import RenderableType
from rich.table import Table
from rich.text import Text
from torch import Tensor

from cadsurgery.data.networks import source_of
from cadsurgery.masks import labelled
from cadsurgery.methods.anytime import AnytimeModel
from cadsurgery.methods.converted import ConvertedModel
from cadsurgery.methods.resampling import ResampledModel
from cadsurgery.methods.sampling import SampledModel
from cadsurgery.methods.sampling.gates import Opened
from cadsurgery.support.counting import describe_not_counted
from cadsurgery.support.errors import InvalidInput
from cadsurgery.support.files import append_lines
from cadsurgery.support.provenance import find_device
from cadsurgery.support.timing import interleaved
from cadsurgery.tasks.by_method import Calls
from cadsurgery.tasks.exits import in_words
from cadsurgery.tasks.for_each import Step, silent
from cadsurgery.tasks.open import example_batch, provenance
from cadsurgery.tasks.options import Benchmark
from cadsurgery.tasks.report import (
    COLOURS,
    Column,
    MeasuredReport,
    TimedRow,
    against_macs,
    canvas,
    check_outputs,
    heading,
    number,
    ratio,
    table,
)
from cadsurgery.tasks.samples import WHOLE

DENSE = "as it was, optimised"
CLOSED, OPEN = "all closed but the grid", "all open"
TAKEN = ("size", "batch", "device", "threads", "rounds", "processor_time")  # of the options of `bench`


@dataclass(frozen=True, kw_only=True)
class SideRow(TimedRow):
    """One side of the comparison.

    Attributes:
        side: what was run.
        macs: multiply-accumulates of a call.
        line: milliseconds of the straight line between the ends at these MACs; None where there are no ends.
    """

    side: str
    macs: int
    line: float | None = None


@dataclass(frozen=True, kw_only=True)
class MethodBench(MeasuredReport):
    """Time against work of a network that a method made; the first row is the network it was made from.

    Attributes:
        image: (B, 3, H, W) of the images.
        clock: `wall`, or `processor`.
        rows: what was run in turn.
        part: of the network whose MACs these are; empty: all of it.
        not_counted: operations that are not among the MACs, because no rule says how much they multiply.
    """

    image: tuple[int, ...]
    clock: str
    rows: tuple[SideRow, ...]
    part: str = ""
    not_counted: tuple[str, ...] = ()

    def subject(self) -> str:
        """Images, device, and what was timed."""
        clock = "processor time" if self.clock == "processor" else "time"
        return (
            f"{self.data} {'x'.join(map(str, self.image))}, on {self.device}; best and median {clock} of {self.rounds} "
            f"interleaved rounds; commit {self.commit or 'unknown'}"
        )

    def tables(self) -> Iterator[Table]:
        """A row for each side."""
        first = self.rows[0]
        columns: list[Column[SideRow]] = [
            Column("side", lambda row: row.side, False),
            Column("MACs", lambda row: f"{row.macs:.3e}"),
            Column("of dense", lambda row: f"{row.macs / first.macs:.3f}"),
            Column("ms", lambda row: number(row.milliseconds, ".1f")),
            Column("median", lambda row: number(row.milliseconds_median, ".1f")),
            Column("of dense", lambda row: ratio(row.milliseconds, first.milliseconds)),
        ]
        if any(row.line is not None for row in self.rows):
            columns.append(Column("of line", lambda row: ratio(row.milliseconds, row.line)))
        yield table(self.rows, columns)

    def parts(self) -> Iterator[RenderableType]:
        """Network, images, the rows, and whose MACs these are."""
        yield heading(self.model, self.weights, self.random)
        yield Text(self.subject(), style="dim")
        yield from self.tables()
        if self.part:
            told = f"MACs are those of the {self.part}, times those of the whole network."
            yield Text(told, style="yellow")
        if left := describe_not_counted(self.not_counted):
            yield Text(left, style="yellow")

    def lines(self) -> list[dict[str, Any]]:
        """Each row as plain values that stand alone, for JSON Lines."""
        values = self.to_dict()
        rows = values.pop("rows")
        return [{**values, **row} for row in rows]

    def figure(self) -> Figure:
        """Time against MACs, and the line."""
        figure = canvas(5.5, 4)
        axes = figure.subplots()
        for place, row in enumerate(self.rows):
            colour = "#222222" if not place else COLOURS[(place - 1) % len(COLOURS)]
            axes.plot([row.macs], [row.milliseconds or 0.0], "o", color=colour, label=row.side)
        ends = sorted((row.macs, row.line) for row in self.rows if row.line is not None)
        axes.plot([macs for macs, _ in ends], [line for _, line in ends], color="#a6bddb", zorder=1)
        axes.set_ylim(bottom=0)
        against_macs(axes, "MACs", "milliseconds")
        figure.suptitle(self.model, fontsize=10)
        return figure


def bench_method(
    net: ConvertedModel,
    fractions: Sequence[float],
    setup: Benchmark,
    *,
    network: object = None,
    picture: Path | None = None,
    output: Path | None = None,
    step: Step = silent,
) -> MethodBench:
    """Time and work of a network that a method made, and of what it was made from, both optimised.

    Args:
        net: with exits or gates, or whose input is sampled.
        fractions: of gates, the shares of open positions at which they are timed besides.
        setup: size and number of the images, device, threads, rounds and clock; the rest as it is by default.
        network: what the report calls it: a file, or the network.
        picture: PNG to draw.
        output: JSON Lines to append the rows to.
        step: called with what is being done.

    Raises:
        InvalidInput: options that only masks have, or that are out of range.
        FileError: a file cannot be written.
    """
    _check(fractions, setup)
    check_outputs(output, picture=picture)
    where, source = find_device(setup.device), source_of(net)
    net = net.eval().to(where)
    images = torch.cat([example_batch(source, None, setup.size, seed) for seed in range(setup.batch)])
    images = images.to(where).contiguous(memory_format=torch.channels_last)
    step("counting multiply-accumulates")
    empty = torch.zeros(len(images), *images.shape[2:], dtype=torch.int64, device=where)
    with labelled(empty):  # for a sampler that asks for labels
        calls, not_counted = _calls(net, images, fractions)
        step("measuring")
        clock = time.process_time if setup.processor_time else time.perf_counter
        runs = {name: partial(run, images) for name, (_, run) in calls.items()}
        times = interleaved(runs, setup.rounds, clock=clock)
    best = {name: (macs, times[name].best) for name, (macs, _) in calls.items()}
    rows = [
        SideRow(
            side=name,
            macs=macs,
            milliseconds=times[name].best,
            milliseconds_median=times[name].median,
            line=_line(macs, best[CLOSED], best[OPEN]) if CLOSED in best and name != DENSE else None,
        )
        for name, (macs, _) in calls.items()
    ]
    report = MethodBench(
        data="street scenes",
        image=tuple(images.shape),
        clock="processor" if setup.processor_time else "wall",
        rounds=setup.rounds,
        rows=tuple(rows),
        part=getattr(net.plan, "part", ""),
        not_counted=not_counted,
        **provenance(network or net, source, where),
    )
    if output is not None:
        append_lines(output, map(json.dumps, report.lines()))
    report.write(picture=picture)
    return report


def _line(macs: int, least: tuple[int, float], most: tuple[int, float]) -> float:
    """Milliseconds at some MACs on the line through two pairs of them."""
    return least[1] + (most[1] - least[1]) * (macs - least[0]) / max(most[0] - least[0], 1)


def _check(fractions: Sequence[float], setup: Benchmark) -> None:
    """Refuse what would be left out silently, or fail later."""
    plain = Benchmark()
    others = [one.name for one in fields(Benchmark) if one.name not in TAKEN]
    if changed := [name for name in others if getattr(setup, name) != getattr(plain, name)]:
        raise InvalidInput(
            f"a network that a method made is measured without {', '.join(changed)}.",
            why="these are of networks with masks, or of other engines.",
            next=f"leave them out; it takes {', '.join(TAKEN)}.",
        )
    if not all(0 <= fraction <= 1 for fraction in fractions):
        raise InvalidInput(
            f"the fractions are {', '.join(f'{fraction:g}' for fraction in fractions)}.",
            next="give shares of open positions from 0 to 1, e.g. 0.5,0.3.",
        )


# -- what is timed of each method ----------------------------------------------------------------------


def _calls(net: ConvertedModel, images: Tensor, fractions: Sequence[float]) -> tuple[Calls, tuple[str, ...]]:
    """By name: MACs, and what is timed; the network it was made from first. And the operations not among the MACs."""
    if isinstance(net, SampledModel):
        return _of_gates(net, images, fractions)
    if isinstance(net, AnytimeModel):
        return _of_exits(net, images)
    assert isinstance(net, ResampledModel)
    return _of_samples(net, images)


def _of_gates(net: SampledModel, images: Tensor, fractions: Sequence[float]) -> tuple[Calls, tuple[str, ...]]:
    fast = net.optimize()
    counted = fast.macs(images)
    calls: dict[str, tuple[int, Callable[[Tensor], object]]] = {
        DENSE: (counted.dense, fast.dense),
        "its own gates": (counted.total, fast),
    }
    shares = sorted({0.0, *map(float, fractions), 1.0})
    for share in shares:
        name, opened = {0.0: CLOSED, 1.0: OPEN}.get(share, f"{share:g} open, in areas"), Opened(share)
        with _forced(fast, opened):
            macs = fast.macs(images).total
        calls[name] = (macs, partial(_run_forced, fast, opened))
    return calls, counted.not_counted


@contextlib.contextmanager
def _forced(net: SampledModel, opened: Opened) -> Iterator[None]:
    """Gates opened at a share of their positions within."""
    net.score_override = opened
    try:
        yield
    finally:
        net.score_override = None


def _run_forced(net: SampledModel, opened: Opened, images: Tensor) -> object:
    with _forced(net, opened):
        return net(images)


def _of_exits(net: AnytimeModel, images: Tensor) -> tuple[Calls, tuple[str, ...]]:
    fast = net.optimize()
    counted = net.macs(images)
    return {
        "all exits, everything computed": (counted[-1].dense, partial(fast, threshold=net.everything)),
        f"all exits, threshold {in_words(net.threshold)}": (counted[-1].macs, fast),
    }, counted.not_counted


def _of_samples(net: ResampledModel, images: Tensor) -> tuple[Calls, tuple[str, ...]]:
    fast, counted = net.optimize(), net.macs(images)
    return {
        f"{WHOLE}, optimised": (counted.original, fast.network),
        f"sampled by {net.sampler.spec()}": (counted.total, fast),
    }, counted.not_counted
