"""Evaluate matching on image sequences: several masks and output strides, against work and time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from cadsurgery.data.images import write_picture
from cadsurgery.masks import resolve_mask
from cadsurgery.methods.side import Side, time_sides
from cadsurgery.support.errors import CadError, InvalidInput, NotInstalled
from cadsurgery.support.progress import Step, counted, silent, within
from cadsurgery.support.provenance import find_device
from cadsurgery.tasks.figures import figure_picture, matches_figure
from cadsurgery.tasks.keypoints.extraction import Extraction, Extractor, Features, PreparedPicture
from cadsurgery.tasks.open import Strides, at_strides, provenance
from cadsurgery.tasks.report import check_outputs
from recipes.hpatches.matching import corner_error, match_errors, matching_accuracy, mutual_matches
from recipes.hpatches.report import CORNERS, THRESHOLDS, MatchingReport, MatchingRow, Pair
from recipes.hpatches.sequences import ImageSequence, Photo, open_sequences


def evaluate_matching(
    network: str | nn.Module,
    folder: Path | str,
    masks: Sequence[str] = (),
    settings: Extraction | None = None,
    *,
    output_stride: Strides = (),
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

    The protocol of HPatches as used by D2-Net and CAD: mutual nearest neighbours under the inner product; the share
    of matches within 1 to 15 pixels of the homography, 0 for a pair without matches; its mean over pairs (MMA).

    Args:
        network: as in `cadsurgery.evaluate`.
        folder: folder of sequences, see `find_sequences`; or `images:FOLDER`, photos that are matched with views of
            themselves by known homographies.
        masks: text forms of masks; default: the mask of the settings.
        settings: how keypoints are found and described; `masks` replaces its mask.
        output_stride, options, weights: as in `cadsurgery.evaluate`.
        everything: include the sequences that the published protocol leaves out.
        rounds: rounds of timing the description of the first image, all settings in turn; 0 for none.
        picture: PNG to draw: accuracy against threshold and work.
        matches: PNG to draw: the matches of the first pair with each setting.
        device, output, step, trust: as in `cadsurgery.evaluate`.

    Raises:
        InvalidInput: an option is out of range, or the network's outputs are not supported.
        CadError: no pair could be matched (the error of the first one); or a name, file or option is refused.
    """
    if rounds < 0:
        raise InvalidInput(f"rounds={rounds}.", next="give 0 for no timing, or more.")
    check_outputs(output, picture=picture, matches=matches)
    settings, torch_device = settings or Extraction(), find_device(device)
    chosen = [*masks] or [settings.mask]
    for mask in chosen:
        resolve_mask(mask or "all")
    sequences, left_out = open_sequences(str(folder), everything=everything)
    step("building and converting")
    nets, source = at_strides(network, output_stride, options or {}, mask="all", weights=weights, trust=trust)
    extractors = [
        Extractor(fast, replace(settings, mask=mask), torch_device)
        for fast in [net.to(torch_device).optimize() for net in nets]
        for mask in chosen
    ]
    failed: list[dict[str, str]] = []
    finished: list[tuple[ImageSequence | Photo, list[_Part]]] = []
    for sequence in counted(sequences, step, "sequence", name=lambda sequence: sequence.name):
        try:
            finished.append((sequence, _match_all(sequence, extractors, failed)))
        except NotInstalled:
            raise
        except CadError as error:
            failed.append({"sequence": sequence.name, **error.to_dict()})
    usable = next((sequence for sequence, parts in finished if parts[0].pairs), None)
    if usable is None:
        nothing = CadError("there was nothing to match.", next="check the images.")
        raise CadError.from_dict(failed[0]) if failed else nothing
    rows = [_row(extractor, [parts[at] for _, parts in finished]) for at, extractor in enumerate(extractors)]
    size = (0, 0)
    if rounds or matches:
        image = usable.read(0)
        seen = extractors[0].seen(image)
        size = (seen.batch.shape[2], seen.batch.shape[3])
        if rounds:
            sides = [Side(extractor.mask, partial(_describe, extractor, seen)) for extractor in extractors]
            rows = time_sides(sides, rows, seen.batch, rounds, step=within(step, "measuring"))
        if matches is not None:
            step("drawing")
            other = usable.read(1)
            both = seen, extractors[0].seen(other)
            drawn = [_draw_matches(extractor, *both, usable.homographies[0]) for extractor in extractors]
            write_picture(figure_picture(matches_figure(image, other, drawn)), matches)
    report = MatchingReport(
        data=str(folder),
        sequences=len(finished),
        left_out=tuple(left_out),
        detector=settings.detector,
        count=settings.count,
        reach=settings.reach,
        image=size,
        rounds=rounds,
        normalisation=str(nets[0].normalisation or ""),
        rows=tuple(rows),
        failed=tuple(failed),
        **provenance(network, source, torch_device),
    )
    report.write(output, picture)
    return report


class _Part(NamedTuple):
    """The results of an extractor on a sequence: pairs, work on the first image, number of keypoints per image."""

    pairs: list[Pair]
    macs: int
    active_fraction: float
    keypoints: tuple[int, ...]


def _describe(extractor: Extractor, seen: PreparedPicture, images: Tensor) -> Features:
    return extractor.features(seen)


def _match_all(
    sequence: ImageSequence | Photo, extractors: Sequence[Extractor], failed: list[dict[str, str]]
) -> list[_Part]:
    """Match one sequence with every extractor; images that cannot be used are recorded as failures."""
    first = extractors[0].seen(sequence.read(0))
    others: dict[int, PreparedPicture] = {}
    for place in range(len(sequence.numbers)):
        try:
            others[place] = extractors[0].seen(sequence.read(place + 1))
        except CadError as error:
            failed.append({"sequence": sequence.name, **error.to_dict()})
    parts = []
    for extractor in extractors:
        first_features = extractor.features(first)
        other_features = {place: extractor.features(other) for place, other in others.items()}
        pairs = [
            _pair(sequence, place, first_features, features) for place, features in other_features.items()
        ]
        with torch.inference_mode():
            macs = extractor.macs(first)
        counts = tuple(len(features.keypoints) for features in (first_features, *other_features.values()))
        parts.append(_Part(pairs, macs, extractor.net.active_fraction, counts))
    return parts


def _pair(sequence: ImageSequence | Photo, place: int, first: Features, other: Features) -> Pair:
    """Match the first image with another one."""
    homography = sequence.homographies[place]
    matches = mutual_matches(first.descriptors, other.descriptors)
    errors = match_errors(first.keypoints, other.keypoints, matches, homography)
    corner = corner_error(first.keypoints, other.keypoints, matches, homography, first.size)
    accuracy = tuple(matching_accuracy(errors, THRESHOLDS))
    return Pair(sequence.name, sequence.kind, sequence.numbers[place], len(matches), accuracy, corner)


def _draw_matches(
    extractor: Extractor, first: PreparedPicture, second: PreparedPicture, homography: Tensor
) -> tuple[str, Tensor, Tensor, Tensor]:
    """Return a setting's matches of two images, for `matches_figure`."""
    one, other = extractor.features(first), extractor.features(second)
    matches = mutual_matches(one.descriptors, other.descriptors)
    errors = match_errors(one.keypoints, other.keypoints, matches, homography)
    return extractor.mask, one.keypoints[matches[:, 0]], other.keypoints[matches[:, 1]], errors


def _row(extractor: Extractor, parts: Sequence[_Part]) -> MatchingRow:
    pairs = tuple(pair for part in parts for pair in part.pairs)
    counts = [count for part in parts for count in part.keypoints]
    high, low = extractor.net.plan.output_stride
    values = {
        "mask": extractor.mask,
        "output_stride": (high, low),
        "reads": "elements" if extractor.reads_elements else "dense map",
        "pairs": pairs,
        "keypoints": sum(counts) / max(len(counts), 1),
        "active_fraction": sum(part.active_fraction for part in parts) / len(parts),
        "macs": sum(part.macs for part in parts) / len(parts),
        "homography": {limit: sum(p.corner_error <= limit for p in pairs) / len(pairs) for limit in CORNERS},
    }
    return MatchingRow(f"{extractor.mask} {high}->{low}", values)
