"""Accuracy of masks and output strides on labelled images, against work and time, beside the dense networks."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cadsurgery.data import SegmentationData, open_data
from cadsurgery.data.images import check_picture, normalise, write_picture
from cadsurgery.data.networks import Source, build_again, source_of
from cadsurgery.masks import resolve_mask
from cadsurgery.network.adaptify import adaptify
from cadsurgery.network.macs import LayerWork
from cadsurgery.network.model import AdaptiveModel
from cadsurgery.network.storage import load
from cadsurgery.support.errors import CadError, InvalidInput
from cadsurgery.support.files import check_folder, written_whole
from cadsurgery.support.processes import gathered, in_order, own_device, shard, start_others, world
from cadsurgery.support.provenance import commit, device_in_words, versions
from cadsurgery.support.timing import Timing, interleaved
from cadsurgery.tasks.convert import Step, build, is_file, weights_in_words
from cadsurgery.tasks.figures import evaluation_figure, figure_picture
from cadsurgery.tasks.segmentation.counters import Setting, Tally, merged
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
    device: str = "cpu",
    output: Path | None = None,
    picture: Path | None = None,
    step: Step = lambda text: None,
    trust: bool = False,
) -> EvaluationReport:
    """Evaluate every mask at every pair of output strides, and beside them both dense networks of each pair.

    Each image is read once and all settings are run on it, with `net.optimize()`. MACs are exact for every image.
    Under `accelerate launch` or `torchrun` each process takes its share of the images; every process returns the same
    figures, the first one measures times and writes.

    Args:
        network: a converted network or file, a network by name or `module:function`, or a module to convert.
        data: labelled images, or their spec; see `open_data`.
        masks: anything `adaptify` takes; default: the converted network's own, or `"edges"`.
        output_stride: pairs (high, low); default: the converted network's, or that of `adaptify`.
        options: further ones for `adaptify`; a converted network keeps its own.
        weights: of a network by name; see `build_model`.
        split: of data by spec.
        limit: the first so many images only.
        batch: images in one call; those that follow one another and have one size.
        rounds: of timing on the first image, all settings in turn; 0 for none.
        device: "cpu" or "cuda".
        output: JSON file to write.
        picture: PNG to draw: accuracy against work.
        step: called with what is being done.
        trust: run code that a converted file names; see `cadsurgery.load`.

    Raises:
        InvalidInput: the network's output is no map of scores, or of another number of classes than the data; an
            impossible option.
        CadError: not one image could be used (that image's error); or a name, file or option is refused.
    """
    start_others()
    _check(limit, batch, rounds)
    if output is not None:
        check_folder(output)
    if picture is not None:
        check_picture(picture, "--picture")
    where = own_device(device)
    for mask in masks:
        resolve_mask(mask)  # a typo should not wait for the network to be built
    found = (open_data(data, split) if isinstance(data, str) else data).first(limit)
    SegmentationMetrics(len(found.classes))  # what it needs should be missed now
    step("building and converting")
    nets = _networks(network, weights, output_stride, dict(options or {}), trust)
    source = source_of(network if isinstance(network, nn.Module) else nets[0])
    settings = [setting for net in nets for setting in _settings(net, masks, where)]
    tallies = [Tally(SegmentationMetrics(len(found.classes))) for _ in settings]
    failed: list[tuple[int, dict[str, str]]] = []
    refusals: list[CadError] = []
    first: tuple[Tensor, Tensor] | None = None
    done = 0
    for images, labels in _batches(found, batch, failed, refusals):
        step(f"{done + len(images)} of {len(shard(found.names))} images")
        pair = (
            normalise(images, source).to(where).contiguous(memory_format=torch.channels_last),
            labels.to(where),
        )
        first = first or (pair[0][:1], pair[1][:1])
        for setting, tally in zip(settings, tallies, strict=True):
            tally.add(setting, *pair, found)
        done += len(images)
    shares = gathered((tallies, failed), where)
    tallies = [merged(parts) for parts in zip(*(share[0] for share in shares), strict=True)]
    failures = in_order([share[1] for share in shares])
    if not tallies[0].images:
        raise refusals[0] if refusals else CadError(failures[0]["what"], next="check the data.")
    times: dict[str, Timing] = {}
    if rounds and first is not None and world().is_main:
        step("measuring")
        times = _times(settings, *first, rounds)
    report = EvaluationReport(
        model=source.name,
        weights=weights_in_words(network, source),
        random=source.weights == "random",
        data=found.name,
        split=found.split,
        images=tallies[0].images,
        batch=batch,
        image=tuple(first[0].shape[1:]) if first is not None else (),
        rounds=rounds,
        processes=world().size,
        device=f"{device_in_words(where)}, {torch.get_num_threads()} threads",
        versions=versions(),
        commit=commit(),
        date=datetime.now(UTC).isoformat(timespec="seconds"),
        rows=tuple(
            _row(setting, tally, times.get(str(position)), found.classes)
            for position, (setting, tally) in enumerate(zip(settings, tallies, strict=True))
        ),
        failed=tuple(failures),
    )
    if world().is_main:
        _write(report, output, picture)
    return report


def _networks(
    network: str | nn.Module,
    weights: str,
    pairs: Sequence[tuple[int, int] | None],
    options: dict[str, Any],
    trust: bool,
) -> list[AdaptiveModel]:
    """A converted network for each pair of output strides."""
    mask: object = "edges"
    found = load(network, trust=trust) if isinstance(network, str) and is_file(network) else network
    if isinstance(found, AdaptiveModel):
        if not pairs:
            return [found]
        source, state, geometry = found.source, found.state_dict(), found.geometry
        if not isinstance(source, Source) or ":" not in source.name:
            raise InvalidInput(
                "a converted network of no name cannot be given other output strides.",
                next="pass the original network instead.",
            )
        original = build_again(source, state)
        original.load_state_dict(state)
        original.cad_source = source  # type: ignore[assignment]
        kept = {name: getattr(geometry, name) for name in ("anchor", "fill", "pool", "patch", "statistics")}
        options = {"region": found.plan.region, "outputs": found.plan.returned, **kept}
        mask = found.mask
    else:
        original = build(found, weights)[0] if isinstance(found, str) else found
    return [
        adaptify(original, mask, output_stride=pair, verify_laws=False, **options)
        for pair in pairs or (None,)
    ]


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
    data: SegmentationData, size: int, failed: list[tuple[int, dict[str, str]]], refusals: list[CadError]
) -> Iterator[tuple[Tensor, Tensor]]:
    """Images (B, 3, H, W) and labels (B, H, W) of this process's share; unusable ones are noted and left out."""
    waiting: list[tuple[Tensor, Tensor]] = []
    for position, name in shard(data.names):
        try:
            pair = data[position]
        except CadError as error:
            failed.append((position, {"image": name, **error.to_dict()}))
            refusals.append(error)
            continue
        if waiting and waiting[0][0].shape != pair[0].shape:
            yield _stacked(waiting)
            waiting = []
        waiting.append(pair)
        if len(waiting) == size:
            yield _stacked(waiting)
            waiting = []
    if waiting:
        yield _stacked(waiting)


def _stacked(pairs: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    images, labels = zip(*pairs, strict=True)
    return torch.stack(images), torch.stack(labels)


def _times(settings: Sequence[Setting], image: Tensor, labels: Tensor, rounds: int) -> dict[str, Timing]:
    """Times of the settings by position, interleaved."""
    sides: dict[str, Callable[[], object]] = {
        str(position): lambda setting=setting: setting(image, labels)  # type: ignore[misc]
        for position, setting in enumerate(settings)
    }
    return interleaved(sides, rounds)


def _row(setting: Setting, tally: Tally, time: Timing | None, classes: tuple[str, ...]) -> EvaluationRow:
    figures, work = tally.metrics.compute(), tally.work
    mask = setting.mask.spec()
    return EvaluationRow(
        mask=mask or "a function",
        output_stride=setting.net.plan.output_stride,
        anchor=mask in (HIGH, LOW),
        miou=figures["miou"],
        iou=dict(zip(classes, figures["iou"], strict=True)),
        pixel_accuracy=figures["pixel_accuracy"],
        boundary_iou=figures["boundary_iou"],
        trimap_iou=figures["trimap_iou"],
        active_fraction=tally.active / tally.pixels,
        macs=work.mask / tally.images,
        macs_of_high=work.mask / work.high,
        region_of_high=work.region_mask / work.region_high if work.region_high else 1.0,
        milliseconds=time.best if time else None,
        milliseconds_median=time.median if time else None,
    )


def _write(report: EvaluationReport, output: Path | None, picture: Path | None) -> None:
    if output is not None:
        with written_whole(output) as temporary:
            temporary.write_text(json.dumps(report.to_dict(), indent=2) + "\n", encoding="utf-8")
    if picture is not None:
        write_picture(figure_picture(evaluation_figure(report)), picture)


def _check(limit: int | None, batch: int, rounds: int) -> None:
    if (limit is not None and limit < 1) or batch < 1 or rounds < 0:
        raise InvalidInput(
            f"limit={limit}, batch={batch}, rounds={rounds} leave nothing to do.",
            next="give at least 1 image, 1 image a call and 0 rounds.",
        )
