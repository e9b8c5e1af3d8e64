"""One more network for real time."""

from __future__ import annotations

import torch.nn.functional as F
from corpus_blocks import conv
from torch import Tensor, nn

from benchmarks.zoo.corpus import network


class Separable(nn.Module):
    """Expanded, depthwise, projected; a shortcut where shapes allow it."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__()
        wide = 2 * inputs
        depthwise = nn.Conv2d(wide, wide, 3, stride, 1, groups=wide, bias=False)
        self.block = nn.Sequential(conv(inputs, wide, 1), depthwise, nn.BatchNorm2d(wide), nn.ReLU6())
        self.project = nn.Sequential(nn.Conv2d(wide, outputs, 1, bias=False), nn.BatchNorm2d(outputs))
        self.use_shortcut = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        y = self.project(self.block(x))
        return x + y if self.use_shortcut else y


@network("resizing", "sizes")
class ContextNetLike(nn.Module):
    """A shallow branch on the image, a deep one on a quarter of it; added at an eighth."""

    def __init__(self) -> None:
        super().__init__()
        self.spatial_detail = nn.Sequential(conv(3, 8, 3, 2), Separable(8, 12, 2), Separable(12, 16, 2))
        self.context = nn.Sequential(
            conv(3, 8, 3, 2),
            Separable(8, 8),
            Separable(8, 12, 2),
            Separable(12, 12),
            Separable(12, 16, 2),
            conv(16, 16),
        )
        self.dwconv, self.conv_lower = (
            nn.Conv2d(16, 16, 3, padding=4, dilation=4, groups=16),
            nn.Conv2d(16, 16, 1),
        )
        self.conv_higher = nn.Conv2d(16, 16, 1)
        self.classifier = nn.Sequential(Separable(16, 16), nn.Dropout(0.1), nn.Conv2d(16, 4, 1))

    def forward(self, x: Tensor) -> Tensor:
        size = x.size()[2:]
        higher = self.spatial_detail(x)
        low = F.interpolate(x, scale_factor=0.25, mode="bilinear", align_corners=True)
        low = F.interpolate(self.context(low), size=higher.shape[2:], mode="bilinear", align_corners=True)
        y = F.relu(self.conv_lower(F.relu(self.dwconv(low))) + self.conv_higher(higher))
        return F.interpolate(self.classifier(y), size, mode="bilinear", align_corners=True)
