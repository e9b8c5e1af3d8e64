"""The benefit of masks, calibrated means and refinements fitted without labels: fidelity and accuracy against work.

    python recipes/voc_deeplab/without_labels.py DATA --network voc [--low 16] [--seeds 0 1 2] [--budgets 0.1 0.2]

DATA holds the folders of recipes/voc_deeplab or recipes/camvid_mobilenetv2. Gain is fitted once per seed to images
without labels (`unlabelled`, or the training split) and compared on the test split, or on `--split val`: divergence
from everything high in thousandths of a nat, share of pixels of the same class, mean IoU of the classes in the
labels.
Work: multiply-accumulates of the whole network and of its region, including the mask's, relative to everything high.
"""

from __future__ import annotations

import argparse
import copy
import json
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

import cadsurgery as cs  # noqa: E402
from cadsurgery.data.images import normalise  # noqa: E402
from cadsurgery.data.networks import source_of  # noqa: E402
from cadsurgery.finetune import calibrate_means, fit_refinement  # noqa: E402
from cadsurgery.masks import Budget, resolve_mask  # noqa: E402
from cadsurgery.support.divergence import divergence  # noqa: E402
from cadsurgery.tasks.sides.masks import Masked  # noqa: E402
from recipes.camvid_mobilenetv2 import network as camvid  # noqa: E402
from recipes.voc_deeplab import network as voc  # noqa: E402
from recipes.voc_deeplab.fit_gain import fit_gain  # noqa: E402

Shown = tuple[
    Tensor, Tensor, Callable[[Tensor], Tensor]
]  # image in 0..1, labels, scores brought to their size


@dataclass(frozen=True)
class Case:
    """A network, its options of `adaptify`, images for fitting, and images for measuring."""

    build: Callable[[Path], nn.Module]
    options: dict[str, Any]
    unlabelled: Callable[[Path], Sequence[Tensor]]
    images: Callable[[Path, str], Sequence[Shown]]


class Lazy(Sequence[Any]):
    """A sequence whose items are created on access."""

    def __init__(self, make: Callable[[Any], Any], sources: Sequence[Any]) -> None:
        self.make, self.sources = make, sources

    def __len__(self) -> int:
        return len(self.sources)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return Lazy(self.make, self.sources[index])
        return self.make(self.sources[index])


def _of_voc(data: Path, split: str) -> Sequence[Shown]:
    pairs = voc.images(data)

    def show(index: int) -> Shown:
        image, labels = pairs[index]
        picture, inside = voc.padded(image)
        return (
            picture,
            labels,
            lambda scores: voc.restored(scores, inside, (labels.shape[0], labels.shape[1])),
        )

    return Lazy(show, range(len(pairs)))


def _of_camvid(data: Path, split: str) -> Sequence[Shown]:
    pairs = camvid.images(data, split)
    return Lazy(lambda index: (*pairs[index], lambda scores: scores), range(len(pairs)))


def _train_images(data: Path) -> Sequence[Tensor]:
    pairs = camvid.images(data, "train")
    return Lazy(lambda index: pairs[index][0], range(len(pairs)))


CASES = {
    "voc": Case(voc.build, {}, lambda data: Lazy(voc.read, voc.unlabelled(data)), _of_voc),
    "camvid": Case(camvid.build, {"fill": "guided"}, _train_images, _of_camvid),
}


class Sums:
    """Metrics of a setting, summed over images."""

    def __init__(self, classes: int) -> None:
        self.counts: dict[str, float] = {}
        self.confusion = torch.zeros(classes, classes, dtype=torch.int64)

    def add(
        self, scores: Tensor, high: Tensor, labels: Tensor, restored: Tensor, macs: Mapping[str, float]
    ) -> None:
        """Add an image."""
        same = (scores.argmax(1) == high.argmax(1)).double().mean()
        figures = {"images": 1, "divergence": float(divergence(high, scores, "classes").mean())}
        for name, value in (figures | {"agreement": float(same), **macs}).items():
            self.counts[name] = self.counts.get(name, 0) + value
        known, classes = labels != 255, len(self.confusion)
        pairs = classes * labels[known] + restored.argmax(1)[0][known]
        self.confusion += torch.bincount(pairs, minlength=classes**2).view(classes, classes)

    def row(self) -> dict[str, float]:
        """Return the metrics."""
        counts, hits = self.counts, self.confusion.diagonal()
        iou = hits / (self.confusion.sum(0) + self.confusion.sum(1) - hits)
        return {
            "network_work": counts["macs"] / counts["macs_high"],
            "region_work": counts["region"] / counts["region_high"],
            "divergence": 1000 * counts["divergence"] / counts["images"],
            "agreement": 100 * counts["agreement"] / counts["images"],
            "miou": 100 * float(iou[self.confusion.sum(1) > 0].mean()),
        }


@torch.inference_mode()
def measure(net: cs.AdaptiveModel, masks: dict[str, Any], shown: Sequence[Shown]) -> list[dict[str, Any]]:
    """Return a row for everything high, each mask and everything low; every image is read once."""
    fast, work = net.optimize(), dict[tuple[int, ...], Any]()
    settings = {
        name: Masked(net, fast, resolve_mask(mask), work)
        for name, mask in {"everything high": "all", **masks, "everything low": "none"}.items()
    }
    sums: dict[str, Sums] = {}
    for number in range(len(shown)):
        image, labels, restore = shown[number]
        x, high = normalise(image, source_of(net))[None], None
        for name, setting in settings.items():
            scores = setting(x)
            high = scores if high is None else high
            total = sums.setdefault(name, Sums(scores.shape[1]))
            total.add(scores, high, labels, restore(scores), setting.count(x))
    return [{"mask": name, **total.row()} for name, total in sums.items()]


def main() -> None:
    """Fit, measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("--network", choices=CASES, required=True)
    parser.add_argument("--low", type=int, default=16, help="low output stride; the high one is 8")
    parser.add_argument("--seeds", type=int, nargs="*", default=[0])
    parser.add_argument("--minutes", type=float, default=5.0, help="processor time of each fit")
    parser.add_argument(
        "--calibrate",
        action="store_true",
        help="first calibrate means over the image, see docs/concepts/refinements.md",
    )
    parser.add_argument(
        "--refine", type=float, metavar="MINUTES", help="fit a refinement; its processor time"
    )
    parser.add_argument("--refine-seed", type=int, default=0)
    parser.add_argument("--balance", type=float, default=0.0, help="balance of classes, see fit_gain")
    parser.add_argument(
        "--fit", type=int, help="number of images to fit to; default: as many as the time allows"
    )
    parser.add_argument("--budgets", type=float, nargs="*", default=[0.1])
    parser.add_argument(
        "--tolerances",
        type=float,
        nargs="*",
        default=[],
        help="shares of the images to keep by tolerances",
    )
    parser.add_argument(
        "--masks", nargs="*", default=["detail", "edges", "oracle"], help="masks to compare with gain"
    )
    parser.add_argument("--split", default="test")
    parser.add_argument("--every", type=int, default=1, help="measure on every N-th image")
    parser.add_argument("--output", type=Path, help="JSON file")
    options = parser.parse_args()
    case = CASES[options.network]
    net = cs.adaptify(
        case.build(options.data), output_stride=(8, options.low), verify_laws=False, **case.options
    )
    if options.calibrate:
        layers = calibrate_means(net, case.unlabelled(options.data))
        print(f"{layers} layers calibrated", file=sys.stderr, flush=True)
    if options.refine:
        refined = fit_refinement(
            net, case.unlabelled(options.data), minutes=options.refine, seed=options.refine_seed
        )
        print(refined, file=sys.stderr, flush=True)
    masks: dict[str, Any] = {name: resolve_mask(name) for name in options.masks}
    fits = {}
    for seed in options.seeds:
        net.mask = f"gain:seed={seed}"
        photos = case.unlabelled(options.data)[: options.fit]
        fit = fit_gain(net, photos, minutes=options.minutes, seed=seed, balance=options.balance)
        fits[seed] = fit.to_dict()
        masks[f"gain, seed {seed}"] = net.mask
        print(f"seed {seed}: {fit}", file=sys.stderr, flush=True)
    budgets: dict[str, Any] = {
        f"{name}, budget {fraction:g}": Budget(mask, fraction)
        for fraction in options.budgets
        for name, mask in masks.items()
    }
    for seed, fit in fits.items():
        for share in options.tolerances:
            mask = copy.deepcopy(masks[f"gain, seed {seed}"])
            mask.tolerance = fit["tolerances"][f"{share:g}"]
            budgets[f"gain, seed {seed}, tolerance for {share:g}"] = mask
    begin = time.process_time()
    rows = measure(net, budgets, case.images(options.data, options.split)[:: options.every])
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True
    )
    print(f"commit {commit.stdout.strip()}, torch {torch.__version__}, {time.process_time() - begin:.0f} s\n")
    print("| mask | whole network | region | divergence | agreement | mIoU |\n|---|---|---|---|---|---|")
    for row in rows:
        figures = f"{row['divergence']:.2f} | {row['agreement']:.3f} | {row['miou']:.2f}"
        print(f"| {row['mask']} | {row['network_work']:.3f} | {row['region_work']:.3f} | {figures} |")
    if options.output is not None:
        document = {"arguments": {k: str(v) for k, v in vars(options).items()}, "fits": fits, "rows": rows}
        options.output.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
