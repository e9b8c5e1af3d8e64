"""A small segmentation network and generated scenes, for the tests of training and the processes they start."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import cadsurgery as cs
from cadsurgery.data.images import SCENE_CLASSES, labelled_scene

SIZE = (48, 64)


def stage(channels: int, wider: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(channels, wider, 3, 2, 1, bias=False), nn.BatchNorm2d(wider), nn.ReLU(inplace=True)
    )


class Segmenter(nn.Module):
    """Output stride 16, two stages of it adaptive; with dropout, so that random numbers matter."""

    def __init__(self, classes: int = len(SCENE_CLASSES)) -> None:
        super().__init__()
        self.backbone = nn.Sequential(stage(3, 8), stage(8, 8), stage(8, 12), stage(12, 16))
        self.classifier = nn.Sequential(nn.Dropout(0.2), nn.Conv2d(16, classes, 1))

    def forward(self, x: Tensor) -> Tensor:
        found = self.classifier(self.backbone(x))
        return F.interpolate(found, size=x.shape[-2:], mode="bilinear", align_corners=False)


class Scenes:
    """Generated scenes of a number and size; all of them labelled."""

    name = "scenes"
    classes = SCENE_CLASSES

    def __init__(self, count: int = 5, size: tuple[int, int] = SIZE) -> None:
        self.items = [labelled_scene(*size, seed) for seed in range(count)]

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.items[index]


def flip(image: Tensor, labels: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    """An augmentation: mirrored for odd seeds."""
    return (image.flip(-1), labels.flip(-1)) if seed % 2 else (image, labels)


def adaptive(mask: object = "edges:threshold=0.2,dilation=3") -> cs.AdaptiveModel:
    torch.manual_seed(0)
    example = torch.zeros(1, 3, *SIZE)
    return cs.adaptify(Segmenter(), mask, output_stride=(4, 16), example_input=example, verify_laws=False)
