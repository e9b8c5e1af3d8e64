"""Matching by R2D2 with full resolution, or half of it, where keypoints can be.

    python recipes/r2d2/recipe.py DATA [--sequences NAME ...] [--network FILE] [--output results.json]
    python recipes/r2d2/recipe.py DATA --lost [--sequences NAME ...]

DATA is a folder with `r2d2/` and `oxford_affine/` (see the README beside this file). The table has the share of
matches within 1, 3 and 5 pixels of the homography, mean over pairs; multiply-accumulates relative to everything
high, including the mask's own; and milliseconds to detect and describe the keypoints of an image, all settings in
turn.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[2]))

import cadsurgery as cs
from cadsurgery.data.images import normalise, read_image
from cadsurgery.data.networks import source_of
from cadsurgery.masks import resolve_mask
from cadsurgery.support.files import write_whole
from cadsurgery.support.provenance import describe_run
from cadsurgery.support.timing import interleaved
from recipes.hpatches.matching import match_errors, matching_accuracy, mutual_matches
from recipes.hpatches.sequences import ImageSequence, find_sequences
from recipes.r2d2.network import BUILDER, FRAME, PUBLISHED

WEIGHTS = Path("r2d2") / "r2d2_wasf_n16.safetensors"
PIXELS = (1, 3, 5)
COUNTS = (5000, 1000)  # maximum numbers of keypoints per image; the first as published
STEPS = (1, 2, 4)  # distances in pixels between the samples of coarser networks
LEAST = 0.7  # minimum repeatability and reliability of a keypoint, as published
TUNED = ("bikes", "graf")  # sequences on whose first images masks were selected; the others are the test
SIFT = "keypoints:detector=sift"
# Masks by output strides.
MASKS = {
    (1, 8): (
        "all",
        f"{SIFT},count=1000,dilations=9/29",
        f"{SIFT},count=4000,dilations=0/35",
        "keypoints:detector=own,count=2000,dilations=0/29",
        "detail | budget:fraction=0/0.8",
        "none",
    ),
    (1, 4): ("none",),
    (1, 2): (f"{SIFT},count=1000,dilations=5", "none"),
}


@dataclass(frozen=True)
class Features:
    """Keypoints of an image, the best first.

    Attributes:
        points: (n, 2) x and y in whole pixels, as published.
        refined: (n, 2) maxima of the parabolas through the neighbouring samples.
        descriptors: (n, 128) at the pixels.
    """

    points: Tensor
    refined: Tensor
    descriptors: Tensor


def build(weights: Path | str = "none", *, published: bool = False) -> torch.nn.Module:
    """Build the network and load its weights strictly; see `recipes.r2d2.network`."""
    return cs.build_model(PUBLISHED if published else BUILDER, str(weights)).eval()


def adapted(weights: Path | str = "none", output_stride: tuple[int, int] = (1, 8)) -> cs.AdaptiveModel:
    """Convert the network to output strides 1 to 8, 4 or 2."""
    return cs.adaptify(build(weights), "all", output_stride=output_stride, verify_laws=False)


def keypoints(maps: Tensor, sides: Tensor, frame: int = FRAME) -> tuple[Tensor, Tensor]:
    """Detect keypoints as published: maxima of repeatability over 3 x 3 samples, where it and reliability are at
    least .7.

    There are none nearer to the image's edge than `frame`.

    Args:
        maps: (2, H, W) reliability and repeatability.
        sides: (H, W) distance in pixels between the network's samples there: 1 at full resolution.
        frame: margin in pixels.

    Returns:
        (n, 2) pixels x and y, those with the largest product of both maps first, and the same refined.
    """
    reliability, repeatability = maps
    chosen = (repeatability >= LEAST) & (reliability >= LEAST)
    for side in sides.unique().tolist():
        for step in {
            1,
            int(side),
        }:  # what is read inside a cell is no sample: less than 3 x 3 samples would compete
            around = F.pad(repeatability[None, None], (step,) * 4, value=-math.inf)
            largest = F.max_pool2d(around, 3, 1, dilation=step)[0, 0]
            chosen &= (repeatability == largest) | (sides != side)
    inner = torch.zeros_like(chosen)
    inner[frame:-frame, frame:-frame] = True
    y, x = (chosen & inner).nonzero(as_tuple=True)
    order = (reliability * repeatability)[y, x].argsort(descending=True, stable=True)
    y, x = y[order], x[order]
    step, middle = sides[y, x].long(), repeatability[y, x]
    across = _top(repeatability[y, x - step], middle, repeatability[y, x + step])
    down = _top(repeatability[y - step, x], middle, repeatability[y + step, x])
    return torch.stack((x, y), 1), torch.stack((x + step * across, y + step * down), 1)


def _top(before: Tensor, middle: Tensor, after: Tensor) -> Tensor:
    """Return the offset of the maximum of the parabola through three samples, at most half a sample; 0 on a line."""
    bend = 2 * (before + after - 2 * middle)
    return torch.where(bend < -1e-6, (before - after) / bend.clamp(max=-1e-6), 0).clamp(-0.5, 0.5)


def features(net: cs.AdaptiveModel, image: Tensor, mask: object = None) -> Features:
    """Detect and describe keypoints in an image (1, 3, H, W), with a mask; default: the network's own."""
    with torch.inference_mode():
        found = net(image, mask=mask)
        places = keypoints(found["maps"][0].float(), 2 ** net.levels[0].long())
        points, refined = (part[: COUNTS[0]] for part in places)
        x, y = points.T
        return Features(points, refined, found["descriptors"][0, :, y, x].T.float())


def matched(first: Features, second: Features, homography: Tensor) -> dict[str, Any]:
    """Count matches and their shares within `PIXELS`, for each number in `COUNTS`, in whole pixels and refined."""
    found: dict[str, Any] = {}
    for count in COUNTS:
        matches = mutual_matches(first.descriptors[:count], second.descriptors[:count])
        found[f"matches_{count}"] = len(matches)
        for name in ("points", "refined"):
            errors = match_errors(getattr(first, name), getattr(second, name), matches, homography)
            found[f"{name}_{count}"] = matching_accuracy(errors, PIXELS)
    return found


def what_is_lost(net: cs.AdaptiveModel, every: Sequence[ImageSequence]) -> Iterator[tuple[str, list[float]]]:
    """Yield MMA at 3 pixels, for each of `COUNTS`, of keypoints on every second or fourth pixel of the dense maps.

    By law 2, a network of that output stride has only these. Variants: unchanged, moved to the largest repeatability
    of the pixels in between, described there, or both.
    """
    found: dict[str, list[list[float]]] = {}
    for sequence in every:
        features: dict[str, list[Features]] = {}
        for path in sequence.images:
            for label, one in _coarser(net, shown(net, path)):
                features.setdefault(label, []).append(one)
        for label, (first, *others) in features.items():
            for other, homography in zip(others, sequence.homographies, strict=True):
                pair = matched(first, other, homography)
                shares = [pair[f"points_{count}"][PIXELS.index(3)] for count in COUNTS]
                found.setdefault(label, []).append(shares)
    for label, pairs in found.items():
        yield label, [sum(shares) / len(pairs) for shares in zip(*pairs, strict=True)]


def _coarser(net: cs.AdaptiveModel, image: Tensor) -> Iterator[tuple[str, Features]]:
    with torch.inference_mode():
        dense = net(image, mask="all")
    maps, descriptors = dense["maps"][0], dense["descriptors"][0]
    for step in STEPS:
        coarse = maps[:, ::step, ::step]
        points = step * keypoints(coarse, torch.ones_like(coarse[0]), -(-FRAME // step))[0][: COUNTS[0]]
        reach = torch.arange(1 - step, step)
        near = torch.cartesian_prod(reach, reach) + points.unsqueeze(1)  # (n, (2 step - 1)^2, 2)
        best = maps[1, near[..., 1], near[..., 0]].argmax(1)
        moved = near[torch.arange(len(near)), best]
        for place, at in (("as they are", points), ("moved", moved)):
            for described, (x, y) in (("", points.T), (", described there", moved.T)):
                yield f"every {step} pixels, {place}{described}", Features(at, at, descriptors[:, y, x].T)


def sequences(data: Path, names: Sequence[str] = ()) -> list[ImageSequence]:
    """Return the sequences of the data, optionally only those with the given names."""
    return [one for one in find_sequences(data / "oxford_affine")[0] if not names or one.name in names]


def shown(net: cs.AdaptiveModel, path: Path) -> Tensor:
    """Read an image (1, 3, H, W), normalised for the network."""
    picture = normalise(read_image(path, upright=False), source_of(net)).unsqueeze(0)
    return picture.contiguous(memory_format=torch.channels_last)


def matching(net: cs.AdaptiveModel, mask: str, every: Sequence[ImageSequence]) -> Iterator[dict[str, Any]]:
    """Yield the results of each pair; for each sequence's first image also the work relative to everything high."""
    for sequence in every:
        images = (shown(net, path) for path in sequence.images)
        image = next(images)
        first = features(net, image, mask)
        report = net.macs(image, mask=mask)
        work = {
            "macs": report.mask / report.high,
            "active": report.active_fraction,
            "keypoints": len(first.points),
        }
        for number, other, homography in zip(sequence.numbers, images, sequence.homographies, strict=True):
            yield {
                "sequence": sequence.name,
                "number": number,
                **work,
                **matched(first, features(net, other, mask), homography),
            }


def measure(
    nets: Sequence[tuple[str, cs.AdaptiveModel, Sequence[str]]],
    every: Sequence[ImageSequence],
    rounds: int,
    say: Callable[[str], None],
) -> list[dict[str, Any]]:
    """Return the rows of the table.

    Args:
        nets: labels, converted networks and their masks; without masks a network is only timed, with everything high.
        every: the sequences.
        rounds: timing rounds on the first image of each sequence, 0 for none.
        say: progress callback.
    """
    rows: list[dict[str, Any]] = []
    sides: dict[str, Callable[[], Any]] = {}
    for label, net, masks in nets:
        fast, strides = net.optimize(), net.plan.output_stride
        firsts = [shown(net, one.images[0]) for one in every]
        for mask in masks or ("all",):
            say(f"{label}, {strides}: {mask}")
            pairs = list(matching(fast, mask, every)) if masks else []
            rows.append({"network": label, "strides": strides, "mask": mask, "pairs": pairs})
            sides[str(len(sides))] = partial(_describe_all, fast, firsts, resolve_mask(mask))
    if rounds:
        say("times")
        for row, time in zip(rows, interleaved(sides, rounds).values(), strict=True):
            row["ms"], row["ms_median"] = time.best / len(every), time.median / len(every)
    return rows


def _describe_all(net: cs.AdaptiveModel, images: Sequence[Tensor], mask: object) -> list[Features]:
    return [features(net, image, mask) for image in images]


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Format rows in Markdown, separately for the sequences used to select masks and the others."""
    limits = "/".join(map(str, PIXELS))
    lines = [
        f"| network | strides | mask | sequences | MMA@{limits} | refined | matches | right | of 1000 | refined "
        "| MACs of given | ms | faster |",
        "|" + 13 * "---|",
    ]
    dense = next((row["ms"] for row in rows if not row["pairs"] and "ms" in row), math.nan)
    for row in rows:
        time = [f"{row['ms']:.0f}", f"{dense / row['ms']:.2f}x"] if "ms" in row else ["", ""]
        network = [row["network"], "-".join(map(str, row["strides"])), f"`{row['mask']}`"]
        names = {pair["sequence"] for pair in row["pairs"]}
        for part in (names - {*TUNED}, names & {*TUNED}):
            pairs = [pair for pair in row["pairs"] if pair["sequence"] in part]
            if pairs:
                lines.append(
                    f"| {' | '.join([*network, ', '.join(sorted(part)), *_figures(pairs), *time])} |"
                )
        if not names:
            lines.append(f"| {' | '.join([*network, *8 * [''], *time])} |")
    return "\n".join(lines)


def _figures(pairs: Sequence[dict[str, Any]]) -> list[str]:
    """Format a row's cells: means over pairs."""

    def mean(value: Callable[[dict[str, Any]], float]) -> float:
        return sum(map(value, pairs)) / len(pairs)

    every, best = COUNTS
    at3 = PIXELS.index(3)
    shares = [
        " ".join(f"{mean(lambda pair: pair[f'{name}_{every}'][place]):.4f}" for place in range(len(PIXELS)))  # noqa: B023
        for name in ("points", "refined")
    ]
    right = mean(lambda pair: pair[f"matches_{every}"] * pair[f"points_{every}"][at3])
    best_shares = [f"{mean(lambda pair: pair[f'{name}_{best}'][at3]):.4f}" for name in ("points", "refined")]  # noqa: B023
    matches = [f"{mean(lambda pair: pair[f'matches_{every}']):.0f}", f"{right:.0f}"]
    return [*shares, *matches, *best_shares, f"{mean(lambda pair: pair['macs']):.3f}"]


def main() -> None:
    """Print the table and write the figures."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", type=Path)
    parser.add_argument("--sequences", nargs="*", default=[], help="names; default: all")
    parser.add_argument(
        "--network", type=Path, help="a converted file for further rows, e.g. with a refinement"
    )
    parser.add_argument(
        "--masks", nargs="*", default=[], help="masks at output strides 1 to 8; default: those of the card"
    )
    parser.add_argument("--rounds", type=int, default=3, help="timing rounds; 0 for none")
    parser.add_argument(
        "--lost", action="store_true", help="report instead what a coarser output stride loses"
    )
    parser.add_argument("--output", type=Path, help="JSON file")
    options = parser.parse_args()
    for folder in ("r2d2", "oxford_affine"):
        if not (options.data / folder).is_dir():
            print(f"skipped: {options.data} holds no {folder} folder")
            sys.exit(0)
    weights = options.data / WEIGHTS
    chosen = {(1, 8): tuple(options.masks)} if options.masks else MASKS
    dense = cs.adaptify(build(weights, published=True), "all", output_stride=(1, 2), verify_laws=False)
    nets = [("as published", dense, ())]
    nets += [("aligned", adapted(weights, strides), masks) for strides, masks in chosen.items()]
    if options.network:
        own = cs.load(options.network, build())
        nets.append((options.network.name, own, chosen.get(own.plan.output_stride) or (own.mask.spec(),)))
    every = sequences(options.data, options.sequences)
    if options.lost:
        for label, shares in what_is_lost(dense.optimize(), every):
            of_best = ", ".join(
                f"{share:.4f} of {count}" for count, share in zip(COUNTS, shares, strict=True)
            )
            print(f"{label}: MMA@3 {of_best}")
        return
    rows = measure(nets, every, options.rounds, lambda text: print(text, file=sys.stderr, flush=True))
    print(table(rows))
    if options.output:
        document = {**describe_run(torch.device("cpu")), "rows": rows}
        with write_whole(options.output) as temporary:
            temporary.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
