"""Draw the level map of each mask on one photo, and count what the network costs with it.

    python -m benchmarks.pictures --masks PHOTO     # writes docs/pictures/masks.json, too
    python -m benchmarks.pictures --empty DETECTOR.onnx PICTURE...

The network is torchvision's fcn_resnet50 with random weights (seed 0), as in the README. Costs are its
multiply-accumulates with the mask, the mask's own included, relative to the network as given; they are counted, not
timed. Masks that have to be trained are drawn as they are before training. The labels of `trimap` are the person that
OpenCV's GrabCut finds in the photo. With `--empty`, the masks of floors are drawn on pictures that are mostly
empty, with a detector of text as the network.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import Tensor

import cadsurgery as cs
from benchmarks.glossary_pictures import WIDTH
from cadsurgery.data.images import normalise, read_image
from cadsurgery.data.networks import source_of
from cadsurgery.elements.lattice import Lattice
from cadsurgery.support.provenance import describe_run
from cadsurgery.tasks.figures import draw_levels

NETWORK = "fcn_resnet50"
_PERSON = (10, 5, 440, 505)  # left, top, width and height of the rectangle that GrabCut starts from
MASKS_OF_FLOORS = ("content", "preview:least=0.3")
_UNIT = (
    (0.5,) * 3,
    (0.5,) * 3,
)  # mean and standard deviation by which the detector's pictures are normalised
# Each mask by its name, as it is drawn: those that rank by a budget of a fifth, others by their defaults.
MASKS: dict[str, dict[str, str]] = {
    "see-image": {
        "edges": "edges | budget:fraction=0.2",
        "gradient": "gradient | budget:fraction=0.2",
        "content": "content | budget:fraction=0.2",
        "keypoints": "keypoints:count=64",
        "trimap": "trimap",
    },
    "see-network": {
        "detail": "detail | budget:fraction=0.2",
        "confidence": "confidence | budget:fraction=0.2",
        "learned": "learned | budget:fraction=0.2",
        "preview": "preview | budget:fraction=0.2",
    },
    "made-of-others": {
        "all": "all",
        "none": "none",
        "random": "random:seed=0",
        "budget": "edges | budget:fraction=0.1/0.3",
        "union": "detail:threshold=3 + edges:threshold=1",
        "dilate": "detail:threshold=3 | dilate:size=5",
        "threshold": "detail | threshold:at=3/1",
        "smooth": "detail:threshold=3 | smooth",
    },
}


def masks(photo: Path) -> tuple[dict[str, Callable[[], Figure]], dict[str, Any]]:
    """Run the network on a photo with each mask; return how to draw each group, and the figures."""
    torch.manual_seed(0)
    picture = read_image(photo)
    model = cs.build_model(NETWORK, "none")
    net = cs.adaptify(model, "edges", verify_laws=False)
    batch = normalise(picture, source_of(model)).unsqueeze(0)
    drawn: dict[str, Callable[[], Figure]] = {}
    rows: dict[str, dict[str, Any]] = {}
    with torch.inference_mode(), cs.masks.labelled(_labels(picture)):
        for group, specs in MASKS.items():
            lattices = {}
            for name, spec in specs.items():
                lattices[name], rows[name] = _measure(model, spec, batch)
                print(spec, rows[name], flush=True)
            drawn[f"masks-{group}"] = partial(_figure, picture, lattices, rows, net.plan.output_stride[0])
    shared = {"network": NETWORK, "weights": "random", "pixels": list(picture.shape[1:])}
    return drawn, {**shared, "masks": rows, **describe_run(torch.device("cpu"))}


def empty(detector: Path, pictures: Sequence[Path]) -> Callable[[], Figure]:
    """Run a detector with each mask of floors on each picture; return how to draw them, a row for each picture."""
    model = cs.build_model(str(detector)).eval()
    net = cs.adaptify(model, "content", coarsest=32, normalisation=_UNIT, verify_laws=False)
    shown: list[tuple[str, np.ndarray]] = []
    for path in pictures:
        picture = _enlarged(read_image(path))
        pixels, batch = picture.permute(1, 2, 0).numpy(), (picture[None].flip(1) - 0.5) / 0.5
        shown.append((path.name, pixels))
        for spec in MASKS_OF_FLOORS:
            with torch.inference_mode():
                net(batch, mask=spec)
            row = {"spec": spec, "active_fraction": net.active_fraction}
            row["of_given"] = net.macs(batch, mask=spec).of_given
            shown.append((_title(row, "kept"), draw_levels(pixels, net.lattice, 1)))
    return partial(_panels, shown, 1.0 + 1.9 * len(pictures))


def _enlarged(picture: Tensor) -> Tensor:
    """Return a picture (3, H, W) at twice its size if it is small, with sides of whole cells of 32 pixels."""
    scale = 2 if min(picture.shape[1:]) < 256 else 1
    size = [round(length * scale / 32) * 32 for length in picture.shape[1:]]
    return F.interpolate(picture[None], size, mode="bilinear", antialias=True)[0]


def _measure(model: torch.nn.Module, spec: str, batch: Tensor) -> tuple[Lattice, dict[str, Any]]:
    net = cs.adaptify(model, spec, verify_laws=False)
    net(batch)  # a learned mask is made on the first call
    lattice, report = net.lattice, net.macs(batch)
    row = {
        "spec": spec,
        "active_fraction": lattice.active_fraction,
        "of_given": report.of_given,
        "of_mask": report.of_mask / report.given if report.given else None,
    }
    return lattice, row


def _labels(picture: Tensor) -> Tensor:
    """Return the labels (1, H, W) of a photo: 1 where GrabCut finds the person."""
    import cv2

    pixels = (255 * picture.permute(1, 2, 0)).byte().numpy()
    found = np.zeros(pixels.shape[:2], np.uint8)
    cv2.setRNGSeed(0)
    cv2.grabCut(pixels, found, _PERSON, np.zeros((1, 65)), np.zeros((1, 65)), 5, cv2.GC_INIT_WITH_RECT)
    return torch.from_numpy(found % 2 == 1).long().unsqueeze(0)  # odd: certainly or probably the person


def _figure(
    picture: Tensor,
    lattices: Mapping[str, Lattice],
    rows: Mapping[str, Mapping[str, Any]],
    output_stride: int,
) -> Figure:
    """Draw the photo and each level map: red is kept, grey is at the lowest level, between them are levels between."""
    pixels = picture.permute(1, 2, 0).numpy()
    levels = (
        (_title(rows[name]), draw_levels(pixels, lattice, output_stride))
        for name, lattice in lattices.items()
    )
    lines = -(-(len(lattices) + 1) // 3)
    return _panels([("photo", pixels), *levels], lines * 2.75)


def _panels(shown: Sequence[tuple[str, np.ndarray]], height: float) -> Figure:
    """Draw pictures with their titles, three in a row."""
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    axes = list(figure.subplots(-(-len(shown) // 3), 3).flat)
    for axis in axes:
        axis.axis("off")
    for axis, (title, pixels) in zip(axes, shown, strict=False):
        axis.imshow(pixels)
        axis.set_title(title, fontsize=8.5)
    return figure


def _title(row: Mapping[str, Any], kept: str = "active") -> str:
    spec = row["spec"]
    for sign in (" | ", " + "):
        spec = spec.replace(sign, f"\n{sign.strip()} ", 1)
    return f"{spec}\n{kept} {row['active_fraction']:.2f}, cost {row['of_given']:.2f}"
