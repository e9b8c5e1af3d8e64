"""ImageNet top-1 of torchvision's MobileNetV2, converted without retraining, against its multiply-accumulates.

    python recipes/imagenet_mobilenetv2/recipe.py DATA [--limit N] [--output results.json]

DATA is a folder with `imagenet_sample/` and `mobilenet_v2_imagenet/` (see the README beside this file).
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from rich.console import Console
from rich.progress import track
from rich.table import Table
from safetensors.torch import load_file
from torch import Tensor, nn
from torchvision.models import mobilenet_v2
from torchvision.transforms.v2.functional import center_crop, pil_to_tensor

import cadsurgery as cs

SIZE = 225  # TensorFlow's padding equals torchvision's at sizes 32 k + 1
BATCH = 20
WEIGHTS = "mobilenet_v2.fp16.safetensors"


@dataclass(frozen=True)
class Setting:
    """One row of the table; no mask for the original network."""

    mask: str = ""
    output_stride: tuple[int, int] = (8, 32)

    @property
    def name(self) -> str:
        """Name in the table."""
        high, low = self.output_stride
        return f"{self.mask}, {high} to {low}" if self.mask else "original, output stride 32"


SETTINGS = (
    Setting(),
    Setting("none"),
    *(Setting("edges", stride) for stride in ((16, 32), (8, 32))),
    *(Setting("edges:threshold=0.95,dilation=5", stride) for stride in ((16, 32), (8, 32), (4, 32))),
    *(Setting(f"random:fraction={kept},seed=0", (16, 32)) for kept in (0.25, 0.5)),
    *(Setting(f"random:fraction={kept},seed=0", (8, 32)) for kept in (0.25, 0.5)),
    Setting("all", (16, 32)),
    Setting("all", (8, 32)),
)


def build(data: Path) -> nn.Module:
    """Build torchvision's network with the trained weights."""
    model = mobilenet_v2(weights=None)
    state = load_file(data / "mobilenet_v2_imagenet" / WEIGHTS)
    model.load_state_dict({k: v.float() if v.is_floating_point() else v for k, v in state.items()})
    return model.eval()


def load_images(data: Path, limit: int | None) -> tuple[Tensor, Tensor]:
    """Load the images (N, 3, 225, 225), preprocessed for the weights, and their labels (N,)."""
    files = sorted((data / "imagenet_sample" / "images").iterdir())[:limit]
    pictures = [center_crop(pil_to_tensor(Image.open(file).convert("RGB")), [SIZE, SIZE]) for file in files]
    labels = [int(file.name.partition("_")[0]) for file in files]
    return torch.stack(pictures), torch.tensor(labels)


def evaluate(net: nn.Module, pictures: Tensor, labels: Tensor, name: str) -> dict[str, Any]:
    """Return top-1 and top-5 accuracy, and means over the images of active fraction and MACs."""
    top1 = top5 = 0
    active, macs = [], []
    steps = range(0, len(labels), BATCH)
    for start in track(steps, description=name, console=Console(stderr=True)):
        x = pictures[start : start + BATCH].float() / 127.5 - 1
        truth = labels[start : start + BATCH].unsqueeze(1)
        with torch.inference_mode():
            ranked = net(x).topk(5).indices
        top1 += int((ranked[:, :1] == truth).sum())
        top5 += int((ranked == truth).sum())
        if isinstance(net, cs.AdaptiveModel):
            active.append(net.active_fraction)
            macs.append(net.macs(x, mask=net.levels).mask / len(x))
    found: dict[str, Any] = {"top1": 100 * top1 / len(labels), "top5": 100 * top5 / len(labels)}
    if macs:
        found |= {"active_fraction": sum(active) / len(active), "macs": sum(macs) / len(macs)}
    return found


def main() -> None:
    """Print the table and write the figures."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", type=Path)
    parser.add_argument("--limit", type=int, help="number of images; default all")
    parser.add_argument("--output", type=Path, help="JSON file")
    options = parser.parse_args()
    if not (options.data / "imagenet_sample").is_dir():
        print(f"skipped: {options.data} holds no imagenet_sample folder")
        sys.exit(0)

    model = build(options.data)
    pictures, labels = load_images(options.data, options.limit)
    results: dict[str, dict[str, Any]] = {}
    for setting in SETTINGS:
        net = model
        if setting.mask:
            # Masks see -1..1 unchanged, as when the figures were measured.
            net = cs.adaptify(model, setting.mask, output_stride=setting.output_stride, normalisation="raw")
        results[setting.name] = evaluate(net, pictures, labels, setting.name)
    own = results[SETTINGS[1].name]["macs"]  # with everything low the network is the original
    results[SETTINGS[0].name] |= {"active_fraction": 0.0, "macs": own}

    table = Table(title=f"{len(labels)} images of ImageNet, {SIZE} x {SIZE}, trained weights, no retraining")
    for column in ("setting", "top-1", "top-5", "active", "MACs", "of original"):
        table.add_column(column, justify="left" if column == "setting" else "right")
    for name, row in results.items():
        row["macs_of_original"] = row["macs"] / own
        figures = (f"{row['top1']:.1f}", f"{row['top5']:.1f}", f"{row['active_fraction']:.2f}")
        table.add_row(name, *figures, f"{row['macs']:.3e}", f"{row['macs_of_original']:.2f}")
    Console().print(table)
    if options.output:
        document = {"images": len(labels), "torch": torch.__version__, "settings": results}
        options.output.write_text(json.dumps(document, indent=2) + "\n")


if __name__ == "__main__":
    main()
