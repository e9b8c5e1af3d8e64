"""Matching on image sequences: several masks and output strides against work and time."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from cadsurgery.data.images import read_image, write_picture
from cadsurgery.masks import resolve_mask
from cadsurgery.network.model import AdaptiveModel
from cadsurgery.support.errors import CadError, InvalidInput
from cadsurgery.support.processes import own_device, world
from cadsurgery.support.timing import Timing, interleaved
from cadsurgery.tasks.figures import figure_picture, matches_figure
from cadsurgery.tasks.for_each import Failures, Step, for_each, silent
from cadsurgery.tasks.keypoints.extraction import Extraction, Extractor, Features, Seen
from cadsurgery.tasks.keypoints.matching import corner_error, match_errors, matching_accuracy, mutual_matches
from cadsurgery.tasks.keypoints.report import CORNERS, THRESHOLDS, MatchingReport, MatchingRow, Pair
from cadsurgery.tasks.keypoints.sequences import ImageSequence, find_sequences
from cadsurgery.tasks.open import at_strides, provenance
from cadsurgery.tasks.report import check_outputs


class _Setting(NamedTuple):
    """One mask at one pair of output strides."""

    extractor: Extractor
    mask: str


def evaluate_matching(
    network: str | nn.Module,
    folder: Path,
    masks: Sequence[str] = (),
    settings: Extraction | None = None,
    *,
    output_stride: Sequence[tuple[int, int] | None] = (),
    options: Mapping[str, Any] | None = None,
    weights: str = "auto",
    everything: bool = False,
    rounds: int = 3,
    device: str = "cpu",
    output: Path | None = None,
    picture: Path | None = None,
    matches: Path | None = None,
    step: Step = silent,
    trust: bool = False,
) -> MatchingReport:
    """Match the first image of every sequence with the others, for every mask at every pair of output strides.

    The protocol of HPatches as D2-Net and CAD use it: mutual nearest neighbours under the inner product, the share of
    matches within 1 to 15 pixels of the homography, 0 for a pair without matches, mean over pairs (MMA).

    Args:
        network: a converted network or file, a network by name or `module:function`, or a module to convert.
        folder: of sequences, see `find_sequences`.
        masks: their strings; default: that of the settings.
        settings: how keypoints are found and described; its mask is not used where masks are given.
        output_stride: pairs (high, low) for a network that is not converted yet.
        options: further ones of `adaptify` for such a network.
        weights: of a network by name.
        everything: also the sequences that the published protocol leaves out.
        rounds: of timing the description of the first image, all settings in turn; 0 for none.
        device: "cpu" or "cuda".
        output: JSON file to write.
        picture: PNG to draw: accuracy against threshold and work.
        matches: PNG to draw: the matches of the first pair with each setting.
        step: called with what is being done.
        trust: run code that a converted file names; see `cadsurgery.load`.

    Raises:
        InvalidInput: an impossible option, or a network whose outputs are not understood.
        CadError: not one pair could be matched (that pair's error); or a name, file or option is refused.
    """
    if rounds < 0:
        raise InvalidInput(f"rounds={rounds}.", next="give 0 for no timing, or more.")
    check_outputs(output, picture=picture, matches=matches)
    settings, where = settings or Extraction(), own_device(device)
    chosen = [*masks] or [settings.mask]
    for mask in chosen:
        resolve_mask(mask or "all")
    sequences, left_out = find_sequences(folder, everything=everything)
    step("building and converting")
    pairs = [pair for pair in output_stride if pair is not None]
    nets, source = at_strides(network, pairs, options or {}, mask="all", weights=weights, trust=trust)
    every = [setting for net in nets for setting in _settings(net, chosen, settings, where)]
    failures = Failures("sequence")
    finished, failed = for_each(
        sequences,
        lambda sequence: _sequence(sequence, every, failures),
        failures,
        where,
        name=lambda sequence: sequence.name,
        step=step,
    )
    usable = next((one.sequence for one in finished if one.pairs[0]), None)
    if usable is None:
        nothing = CadError("there was nothing to match.", next="check the images.")
        raise CadError.from_dict(failed[0]) if failed else nothing
    times, size = dict[str, Timing](), (0, 0)
    if world().is_main and (rounds or matches):
        times, size = _extras(usable, every, rounds, matches, step)
    report = MatchingReport(
        data=str(folder),
        sequences=len(finished),
        left_out=tuple(left_out),
        detector=settings.detector,
        count=settings.count,
        reach=settings.reach,
        image=size,
        rounds=rounds,
        rows=tuple(
            _row(setting, [(one.pairs[at], one.costs[at]) for one in finished], times.get(str(at)))
            for at, setting in enumerate(every)
        ),
        failed=tuple(failed),
        **provenance(network, source, where),
    )
    if world().is_main:
        report.write(output, picture)
    return report


class _Cost(NamedTuple):
    """What a setting did on the first image of a sequence, and how many keypoints each image had."""

    macs: int
    active_fraction: float
    keypoints: tuple[int, ...]


class _Done(NamedTuple):
    """A sequence, and of each setting its pairs and its cost."""

    sequence: ImageSequence
    pairs: list[list[Pair]]
    costs: list[_Cost]


def _settings(
    net: AdaptiveModel, masks: Sequence[str], settings: Extraction, where: torch.device
) -> list[_Setting]:
    fast = net.to(where).optimize()
    return [
        _Setting(Extractor(fast, replace(settings, mask=mask), where), mask or net.mask.spec())
        for mask in masks
    ]


def _sequence(sequence: ImageSequence, settings: Sequence[_Setting], failures: Failures) -> _Done:
    """One sequence with every setting; images that cannot be used are noted."""
    seen: list[Seen | None] = []
    for path in sequence.images:
        try:
            seen.append(settings[0].extractor.seen(read_image(path, upright=False)))
        except CadError as error:
            if not seen:
                raise
            seen.append(None)
            failures.note(error)
    pairs, costs = [], []
    assert seen[0] is not None
    for extractor, _ in settings:
        features = [extractor.features(image) if image is not None else None for image in seen]
        pairs.append(_pairs(sequence, features))
        with torch.inference_mode():
            macs = extractor.macs(seen[0])
        counts = tuple(len(part.keypoints) for part in features if part is not None)
        costs.append(_Cost(macs, extractor.net.active_fraction, counts))
    return _Done(sequence, pairs, costs)


def _pairs(sequence: ImageSequence, features: Sequence[Features | None]) -> list[Pair]:
    first, *others = features
    assert first is not None
    pairs = []
    for number, homography, other in zip(sequence.numbers, sequence.homographies, others, strict=True):
        if other is None:
            continue
        matches = mutual_matches(first.descriptors, other.descriptors)
        errors = match_errors(first.keypoints, other.keypoints, matches, homography)
        corner = corner_error(first.keypoints, other.keypoints, matches, homography, first.size)
        accuracy = tuple(matching_accuracy(errors, THRESHOLDS))
        pairs.append(Pair(sequence.name, sequence.kind, number, len(matches), accuracy, corner))
    return pairs


def _extras(
    sequence: ImageSequence,
    settings: Sequence[_Setting],
    rounds: int,
    matches: Path | None,
    step: Step,
) -> tuple[dict[str, Timing], tuple[int, int]]:
    """Times of all settings on the first image, and the picture of matches."""
    image = read_image(sequence.images[0], upright=False)
    seen = settings[0].extractor.seen(image)
    times: dict[str, Timing] = {}
    if rounds:
        step("measuring")
        sides: dict[str, Callable[[], object]] = {
            str(place): lambda e=extractor: e.features(seen)  # type: ignore[misc]
            for place, (extractor, _) in enumerate(settings)
        }
        times = interleaved(sides, rounds)
    if matches is not None:
        step("drawing")
        other, drawn = read_image(sequence.images[1], upright=False), []
        seen_other = settings[0].extractor.seen(other)
        for extractor, name in settings:
            first, second = extractor.features(seen), extractor.features(seen_other)
            mutual = mutual_matches(first.descriptors, second.descriptors)
            errors = match_errors(first.keypoints, second.keypoints, mutual, sequence.homographies[0])
            ends = first.keypoints[mutual[:, 0]], second.keypoints[mutual[:, 1]]
            drawn.append((name, *ends, errors))
        write_picture(figure_picture(matches_figure(image, other, drawn)), matches)
    return times, (seen.batch.shape[2], seen.batch.shape[3])


def _row(
    setting: _Setting, parts: Sequence[tuple[Sequence[Pair], _Cost]], time: Timing | None
) -> MatchingRow:
    every, costs = tuple(pair for pairs, _ in parts for pair in pairs), [cost for _, cost in parts]
    counts = [count for cost in costs for count in cost.keypoints]
    return MatchingRow(
        mask=setting.mask,
        output_stride=setting.extractor.net.plan.output_stride,
        reads="elements" if setting.extractor.reads_elements else "dense map",
        pairs=every,
        keypoints=sum(counts) / max(len(counts), 1),
        active_fraction=sum(cost.active_fraction for cost in costs) / len(costs),
        macs=sum(cost.macs for cost in costs) / len(costs),
        homography={limit: _share(every, limit) for limit in CORNERS},
        milliseconds=time.best if time else None,
        milliseconds_median=time.median if time else None,
    )


def _share(pairs: Sequence[Pair], limit: float) -> float:
    return sum(pair.corner_error <= limit for pair in pairs) / len(pairs)
