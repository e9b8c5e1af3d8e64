"""More networks for real time: pre-activation on joined maps, parallel strips, pyramids in a block, fire modules."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from corpus_blocks import conv
from torch import Tensor, nn

from benchmarks.zoo.corpus import network


def before(width: int) -> nn.Sequential:
    """Norm and activation in front of a convolution."""
    return nn.Sequential(nn.BatchNorm2d(width), nn.PReLU(width))


class JoinedDown(nn.Module):
    """A strided convolution, beside max pooling where channels are to spare."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.joins = inputs < outputs
        self.conv = nn.Conv2d(inputs, outputs - inputs if self.joins else outputs, 3, 2, 1)
        self.max_pool, self.bn_prelu = nn.MaxPool2d(2, stride=2), before(outputs)

    def forward(self, input: Tensor) -> Tensor:
        y = self.conv(input)
        if self.joins:
            y = torch.cat([y, self.max_pool(input)], 1)
        return self.bn_prelu(y)


def strips(width: int, k: int, d: int = 1) -> list[nn.Module]:
    """Two strips of k samples, dilated."""
    pad = d * (k // 2)
    return [
        nn.Conv2d(width, width, (k, 1), padding=(pad, 0), dilation=(d, 1)),
        nn.ReLU(inplace=True),
        nn.Conv2d(width, width, (1, k), padding=(0, pad), dilation=(1, d)),
        nn.BatchNorm2d(width),
    ]


class Strip(nn.Module):
    """A narrow residual block of strips, or of one dilated window."""

    def __init__(self, width: int, dilation: int = 0) -> None:
        super().__init__()
        n = width // 4
        middle = [nn.Conv2d(n, n, 3, padding=dilation, dilation=dilation)] if dilation else strips(n, 3)[:3]
        self.layers = nn.Sequential(
            conv(width, n, 1), *middle, nn.BatchNorm2d(n), nn.PReLU(), nn.Conv2d(n, width, 1)
        )

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + self.layers(x))


@network("indices", "dilation", "transposed")
class FSSNetLike(nn.Module):
    """Pools with places beside strided convolutions; back by unpooling beside transposed convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.initial, self.pool = JoinedDown(3, 8), nn.MaxPool2d(2, 2, return_indices=True)
        self.enc1, self.enc2 = nn.Conv2d(8, 8, 2, 2), nn.Conv2d(16, 16, 2, 2)
        self.wide1, self.wide2 = nn.Conv2d(8, 16, 1), nn.Conv2d(16, 24, 1)
        self.side1, self.side2 = conv(8, 16, 1), conv(16, 24, 1)
        self.block1 = nn.Sequential(Strip(16), Strip(16))
        self.block2 = nn.Sequential(Strip(24, 1), Strip(24, 2), Strip(24, 5), Strip(24, 9))
        self.narrow2, self.narrow1, self.unpool = nn.Conv2d(24, 16, 1), nn.Conv2d(16, 8, 1), nn.MaxUnpool2d(2)
        self.grow2, self.grow1 = nn.ConvTranspose2d(24, 16, 2, 2), nn.ConvTranspose2d(16, 8, 2, 2)
        self.last = nn.ConvTranspose2d(8, 4, 2, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.initial(x)
        pooled, places1 = self.pool(x)
        y = self.block1(F.relu(self.wide1(pooled) + self.side1(self.enc1(x))))
        pooled, places2 = self.pool(y)
        z = self.block2(F.relu(self.wide2(pooled) + self.side2(self.enc2(y))))
        z = F.relu(self.unpool(self.narrow2(z), places2) + self.grow2(z))
        z = F.relu(self.unpool(self.narrow1(z), places1) + self.grow1(z))
        return self.last(z)


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
