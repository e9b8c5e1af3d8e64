"""Networks with gates by name and file: converted, evaluated beside the dense network, and what they cost."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from rich.table import Table
from torch import Tensor, nn

from cadsurgery.data import SegmentationData
from cadsurgery.data.networks import source_of
from cadsurgery.methods.sampling import SampledModel, sample
from cadsurgery.support.divergence import maps_of, resize, tensors_of
from cadsurgery.support.errors import CadError, CannotConvert, InvalidInput
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
    against_macs,
    canvas,
    check_outputs,
    number,
    ratio,
    table,
)
from cadsurgery.tasks.segmentation.metrics import SegmentationMetrics
from cadsurgery.tasks.segmentation.report import percent

DENSE, GATES = "dense", "its gates"


# -- evaluating ----------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class GateRow(TimedRow):
    """The network dense, or with its gates.

    Attributes:
        setting: `DENSE` or `GATES`.
        density: share of positions that are computed, by the work at each, mean over images.
        miou: mean IoU, 0..1.
        iou: of each class by name; None for a class in neither predictions nor labels.
        pixel_accuracy: share of right pixels.
        macs: multiply-accumulates, the gates' own included, mean over images.
    """

    setting: str
    density: float
    miou: float | None
    iou: dict[str, float | None]
    pixel_accuracy: float | None
    macs: float


@dataclass(frozen=True, kw_only=True)
class GateReport(MethodEvaluation):
    """Accuracy against work and time of a network with gates, beside the dense one.

    Attributes:
        rows: dense, and with its gates.
    """

    rows: tuple[GateRow, ...]

    def tables(self) -> Iterator[Table]:
        """A row for each."""
        dense = self.rows[0]
        columns: list[Column[GateRow]] = [
            Column("network", lambda row: row.setting, False),
            Column("open", lambda row: f"{row.density:.3f}"),
            Column("mIoU", lambda row: percent(row.miou)),
            Column("pixels", lambda row: percent(row.pixel_accuracy)),
            Column("MACs", lambda row: f"{row.macs:.3e}"),
            Column("of dense", lambda row: f"{row.macs / dense.macs:.3f}"),
            Column("ms", lambda row: number(row.milliseconds)),
            Column("of dense", lambda row: ratio(row.milliseconds, dense.milliseconds)),
        ]
        yield table(self.rows, columns)

    def figure(self) -> Figure:
        """Mean IoU against MACs."""
        figure = canvas(5.5, 4)
        axes = figure.subplots()
        for row, colour in zip(self.rows, ("#222222", COLOURS[0]), strict=True):
            axes.plot([row.macs], [100 * (row.miou or 0)], "o", color=colour, label=row.setting)
        axes.set_xlim(left=0)
        against_macs(axes, "MACs of one image", "mean IoU, %")
        figure.suptitle(f"{self.model}, {self.images} images", fontsize=10)
        return figure


def evaluate_gates(
    net: SampledModel,
    samples: SegmentationData,
    *,
    network: object = None,
    rounds: int = 3,
    device: torch.device | str = "cpu",
    output: Path | None = None,
    picture: Path | None = None,
    step: Step = silent,
) -> GateReport:
    """Accuracy, work and time of a network with gates, beside the dense network.

    Args:
        net: whose inference copy is run.
        samples: with labels.
        network: what the report calls it: a file, or the network.
        rounds: of timing on the first image, both in turn; 0 for none.
        device: to run on.
        output: JSON file to write.
        picture: PNG to draw.
        step: called with what is being done.

    Raises:
        InvalidInput: data without labels.
        CadError: not one image could be used.
    """
    check_outputs(output, picture=picture)
    if not samples.is_labelled:
        raise InvalidInput(
            "gates are evaluated on labels.", next="give labelled data, see cadsurgery eval --help."
        )
    where, source = torch.device(device), source_of(net)
    fast = copy.deepcopy(net).eval().to(where).optimize()
    calls: dict[str, Callable[[Tensor], Any]] = {DENSE: fast.dense, GATES: fast}
    metrics = {name: SegmentationMetrics(len(samples.classes)) for name in calls}
    work, failures, first = list[tuple[int, int, float]](), Failures("image"), None

    def see(batch: Tensor, _: Tensor) -> tuple[dict[str, Tensor], tuple[int, int, float]]:
        with torch.inference_mode():
            scores = {name: maps_of(call(batch))[-1].float() for name, call in calls.items()}
            counted = fast.macs(batch)
        return scores, (counted.dense, counted.total, counted.density)

    for batch, labels, (scores, counted) in each_labelled(samples, source, where, see, failures, step):
        first = batch if first is None else first
        work.append(counted)
        for name, values in scores.items():
            metrics[name].update(resize(values, labels.shape).argmax(1).cpu(), labels.unsqueeze(0))
    failed = failures.gather(where)
    if first is None:
        raise CadError.from_dict(failed[0])
    dense, total, density = (sum(part) / len(work) for part in zip(*work, strict=True))
    rows = [
        _row(DENSE, metrics[DENSE], samples, dense, 1.0),
        _row(GATES, metrics[GATES], samples, total, density),
    ]
    if rounds:
        step("measuring")
        rows = add_times(rows, [partial(call, first) for call in calls.values()], rounds)
    report = GateReport(
        data=samples.name,
        split=samples.split,
        images=len(work),
        image=tuple(first.shape[1:]),
        rounds=rounds,
        rows=tuple(rows),
        failed=tuple(failed),
        **provenance(network or net, source, where),
    )
    report.write(output, picture)
    return report


def _row(
    setting: str, metrics: SegmentationMetrics, samples: SegmentationData, macs: float, density: float
) -> GateRow:
    figures = metrics.compute()
    return GateRow(
        setting=setting,
        density=density,
        miou=figures["miou"],
        iou=dict(zip(samples.classes, figures["iou"], strict=True)),
        pixel_accuracy=figures["pixel_accuracy"],
        macs=macs,
    )


# -- converting ----------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class GatesReport(MethodReport):
    """What `cadsurgery convert --method sampling` tells.

    `sides` are the original, the network with its gates open as they start, both as they are and optimised; and the
    optimised copy with everything closed but the grid: what training lies between.
    """

    is_verified: bool

    def verified(self) -> str:
        """Of a conversion that was."""
        return "with open gates it is the original, bit for bit" if self.is_verified else ""

    def new(self) -> str:
        """The gates."""
        return "gates start open: train them with cadsurgery finetune --train gates"


def convert_gates(*, options: Mapping[str, Any], verify: bool, **told: Any) -> GatesReport:
    """Build, add gates, verify, measure and save; see `cadsurgery convert --help`.

    Args:
        options: of `cadsurgery.sample`.
        verify: whether the original is compared.
        told: of `Conversion.begin`.

    Raises:
        CannotConvert: with open gates the network is not the original.
    """
    conversion = Conversion.begin(SampledModel.method, **told)
    before, batch = conversion.before, conversion.batch
    conversion.step("adding gates")
    net = sample(before, **options)
    if verify:
        _check_open(before, net, batch)
    fast, closed = net.optimize(), net.optimize()
    for gate in closed.gates:
        gate.bias.data.neg_()
    counted, least = net.macs(batch), closed.macs(batch)
    calls: Calls = {
        "original": (counted.dense, before),
        "gates open": (counted.total, net),
        "original, optimised": (counted.dense, fast.dense),
        "gates open, net.optimize()": (counted.total, fast),
        "all closed but the grid, net.optimize()": (least.total, closed),
    }
    return GatesReport(**conversion.end(net, calls, counted.not_counted), is_verified=verify)


def _check_open(before: nn.Module, net: SampledModel, batch: Tensor) -> None:
    with torch.inference_mode():
        found, expected = tensors_of(net(batch)), tensors_of(before(batch))
    same = len(found) == len(expected) and all(map(torch.equal, found, expected))
    if not same:
        raise CannotConvert(
            "with all gates open the network is not the original.",
            where=net.plan.branches[0].name,
            why="what it returns on the image differs.",
            next="report it, with the network; --no-verify converts all the same.",
        )
