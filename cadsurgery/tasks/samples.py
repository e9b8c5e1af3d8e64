"""Networks whose input is sampled, by name and file: converted, and evaluated beside the network itself."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
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
from cadsurgery.masks import labelled
from cadsurgery.methods.resampling import ResampledModel, UniformSampler, resample
from cadsurgery.support.divergence import maps_of, resize
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
    against_macs,
    canvas,
    check_outputs,
    number,
    ratio,
    table,
)
from cadsurgery.tasks.segmentation.metrics import SegmentationMetrics
from cadsurgery.tasks.segmentation.report import percent

WHOLE = "the whole image"


# -- evaluating ----------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class SampleRow(TimedRow):
    """One way to see the images.

    Attributes:
        sampler: of the network, `uniform`, or `WHOLE`: the network without sampling.
        miou: mean IoU, 0..1.
        of_targets: that of the classes whose boundaries matter; None where none of them is in the data.
        iou: of each class by name; None for a class in neither predictions nor labels.
        pixel_accuracy: share of right pixels.
        macs: multiply-accumulates, the sampler's own included, mean over images.
        macs_of_sampler: those of the sampler.
    """

    sampler: str
    miou: float | None
    of_targets: float | None
    iou: dict[str, float | None]
    pixel_accuracy: float | None
    macs: float
    macs_of_sampler: float


@dataclass(frozen=True, kw_only=True)
class SampleReport(MethodEvaluation):
    """Accuracy against work and time of a sampled input.

    Attributes:
        size: (height, width) of the sampled images.
        targets: classes whose boundaries matter, by name.
        rows: the network's own sampler, equal distances, the whole image.
    """

    size: tuple[int, int]
    targets: tuple[str, ...]
    rows: tuple[SampleRow, ...]

    def in_words(self) -> str:
        """How many images, and their size."""
        return f"{super().in_words()} sampled at {'x'.join(map(str, self.size))}"

    def tables(self) -> Iterator[Table]:
        """A row for each way."""
        whole = self.rows[-1]
        columns: list[Column[SampleRow]] = [
            Column("sampled by", lambda row: row.sampler, False),
            Column("mIoU", lambda row: percent(row.miou)),
            Column("targets", lambda row: percent(row.of_targets)),
            Column("pixels", lambda row: percent(row.pixel_accuracy)),
            Column("MACs", lambda row: f"{row.macs:.3e}"),
            Column("of whole", lambda row: f"{row.macs / whole.macs:.3f}"),
            Column("ms", lambda row: number(row.milliseconds)),
            Column("of whole", lambda row: ratio(row.milliseconds, whole.milliseconds)),
        ]
        yield table(self.rows, columns, style=lambda row: "dim" if row.sampler == WHOLE else "")

    def figure(self) -> Figure:
        """Mean IoU of all classes and of the targets against MACs."""
        figure = canvas(5.5, 4)
        axes = figure.subplots()
        for place, row in enumerate(self.rows):
            for marker, value in (("o", row.miou), ("^", row.of_targets)):
                if value is not None:
                    label = row.sampler if marker == "o" else None
                    axes.plot(
                        [row.macs], [100 * value], marker, color=COLOURS[place % len(COLOURS)], label=label
                    )
        axes.set_xlim(left=0)
        against_macs(axes, "MACs of one image", "mean IoU, %: all classes (dots), targets (triangles)")
        figure.suptitle(f"{self.model}, {self.images} images", fontsize=10)
        return figure


@dataclass(frozen=True)
class _Way:
    """One way to see images: the network, its inference copy, and what is counted of it."""

    name: str
    net: ResampledModel
    fast: nn.Module
    metrics: SegmentationMetrics
    work: list[tuple[int, int]]

    def __call__(self, images: Tensor) -> Tensor:
        """Class scores."""
        return maps_of(self.fast(images))[-1]

    def count(self, images: Tensor) -> tuple[int, int]:
        """MACs in all, and of the sampler."""
        found = self.net.macs(images)
        return (found.original, 0) if self.name == WHOLE else (found.total, found.sampler)


def evaluate_resampled(
    net: ResampledModel,
    samples: SegmentationData,
    *,
    network: object = None,
    rounds: int = 3,
    device: torch.device | str = "cpu",
    output: Path | None = None,
    picture: Path | None = None,
    step: Step = silent,
) -> SampleReport:
    """Accuracy, work and time of a sampled input, beside equal distances at the same size and the whole image.

    Args:
        net: whose inference copy is run.
        samples: with labels, which a sampler may ask for.
        network: what the report calls it: a file, or the network.
        rounds: of timing on the first image, all in turn; 0 for none.
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
            "sampled inputs are evaluated on labels.", next="give labelled data, see cadsurgery eval --help."
        )
    where, source = torch.device(device), source_of(net)
    net = copy.deepcopy(net).eval().to(where)
    fast, options = net.optimize(), net.sampler.options
    uniform = copy.deepcopy(net)
    uniform.location_sampler = UniformSampler(options)
    of_uniform = copy.copy(fast)
    of_uniform._modules = {**fast._modules, "location_sampler": uniform.sampler}
    named: list[tuple[str, ResampledModel, nn.Module]] = [
        (net.sampler.spec(), net, fast),
        *([] if isinstance(net.sampler, UniformSampler) else [("uniform", uniform, of_uniform)]),
        (WHOLE, net, fast.network),
    ]
    ways = [_Way(*one, SegmentationMetrics(len(samples.classes)), []) for one in named]
    failures, first = Failures("image"), None

    def work(batch: Tensor, labels: Tensor) -> list[tuple[Tensor, tuple[int, int]]]:
        with torch.inference_mode(), labelled(labels.unsqueeze(0).to(where)):
            return [(way(batch).float(), way.count(batch)) for way in ways]

    for batch, labels, found in each_labelled(samples, source, where, work, failures, step):
        first = (batch, labels.unsqueeze(0).to(where)) if first is None else first
        for way, (scores, counted) in zip(ways, found, strict=True):
            way.metrics.update(resize(scores, labels.shape).argmax(1).cpu(), labels.unsqueeze(0))
            way.work.append(counted)
    failed = failures.gather(where)
    if first is None:
        raise CadError.from_dict(failed[0])
    chosen = range(len(samples.classes)) if options.targets is None else options.targets
    targets = [samples.classes[place] for place in chosen if place < len(samples.classes)]
    rows = [_row(way, samples, targets) for way in ways]
    if rounds:
        step("measuring")
        image, truth = first
        with labelled(truth):
            rows = add_times(rows, [partial(way, image) for way in ways], rounds)
    report = SampleReport(
        data=samples.name,
        split=samples.split,
        images=len(ways[0].work),
        image=tuple(first[0].shape[1:]),
        size=net.size,
        targets=tuple(targets),
        rounds=rounds,
        rows=tuple(rows),
        failed=tuple(failed),
        **provenance(network or net, source, where),
    )
    report.write(output, picture)
    return report


def _row(way: _Way, samples: SegmentationData, targets: list[str]) -> SampleRow:
    figures = way.metrics.compute()
    iou = dict(zip(samples.classes, figures["iou"], strict=True))
    known = [value for name in targets if (value := iou[name]) is not None]
    work = [sum(part) / len(way.work) for part in zip(*way.work, strict=True)]
    return SampleRow(
        sampler=way.name,
        miou=figures["miou"],
        of_targets=sum(known) / len(known) if known else None,
        iou=iou,
        pixel_accuracy=figures["pixel_accuracy"],
        macs=work[0],
        macs_of_sampler=work[1],
    )


# -- converting ----------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class SamplingReport(MethodReport):
    """What `cadsurgery convert --method resampling` tells.

    `sides` are the network on the whole image, and on the sampled one; `error` is how far the network is from the
    original with equal distances at the size of the image, relative.
    """

    error: float | None

    def verified(self) -> str:
        """How far it is from the original."""
        told = f"uniform at the image's size it is the original (relative error {self.error or 0:.1e})"
        return "" if self.error is None else told

    def new(self) -> str:
        """A sampler that has to be trained."""
        told = "the sampler is new: train it with cadsurgery finetune --objective locations"
        return told if self.plan.sampler == "learned" else ""


def convert_resampled(*, options: Mapping[str, Any], verify: bool, **told: Any) -> SamplingReport:
    """Build, put a sampler before it, verify, measure and save; see `cadsurgery convert --help`.

    Args:
        options: of `cadsurgery.resample`.
        verify: whether the original is compared.
        told: of `Conversion.begin`.
    """
    conversion = Conversion.begin(ResampledModel.method, **told)
    before, batch = conversion.before, conversion.batch
    net = resample(before, **options)
    error = None
    if verify:
        conversion.step("verifying")
        same = resample(before, "uniform", (batch.shape[2], batch.shape[3]), example_input=batch)
        with torch.inference_mode():
            found, expected = (maps_of(one(batch))[0] for one in (same, before))
            expected = resize(expected, batch.shape[2:])
        error = float((found - expected).abs().max() / expected.abs().max())
    fast = net.optimize()
    with labelled(torch.zeros(batch.shape[0], *batch.shape[2:], dtype=torch.int64, device=batch.device)):
        counted = net.macs(batch)
        calls: Calls = {
            WHOLE: (counted.original, before),
            f"sampled by {net.sampler.spec()}": (counted.total, net),
            "sampled, net.optimize()": (counted.total, fast),
        }
        return SamplingReport(**conversion.end(net, calls, counted.not_counted), error=error)
