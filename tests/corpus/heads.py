"""Keypoints, depth, counting, edges, objects: backbones with decoders and heads."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from corpus_blocks import Residual, conv, twice
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
