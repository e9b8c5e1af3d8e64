"""Gates of two classifiers, trained without labels on half of an ImageNet sample, and measured on the other half.

    python recipes/sampling_imagenet/recipe.py DATA [RUNS] [--network mobilenet_v2] [--weights 1 2 4 8]
        [--steps 60] [--output results.json]

DATA is a folder with `imagenet_sample/`, `mobilenet_v2_imagenet/` and `squeezenet1_0_imagenet/` (see the README
beside this file); RUNS (default: runs) gets a folder for each weight of the sparse loss. Existing runs are not
trained again, and existing rows in the output are not measured again.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn
from torchvision import models
from torchvision.transforms.v2.functional import center_crop, pil_to_tensor

import cadsurgery as cs
from cadsurgery.finetune import Settings, fit
from cadsurgery.support.provenance import describe_run
from cadsurgery.support.timing import interleaved

BATCH = 10
MASKS = ("edges", "edges:threshold=0.95,dilation=5")  # masks of `adaptify`, for comparison with gates
Call = Callable[[Tensor], Tensor]
TIMED = 8  # number of images, of the other half, that are timed
# Temperature of gates in training. It ends at the temperature of evaluation, and starts below the published 1: while
# shares are soft, the centre of the Gaussian, which counts with its share, restores closed positions, and closing seems
# to cost nothing.
FIRST, FINAL = 0.1, 0.03
FIRES = (3, 4, 5, 7, 8, 9, 10, 12)
BGR_MEAN = (104.0, 117.0, 123.0)


class Network(NamedTuple):
    """A network, and how it is sampled, trained, and evaluated.

    Attributes:
        folder: folder of its weights.
        side: side of its input.
        smaller: other sides, at which the dense network is measured.
        where: sampled modules; SqueezeNet has no residual branches.
        lr: learning rate of its gates. A step changes a score by about the rate times the mean of the gate's input:
            2.6, and 310 in SqueezeNet, which takes images in 0..255.
    """

    folder: str
    side: int
    smaller: tuple[int, ...]
    where: str | tuple[str, ...]
    lr: float


NETWORKS = {
    "mobilenet_v2": Network("mobilenet_v2_imagenet", 225, (193, 161), "auto", 0.1),
    "squeezenet1_0": Network(
        "squeezenet1_0_imagenet",
        227,
        (195, 163),
        tuple(f"features.{fire}.expand{kernel}" for fire in FIRES for kernel in ("1x1", "3x3")),
        1e-3,
    ),
}


def build(name: str, data: Path) -> nn.Module:
    """Build torchvision's network with the trained weights."""
    model = getattr(models, name)(weights=None)
    state = load_file(next((data / NETWORKS[name].folder).glob("*.safetensors")))
    model.load_state_dict({k: v.float() if v.is_floating_point() else v for k, v in state.items()})
    return model.eval()


def load_images(name: str, data: Path) -> Tensor:
    """Load the images (1000, 3, side, side), normalised for the weights; image n has label n."""
    files, side = sorted((data / "imagenet_sample" / "images").iterdir()), NETWORKS[name].side
    pictures = [center_crop(pil_to_tensor(Image.open(file).convert("RGB")), [side, side]) for file in files]
    images = torch.stack(pictures).float()
    if name == "mobilenet_v2":
        return images / 127.5 - 1
    return images.flip(1) - torch.tensor(BGR_MEAN).view(3, 1, 1)


class Unlabelled:
    """Images for training without labels."""

    name, is_labelled = "every second image", False

    def __init__(self, images: Tensor) -> None:
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int, /) -> tuple[tuple[Tensor], Tensor]:
        return (self.images[index],), torch.zeros(1, 1, dtype=torch.int64)


def train(name: str, model: nn.Module, images: Tensor, weight: float, steps: int, folder: Path) -> float:
    """Train gates and write the network; return the CPU seconds."""
    started = time.process_time()
    settings = Settings(
        steps=steps,
        batch=BATCH,
        lr=NETWORKS[name].lr,
        optimizer="adamw",
        weight_decay=0.0,
        power=0.9,
        train="gates",
        save_every=steps,
        workers=0,
        objective_options={"weight": weight, "start": FIRST, "decay": (FINAL / FIRST) ** (1 / steps)},
    )
    # With noise, as published: gaps then are scattered, next to the positions from which they are filled.
    net = cs.sample(model, network_where(name), noise=True)
    fit(net, Unlabelled(images), settings, output=folder, device="cpu")
    return time.process_time() - started


@torch.no_grad()
def measure(net: Call, images: Tensor, labels: Tensor, macs: Any = None) -> dict[str, float]:
    """Return top-1 accuracy and, with a counting function, the mean MACs per image over every fifth batch."""
    hits, work, counted = 0, 0, 0
    for start in range(0, len(labels), BATCH):
        batch = images[start : start + BATCH]
        hits += int((net(batch).argmax(1) == labels[start : start + BATCH]).sum())
        if macs and start % (5 * BATCH) == 0:
            work, counted = work + macs(batch), counted + len(batch)
    return {"top1": 100 * hits / len(labels), "macs": work / max(counted, 1)}


def work_of(net: cs.SampledModel | cs.AdaptiveModel, images: Tensor) -> int:
    """Return the MACs of a batch, as computed."""
    return net.macs(images).total if isinstance(net, cs.SampledModel) else net.macs(images).mask


def at_random(net: cs.SampledModel, images: Tensor) -> cs.SampledModel:
    """Return a copy with gates open at random positions, as often as the network's on every fifth batch."""
    seen: dict[int, list[float]] = {}
    for start in range(0, len(images), 5 * BATCH):
        net(images[start : start + BATCH])
        for number, density in enumerate(net.densities.values()):
            seen.setdefault(number, []).append(density)
    logits = {number: torch.tensor(sum(found) / len(found)).logit(1e-4) for number, found in seen.items()}
    chance = copy.deepcopy(net)
    chance.score_override = lambda number, score: torch.full_like(score, float(logits[number]))
    return chance


def trained(
    name: str, model: nn.Module, images: Tensor, weight: float, steps: int, runs: Path
) -> tuple[cs.SampledModel, float]:
    """Return the network trained with a weight of the sparse loss, and the CPU seconds; trains it if missing."""
    folder = runs / f"{name}-{weight}"
    if not (folder / "net.safetensors").is_file():
        seconds = train(name, model, images, weight, steps, folder)
        (folder / "seconds.json").write_text(json.dumps(seconds))
    net = cs.load(folder / "net.safetensors", model)
    assert isinstance(net, cs.SampledModel)
    return net, json.loads((folder / "seconds.json").read_text())


def rows(
    name: str, data: Path, runs: Path, weights: Sequence[float], steps: int, known: Collection[str] = ()
) -> Iterator[dict[str, Any]]:
    """Yield the measured rows: the dense network, its gates, smaller images, and `adaptify` on these.

    Known rows are skipped. `ms` is the time of an image, `ms_of_dense` that of the dense network in the same run.
    """
    model, images = build(name, data), load_images(name, data)
    ours, theirs, labels = images[::2], images[1::2], torch.arange(len(images))[1::2]
    whole = cs.sample(model, network_where(name))
    fast = whole.optimize()
    dense, low = whole.macs(theirs[:1].to("meta")).dense, cs.plan(model).output_stride[1]

    def row(setting: str, net: Call, pictures: Tensor, macs: Any, **more: Any) -> dict[str, Any]:
        found = measure(net, pictures, labels, macs)
        sides: dict[str, Callable[[], object]] = {
            "dense": lambda: [fast.dense(one[None]) for one in theirs[:TIMED]],
            "this": lambda: [net(one[None]) for one in pictures[:TIMED]],
        }
        times = interleaved(sides, 5, clock=time.process_time)
        taken = {"ms": times["this"].best / TIMED, "ms_of_dense": times["dense"].best / TIMED}
        return {"setting": setting, **found, "of_dense": found["macs"] / dense, **taken, **more}

    def count(batch: Tensor) -> int:
        return whole.macs(batch.to("meta")).dense

    if "dense" not in known:
        yield row("dense", fast.dense, theirs, count)
    for weight in weights:
        if f"gates, {weight}" in known:
            continue
        net, seconds = trained(name, model, ours, weight, steps, runs)
        gated = net.optimize()
        chance = measure(at_random(gated, theirs), theirs, labels)["top1"]
        details = {"trained": round(seconds), "at_random": chance}
        yield row(f"gates, {weight}", gated, theirs, partial(work_of, gated), **details)
    for side in NETWORKS[name].smaller:
        small = F.interpolate(theirs, size=(side, side), mode="bilinear", antialias=True, align_corners=False)
        if f"dense, {side} pixels" not in known:
            yield row(f"dense, {side} pixels", fast.dense, small, count)
        for mask in MASKS:
            setting = f"adaptify {mask}, {low // 2} to {low}, {side} pixels"
            if setting not in known:
                adaptive = cs.adaptify(model, mask, output_stride=(low // 2, low))
                yield row(setting, adaptive.optimize(), small, partial(work_of, adaptive))


def network_where(name: str) -> str | list[str]:
    """Return the sampled modules of a network, as `cadsurgery.sample` takes them."""
    where = NETWORKS[name].where
    return where if isinstance(where, str) else list(where)


def main() -> None:
    """Train, measure, print a table in Markdown and write JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", type=Path)
    parser.add_argument("runs", type=Path, nargs="?", default=Path("runs"))
    parser.add_argument("--network", default="mobilenet_v2", choices=list(NETWORKS))
    parser.add_argument("--weights", nargs="*", type=float, default=[1.0, 2.0, 4.0, 8.0])
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    needed = [options.data / "imagenet_sample" / "images", options.data / NETWORKS[options.network].folder]
    if missing := [folder for folder in needed if not folder.is_dir()]:
        print(f"skipped: {missing[0]} is missing; the README beside this file says where data comes from.")
        return
    details = {"batch": BATCH, **describe_run(torch.device("cpu"))}
    known = json.loads(options.output.read_text()) if options.output and options.output.is_file() else {}
    done: list[dict[str, Any]] = known.get(options.network, {}).get("rows", [])
    settings = [row["setting"] for row in done]
    print("| setting | top-1 | at random | MACs | of dense | CPU ms | dense | training, CPU s |")
    print("|---|---|---|---|---|---|---|---|")
    for row in rows(options.network, options.data, options.runs, options.weights, options.steps, settings):
        done.append({**row, "commit": details["commit"]})
        print(
            f"| {row['setting']} | {row['top1']:.1f} | {row.get('at_random', '')} | {row['macs']:.3e} | "
            f"{row['of_dense']:.3f} | {row['ms']:.1f} | {row['ms_of_dense']:.1f} | {row.get('trained', '')} |",
            flush=True,
        )
        if options.output:  # results so far
            values = {**known, options.network: {**details, "rows": done}}
            options.output.write_text(json.dumps(values, indent=1) + "\n")


if __name__ == "__main__":
    main()
