"""Matching with ALIKE, a user's own network: as published, and with full resolution only around keypoints.

    python recipes/alike/recipe.py DATA [--network alike-n] [--only NAME ...] [--rounds N] [--output results.json]

DATA is a folder with `alike/` and `homography_pairs/` (see the README beside this file). The table has the share of
matches within 3 pixels of the homography, mean over eight pairs; multiply-accumulates of the adaptive part and of the
whole network, including the mask's own, relative to everything high; and milliseconds for two images one by one, all
settings in turn.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[2]))

import cadsurgery as cs
from cadsurgery.data.images import read_image
from cadsurgery.masks import resolve_mask
from cadsurgery.masks.detectors import peaks
from cadsurgery.support.timing import interleaved
from recipes.alike.network import CHANNELS, REGION, STRIDES, build, padded
from recipes.hpatches.matching import match_errors, matching_accuracy, mutual_matches

COUNT, RADIUS, BORDER, PIXELS = 1000, 2, 5, 3
# The first image of each sequence is matched with these images; `graf` 4 and 6 are too difficult for the network.
SEQUENCES = {"churchill": (2, 3, 4, 5, 6), "graf": (2, 3, 5)}

# Measured with the authors' code on the same images, without this package: see the README of the weights.
MEASURED = {
    "alike-t": {
        **{"churchill-2": 0.826, "churchill-3": 0.763, "churchill-4": 0.728, "churchill-5": 0.922},
        **{"churchill-6": 0.628, "graf-2": 0.618, "graf-3": 0.440, "graf-5": 0.250},
    },
    "alike-n": {
        **{"churchill-2": 0.893, "churchill-3": 0.816, "churchill-4": 0.815, "churchill-5": 0.940},
        **{"churchill-6": 0.665, "graf-2": 0.691, "graf-3": 0.599, "graf-5": 0.525},
    },
}


@dataclass(frozen=True)
class Group:
    """Masks evaluated on one converted network, together with everything high and everything low.

    Attributes:
        output_stride: high and low output stride.
        strides: strides before the last convolution, see `Alike`.
        options: further options of `adaptify`.
        masks: masks by label.
    """

    output_stride: tuple[int, int]
    strides: tuple[int, ...] = ()
    options: dict[str, Any] = field(default_factory=dict)
    masks: dict[str, str] = field(default_factory=dict)


def around(detector: str, count: int, *dilations: int) -> dict[str, str]:
    """Return a keypoint mask, by its label."""
    sides = "/".join(map(str, dilations))
    mask = f"keypoints:detector={detector},count={count},dilations={sides}"
    return {f"{detector} {count}, {sides} pixels": mask}


def budget(name: str, fraction: float) -> dict[str, str]:
    """Return a mask that keeps a share of the image, by its label."""
    return {f"{name}, budget {fraction:g}": f"{name} | budget:fraction={fraction}"}


HEAD: dict[str, Any] = {"region": REGION}
GROUPS = {
    # High is the original network; elsewhere its last convolution is evaluated at every fourth pixel.
    "head 1-4": Group(
        (1, 4),
        STRIDES,
        HEAD,
        {
            **around("sift", 1000, 9),
            **around("sift", 2000, 9),
            **around("sift", 2000, 9, 21),
            **around("sift", 2000, 11),
            **around("own", 1000, 15),
            **around("own", 4000, 5, 13),
            **budget("edges", 0.3),
            **budget("edges", 0.4),
            **budget("random", 0.4),
        },
    ),
    "head 1-4, nearest": Group((1, 4), STRIDES, HEAD | {"fill": "nearest"}, around("sift", 2000, 11)),
    # Low is the original network; in high areas its pools are removed.
    "pools 8-32": Group(
        (8, 32), masks={**around("sift", 1000, 9), **around("sift", 2000, 11), **around("own", 1000, 15)}
    ),
    "pools 2-32": Group(
        (2, 32), masks={**around("sift", 500, 9), **around("sift", 2000, 11), **around("own", 1000, 15)}
    ),
    "pools 1-32": Group((1, 32), masks=around("sift", 1000, 9)),
}


@dataclass(frozen=True)
class Features:
    """Keypoints (n, 2), x and y in whole pixels, and their descriptors (n, D)."""

    points: Tensor
    descriptors: Tensor


def features(net: nn.Module, image: Tensor, **options: Any) -> Features:
    """Detect and describe keypoints in an image (3, H, W); the options are passed to the network."""
    with torch.inference_mode():
        found = net(padded(image[None]), **options)
    height, width = image.shape[1:]
    scores, descriptors = (found[name][0, :, :height, :width] for name in ("scores", "descriptors"))
    ((points, _),) = peaks(scores, COUNT, RADIUS, BORDER)
    return Features(points, descriptors[:, points[:, 1], points[:, 0]].T)


def matched(first: Features, second: Features, homography: Tensor) -> dict[str, float]:
    """Return the share of correct matches, and the number of matches."""
    matches = mutual_matches(first.descriptors, second.descriptors)
    errors = match_errors(first.points, second.points, matches, homography)
    return {"accuracy": matching_accuracy(errors, [PIXELS])[0], "matches": len(matches)}


def pictures(data: Path) -> dict[str, Tensor]:
    """Read the images (3, H, W), by sequence and number."""
    folder = data / "homography_pairs"
    names = [(name, index) for name, others in SEQUENCES.items() for index in (1, *others)]
    return {f"{name}-{index}": read_image(folder / name / f"{index}.jpg") for name, index in names}


def matching(data: Path, images: dict[str, Tensor], net: nn.Module, **options: Any) -> dict[str, Any]:
    """Return the accuracy of each pair, and the means."""
    found = {name: features(net, image, **options) for name, image in images.items()}
    pairs = {}
    for name in found:
        sequence, _, index = name.partition("-")
        if index != "1":
            file = data / "homography_pairs" / sequence / f"H_1_{index}.txt"
            homography = torch.from_numpy(np.loadtxt(file))
            pairs[name] = matched(found[f"{sequence}-1"], found[name], homography)
    right = [pair["accuracy"] * pair["matches"] for pair in pairs.values()]
    means = {key: sum(pair[key] for pair in pairs.values()) / len(pairs) for key in ("accuracy", "matches")}
    return {**means, "right": sum(right) / len(pairs), "pairs": pairs}


def cost(net: cs.AdaptiveModel, images: dict[str, Tensor], mask: str) -> dict[str, float]:
    """Return the MACs of the adaptive part and of the whole network with the mask, relative to everything high."""
    inside = {decision.node for decision in net.plan.chosen("adapt", "keep")}
    part = part_high = whole = whole_high = 0
    active = []
    for image in images.values():
        report = net.macs(padded(image[None]), mask=mask)
        layers = [layer for layer in report.layers if layer.layer in inside]
        part += report.of_mask + sum(layer.mask for layer in layers)
        part_high += sum(layer.high for layer in layers)
        whole, whole_high = whole + report.mask, whole_high + report.high
        active.append(report.active_fraction)
    shares = {"part_of_high": part / part_high, "whole_of_high": whole / whole_high}
    return {**shares, "active_fraction": sum(active) / len(active)}


def adapted(data: Path, name: str, group: Group) -> cs.AdaptiveModel:
    """Convert the network of a group."""
    net = build(data, name, group.strides)
    options = {"normalisation": "raw", **group.options}  # as when the figures were measured: masks saw 0..1
    return cs.adaptify(net, "none", output_stride=group.output_stride, **options)


def measure(
    data: Path, name: str, only: list[str], rounds: int, say: Callable[[str], None]
) -> list[dict[str, Any]]:
    """Return the rows of the table: the original network, then the groups."""
    images = pictures(data)
    shown = [laid_out(padded(images[key][None])) for key in ("churchill-1", "graf-1")]
    original = laid_out(build(data, name))
    rows: list[dict[str, Any]] = [{"network": "as published", "setting": ""}]
    rows[0] |= matching(data, images, original)
    sides: list[Callable[[], Any]] = [lambda: [original(x) for x in shown]]
    for label in only:
        net = adapted(data, name, GROUPS[label])
        fast = net.optimize()
        masks = {"everything high": "all", **GROUPS[label].masks, "everything low": "none"}
        for setting, mask in masks.items():
            say(f"{label}: {setting}")
            found = {**matching(data, images, net, mask=mask), **cost(net, images, mask)}
            rows.append({"network": label, "setting": setting, "mask": mask, **found})
            provider = resolve_mask(mask)
            sides.append(lambda net=fast, mask=provider: [net(x, mask=mask) for x in shown])  # type: ignore[misc]
    if rounds:
        say("times")
        times = interleaved({str(place): side for place, side in enumerate(sides)}, rounds)
        for row, time in zip(rows, times.values(), strict=True):
            row["ms"], row["ms_median"] = time.best, time.median
    return rows


def laid_out(value: Any) -> Any:
    """Convert a network or images to channels-last, the fastest layout."""
    return value.to(memory_format=torch.channels_last)


def table(rows: list[dict[str, Any]]) -> str:
    """Format rows in Markdown."""
    lines = [
        "| network | setting | accuracy | matches | right | active | MACs of given | in the region | ms |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    # The network as given is everything low with `pools`, whose strides it has, and everything high with `head`.
    lows = {row["network"]: row["whole_of_high"] for row in rows if row["setting"] == "everything low"}
    for row in rows:
        given = lows.get(row["network"], 1.0) if row["network"].startswith("pools") else 1.0
        of_given = {"of_given": row.get("whole_of_high", given) / given}
        keys = ("active_fraction", "of_given", "part_of_high")
        shares = [f"{value:.3f}" if (value := (row | of_given).get(key)) is not None else "" for key in keys]
        figures = [f"{row['accuracy']:.4f}", f"{row['matches']:.0f}", f"{row['right']:.0f}", *shares]
        ms = f"{row['ms']:.0f}" if "ms" in row else ""
        lines.append(f"| {row['network']} | {row['setting']} | {' | '.join(figures)} | {ms} |")
    return "\n".join(lines)


def furthest(row: dict[str, Any], name: str) -> float:
    """Return the largest difference of a pair's accuracy from the authors' code."""
    return max(abs(row["pairs"][pair]["accuracy"] - value) for pair, value in MEASURED[name].items())


def main() -> None:
    """Print the table and write the figures."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", type=Path)
    parser.add_argument("--network", choices=list(CHANNELS), default="alike-n")
    parser.add_argument("--only", nargs="*", choices=list(GROUPS), default=list(GROUPS))
    parser.add_argument("--rounds", type=int, default=5, help="timing rounds; 0 for none")
    parser.add_argument("--output", type=Path, help="JSON file")
    options = parser.parse_args()
    for folder in ("alike", "homography_pairs"):
        if not (options.data / folder).is_dir():
            print(f"skipped: {options.data} holds no {folder} folder")
            sys.exit(0)
    rows = measure(
        options.data,
        options.network,
        options.only,
        options.rounds,
        lambda text: print(text, file=sys.stderr),
    )
    print(table(rows))
    for row in rows:
        label = f"{row['network']} {row['setting']}".strip()
        print(f"{label}: at most {furthest(row, options.network):.4f} from the measured pairs")
    if options.output:
        document = {
            "network": options.network,
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
        }
        options.output.write_text(json.dumps({**document, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
