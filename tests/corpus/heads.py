"""Keypoints, depth, counting, edges, objects: backbones with decoders and heads."""

from __future__ import annotations

from collections import namedtuple

import torch
import torch.nn.functional as F
from corpus_blocks import Encoder, Residual, conv, twice
from torch import nn

from benchmarks.zoo.corpus import network


@network("transposed", "norms")
class PoseBaseline(nn.Module):
    """The simple baseline of pose estimation: an encoder, transposed 4/2, heatmaps; batch norms with a momentum."""

    def __init__(self, num_joints: int = 5) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 7, 2, 3, bias=False)
        self.bn1, self.maxpool = nn.BatchNorm2d(8, momentum=0.1), nn.MaxPool2d(3, 2, 1)
        self.layer1, self.layer2, self.layer3 = Residual(8, 8), Residual(8, 16, 2), Residual(16, 32, 2)
        self.up1, self.up2 = (
            nn.ConvTranspose2d(32, 16, 4, 2, 1, bias=False),
            nn.ConvTranspose2d(16, 16, 4, 2, 1, bias=False),
        )
        self.bn2, self.bn3 = nn.BatchNorm2d(16), nn.BatchNorm2d(16)
        self.final_layer = nn.Conv2d(16, num_joints, kernel_size=1)

    def forward(self, x):
        x = self.maxpool(F.relu(self.bn1(self.conv1(x))))
        x = self.layer3(self.layer2(self.layer1(x)))
        x = F.relu(self.bn2(self.up1(x)))
        return self.final_layer(F.relu(self.bn3(self.up2(x))))


Prediction = namedtuple("Prediction", ["shrink", "threshold", "binary"])


@network("outputs", "transposed", "resizing")
class TextSpotter(nn.Module):
    """Text (as DB): a pyramid concatenated at stride 4; two transposed 2/2; a named tuple."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = Encoder()
        self.reduce = nn.ModuleList([conv(c, 12, 1) for c in Encoder.widths])
        self.binarize, self.thresh = self.head(), self.head()

    @staticmethod
    def head() -> nn.Sequential:
        """To the image's resolution."""
        return nn.Sequential(
            conv(48, 12), nn.ConvTranspose2d(12, 12, 2, 2), nn.BatchNorm2d(12), nn.ReLU(),
            nn.ConvTranspose2d(12, 1, 2, 2), nn.Sigmoid(),
        )  # fmt: skip

    def forward(self, x):
        c2, c3, c4, c5 = (r(f) for r, f in zip(self.reduce, self.encoder(x)))
        p4 = F.interpolate(c5, size=c4.size()[2:], mode="nearest") + c4
        p3 = F.interpolate(p4, size=c3.size()[2:], mode="nearest") + c3
        p2 = F.interpolate(p3, size=c2.size()[2:], mode="nearest") + c2
        h, w = p2.size()[2:]
        y = torch.cat([p2, *(F.interpolate(p, size=(h, w), mode="nearest") for p in (p3, p4, c5))], dim=1)
        shrink, threshold = self.binarize(y), self.thresh(y)
        return Prediction(shrink, threshold, torch.reciprocal(1 + torch.exp(-50 * (shrink - threshold))))


@network("indices", "inputs", call=lambda x: (x, x[:, :1].sigmoid()))
class IndexMatting(nn.Module):
    """Matting: image and trimap side by side, pooled with indices, unpooled; alpha between 0 and 1."""

    def __init__(self) -> None:
        super().__init__()
        self.enc1, self.enc2, self.enc3 = twice(4, 8), twice(8, 16), twice(16, 32)
        self.dec2, self.dec1, self.out = conv(32, 16, 5), conv(16, 8, 5), nn.Conv2d(8, 1, 5, padding=2)

    def forward(self, image, trimap):
        x1, id1 = F.max_pool2d(self.enc1(torch.cat([image, trimap], 1)), (2, 2), (2, 2), return_indices=True)
        x2, id2 = F.max_pool2d(self.enc2(x1), (2, 2), (2, 2), return_indices=True)
        y = self.dec2(self.enc3(x2))
        y = F.max_unpool2d(y, id2, kernel_size=2, stride=2, output_size=x1.shape[2:])
        y = F.max_unpool2d(self.dec1(y), id1, kernel_size=2, stride=2, output_size=image.shape[2:])
        return torch.clamp(self.out(y), 0, 1)
