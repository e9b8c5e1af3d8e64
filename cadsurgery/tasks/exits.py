"""Networks with exits by name and file: converted, evaluated at every exit, run within a deadline."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter
from rich.table import Table
from torch import Tensor, nn

from cadsurgery.data import SegmentationData
from cadsurgery.data.networks import source_of
from cadsurgery.methods.anytime import AnytimeModel, Threshold, anytime
from cadsurgery.network.macs import dense_macs
from cadsurgery.support.divergence import maps_of
from cadsurgery.support.errors import CadError, InvalidInput
from cadsurgery.tasks.by_method import (
    Calls,
    Conversion,
    MethodEvaluation,
    MethodReport,
    each_labelled,
)
from cadsurgery.tasks.for_each import Failures, Step, silent
from cadsurgery.tasks.open import provenance
from cadsurgery.tasks.report import (
    COLOURS,
    Column,
    TimedRow,
    add_times,
    canvas,
    check_outputs,
    number,
    ratio,
    table,
)
from cadsurgery.tasks.segmentation.metrics import SegmentationMetrics
from cadsurgery.tasks.segmentation.report import percent

# -- evaluating ----------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class ExitRow(TimedRow):
    """One exit at one threshold; its time is until its prediction is there.

    Attributes:
        threshold: of confidence, or one of each exit but the last; None where everything is computed.
        exit: its number, from 1.
        name: what it comes after.
        miou: mean IoU, 0..1.
        iou: of each class by name; None for a class in neither predictions nor labels.
        pixel_accuracy: share of right pixels.
        macs: multiply-accumulates up to it, mean over images.
        macs_of_whole: relative to the last exit with everything computed.
    """

    threshold: float | tuple[float, ...] | None
    exit: int
    name: str
    miou: float | None
    iou: dict[str, float | None]
    pixel_accuracy: float | None
    macs: float
    macs_of_whole: float

    @property
    def setting(self) -> str:
        """Its threshold in words."""
        return "all computed" if self.threshold is None else in_words(self.threshold)


def in_words(threshold: float | Sequence[float]) -> str:
    """A threshold, or those of several exits."""
    return " ".join(f"{one:g}" for one in (threshold if isinstance(threshold, Sequence) else [threshold]))


@dataclass(frozen=True, kw_only=True)
class ExitReport(MethodEvaluation):
    """Accuracy against work and time at every exit.

    Attributes:
        rows: with everything computed first, then by threshold.
    """

    rows: tuple[ExitRow, ...]

    def tables(self) -> Iterator[Table]:
        """A row for each threshold and exit."""
        last = {row.exit: row for row in self.rows if row.threshold is None}
        columns: list[Column[ExitRow]] = [
            Column("threshold", lambda row: row.setting),
            Column("exit", lambda row: f"{row.exit} {row.name}", False),
            Column("mIoU", lambda row: percent(row.miou)),
            Column("pixels", lambda row: percent(row.pixel_accuracy)),
            Column("MACs", lambda row: f"{row.macs:.3e}"),
            Column("of whole", lambda row: f"{row.macs_of_whole:.2f}"),
            Column("ms", lambda row: number(row.milliseconds)),
            Column("of whole", lambda row: ratio(row.milliseconds, last[max(last)].milliseconds)),
        ]
        yield table(self.rows, columns, style=lambda row: "dim" if row.threshold is None else "")

    def figure(self) -> Figure:
        """Mean IoU against MACs and, if it was measured, time; a line for each threshold."""
        timed = all(row.milliseconds is not None for row in self.rows)
        figure = canvas(10 if timed else 5.5, 4)
        panels = figure.subplots(1, 2 if timed else 1, squeeze=False)[0]
        sides = [("MACs of one image", lambda row: row.macs), ("milliseconds", lambda row: row.milliseconds)]
        thresholds = list(dict.fromkeys(row.threshold for row in self.rows))
        for axes, (label, work) in zip(panels, sides, strict=False):
            for place, threshold in enumerate(thresholds):
                rows = [row for row in self.rows if row.threshold == threshold]
                name = f"{'' if threshold is None else 'threshold '}{rows[0].setting}"
                style = {"color": "grey", "linestyle": "--"} if threshold is None else {}
                style = style or {"color": COLOURS[place % len(COLOURS)]}
                points = [100 * (row.miou or 0) for row in rows]
                axes.plot(
                    [work(row) for row in rows],
                    points,
                    "o",
                    ls=style.pop("linestyle", "-"),
                    label=name,
                    **style,
                )
            axes.set_xlabel(label)
            axes.set_ylabel("mean IoU, %")
            axes.set_xlim(left=0)
            axes.spines[["top", "right"]].set_visible(False)
        panels[0].xaxis.set_major_formatter(EngFormatter())
        panels[0].legend(frameon=False, fontsize=8)
        figure.suptitle(f"{self.model}, {self.images} images", fontsize=10)
        return figure


def evaluate_exits(
    net: AnytimeModel,
    samples: SegmentationData,
    thresholds: Sequence[float | Sequence[float]] = (),
    *,
    network: object = None,
    rounds: int = 3,
    device: torch.device | str = "cpu",
    output: Path | None = None,
    picture: Path | None = None,
    step: Step = silent,
) -> ExitReport:
    """Accuracy, work and time at every exit, with everything computed and at some thresholds.

    Args:
        net: with exits; its optimised copy is run.
        samples: with labels.
        thresholds: of confidence, each one number or one of each exit but the last; default: the network's own.
        network: what the report calls it: a file, or the network.
        rounds: of timing on the first image, all in turn; 0 for none.
        device: to run on.
        output: JSON file to write.
        picture: PNG to draw.
        step: called with what is being done.

    Raises:
        InvalidInput: data without labels, or of other classes.
        CadError: not one image could be used.
    """
    check_outputs(output, picture=picture)
    if not samples.is_labelled:
        raise InvalidInput(
            "exits are evaluated on labels.", next="give labelled data, see cadsurgery eval --help."
        )
    if len(samples.classes) != net.plan.classes:
        raise InvalidInput(
            f"the network has {net.plan.classes} classes and data {samples.name} has {len(samples.classes)}.",
            next="evaluate a network trained on these classes, or open the data with its classes.",
        )
    where, source = torch.device(device), source_of(net)
    fast = net.eval().optimize().to(where)
    given = [tuple(one) if isinstance(one, Sequence) else one for one in thresholds or (net.threshold,)]
    settings = [net.everything, *(one for one in given if not net.asks_everything(one))]
    exits = range(len(net.plan.exits))
    metrics = [[SegmentationMetrics(len(samples.classes)) for _ in exits] for _ in settings]
    macs = [[0 for _ in exits] for _ in settings]
    failures, first, done = Failures("image"), None, 0

    def work(batch: Tensor, _: Tensor) -> list[tuple[tuple[Tensor, ...], list[int]]]:
        batch = batch.contiguous(memory_format=torch.channels_last)
        return [_count(fast, batch, threshold) for threshold in settings]

    for batch, labels, found in each_labelled(samples, source, where, work, failures, step):
        first, done = batch if first is None else first, done + 1
        for number_, (predictions, counted) in enumerate(found):
            for exit in exits:
                scores = F.interpolate(
                    predictions[exit].float(), labels.shape, mode="bilinear", align_corners=False
                )
                metrics[number_][exit].update(scores.argmax(1).cpu(), labels.unsqueeze(0))
                macs[number_][exit] += counted[exit]
    failed = failures.gather(where)
    if first is None:
        raise CadError.from_dict(failed[0])
    rows = []
    for place, threshold in enumerate(settings):
        for exit in exits:
            figures = metrics[place][exit].compute()
            rows.append(
                ExitRow(
                    threshold=None if net.asks_everything(threshold) else threshold,
                    exit=exit + 1,
                    name=net.plan.exits[exit].name,
                    miou=figures["miou"],
                    iou=dict(zip(samples.classes, figures["iou"], strict=True)),
                    pixel_accuracy=figures["pixel_accuracy"],
                    macs=macs[place][exit] / done,
                    macs_of_whole=macs[place][exit] / macs[0][-1],
                )
            )
    if rounds:
        step("measuring")
        image = first.contiguous(memory_format=torch.channels_last)
        sides = [
            partial(_until_exit, fast, image, threshold, exit) for threshold in settings for exit in exits
        ]
        rows = add_times(rows, sides, rounds)
    report = ExitReport(
        data=samples.name,
        split=samples.split,
        images=done,
        image=tuple(first.shape[1:]),
        rounds=rounds,
        rows=tuple(rows),
        failed=tuple(failed),
        **provenance(network or net, source, where),
    )
    report.write(output, picture)
    return report


def _count(net: AnytimeModel, batch: Tensor, threshold: Threshold) -> tuple[tuple[Tensor, ...], list[int]]:
    """The predictions of an image, and the work up to each."""
    with torch.inference_mode():
        predictions, report = net.predict_and_count(batch, threshold=threshold)
    return predictions, [exit.macs for exit in report]


def _until_exit(net: AnytimeModel, batch: Tensor, threshold: Threshold, exit: int) -> None:
    steps = net.steps(batch, threshold=threshold)
    for _ in range(exit + 1):
        next(steps)


# -- converting ----------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class ExitsReport(MethodReport):
    """What `cadsurgery convert --method anytime` tells.

    `sides` are the original, all exits with everything computed, and the optimised copy at its threshold; `error` is
    how far the last exit is from the original where everything is computed, relative.
    """

    threshold: float | tuple[float, ...]
    error: float | None

    def verified(self) -> str:
        """How far the last exit is from the original."""
        told = f"the last exit is the original (relative error {self.error or 0:.1e})"
        return "" if self.error is None else told

    def new(self) -> str:
        """The heads."""
        return "the heads of the other exits are new: train them with cadsurgery finetune --train exits"


def convert_exits(*, options: Mapping[str, Any], verify: bool, **told: Any) -> ExitsReport:
    """Build, add exits, verify, measure and save; see `cadsurgery convert --help`.

    Args:
        options: of `cadsurgery.anytime`; None for its own defaults.
        verify: whether the original is compared.
        told: of `Conversion.begin`.
    """
    conversion = Conversion.begin(AnytimeModel.method, **told)
    before, batch = conversion.before, conversion.batch
    conversion.step("adding exits")
    net = anytime(before, **{name: value for name, value in options.items() if value is not None})
    error = _difference(before, net, batch) if verify else None
    counted, fast = net.macs(batch), net.optimize()
    calls: Calls = {
        "original": (dense_macs(before, batch), before),
        "all exits, everything computed": (counted[-1].dense, partial(fast, threshold=net.everything)),
        f"all exits, threshold {in_words(net.threshold)}": (counted[-1].macs, fast),
    }
    return ExitsReport(
        **conversion.end(net, calls, counted.not_counted), threshold=net.threshold, error=error
    )


def _difference(before: nn.Module, net: AnytimeModel, batch: Tensor) -> float | None:
    """Relative error of the last exit against the network; None for a backbone, whose heads are all new."""
    if len(net.heads) == len(net.plan.exits):
        return None
    with torch.inference_mode():
        expected, found = maps_of(before(batch))[0], net(batch, threshold=net.everything)[-1]
    return float((found - expected).abs().max() / expected.abs().max())
