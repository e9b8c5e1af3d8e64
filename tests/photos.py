"""Photos that tests of keypoints write and read."""

from __future__ import annotations

from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

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
