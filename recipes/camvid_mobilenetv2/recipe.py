"""CamVid accuracy of a MobileNetV2 + FCN segmentation network, converted without retraining.

    python recipes/camvid_mobilenetv2/recipe.py DATA [--only NAME ...] [--limit N] [--output results.json]

DATA is a folder with `camvid/` and `camvid_mobilenetv2_fcn/` (see the README beside this file). One
confusion matrix over the whole test split, mean IoU of classes 0..10, label 11 ignored.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
import torch.nn.functional as F
from PIL import Image
from rich.console import Console
from rich.progress import track
from rich.table import Table
from safetensors.torch import load_file
from torch import Tensor, nn
from torchvision.models.segmentation.fcn import FCNHead

import cadsurgery as cs

CLASSES, IGNORED = 11, 11
THIN = (2, 6, 9)  # pole, sign, pedestrian
BATCH = 4


class Segmenter(nn.Module):
    """timm MobileNetV2 at output stride 8, torchvision FCN head, bilinear upsampling."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = timm.create_model(
            "mobilenetv2_100", features_only=True, output_stride=8, out_indices=(4,)
        )
        self.head = FCNHead(320, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        """Class scores at image resolution."""
        scores = self.head(self.backbone(x)[0])
        return F.interpolate(scores, size=x.shape[-2:], mode="bilinear", align_corners=False)


@dataclass(frozen=True)
class Setting:
    """One row of the table: options of `adaptify`; none for the network as it is."""

    mask: str = ""
    output_stride: tuple[int, int] = (8, 32)
    options: dict[str, Any] = field(default_factory=dict)


EDGES, GRADED = "edges:threshold=0.35,dilation=11", "edges:threshold=0.95/0.1,dilation=5/15"
NEAREST: dict[str, Any] = {"fill": "nearest"}
SETTINGS = {
    "dense OS 8": Setting(),
    "edges 0/2 nearest, blocks": Setting(EDGES, options={**NEAREST, "patch": "block"}),
    "edges 0/2 nearest, quadtree": Setting(EDGES, options=NEAREST),
    "edges 0/2 linear, quadtree": Setting(EDGES),
    "edges 0/1 linear, quadtree": Setting(EDGES, (8, 16)),
    "graded edges linear": Setting(GRADED),
    "all low linear": Setting("none"),
}


def build(data: Path) -> Segmenter:
    """The network with its trained weights."""
    file = data / "camvid_mobilenetv2_fcn" / "mobilenetv2_fcn_os8_camvid.fp16.safetensors"
    model = Segmenter()
    model.load_state_dict(
        {
            name: value.float() if value.is_floating_point() else value
            for name, value in load_file(file).items()
        }
    )
    return model.eval()


def load_split(data: Path, limit: int | None) -> list[tuple[Path, Path]]:
    """Image and label files of the test split."""
    folder = data / "camvid" / "test"
    images = sorted((folder / "images").iterdir())[:limit]
    return [(image, folder / "labels" / f"{image.stem}.png") for image in images]


def evaluate(net: nn.Module, files: list[tuple[Path, Path]], name: str) -> dict[str, Any]:
    """Confusion matrix over the files, and the mean cost relative to the dense network's adaptive part."""
    confusion = torch.zeros(CLASSES, CLASSES, dtype=torch.int64)
    active, spent = [], 0.0
    for start in track(range(0, len(files), BATCH), description=name, console=Console(stderr=True)):
        chunk = files[start : start + BATCH]
        pictures = [np.array(Image.open(image).convert("RGB")) for image, _ in chunk]
        x = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).float() / 127.5 - 1
        labels = torch.from_numpy(np.stack([np.array(Image.open(label)) for _, label in chunk])).long()
        begin = time.perf_counter()
        with torch.inference_mode():
            predicted = net(x.contiguous(memory_format=torch.channels_last)).argmax(1)
        spent += time.perf_counter() - begin
        valid = labels < CLASSES
        pairs = labels[valid] * CLASSES + predicted[valid]
        confusion += torch.bincount(pairs, minlength=CLASSES**2).view(CLASSES, CLASSES)
        if isinstance(net, cs.AdaptiveModel):
            active.append((net.active_fraction, region_cost(net, x)))
    hits = confusion.diag().double()
    iou = hits / (confusion.sum(0) + confusion.sum(1) - confusion.diag())
    shares = np.array(active).mean(0) if active else (1.0, 1.0)
    return {
        "miou": 100 * iou.nanmean().item(),  # a class can be absent from a few images
        "thin": 100 * iou[list(THIN)].nanmean().item(),
        "pixel_accuracy": 100 * (hits.sum() / confusion.sum()).item(),
        "active_fraction": float(shares[0]),
        "cost": float(shares[1]),
        "iou": [None if math.isnan(value) else 100 * value for value in iou.tolist()],
        "seconds_per_image": spent / len(files),
    }


def region_cost(net: cs.AdaptiveModel, x: Tensor) -> float:
    """MACs of the adaptive part for this batch's masks, relative to everything high."""
    adaptive = {decision.node for decision in net.plan.chosen("adapt", "keep")}
    layers = [layer for layer in net.macs(x).layers if layer.layer in adaptive]
    return sum(layer.mask for layer in layers) / sum(layer.high for layer in layers)


def main() -> None:
    """Print the table, write the figures."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", type=Path)
    parser.add_argument("--only", nargs="+", choices=list(SETTINGS), default=list(SETTINGS))
    parser.add_argument("--limit", type=int, help="number of images; default all")
    parser.add_argument("--output", type=Path, help="JSON file")
    options = parser.parse_args()
    if not (options.data / "camvid").is_dir():
        print(f"skipped: {options.data} holds no camvid folder")
        sys.exit(0)

    model, files = build(options.data), load_split(options.data, options.limit)
    results = {}
    table = Table(title=f"CamVid test, {len(files)} images, weights trained at OS 8, no retraining")
    for column in ("setting", "mIoU", "thin classes", "pixel acc.", "active", "cost", "s / image"):
        table.add_column(column, justify="left" if column == "setting" else "right")
    for name in options.only:
        setting = SETTINGS[name]
        net: nn.Module = model
        if setting.mask:
            net = cs.adaptify(model, setting.mask, output_stride=setting.output_stride, **setting.options)
        row = results[name] = evaluate(net, files, name)
        figures = (row["miou"], row["thin"], row["pixel_accuracy"], row["active_fraction"], row["cost"])
        table.add_row(name, *(f"{value:.2f}" for value in figures), f"{row['seconds_per_image']:.2f}")
    Console().print(table)
    if options.output:
        document = {"images": len(files), "torch": torch.__version__, "settings": results}
        options.output.write_text(json.dumps(document, indent=2) + "\n")


if __name__ == "__main__":
    main()
