"""The cost of `net.optimize(precision="int8")` on trained networks: int8 and float copies under the same masks.

    python benchmarks/int8_copies.py --data DATA [--network camvid voc imagenet] [--every 1] [--calibrate 32]
                                     [--largest-error 0.05]

DATA holds camvid, camvid_mobilenetv2_fcn, voc_deeplab, imagenet_sample and mobilenet_v2_imagenet. Copies are
calibrated on other images than they are measured on: training images of CamVid, unlabelled photos, every tenth image
of ImageNet's sample. Figures are mean IoU or top-1 accuracy in per cent, in brackets the standard error of the
difference from float, and processor milliseconds per image, the copies in turn on each image with one thread.
"""

from __future__ import annotations

import argparse
import importlib.util
import random
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torchvision
from safetensors.torch import load_file
from torch import Tensor, nn

import cadsurgery as cs
from cadsurgery.data.images import read_image
from cadsurgery.support.provenance import describe_run
from cadsurgery.tasks.segmentation.metrics import IGNORED

ROOT = Path(__file__).parents[1]
SIDE = 225  # side at which the given MobileNetV2 is exact


class Task(NamedTuple):
    """A network, calibration images (1, 3, H, W), test images with labels, and a counter for the figure."""

    model: nn.Module
    calibration: list[Tensor]
    images: Callable[[], Iterator[tuple[Tensor, Any]]]
    counter: Callable[[], Any]


class Segments:
    """Mean IoU of class scores over the classes in the labels.

    Some classes do not occur in fifty images; a few pixels predicted as one of these would weigh as much as a whole
    class.
    """

    def __init__(self, classes: int, restore: Callable[..., Tensor] | None = None) -> None:
        self.classes, self.restore, self.seen = classes, restore, list[Tensor]()

    def add(self, scores: Tensor, known: Any) -> None:
        """Add the scores (1, C, H, W) of an image, with its labels or data to restore them."""
        if self.restore is not None:
            inside, known = known
            scores = self.restore(scores, inside, known.shape[-2:])
        counted, classes = known != IGNORED, self.classes
        pairs = classes * known[counted] + scores.argmax(1)[counted]
        self.seen.append(torch.bincount(pairs, minlength=classes**2).view(classes, classes))

    def figure(self, images: Sequence[int]) -> float:
        """Return the figure of these images, in per cent."""
        confusion = torch.stack([self.seen[image] for image in images]).sum(0)
        labelled, hits = confusion.sum(1), confusion.diagonal()
        iou = hits / (labelled + confusion.sum(0) - hits)
        return 100 * float(iou[labelled > 0].mean())


class Classes:
    """Top-1 accuracy."""

    def __init__(self) -> None:
        self.seen = list[bool]()

    def add(self, scores: Tensor, known: int) -> None:
        """Add the scores (1, C) of an image, with its class."""
        self.seen.append(int(scores.argmax(1)) == known)

    def figure(self, images: Sequence[int]) -> float:
        """Return the figure of these images, in per cent."""
        return 100 * sum(self.seen[image] for image in images) / len(images)


def error_of_difference(counter: Any, other: Any) -> float:
    """Return the standard error of the difference of two figures of the same images (bootstrap over images)."""
    draw, count = random.Random(0), len(counter.seen)
    drawn = (draw.choices(range(count), k=count) for _ in range(500))
    return statistics.stdev(counter.figure(images) - other.figure(images) for images in drawn)


def recipe(name: str) -> Any:
    """Import the module of a recipe."""
    spec = importlib.util.spec_from_file_location(f"{name}_recipe", ROOT / "recipes" / name / "network.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def normalised(picture: Tensor) -> Tensor:
    """Normalise an image in 0..1 to (1, 3, H, W) in -1..1."""
    return picture.mul(2).sub(1).unsqueeze(0)


def camvid(data: Path, every: int, calibrate: int) -> Task:
    """Return the network of recipes/camvid_mobilenetv2 with CamVid's test images."""
    network = recipe("camvid_mobilenetv2")
    train, test = network.images(data, "train"), network.images(data, "test")
    step = max(1, len(train) // calibrate)

    def images() -> Iterator[tuple[Tensor, Any]]:
        for index in range(0, len(test), every):
            picture, labels = test[index]
            yield normalised(picture), labels.unsqueeze(0)

    calibration = [normalised(train[index][0]) for index in range(0, len(train), step)][:calibrate]
    return Task(network.build(data), calibration, images, lambda: Segments(len(network.CLASSES)))


def voc(data: Path, every: int, calibrate: int) -> Task:
    """Return the network of recipes/voc_deeplab with its labelled images."""
    network = recipe("voc_deeplab")
    test, photos = network.images(data), network.unlabelled(data)

    def images() -> Iterator[tuple[Tensor, Any]]:
        for index in range(0, len(test), every):
            picture, labels = test[index]
            padded, inside = network.padded(picture)
            yield normalised(padded), (inside, labels.unsqueeze(0))

    calibration = [normalised(network.read(path)) for path in photos[:: max(1, len(photos) // calibrate)]][
        :calibrate
    ]
    return Task(network.build(data), calibration, images, lambda: Segments(21, network.restored))


def imagenet(data: Path, every: int, calibrate: int) -> Task:
    """Return MobileNetV2 with ImageNet's sample, without the calibration images."""
    model = torchvision.models.mobilenet_v2()
    state = load_file(data / "mobilenet_v2_imagenet" / "mobilenet_v2.fp16.safetensors")
    model.load_state_dict(
        {name: value.float() if value.is_floating_point() else value for name, value in state.items()}
    )
    model.pretrained_cfg = {"mean": (0.5,) * 3, "std": (0.5,) * 3}
    paths = sorted((data / "imagenet_sample" / "images").glob("*.jpg"))

    def read(path: Path) -> Tensor:
        picture = read_image(path)
        top, left = ((side - SIDE) // 2 for side in picture.shape[1:])
        return normalised(picture[:, top : top + SIDE, left : left + SIDE])

    def images() -> Iterator[tuple[Tensor, Any]]:
        for path in [path for place, path in enumerate(paths) if place % 10][::every]:
            yield read(path), int(path.name.split("_")[0])

    return Task(model.eval(), [read(path) for path in paths[::10][:calibrate]], images, Classes)


TASKS = {"camvid": camvid, "voc": voc, "imagenet": imagenet}


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--network", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--mask", nargs="+", default=["all", "edges | budget:fraction=0.34"])
    parser.add_argument("--every", type=int, default=1, help="measure on every N-th image")
    parser.add_argument("--calibrate", type=int, default=32, help="number of calibration images")
    parser.add_argument(
        "--largest-error", type=float, help="largest error of a third copy, see `AdaptiveModel.optimize`"
    )
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(describe_run(torch.device("cpu")), flush=True)
    for name in options.network:
        task = TASKS[name](options.data, options.every, options.calibrate)
        net = cs.adaptify(task.model, options.mask[-1], normalisation="raw", verify_laws=False)
        copies = {
            "float": net.optimize(),
            "int8": net.optimize(precision="int8", calibration=task.calibration),
        }
        if options.largest_error:
            limited: Any = {"calibration": task.calibration, "largest_error": options.largest_error}
            copies[f"int8, {options.largest_error:g}"] = net.optimize(precision="int8", **limited)
        for kind, copy in copies.items():
            print(f"\n{name}, {kind}: {copy.quantisation}\n", flush=True)
        spent = Counter[Any]()
        counters = {(mask, kind): task.counter() for mask in options.mask for kind in copies}
        for image, known in task.images():
            for mask in options.mask:
                for kind, copy in copies.items():
                    start = time.process_time()
                    scores = copy(image, mask=mask)
                    spent[mask, kind] += 1e3 * (time.process_time() - start)
                    counters[mask, kind].add(scores, known)
                    spent[mask] += 1
        for (mask, kind), counter in counters.items():
            each = len(copies) * spent[mask, kind] / spent[mask]
            figure, spread = counter.figure(range(len(counter.seen))), ""
            if kind != "float":
                spread = f" ({error_of_difference(counter, counters[mask, 'float']):.2f})"
            print(f"| {name} | {mask} | {kind} | {figure:.2f}{spread} | {each:.1f} ms |", flush=True)


if __name__ == "__main__":
    main()
