"""Check by labels what `tune` gains without them, against the same network with its budgets, not tuned.

    python -m benchmarks.tune_check DATA FOLDER [--networks camvid-8,voc-8] [--photos 60] [--others 100]

For each network, converted with guided filling, `tune` runs on photos without their labels. Then the
network it was given and the tuned one are measured with labels on other pictures of the same data, under everything
low and `detail` with a budget of .1; the tuned one also under `gain` with that budget, if it chose `gain`, and under
the mask that it chose. Printed are the changes of mIoU in points relative to the network as given, and that of tuning,
each with its standard error (a paired bootstrap over pictures).
An interrupted tuning goes on in FOLDER.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

import cadsurgery as cs
from benchmarks.trained import NETWORKS, divided
from cadsurgery.data.images import normalise
from cadsurgery.data.networks import source_of
from cadsurgery.finetune.tuning import tune
from cadsurgery.masks import Budget
from cadsurgery.tasks.judging import LABELS, Judgement, estimate, judge

PAIR = (8, 16)
FRACTION = 0.1
DETAIL = f"detail | budget:fraction={FRACTION}"


def main() -> None:
    """Tune each network, measure both, and print the comparison."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--networks", default="camvid-8,voc-8")
    parser.add_argument("--photos", type=int, default=60)
    parser.add_argument("--others", type=int, default=100)
    parser.add_argument("--minutes", type=float, default=5.0, help="of processor time for fitting")
    options = parser.parse_args()
    for name in options.networks.split(","):
        model, data = NETWORKS[name](options.data)
        photos, others = divided(data, options.photos, options.others)
        net = cs.adaptify(model, "none", output_stride=PAIR, fill="guided", verify_laws=False)
        report = tune(
            net, photos.unlabelled(), output=options.folder / name, minutes=options.minutes, rounds=0
        )
        tuned = cs.load(report.network, model=NETWORKS[name](options.data)[0])
        pairs: dict[str, tuple[object, object]] = {
            "everything low": ("none", "none"),
            f"detail {FRACTION}": (DETAIL, DETAIL),
        }
        if report.chosen.startswith("gain"):
            pairs[f"detail, tuned: gain, {FRACTION}"] = (DETAIL, Budget(tuned.mask.mask, FRACTION))
        pairs[f"detail, tuned: as chosen, {report.chosen}"] = (DETAIL, tuned.mask)
        sides: dict[str, tuple[cs.AdaptiveModel, object]] = {}
        for words, (before, after) in pairs.items():
            sides |= {f"{words}, before": (net, before), f"{words}, after": (tuned, after)}
        judged = _measure(model, sides, others)
        given, kept = judged["given"], ", ".join(report.kept) or "nothing"
        print(
            f"{name}, {len(photos)} photos, kept: {kept}; {len(given)} other pictures, as given "
            f"{100 * estimate(given, given, LABELS).value:.2f} mIoU"
        )
        for words in pairs:
            before, after = (judged[f"{words}, {when}"] for when in ("before", "after"))
            print(
                f"  {words}: {_change(before, given)} before, {_change(after, given)} after; "
                f"tuning {_change(after, before)}"
            )
        sys.stdout.flush()


def _measure(
    model: torch.nn.Module, sides: dict[str, tuple[cs.AdaptiveModel, object]], data: cs.SegmentationData
) -> dict[str, list[Judgement]]:
    """Judge the network as given, `given`, and each network under a mask on each picture."""
    judged: dict[str, list[Judgement]] = {name: [] for name in ("given", *sides)}
    source = source_of(model)
    with torch.inference_mode():
        for image, labels in data:
            batch = normalise(image, source).unsqueeze(0)
            given = model(batch)
            outputs = {"given": given, **{name: net(batch, mask=mask) for name, (net, mask) in sides.items()}}
            size = (image.shape[1], image.shape[2])
            for name, output in outputs.items():
                judged[name].append(judge(0.0, output, given, labels.unsqueeze(0), size, "classes"))
    return judged


def _change(judged: list[Judgement], base: list[Judgement]) -> str:
    found = estimate(judged, base, LABELS)
    return f"{100 * found.change:+.2f} (±{100 * found.error:.2f})"


if __name__ == "__main__":
    main()
