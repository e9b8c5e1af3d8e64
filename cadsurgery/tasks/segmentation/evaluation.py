"""Accuracy of masks and output strides on labelled images, or fidelity to the dense network on others, against work
and time, beside the dense networks."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from itertools import groupby, islice
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cadsurgery.data import SegmentationData, open_data
from cadsurgery.data.images import normalise
from cadsurgery.masks import MaskProvider, labelled, resolve_mask
from cadsurgery.methods.anytime import AnytimeModel
from cadsurgery.methods.sampling import SampledModel
from cadsurgery.methods.storage import SiblingModel
from cadsurgery.network.macs import MASK_LAYERS, LayerWork, layer_work
from cadsurgery.network.model import AdaptiveModel
from cadsurgery.support.divergence import KINDS, Kind
from cadsurgery.support.errors import CadError, InvalidInput, check_name, describe_error
from cadsurgery.support.processes import gather, own_device, shard, world
from cadsurgery.tasks.by_method import open_any
from cadsurgery.tasks.exits import ExitReport, evaluate_exits
from cadsurgery.tasks.for_each import Failures, Step, each, silent
from cadsurgery.tasks.gates import GateReport, evaluate_gates
from cadsurgery.tasks.open import at_strides, provenance
from cadsurgery.tasks.report import add_times, check_outputs
from cadsurgery.tasks.samples import SampleReport, evaluate_resampled
from cadsurgery.tasks.segmentation.fidelity import FidelityMetrics
from cadsurgery.tasks.segmentation.metrics import SegmentationMetrics
from cadsurgery.tasks.segmentation.report import EvaluationReport, EvaluationRow

HIGH, LOW = "all", "none"


def evaluate(
    network: str | nn.Module,
    data: str | SegmentationData,
    masks: Sequence[object] = (),
    *,
    output_stride: Sequence[tuple[int, int] | None] = (),
    options: Mapping[str, Any] | None = None,
    weights: str = "auto",
    split: str = "test",
    limit: int | None = None,
    batch: int = 1,
    rounds: int = 3,
    kind: Kind = "auto",
    device: str = "cpu",
    output: Path | None = None,
    picture: Path | None = None,
    thresholds: Sequence[float | Sequence[float]] = (),
    step: Step = silent,
    trust: bool = False,
) -> EvaluationReport | ExitReport | GateReport | SampleReport:
    """Evaluate every mask at every pair of output strides, and beside them both dense networks of each pair.

    Without labels the figures are fidelity: what the dense network of the high output stride gives for an image stands
    for its labels, see `FidelityMetrics`; the outputs may be anything that has maps.

    Each image is read once and all settings are run on it, with `net.optimize()`. MACs are exact for every image.
    Under `torchrun` or `accelerate launch` each process takes its share of the images; every process returns the same
    figures, the first one measures times and writes.

    Args:
        network: a converted network or file, a network by name or `module:function`, or a module to convert.
        data: images with or without labels, or their spec; see `open_data`.
        masks: anything `adaptify` takes; default: the converted network's own, or `"edges"`.
        output_stride: pairs (high, low); default: the converted network's, or that of `adaptify`.
        options: further ones for `adaptify`; a converted network keeps its own.
        weights: of a network by name; see `build_model`.
        split: of data by spec.
        limit: the first so many images only.
        batch: images in one call; those that follow one another and have one size.
        rounds: of timing on the first image, all settings in turn; 0 for none.
        kind: of the outputs, without labels: `classes` or `values`; `auto` tells by the first, see
            `cadsurgery.support.divergence.kind_of`.
        device: "cpu" or "cuda".
        output: JSON file to write.
        picture: PNG to draw: accuracy against work.
        thresholds: of confidence, of a network with exits, whose exits are evaluated; each is one number, or one of
            each exit but the last; default: its own.
        step: called with what is being done.
        trust: run code that a converted file names; see `cadsurgery.load`.

    Raises:
        InvalidInput: the network's output is no map of scores, or of another number of classes than the data; without
            labels, it has no maps, or a mask asks for labels; an impossible option.
        CadError: not one image could be used (that image's error); or a name, file or option is refused.
    """
    _check(limit, batch, rounds)
    check_name("kind of output", kind, KINDS)
    check_outputs(output, picture=picture)
    where = own_device(device)
    for mask in masks:
        resolve_mask(mask)  # a typo should not wait for the network to be built
    samples = (open_data(data, split) if isinstance(data, str) else data).first(limit)
    told: Any = {"rounds": rounds, "device": where, "output": output, "picture": picture, "step": step}
    if (made := open_any(network, trust)) is not None:
        has_masks = bool(masks or output_stride)
        return _evaluate_made(made, samples, has_masks, thresholds, network=network, **told)
    if thresholds:
        raise InvalidInput(
            "thresholds are of networks with exits, and this one has none.",
            next="convert it with cs.anytime.",
        )
    step("building and converting")
    nets, source = at_strides(network, output_stride, options or {}, weights=weights, trust=trust)
    settings = [setting for net in nets for setting in _settings(net, masks, where)]
    tallies = [
        Tally(SegmentationMetrics(len(samples.classes)) if samples.is_labelled else FidelityMetrics(kind))
        for _ in settings
    ]
    failures = Failures("image")
    first: tuple[Tensor, Tensor | None] | None = None
    done = 0
    for positions, images, labels in _batches(samples, batch, failures):
        step(f"{done + len(images)} of {len(shard(samples.names))} images")
        images = normalise(images, source).to(where).contiguous(memory_format=torch.channels_last)
        known = labels.to(where) if samples.is_labelled else None
        try:
            found = settings[0](images, known)
        except (CadError, RuntimeError) as error:  # whatever the network itself says of an image of this size
            for position in positions:
                failures.at(position, samples.names[position])
                failures.note(_not_taken(error, images))
            continue
        first = first or (images[:1], None if known is None else known[:1])
        truth: Any = known
        for setting, tally in zip(settings, tallies, strict=True):
            found = found if setting is settings[0] else setting(images, known)
            if known is None and setting.mask.spec() == HIGH:
                truth = found  # for all settings of its network, of which it is the first
            tally.add(setting, images, found, truth, samples)
        done += len(images)
    tallies = [merge(parts) for parts in zip(*gather(tallies, where), strict=True)]
    failed = failures.gather(where)
    count = tallies[0].counts["images"]
    if not count:
        raise CadError.from_dict(failed[0])
    rows = [_row(*pair, samples.classes) for pair in zip(settings, tallies, strict=True)]
    kinds = [tally.metrics.kind for tally in tallies if isinstance(tally.metrics, FidelityMetrics)]
    if rounds and first is not None and world().is_main:
        step("measuring")
        rows = add_times(rows, [partial(setting, *first) for setting in settings], rounds)
    report = EvaluationReport(
        data=samples.name,
        split=samples.split,
        fidelity=kinds[0] if kinds else None,
        images=count,
        batch=batch,
        image=tuple(first[0].shape[1:]) if first is not None else (),
        rounds=rounds,
        processes=world().size,
        normalisation=str(nets[0].normalisation or ""),
        rows=tuple(rows),
        failed=tuple(failed),
        **provenance(network, source, where),
    )
    if world().is_main:
        report.write(output, picture)
    return report


def _evaluate_made(
    net: SiblingModel, samples: SegmentationData, has_masks: bool, thresholds: Sequence[Any], **told: Any
) -> ExitReport | GateReport | SampleReport:
    """What a method made, as it is evaluated."""
    if isinstance(net, AnytimeModel):
        if has_masks:
            raise InvalidInput(
                "a network with exits has no masks.", next="leave out masks and output strides."
            )
        return evaluate_exits(net, samples, thresholds, **told)
    if has_masks or thresholds:
        kind = "with gates" if isinstance(net, SampledModel) else "whose input is sampled"
        raise InvalidInput(
            f"a network {kind} has no masks and no thresholds.",
            next="leave out masks, output strides and thresholds.",
        )
    if isinstance(net, SampledModel):
        return evaluate_gates(net, samples, **told)
    return evaluate_resampled(net, samples, **told)


@dataclass(frozen=True)
class Setting:
    """One mask on one converted network.

    Attributes:
        net: as converted, for its plan and work.
        fast: its optimised copy, which is run.
        mask: the provider.
        work: of layers by shape of the batch, shared by the settings of a network; None where it is not linear.
        of_mask: MACs that the mask itself takes, by shape of the batch.
    """

    net: AdaptiveModel
    fast: AdaptiveModel
    mask: MaskProvider
    work: dict[tuple[int, ...], tuple[LayerWork, ...] | None]
    of_mask: dict[tuple[int, ...], int] = field(default_factory=dict)

    def __call__(self, images: Tensor, labels: Tensor | None) -> Any:
        """The network's output under this mask; masks may see the labels (B, H, W), if there are any."""
        with torch.inference_mode(), _labelled(labels):
            return self.fast(images, mask=self.mask)

    def macs(self, images: Tensor, labels: Tensor | None) -> dict[str, int]:
        """Of the call before, on the same images: with the mask and everything high, of the network and of its
        adaptive region."""
        shape = tuple(images.shape)
        if shape not in self.work:
            self.work[shape] = layer_work(self.net, images)
        inside = {decision.node for decision in self.net.plan.chosen("adapt", "keep")}
        layers, lattice, counts = self.work[shape], self.fast.lattice, []
        if layers is None or shape not in self.of_mask:
            with _labelled(labels):
                report = self.net.macs(images, mask=self.mask)
            self.of_mask[shape] = report.of_mask
            counts = [(e.layer, e.mask, e.high) for e in report.layers if e.layer not in MASK_LAYERS]
        if layers is not None:
            size, where = lattice.whole_size, lattice.levels.device
            high = self.net.geometry.uniform(0, lattice.batch, size, where)
            counts = [(entry.layer, entry.on(lattice), entry.on(high)) for entry in layers]
        of_mask = self.of_mask[shape]
        return {
            "macs": of_mask + sum(mask for _, mask, _ in counts),
            "macs_high": sum(high for *_, high in counts),
            "region": of_mask + sum(mask for name, mask, _ in counts if name in inside),
            "region_high": sum(high for name, _, high in counts if name in inside),
        }


@dataclass
class Tally:
    """Sums over the images one setting has seen, which shares of the images merge to exactly.

    Attributes:
        metrics: accuracy, or fidelity.
        counts: of `images`, of fine `pixels` and of `active` ones at level 0, and of MACs, see `Setting.macs`.
    """

    metrics: SegmentationMetrics | FidelityMetrics
    counts: Counter[str] = field(default_factory=Counter)

    def add(self, setting: Setting, images: Tensor, output: Any, truth: Any, data: SegmentationData) -> None:
        """Add what a setting gave for a batch, beside the labels (B, H, W), or the output that stands for them."""
        if isinstance(self.metrics, FidelityMetrics):
            self.metrics.update(output, truth, (images.shape[2], images.shape[3]))
        else:
            self.metrics.update(_prediction(output, truth.shape[1:], data), truth)
        levels = setting.fast.levels
        of_call = {"images": len(images), "active": int((levels == 0).sum()), "pixels": levels.numel()}
        labels = truth if data.is_labelled else None
        self.counts.update(of_call | setting.macs(images, labels))


def _labelled(labels: Tensor | None) -> AbstractContextManager[None]:
    return nullcontext() if labels is None else labelled(labels)


def _prediction(output: Any, size: tuple[int, ...], data: SegmentationData) -> Tensor:
    """(B, H, W): the class of each pixel."""
    scores = scores_of(output)
    if scores.shape[1] != len(data.classes):
        raise InvalidInput(
            f"the network has {scores.shape[1]} classes and data {data.name} has {len(data.classes)}.",
            next="evaluate a network trained on these classes, or open the data with its classes.",
        )
    return F.interpolate(scores.float(), size=size, mode="bilinear", align_corners=False).argmax(1)


def scores_of(output: Any) -> Tensor:
    """Class scores (B, C, h, w) of a network's output: a tensor, or the entry `out` of a dictionary.

    Raises:
        InvalidInput: it is something else.
    """
    scores = output.get("out") if isinstance(output, Mapping) else output
    if not isinstance(scores, Tensor) or scores.dim() != 4:
        shape = f"of shape {tuple(scores.shape)}" if isinstance(scores, Tensor) else type(output).__name__
        raise InvalidInput(
            f"the network's output is no map of class scores: {shape}.",
            next="evaluate a segmentation network: it returns (batch, classes, height, width), or a "
            'dictionary with that as "out".',
        )
    return scores


def merge(parts: Sequence[Tally]) -> Tally:
    """The sums of several parts of a split."""
    whole = copy.deepcopy(parts[0])
    for part in parts[1:]:
        whole.metrics.merge(part.metrics)  # type: ignore[arg-type]  # all of one run are of one class
        whole.counts.update(part.counts)
    return whole


def _settings(net: AdaptiveModel, masks: Sequence[object], where: torch.device) -> list[Setting]:
    """Dense high, the masks, dense low. Masks are copied, since they go to the device and stop training."""
    chosen = [
        copy.deepcopy(resolve_mask(mask)).eval().to(where) for mask in (HIGH, *(masks or (net.mask,)), LOW)
    ]
    middle = [mask for mask in chosen if mask.spec() not in (HIGH, LOW)]
    net, work = copy.deepcopy(net).to(where).eval(), dict[tuple[int, ...], tuple[LayerWork, ...] | None]()
    fast = net.optimize()
    return [Setting(net, fast, mask, work) for mask in (chosen[0], *middle, chosen[-1])]


def _batches(
    data: SegmentationData, size: int, failures: Failures
) -> Iterator[tuple[tuple[int, ...], Tensor, Tensor]]:
    """Positions, images (B, 3, H, W) and labels (B, H, W) of this process's share; unusable ones are noted and left
    out."""
    items = each(range(len(data)), data.__getitem__, failures, name=data.names.__getitem__)
    for _, alike in groupby(items, key=lambda item: item[1][0].shape):
        while batch := list(islice(alike, size)):
            positions, pairs = zip(*batch, strict=True)
            images, labels = zip(*pairs, strict=True)
            yield positions, torch.stack(images), torch.stack(labels)


def _not_taken(error: Exception, images: Tensor) -> CadError:
    """The refusal of images that a network cannot be run on."""
    if isinstance(error, CadError):
        return error
    return InvalidInput(
        f"the network does not take an image of {images.shape[2]}x{images.shape[3]} pixels.",
        why=describe_error(error),
        next="resize or crop the images to sizes that it takes, e.g. multiples of its strides.",
    )


def _row(setting: Setting, tally: Tally, classes: Sequence[str]) -> EvaluationRow:
    figures, counts = tally.metrics.compute(), tally.counts
    mask, region_high = setting.mask.spec(), counts["region_high"]
    classes = classes or [f"class {place}" for place in range(len(figures["iou"]))]
    return EvaluationRow(
        mask=mask or "a function",
        output_stride=setting.net.plan.output_stride,
        anchor=mask in (HIGH, LOW),
        active_fraction=counts["active"] / counts["pixels"],
        macs=counts["macs"] / counts["images"],
        macs_of_high=counts["macs"] / counts["macs_high"],
        region_of_high=counts["region"] / region_high if region_high else 1.0,
        iou=dict(zip(classes, figures["iou"], strict=True)),
        **{name: value for name, value in figures.items() if name not in ("iou", "pixels")},
    )


def _check(limit: int | None, batch: int, rounds: int) -> None:
    if (limit is not None and limit < 1) or batch < 1 or rounds < 0:
        raise InvalidInput(
            f"limit={limit}, batch={batch}, rounds={rounds} leave nothing to do.",
            next="give at least 1 image, 1 image a call and 0 rounds.",
        )
