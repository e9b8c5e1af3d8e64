"""Photos that tests of keypoints write and read, and networks that describe them."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from cadsurgery.data.images import labelled_scene


def scene(height: int = 96, width: int = 128, seed: int = 0) -> Tensor:
    return labelled_scene(height, width, seed)[0]


def save(image: Tensor, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray((255 * image.permute(1, 2, 0)).round().byte().numpy()).save(path)
    return path


def save_some(folder: Path) -> Path:
    """Write two images of different size, one below another folder, a corrupt one, one of one colour."""
    save(scene(), folder / "first.png")
    save(scene(97, 63, 1), folder / "more" / "second.png")
    save(torch.full((3, 40, 44), 0.5), folder / "third.png")
    (folder / "broken.png").write_bytes(b"no image")
    return folder


def describer() -> nn.Module:
    """Eight channels at output stride 4; by `photos:describer`."""
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for inputs in (3, 8):
        layers += [nn.Conv2d(inputs, 8, 3, 1, 1), nn.ReLU(), nn.MaxPool2d(2)]
    return nn.Sequential(*layers, nn.Conv2d(8, 8, 3, 1, 1)).eval()


class Both(nn.Module):
    """A score map and descriptors at the image's size."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk, self.head = describer(), nn.Conv2d(8, 9, 1)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        found = F.interpolate(self.trunk(x), scale_factor=4.0, mode="bilinear", align_corners=True)
        found = self.head(found)
        return {"scores": found[:, :1].sigmoid(), "descriptors": found[:, 1:]}
