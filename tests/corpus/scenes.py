"""Scene parsing: pyramids of pooling and of dilations, feature pyramids, low-level skips, full convolution."""

from __future__ import annotations

import torch.nn.functional as F
from corpus_blocks import Encoder, conv
from torch import nn

from benchmarks.zoo.corpus import network


@network("resizing", "modules")
class FeaturePyramid(nn.Module):
    """Top-down sums by nearest upsampling, each level brought to stride 4 and added."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = Encoder()
        self.lateral = nn.ModuleList([nn.Conv2d(c, 16, 1) for c in Encoder.widths])
        self.seg = nn.ModuleList([conv(16, 12) for _ in range(4)])
        self.head = nn.Conv2d(12, 4, 1)

    def forward(self, x):
        c = self.encoder(x)
        p = [self.lateral[-1](c[-1])]
        for lateral, feature in zip(self.lateral[-2::-1], c[-2::-1]):
            p.insert(0, lateral(feature) + F.interpolate(p[0], size=feature.shape[-2:], mode="nearest"))
        y = 0
        for step, level in zip(self.seg, p):
            y = y + F.interpolate(step(level), size=p[0].shape[2:], mode="bilinear", align_corners=False)
        return F.interpolate(self.head(y), size=x.shape[2:], mode="bilinear", align_corners=False)


def vgg(*widths: int, first: int = 1) -> list[nn.Sequential]:
    """Steps of a VGG; the first convolution pads by `first`."""
    steps, before = [], 3
    for width in widths:
        padding = first if before == 3 else 1
        convolution = nn.Conv2d(before, width, 3, padding=padding)
        steps.append(nn.Sequential(convolution, nn.ReLU(True), nn.MaxPool2d(2, 2, ceil_mode=True)))
        before = width
    return steps


@network("transposed", "pads", "sizes")
class FCN8s(nn.Module):
    """The image padded by 100; scores of three depths, transposed 4/2 and 16/8, cropped at fixed offsets."""

    def __init__(self) -> None:
        super().__init__()
        self.step1, self.step2, self.step3, self.step4, self.step5 = vgg(8, 16, 32, 48, 48, first=100)
        self.fc6, self.fc7 = (
            nn.Sequential(nn.Conv2d(48, 64, 7), nn.ReLU(True), nn.Dropout2d()),
            conv(64, 64, 1),
        )
        self.score3, self.score4, self.score = nn.Conv2d(32, 4, 1), nn.Conv2d(48, 4, 1), nn.Conv2d(64, 4, 1)
        self.upscore2 = nn.ConvTranspose2d(4, 4, 4, stride=2, bias=False)
        self.upscore_pool4 = nn.ConvTranspose2d(4, 4, 4, stride=2, bias=False)
        self.upscore8 = nn.ConvTranspose2d(4, 4, 16, stride=8, bias=False)

    def forward(self, x):
        pool3 = self.step3(self.step2(self.step1(x)))
        pool4 = self.step4(pool3)
        h = self.upscore2(self.score(self.fc7(self.fc6(self.step5(pool4)))))
        c = self.score4(pool4 * 0.01)
        h = h + c[:, :, 5 : 5 + h.size()[2], 5 : 5 + h.size()[3]]
        h = self.upscore_pool4(h)
        c = self.score3(pool3 * 0.0001)
        h = self.upscore8(h + c[:, :, 9 : 9 + h.size()[2], 9 : 9 + h.size()[3]])
        return h[:, :, 31 : 31 + x.size()[2], 31 : 31 + x.size()[3]].contiguous()
